/* Work requests and their completions. */
#include "fake.h"

static int post_one(fake_qp *self, const struct ibv_send_wr *wr)
{
    int error;
    if (fails("post_send", &error))
        return error;
    if (self->qp.state != IBV_QPS_RTS && self->qp.state != IBV_QPS_ERR)
        return EINVAL;
    if (wr->num_sge != 1 || wr->opcode != IBV_WR_RDMA_READ)
        return EINVAL;
    if (self->posted - self->freed == self->depth)
        return ENOMEM;
    const struct ibv_sge *piece = &wr->sg_list[0];
    self->work[self->posted++ % self->depth] = (fake_wr){.id = wr->wr_id,
                                                         .remote_address = wr->wr.rdma.remote_addr,
                                                         .rkey = wr->wr.rdma.rkey,
                                                         .signalled = (wr->send_flags & IBV_SEND_SIGNALED) != 0,
                                                         .opcode = wr->opcode,
                                                         .piece = *piece};
    if (mr_allows(mr_find(piece->lkey, 0), self->qp.pd, IBV_ACCESS_LOCAL_WRITE, piece->addr, piece->length))
        memset((void *)(uintptr_t)piece->addr, UNSET, piece->length);
    return 0;
}

int fake_post_send(struct ibv_qp *raw, struct ibv_send_wr *wr, struct ibv_send_wr **bad)
{
    int error = 0;
    pthread_mutex_lock(&fake_lock);
    fake_qp *self = LIVE(fake_qp, raw);
    for (; wr && !error; wr = error ? wr : wr->next)
        error = post_one(self, wr);
    if (error)
        *bad = wr;
    else if (self->qp.state == IBV_QPS_ERR)
        qp_break(self);
    pthread_mutex_unlock(&fake_lock);
    return error;
}

/* Serves one READ as both ends would. A status that the responder gives breaks its queue pair too. */
static enum ibv_wc_status serve(const fake_qp *self, const fake_wr *work)
{
    const struct ibv_sge *piece = &work->piece;
    if (piece->length > MAX_MESSAGE_BYTES)
        return IBV_WC_LOC_LEN_ERR;
    if (!mr_allows(mr_find(piece->lkey, 0), self->qp.pd, IBV_ACCESS_LOCAL_WRITE, piece->addr, piece->length))
        return IBV_WC_LOC_PROT_ERR;
    fake_qp *peer = qp_find(self->attr.dest_qp_num);
    if (!peer || (peer->qp.state != IBV_QPS_RTR && peer->qp.state != IBV_QPS_RTS) ||
        peer->attr.dest_qp_num != self->qp.qp_num || peer->attr.rq_psn != self->attr.sq_psn ||
        peer->attr.path_mtu != self->attr.path_mtu || self->attr.max_rd_atomic == 0)
        return IBV_WC_RETRY_EXC_ERR;
    uint64_t in_flight = self->posted - self->done;
    in_flight = in_flight < self->attr.max_rd_atomic ? in_flight : self->attr.max_rd_atomic;
    enum ibv_wc_status status = IBV_WC_SUCCESS;
    if (in_flight > peer->attr.max_dest_rd_atomic || !(peer->attr.qp_access_flags & IBV_ACCESS_REMOTE_READ))
        status = IBV_WC_REM_INV_REQ_ERR;
    else if (!mr_allows(mr_find(0, work->rkey), peer->qp.pd, IBV_ACCESS_REMOTE_READ, work->remote_address,
                        piece->length))
        status = IBV_WC_REM_ACCESS_ERR;
    if (status != IBV_WC_SUCCESS)
        qp_break(peer);
    else
        memcpy((void *)(uintptr_t)piece->addr, (const void *)(uintptr_t)work->remote_address, piece->length);
    return status;
}

static void make_progress(fake_qp *self, fake_cq *cq)
{
    const long late = setting(NULL, "LATE", 0);
    while (self->done < self->posted && !self->stuck) {
        const fake_wr *work = &self->work[self->done % self->depth];
        if (late) {
            if (self->patience == 0)
                self->patience = late * (1 + self->qp.qp_num % 3);
            if (--self->patience > 0)
                return;
        }
        int order = ordered_status();
        self->stuck = order == -2;
        if (self->stuck)
            return;
        enum ibv_wc_status status = order < 0 ? serve(self, work) : (enum ibv_wc_status)order;
        self->done++;
        if (status != IBV_WC_SUCCESS) {
            cq_push(cq, self, work, status);
            qp_break(self);
        } else if (work->signalled) {
            cq_push(cq, self, work, status);
        }
    }
}

int fake_poll_cq(struct ibv_cq *raw, int capacity, struct ibv_wc *out)
{
    int error, n = 0;
    pthread_mutex_lock(&fake_lock);
    fake_cq *self = LIVE(fake_cq, raw);
    if (fails("poll_cq", &error)) {
        pthread_mutex_unlock(&fake_lock);
        return -error;
    }
    for (object *at = fake_live; at; at = at->next) {
        fake_qp *qp = (fake_qp *)(void *)at;
        if (at->kind == QP && qp->qp.send_cq == raw && qp->qp.state == IBV_QPS_RTS)
            make_progress(qp, self);
    }
    for (; n < self->n && n < capacity; n++) {
        fake_qp *qp = qp_find(self->wcs[n].qp_num);
        if (qp)
            qp->freed = self->frees[n];
        out[n] = self->wcs[n];
    }
    self->n -= n;
    memmove(self->wcs, self->wcs + n, (size_t)self->n * sizeof *self->wcs);
    memmove(self->frees, self->frees + n, (size_t)self->n * sizeof *self->frees);
    pthread_mutex_unlock(&fake_lock);
    return n;
}

EXPORT const char *ibv_wc_status_str(enum ibv_wc_status status)
{
    static const char *const names[] = {"success",
                                        "local length error",
                                        "local QP operation error",
                                        "local EE context operation error",
                                        "local protection error",
                                        "Work Request Flushed Error",
                                        "memory management operation error",
                                        "bad response error",
                                        "local access error",
                                        "remote invalid request error",
                                        "remote access error",
                                        "remote operation error",
                                        "transport retry counter exceeded",
                                        "RNR retry counter exceeded",
                                        "local RDD violation error",
                                        "remote invalid RD request",
                                        "aborted error",
                                        "invalid EE context number",
                                        "invalid EE context state",
                                        "fatal error",
                                        "response timeout error",
                                        "general error",
                                        "TM error",
                                        "TM software rendezvous"};
    return (size_t)status < sizeof names / sizeof *names ? names[status] : "unknown";
}
