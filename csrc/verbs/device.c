/* Devices, ports and the ranked GID table. */
#ifdef COTRA_HAVE_VERBS
#include "verbs/verbs.h"

#include <errno.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static struct ibv_device **list_devices(const cotra_verbs_library *verbs, int *n, cotra_error *err)
{
    errno = 0;
    struct ibv_device **list = verbs->get_device_list(n);
    if (!list) {
        int error = errno ? errno : ENOSYS;
        cotra_fail_errno(err, COTRA_ERR_UNAVAILABLE, error,
                         "ibv_get_device_list: the kernel offers no verbs; load its modules (modprobe ib_uverbs, and "
                         "rdma_rxe for Soft-RoCE; in a container also --device /dev/infiniband)");
    }
    return list;
}

static int mtu_bytes(enum ibv_mtu mtu)
{
    return mtu >= IBV_MTU_256 && mtu <= IBV_MTU_4096 ? 128 << mtu : 0;
}

static int query_port(const cotra_device *device, uint32_t port, struct ibv_port_attr *out)
{
    struct verbs_context *extended = verbs_get_ctx_op(device->context, query_port);
    memset(out, 0, sizeof *out);
    if (extended)
        return extended->query_port(device->context, (uint8_t)port, out, sizeof *out);
    return device->verbs->query_port(device->context, (uint8_t)port, (struct _compat_ibv_port_attr *)out);
}

static void copy_text(char *to, size_t capacity, const char *from)
{
    size_t n = strnlen(from, capacity - 1);
    memcpy(to, from, n);
    to[n] = 0;
}

static int open_context(const cotra_verbs_library *verbs, struct ibv_device *entry, cotra_device *device,
                        cotra_error *err)
{
    const char *name = verbs->get_device_name(entry);
    errno = 0;
    device->verbs = verbs;
    device->context = verbs->open_device(entry);
    if (!device->context)
        return cotra_fail_errno(err, COTRA_ERR_NO_DEVICE, errno, "ibv_open_device %s (is /dev/infiniband accessible?)",
                                name);
    struct ibv_device_attr attributes;
    int error = verbs->query_device(device->context, &attributes);
    if (error) {
        verbs->close_device(device->context);
        device->context = NULL;
        return cotra_fail_errno(err, COTRA_ERR_NO_DEVICE, error, "ibv_query_device %s", name);
    }
    cotra_device_info *info = &device->info;
    memset(info, 0, sizeof *info);
    copy_text(info->name, sizeof info->name, name);
    copy_text(info->firmware, sizeof info->firmware, attributes.fw_ver);
    info->node_guid = be64toh(attributes.node_guid);
    info->max_mr_bytes = attributes.max_mr_size;
    info->vendor_id = attributes.vendor_id;
    info->vendor_part_id = attributes.vendor_part_id;
    info->max_qp_wr = attributes.max_qp_wr;
    info->max_cqe = attributes.max_cqe;
    info->max_rd_atomic = attributes.max_qp_rd_atom;
    info->max_init_rd_atomic = attributes.max_qp_init_rd_atom;
    info->n_ports = attributes.phys_port_cnt;
    return COTRA_OK;
}

int cotra_verbs_devices(cotra_device_info *out, uint32_t capacity, uint32_t *count, cotra_error *err)
{
    *count = 0;
    const cotra_verbs_library *verbs = cotra_verbs_load(err);
    if (!verbs)
        return COTRA_ERR_UNAVAILABLE;
    int n = 0, status = COTRA_OK;
    struct ibv_device **list = list_devices(verbs, &n, err);
    if (!list)
        return COTRA_ERR_UNAVAILABLE;
    for (int i = 0; i < n && !status; i++) {
        cotra_device device;
        status = open_context(verbs, list[i], &device, err);
        if (status)
            break;
        if (*count < capacity)
            out[*count] = device.info;
        ++*count;
        verbs->close_device(device.context);
    }
    verbs->free_device_list(list);
    return status;
}

static bool has_active_port(const cotra_device *device)
{
    struct ibv_port_attr port;
    for (uint32_t p = 1; p <= device->info.n_ports; p++)
        if (query_port(device, p, &port) == 0 && port.state == IBV_PORT_ACTIVE)
            return 1;
    return 0;
}

int cotra_device_open(const char *name, cotra_device **out, cotra_error *err)
{
    *out = NULL;
    const cotra_verbs_library *verbs = cotra_verbs_load(err);
    if (!verbs)
        return COTRA_ERR_UNAVAILABLE;
    int n = 0, status, error;
    char seen[200] = "";
    struct ibv_device **list = list_devices(verbs, &n, err);
    if (!list)
        return COTRA_ERR_UNAVAILABLE;
    cotra_device *device = calloc(1, sizeof *device);
    if (!device) {
        status = cotra_fail(err, COTRA_ERR_NO_MEMORY, "device: no memory");
        goto free_list;
    }
    for (int i = 0; i < n; i++) {
        const char *this_name = verbs->get_device_name(list[i]);
        size_t used = strlen(seen);
        snprintf(seen + used, sizeof seen - used, "%s%s", used ? ", " : "", this_name);
        if (name && strcmp(name, this_name) != 0)
            continue;
        status = open_context(verbs, list[i], device, err);
        if (status)
            goto free_device;
        if (name || has_active_port(device))
            break;
        verbs->close_device(device->context);
        device->context = NULL;
    }
    if (!device->context) {
        if (name)
            status = cotra_fail(err, COTRA_ERR_NO_DEVICE, "no verbs device is named %s; there %s: %s", name,
                                n == 1 ? "is" : "are", n ? seen : "none");
        else
            status =
                cotra_fail(err, COTRA_ERR_NO_DEVICE,
                           "no verbs device has an active port (devices: %s); for Soft-RoCE: rdma link add rxe0 type "
                           "rxe netdev INTERFACE",
                           n ? seen : "none");
        goto free_device;
    }
    errno = 0;
    device->pd = verbs->alloc_pd(device->context);
    if (!device->pd) {
        error = errno;
        status = cotra_fail_errno(err, COTRA_ERR_SYSTEM, error, "ibv_alloc_pd on %s", device->info.name);
        goto close_context;
    }
    verbs->free_device_list(list);
    *out = device;
    return COTRA_OK;
close_context:
    verbs->close_device(device->context);
free_device:
    free(device);
free_list:
    verbs->free_device_list(list);
    return status;
}

void cotra_device_get_info(const cotra_device *device, cotra_device_info *out)
{
    *out = device->info;
}

void cotra_device_close(cotra_device *device)
{
    if (!device)
        return;
    device->verbs->dealloc_pd(device->pd);
    device->verbs->close_device(device->context);
    free(device);
}

int cotra_device_port(const cotra_device *device, uint32_t port, cotra_port_info *out, cotra_error *err)
{
    struct ibv_port_attr attributes;
    if (port < 1 || port > device->info.n_ports)
        return cotra_fail(err, COTRA_ERR_NO_DEVICE, "%s has no port %u: it has %u, counted from 1", device->info.name,
                          port, device->info.n_ports);
    int error = query_port(device, port, &attributes);
    if (error)
        return cotra_fail_errno(err, COTRA_ERR_NO_DEVICE, error, "ibv_query_port %u of %s", port, device->info.name);
    memset(out, 0, sizeof *out);
    out->port = port;
    out->state = attributes.state;
    out->link_layer = attributes.link_layer == IBV_LINK_LAYER_ETHERNET ? 2 : 1;
    out->active_mtu_bytes = (uint32_t)mtu_bytes(attributes.active_mtu);
    out->lid = attributes.lid;
    out->gid_count = (uint32_t)attributes.gid_tbl_len;
    return COTRA_OK;
}

/* One line of /sys/class/infiniband/DEVICE/ports/PORT/gid_attrs/KIND/INDEX; empty where there is none. */
static void read_gid_attribute(const cotra_device *device, uint32_t port, const char *kind, uint32_t index, char *out,
                               int capacity)
{
    char path[IBV_SYSFS_PATH_MAX + 64];
    snprintf(path, sizeof path, "%s/ports/%u/gid_attrs/%s/%u", device->context->device->ibdev_path, port, kind, index);
    out[0] = 0;
    FILE *file = fopen(path, "re");
    if (!file)
        return;
    if (!fgets(out, capacity, file))
        out[0] = 0;
    fclose(file);
    out[strcspn(out, "\n")] = 0;
}

static const uint8_t mapped_prefix[12] = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xFF, 0xFF};
static const uint8_t zeros[16];

static bool is_ipv4(const uint8_t *address)
{
    return memcmp(address, mapped_prefix, sizeof mapped_prefix) == 0;
}

static bool is_link_local(const uint8_t *address)
{
    return is_ipv4(address) ? address[12] == 169 && address[13] == 254
                            : address[0] == 0xFE && (address[1] & 0xC0) == 0x80;
}

static int common_bits(const uint8_t *a, const uint8_t *b)
{
    int bits = 0;
    for (int i = 0; i < 16; i++) {
        uint8_t difference = a[i] ^ b[i];
        if (difference == 0) {
            bits += 8;
            continue;
        }
        return bits + __builtin_clz((unsigned)difference << 24);
    }
    return bits;
}

/* The ranking: RoCEv2 before v1 (v1 does not route), the peer's address family, not link-local unless the peer is, then
 * the longest common prefix with the peer's address. */
static void rank_gid(cotra_gid_info *gid, const uint8_t *peer)
{
    const int ipv4 = is_ipv4(gid->gid), local = is_link_local(gid->gid);
    int common = peer ? common_bits(gid->gid, peer) : 0;
    gid->score = gid->type == COTRA_GID_ROCE_V1 ? 0 : 4000;
    if (peer && is_ipv4(peer) == ipv4)
        gid->score += 2000;
    if (peer ? is_link_local(peer) == local : !local)
        gid->score += 1000;
    gid->score += peer && is_ipv4(peer) == ipv4 ? common : ipv4;
    snprintf(gid->why, sizeof gid->why, "%s, %s%s%s",
             gid->type == COTRA_GID_ROCE_V2   ? "RoCEv2"
             : gid->type == COTRA_GID_ROCE_V1 ? "RoCEv1"
                                              : "InfiniBand",
             ipv4 ? "IPv4" : "IPv6", local ? ", link-local" : "",
             peer && is_ipv4(peer) == ipv4 && common >= (ipv4 ? 120 : 64) ? ", same subnet as the peer" : "");
}

static int by_score(const void *a, const void *b)
{
    const cotra_gid_info *x = a, *y = b;
    return x->score != y->score ? (x->score < y->score ? 1 : -1) : (x->index > y->index) - (x->index < y->index);
}

int cotra_device_gids(const cotra_device *device, uint32_t port, const uint8_t *peer_address, cotra_gid_info *out,
                      uint32_t capacity, uint32_t *count, cotra_error *err)
{
    *count = 0;
    cotra_port_info info = {0};
    int status = cotra_device_port(device, port, &info, err);
    if (status)
        return status;
    if (peer_address && memcmp(peer_address, zeros, sizeof zeros) == 0)
        peer_address = NULL;
    int error = 0;
    for (uint32_t i = 0; i < info.gid_count && *count < capacity; i++) {
        union ibv_gid gid;
        errno = 0;
        if (device->verbs->query_gid(device->context, (uint8_t)port, (int)i, &gid) != 0) {
            error = errno ? errno : EIO;
            continue;
        }
        if (memcmp(gid.raw, zeros, sizeof zeros) == 0)
            continue;
        cotra_gid_info *entry = &out[(*count)++];
        memset(entry, 0, sizeof *entry);
        memcpy(entry->gid, gid.raw, sizeof entry->gid);
        entry->index = i;
        char text[64];
        read_gid_attribute(device, port, "types", i, text, sizeof text);
        entry->type = info.link_layer == 1                 ? COTRA_GID_IB
                      : strstr(text, "v2") || text[0] == 0 ? COTRA_GID_ROCE_V2
                                                           : COTRA_GID_ROCE_V1;
        rank_gid(entry, peer_address);
    }
    if (*count == 0 && error)
        return cotra_fail_errno(err, COTRA_ERR_NO_DEVICE, error, "ibv_query_gid of port %u of %s", port,
                                device->info.name);
    qsort(out, *count, sizeof *out, by_score);
    return COTRA_OK;
}
#else
typedef int cotra_no_devices_here;
#endif
