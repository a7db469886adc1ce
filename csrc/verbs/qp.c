/* Reliable-connected queue pairs (InfiniBand Architecture Specification 1.2.1, section 10.3): RESET, INIT, RTR, RTS. */
#ifdef COTRA_HAVE_VERBS
#include "verbs/verbs.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

/* 6 retries, not 7: rdma_rxe takes 7 to mean for ever (rxe_comp.c), and a dead owner would then never be noticed. */
enum { DEFAULT_SEND_DEPTH = 128, DEFAULT_TIMEOUT = 14, DEFAULT_RETRIES = 6, DEFAULT_HOPS = 64, MAX_GIDS = 256 };

static uint32_t least(uint32_t a, uint32_t b)
{
    return a < b ? a : b;
}

static int check_options(const cotra_device *device, cotra_qp_options *options, cotra_error *err)
{
    if (options->send_depth == 0)
        options->send_depth =
            least(least(DEFAULT_SEND_DEPTH, (uint32_t)device->info.max_qp_wr), (uint32_t)device->info.max_cqe);
    if (options->timeout_exponent == 0)
        options->timeout_exponent = DEFAULT_TIMEOUT;
    if (options->retry_count == 0)
        options->retry_count = DEFAULT_RETRIES;
    if (options->hop_limit == 0)
        options->hop_limit = DEFAULT_HOPS;
    if (options->send_depth > (uint32_t)device->info.max_qp_wr || options->send_depth > (uint32_t)device->info.max_cqe)
        return cotra_fail(err, COTRA_ERR_ARGUMENT,
                          "send_depth %u: %s takes %d work requests and %d completions at most", options->send_depth,
                          device->info.name, device->info.max_qp_wr, device->info.max_cqe);
    if (options->timeout_exponent > 31 || options->retry_count > 7 || options->traffic_class > 255 ||
        options->service_level > 15 || options->hop_limit > 255)
        return cotra_fail(err, COTRA_ERR_ARGUMENT,
                          "queue pair options: timeout_exponent <= 31, retry_count <= 7, traffic_class <= 255, "
                          "service_level <= 15, hop_limit <= 255");
    if (options->port == 0) {
        cotra_port_info info;
        for (uint32_t p = 1; p <= device->info.n_ports && options->port == 0; p++)
            if (cotra_device_port(device, p, &info, NULL) == COTRA_OK && info.state == IBV_PORT_ACTIVE)
                options->port = p;
        if (options->port == 0)
            return cotra_fail(err, COTRA_ERR_NO_DEVICE, "%s has no active port (ip link set INTERFACE up?)",
                              device->info.name);
    }
    return COTRA_OK;
}

static int choose_gid(cotra_qp *qp, cotra_error *err)
{
    cotra_gid_info *gids = calloc(MAX_GIDS, sizeof *gids);
    uint32_t n = 0;
    if (!gids)
        return cotra_fail(err, COTRA_ERR_NO_MEMORY, "queue pair: no memory");
    const cotra_qp_options *options = &qp->options;
    int status = cotra_device_gids(qp->device, options->port, options->peer_address, gids, MAX_GIDS, &n, err);
    if (status)
        goto done;
    uint32_t at = 0;
    while (options->gid_index >= 0 && at < n && gids[at].index != (uint32_t)options->gid_index)
        at++;
    if (at < n)
        qp->gid = gids[at];
    else if (options->gid_index >= 0)
        status = cotra_fail(err, COTRA_ERR_NO_DEVICE,
                            "port %u of %s has no GID index %d (it has %u GIDs; cotra doctor lists them)",
                            options->port, qp->device->info.name, options->gid_index, n);
    else if (qp->link_layer == 2)
        status = cotra_fail(err, COTRA_ERR_NO_DEVICE, "port %u of %s has no GID: give its network interface an address",
                            options->port, qp->device->info.name);
done:
    free(gids);
    return status;
}

static int to_init(cotra_qp *qp, cotra_error *err)
{
    struct ibv_qp_attr attributes;
    memset(&attributes, 0, sizeof attributes);
    attributes.qp_state = IBV_QPS_INIT;
    attributes.port_num = (uint8_t)qp->options.port;
    attributes.qp_access_flags = IBV_ACCESS_REMOTE_READ;
    int error = qp->device->verbs->modify_qp(qp->qp, &attributes,
                                             IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS);
    return error ? cotra_fail_errno(err, COTRA_ERR_SYSTEM, error, "ibv_modify_qp to INIT on %s", qp->device->info.name)
                 : COTRA_OK;
}

int cotra_qp_create(cotra_device *device, const cotra_qp_options *options, cotra_qp **out, cotra_error *err)
{
    *out = NULL;
    cotra_qp *qp = calloc(1, sizeof *qp);
    if (!qp)
        return cotra_fail(err, COTRA_ERR_NO_MEMORY, "queue pair: no memory");
    const cotra_verbs_library *verbs = device->verbs;
    qp->device = device;
    qp->options = *options;
    cotra_port_info port;
    int status = check_options(device, &qp->options, err);
    if (status)
        goto free_qp;
    status = cotra_device_port(device, qp->options.port, &port, err);
    if (status)
        goto free_qp;
    qp->link_layer = port.link_layer;
    status = choose_gid(qp, err);
    if (status)
        goto free_qp;

    errno = 0;
    qp->cq = verbs->create_cq(device->context, (int)qp->options.send_depth, NULL, NULL, 0);
    if (!qp->cq) {
        status = cotra_fail_errno(err, COTRA_ERR_SYSTEM, errno, "ibv_create_cq of %u entries on %s",
                                  qp->options.send_depth, device->info.name);
        goto free_qp;
    }
    struct ibv_qp_init_attr init;
    memset(&init, 0, sizeof init);
    init.send_cq = init.recv_cq = qp->cq;
    init.qp_type = IBV_QPT_RC;
    init.cap.max_send_wr = qp->options.send_depth;
    init.cap.max_recv_wr = 1;
    init.cap.max_send_sge = init.cap.max_recv_sge = 1;
    errno = 0;
    qp->qp = verbs->create_qp(device->pd, &init);
    if (!qp->qp) {
        status = cotra_fail_errno(err, COTRA_ERR_SYSTEM, errno, "ibv_create_qp with %u work requests on %s",
                                  qp->options.send_depth, device->info.name);
        goto destroy_cq;
    }
    status = to_init(qp, err);
    if (status)
        goto destroy_qp;
    memcpy(qp->local.gid, qp->gid.gid, sizeof qp->local.gid);
    qp->local.qp_number = qp->qp->qp_num;
    qp->local.packet_sequence = (uint32_t)(cotra_clock_ns() >> 8) & 0xFFFFFFu;
    qp->local.lid = port.lid;
    qp->local.mtu_bytes = port.active_mtu_bytes;
    qp->local.max_rd_atomic = (uint32_t)device->info.max_rd_atomic;
    qp->local.max_init_rd_atomic = (uint32_t)device->info.max_init_rd_atomic;
    *out = qp;
    return COTRA_OK;
destroy_qp:
    verbs->destroy_qp(qp->qp);
destroy_cq:
    verbs->destroy_cq(qp->cq);
free_qp:
    free(qp);
    return status;
}

void cotra_qp_get_local(const cotra_qp *qp, cotra_qp_attributes *out, cotra_gid_info *gid)
{
    *out = qp->local;
    *gid = qp->gid;
}

static enum ibv_mtu mtu_of(uint32_t bytes)
{
    enum ibv_mtu mtu = IBV_MTU_256;
    while (mtu < IBV_MTU_4096 && 256u << mtu <= bytes)
        mtu++;
    return mtu;
}

int cotra_qp_connect(cotra_qp *qp, const cotra_qp_attributes *remote, cotra_error *err)
{
    const cotra_qp_options *options = &qp->options;
    const cotra_qp_attributes *local = &qp->local;
    if (qp->connected)
        return cotra_fail(err, COTRA_ERR_ARGUMENT, "queue pair %u is connected already", local->qp_number);
    if (remote->mtu_bytes < 256 || remote->qp_number >= 1u << 24 || remote->packet_sequence >= 1u << 24 ||
        remote->max_rd_atomic == 0)
        return cotra_fail(err, COTRA_ERR_ARGUMENT,
                          "the peer's queue pair attributes make no sense: number %u, MTU %u, %u "
                          "READs at once",
                          remote->qp_number, remote->mtu_bytes, remote->max_rd_atomic);
    uint32_t serve = least(least(local->max_rd_atomic, remote->max_init_rd_atomic), 255);
    uint32_t start = least(least(local->max_init_rd_atomic, remote->max_rd_atomic), 255);
    if (options->max_rd_atomic)
        start = least(start, options->max_rd_atomic);

    struct ibv_qp_attr attributes;
    memset(&attributes, 0, sizeof attributes);
    attributes.qp_state = IBV_QPS_RTR;
    attributes.path_mtu = mtu_of(least(local->mtu_bytes, remote->mtu_bytes));
    attributes.dest_qp_num = remote->qp_number;
    attributes.rq_psn = remote->packet_sequence;
    attributes.max_dest_rd_atomic = (uint8_t)serve;
    attributes.min_rnr_timer = 12;
    attributes.ah_attr.dlid = (uint16_t)remote->lid;
    attributes.ah_attr.sl = (uint8_t)options->service_level;
    attributes.ah_attr.port_num = (uint8_t)options->port;
    static const uint8_t none[16];
    if (qp->link_layer == 2 || (remote->lid == 0 && memcmp(remote->gid, none, sizeof none) != 0)) {
        attributes.ah_attr.is_global = 1;
        memcpy(attributes.ah_attr.grh.dgid.raw, remote->gid, sizeof remote->gid);
        attributes.ah_attr.grh.sgid_index = (uint8_t)qp->gid.index;
        attributes.ah_attr.grh.hop_limit = (uint8_t)options->hop_limit;
        attributes.ah_attr.grh.traffic_class = (uint8_t)options->traffic_class;
    }
    int error = qp->device->verbs->modify_qp(qp->qp, &attributes,
                                             IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN |
                                                 IBV_QP_RQ_PSN | IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER);
    if (error)
        return cotra_fail_errno(err, COTRA_ERR_SYSTEM, error,
                                "ibv_modify_qp to RTR on %s, GID index %u (%s): can that address reach the peer's GID?",
                                qp->device->info.name, qp->gid.index, qp->gid.why);
    memset(&attributes, 0, sizeof attributes);
    attributes.qp_state = IBV_QPS_RTS;
    attributes.sq_psn = local->packet_sequence;
    attributes.timeout = (uint8_t)options->timeout_exponent;
    attributes.retry_cnt = (uint8_t)options->retry_count;
    attributes.rnr_retry = 7;
    attributes.max_rd_atomic = (uint8_t)start;
    error = qp->device->verbs->modify_qp(qp->qp, &attributes,
                                         IBV_QP_STATE | IBV_QP_SQ_PSN | IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT |
                                             IBV_QP_RNR_RETRY | IBV_QP_MAX_QP_RD_ATOMIC);
    if (error)
        return cotra_fail_errno(err, COTRA_ERR_SYSTEM, error, "ibv_modify_qp to RTS on %s", qp->device->info.name);
    qp->connected = 1;
    return COTRA_OK;
}

void cotra_qp_abort(cotra_qp *qp)
{
    struct ibv_qp_attr attributes;
    memset(&attributes, 0, sizeof attributes);
    attributes.qp_state = IBV_QPS_ERR;
    qp->device->verbs->modify_qp(qp->qp, &attributes, IBV_QP_STATE);
}

void cotra_qp_destroy(cotra_qp *qp)
{
    if (!qp)
        return;
    qp->device->verbs->destroy_qp(qp->qp);
    qp->device->verbs->destroy_cq(qp->cq);
    free(qp);
}
#else
typedef int cotra_no_qp_here;
#endif
