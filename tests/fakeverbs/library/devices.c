/* Devices, ports and GIDs. */
#include "fake.h"

#include <arpa/inet.h>

static struct ibv_device devices[N_DEVICES];

int gid_at(const struct ibv_device *device, int index, union ibv_gid *out)
{
    char text[64];
    memset(out, 0, sizeof *out);
    if (!list_entry(setting_text(device, "GIDS", "fe80::1,::ffff:127.0.0.1"), index, text, sizeof text))
        return 0;
    if (inet_pton(AF_INET6, text, out->raw) != 1)
        violated("FAKE_VERBS_GIDS", text);
    return 1;
}

static int gid_count(const struct ibv_device *device)
{
    union ibv_gid gid;
    int n = 0;
    while (gid_at(device, n, &gid))
        n++;
    return n;
}

int gid_is_known(const union ibv_gid *wanted)
{
    union ibv_gid gid;
    for (int d = 0; d < N_DEVICES && devices[d].name[0]; d++)
        for (int i = 0; gid_at(&devices[d], i, &gid); i++)
            if (memcmp(&gid, wanted, sizeof gid) == 0)
                return 1;
    return 0;
}

EXPORT struct ibv_device **ibv_get_device_list(int *n)
{
    int error, count = 0;
    pthread_mutex_lock(&fake_lock);
    if (fails("get_device_list", &error)) {
        pthread_mutex_unlock(&fake_lock);
        errno = error;
        return NULL;
    }
    struct ibv_device **list = calloc(N_DEVICES + 1, sizeof *list);
    const char *names = setting_text(NULL, "DEVICES", "fake0");
    while (list && count < N_DEVICES && list_entry(names, count, devices[count].name, sizeof devices[count].name)) {
        struct ibv_device *device = &devices[count];
        snprintf(device->ibdev_path, sizeof device->ibdev_path, "%.180s/%s",
                 setting_text(NULL, "SYSFS", "/sys/class/infiniband"), device->name);
        device->node_type = IBV_NODE_CA;
        device->transport_type = IBV_TRANSPORT_IB;
        list[count++] = device;
    }
    fake_live_lists++;
    pthread_mutex_unlock(&fake_lock);
    if (n)
        *n = count;
    return list;
}

EXPORT void ibv_free_device_list(struct ibv_device **list)
{
    pthread_mutex_lock(&fake_lock);
    fake_live_lists--;
    pthread_mutex_unlock(&fake_lock);
    free(list);
}

EXPORT const char *ibv_get_device_name(struct ibv_device *device)
{
    return device->name;
}

static int port_attributes(struct ibv_context *context, uint8_t port, struct ibv_port_attr *out, size_t size)
{
    const struct ibv_device *device = context->device;
    struct ibv_port_attr attr;
    int error;
    if (fails("query_port", &error))
        return error;
    if (port < 1 || port > N_PORTS)
        return EINVAL;
    memset(&attr, 0, sizeof attr);
    attr.state = (enum ibv_port_state)setting(device, "PORT_STATE", IBV_PORT_ACTIVE);
    attr.max_mtu = IBV_MTU_4096;
    attr.active_mtu = (enum ibv_mtu)setting(device, "MTU", IBV_MTU_4096);
    attr.gid_tbl_len = gid_count(device);
    attr.max_msg_sz = MAX_MESSAGE_BYTES;
    attr.pkey_tbl_len = 1;
    attr.link_layer = (uint8_t)setting(device, "LINK_LAYER", IBV_LINK_LAYER_ETHERNET);
    attr.lid = (uint16_t)setting(device, "LID", attr.link_layer == IBV_LINK_LAYER_ETHERNET ? 0 : 7);
    memcpy(out, &attr, size < sizeof attr ? size : sizeof attr);
    return 0;
}

static int query_port_extended(struct ibv_context *context, uint8_t port, struct ibv_port_attr *out, size_t size)
{
    pthread_mutex_lock(&fake_lock);
    LIVE(fake_context, context);
    int error = port_attributes(context, port, out, size);
    pthread_mutex_unlock(&fake_lock);
    return error;
}

EXPORT int ibv_query_port(struct ibv_context *context, uint8_t port, struct _compat_ibv_port_attr *out)
{
    return query_port_extended(context, port, (struct ibv_port_attr *)out,
                               offsetof(struct ibv_port_attr, port_cap_flags2));
}

EXPORT int ibv_query_gid(struct ibv_context *context, uint8_t port, int index, union ibv_gid *gid)
{
    int error = 0;
    pthread_mutex_lock(&fake_lock);
    LIVE(fake_context, context);
    if (!fails("query_gid", &error) && (port < 1 || port > N_PORTS || !gid_at(context->device, index, gid)))
        error = EINVAL;
    pthread_mutex_unlock(&fake_lock);
    errno = error;
    return error ? -1 : 0;
}

EXPORT struct ibv_context *ibv_open_device(struct ibv_device *device)
{
    int error;
    pthread_mutex_lock(&fake_lock);
    if (fails("open_device", &error)) {
        pthread_mutex_unlock(&fake_lock);
        errno = error;
        return NULL;
    }
    fake_context *self = object_create(sizeof *self, CONTEXT);
    pthread_mutex_unlock(&fake_lock);
    struct ibv_context *context = &self->verbs.context;
    context->device = device;
    context->ops.poll_cq = fake_poll_cq;
    context->ops.post_send = fake_post_send;
    if (!setting(device, "COMPAT", 0)) {
        self->verbs.sz = sizeof self->verbs;
        self->verbs.query_port = query_port_extended;
        context->abi_compat = __VERBS_ABI_IS_EXTENDED;
    }
    return context;
}

EXPORT int ibv_close_device(struct ibv_context *context)
{
    int error = 0;
    pthread_mutex_lock(&fake_lock);
    fake_context *self = LIVE(fake_context, context);
    if (!fails("close_device", &error) && self->object.users)
        error = EBUSY;
    if (!error)
        object_destroy(&self->object);
    pthread_mutex_unlock(&fake_lock);
    return error;
}

EXPORT int ibv_query_device(struct ibv_context *context, struct ibv_device_attr *out)
{
    int error = 0;
    const struct ibv_device *device = context->device;
    pthread_mutex_lock(&fake_lock);
    LIVE(fake_context, context);
    memset(out, 0, sizeof *out);
    if (!fails("query_device", &error)) {
        snprintf(out->fw_ver, sizeof out->fw_ver, "1.2.3");
        out->node_guid = htobe64(0x0102030405060708);
        out->max_mr_size = (uint64_t)setting(device, "MAX_MR_BYTES", INT64_MAX);
        out->vendor_id = 0xFACE;
        out->vendor_part_id = 1;
        out->max_qp_wr = (int)setting(device, "MAX_QP_WR", 16384);
        out->max_cqe = (int)setting(device, "MAX_CQE", 65535);
        out->max_qp_rd_atom = (int)setting(device, "MAX_RD_ATOMIC", 16);
        out->max_qp_init_rd_atom = (int)setting(device, "MAX_INIT_RD_ATOMIC", 16);
        out->phys_port_cnt = N_PORTS;
    }
    pthread_mutex_unlock(&fake_lock);
    return error;
}
