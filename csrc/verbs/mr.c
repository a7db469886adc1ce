/* Memory registrations. The owner's side gives REMOTE_READ and nothing else: a peer can never write. */
#ifdef COTRA_HAVE_VERBS
#include "verbs/verbs.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/resource.h>

struct cotra_mr {
    cotra_device *device;
    struct ibv_mr *mr;
};

int cotra_mr_register(cotra_device *device, const void *address, uint64_t length_bytes, int access, struct ibv_mr **out,
                      cotra_error *err)
{
    if (length_bytes == 0 || length_bytes > device->info.max_mr_bytes)
        return cotra_fail(err, COTRA_ERR_ARGUMENT, "%s registers 1 to %llu bytes at once, not %llu", device->info.name,
                          (unsigned long long)device->info.max_mr_bytes, (unsigned long long)length_bytes);
    errno = 0;
    *out = device->verbs->reg_mr(device->pd, (void *)(uintptr_t)address, length_bytes, access);
    if (*out)
        return COTRA_OK;
    int error = errno;
    struct rlimit limit = {0, 0};
    getrlimit(RLIMIT_MEMLOCK, &limit);
    if (error != ENOMEM && error != EPERM && error != EAGAIN)
        return cotra_fail_errno(err, COTRA_ERR_SYSTEM, error, "ibv_reg_mr of %llu bytes on %s",
                                (unsigned long long)length_bytes, device->info.name);
    char soft[32] = "unlimited";
    if (limit.rlim_cur != RLIM_INFINITY)
        snprintf(soft, sizeof soft, "%llu bytes", (unsigned long long)limit.rlim_cur);
    return cotra_fail_errno(
        err, COTRA_ERR_MEMLOCK, error,
        "ibv_reg_mr of %llu bytes on %s: it must be pinned, and RLIMIT_MEMLOCK is %s; raise it with "
        "'ulimit -l %llu' or a line '* - memlock unlimited' in /etc/security/limits.conf",
        (unsigned long long)length_bytes, device->info.name, soft, (unsigned long long)(length_bytes + 1023) / 1024);
}

int cotra_mr_create(cotra_device *device, const void *address, uint64_t length_bytes, cotra_mr **out, cotra_error *err)
{
    *out = NULL;
    cotra_mr *mr = calloc(1, sizeof *mr);
    if (!mr)
        return cotra_fail(err, COTRA_ERR_NO_MEMORY, "memory region: no memory");
    mr->device = device;
    int status = cotra_mr_register(device, address, length_bytes, IBV_ACCESS_REMOTE_READ, &mr->mr, err);
    if (status) {
        free(mr);
        return status;
    }
    *out = mr;
    return COTRA_OK;
}

void cotra_mr_get_info(const cotra_mr *mr, cotra_mr_info *out)
{
    *out = (cotra_mr_info){
        .address = (uint64_t)(uintptr_t)mr->mr->addr, .length_bytes = mr->mr->length, .rkey = mr->mr->rkey};
}

int cotra_mr_destroy(cotra_mr *mr, cotra_error *err)
{
    if (!mr)
        return COTRA_OK;
    int error = mr->device->verbs->dereg_mr(mr->mr);
    if (error)
        cotra_fail_errno(err, COTRA_ERR_SYSTEM, error, "ibv_dereg_mr on %s", mr->device->info.name);
    free(mr);
    return error ? COTRA_ERR_SYSTEM : COTRA_OK;
}
#else
typedef int cotra_no_mr_here;
#endif
