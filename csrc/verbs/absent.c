/* The same interface where the package was built without <infiniband/verbs.h>: every call says so. */
#ifndef COTRA_HAVE_VERBS
#include "base/status.h"

static int absent(cotra_error *err)
{
    return cotra_fail(
        err, COTRA_ERR_UNAVAILABLE,
        "this cotra-rdma was built without <infiniband/verbs.h>: install libibverbs-dev (Debian, Ubuntu) or "
        "rdma-core-devel (Fedora, RHEL) and install the package again from source");
}

int cotra_verbs_compiled(void)
{
    return 0;
}

int cotra_verbs_probe(char *text, uint32_t text_bytes, cotra_error *err)
{
    (void)text, (void)text_bytes;
    return absent(err);
}

int cotra_verbs_devices(cotra_device_info *out, uint32_t capacity, uint32_t *count, cotra_error *err)
{
    (void)out, (void)capacity;
    *count = 0;
    return absent(err);
}

int cotra_device_open(const char *name, cotra_device **out, cotra_error *err)
{
    (void)name;
    *out = NULL;
    return absent(err);
}

/* No device can be opened, so nothing below is ever called with one. */
void cotra_device_get_info(const cotra_device *device, cotra_device_info *out)
{
    (void)device, (void)out;
}

int cotra_device_port(const cotra_device *device, uint32_t port, cotra_port_info *out, cotra_error *err)
{
    (void)device, (void)port, (void)out;
    return absent(err);
}

int cotra_device_gids(const cotra_device *device, uint32_t port, const uint8_t *peer_address, cotra_gid_info *out,
                      uint32_t capacity, uint32_t *count, cotra_error *err)
{
    (void)device, (void)port, (void)peer_address, (void)out, (void)capacity;
    *count = 0;
    return absent(err);
}

void cotra_device_close(cotra_device *device)
{
    (void)device;
}

int cotra_mr_create(cotra_device *device, const void *address, uint64_t length_bytes, cotra_mr **out, cotra_error *err)
{
    (void)device, (void)address, (void)length_bytes;
    *out = NULL;
    return absent(err);
}

void cotra_mr_get_info(const cotra_mr *mr, cotra_mr_info *out)
{
    (void)mr, (void)out;
}

int cotra_mr_destroy(cotra_mr *mr, cotra_error *err)
{
    (void)mr;
    return absent(err);
}

int cotra_qp_create(cotra_device *device, const cotra_qp_options *options, cotra_qp **out, cotra_error *err)
{
    (void)device, (void)options;
    *out = NULL;
    return absent(err);
}

void cotra_qp_get_local(const cotra_qp *qp, cotra_qp_attributes *out, cotra_gid_info *gid)
{
    (void)qp, (void)out, (void)gid;
}

int cotra_qp_connect(cotra_qp *qp, const cotra_qp_attributes *remote, cotra_error *err)
{
    (void)qp, (void)remote;
    return absent(err);
}

void cotra_qp_destroy(cotra_qp *qp)
{
    (void)qp;
}

int cotra_channel_open_verbs(cotra_qp *qp, const cotra_remote_region *region, uint32_t slots, uint32_t slot_bytes,
                             cotra_channel **out, cotra_error *err)
{
    (void)qp, (void)region, (void)slots, (void)slot_bytes;
    *out = NULL;
    return absent(err);
}
#else
typedef int cotra_verbs_are_here;
#endif
