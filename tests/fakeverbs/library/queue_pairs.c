/* Queue pairs and their states. */
#include "fake.h"

static uint32_t last_qp_number = 0x10;

EXPORT struct ibv_qp *ibv_create_qp(struct ibv_pd *pd, struct ibv_qp_init_attr *init)
{
    int error = 0;
    fake_qp *self = NULL;
    pthread_mutex_lock(&fake_lock);
    fake_pd *parent = LIVE(fake_pd, pd);
    fake_cq *cq = LIVE(fake_cq, init->send_cq);
    if (!fails("create_qp", &error) &&
        (init->qp_type != IBV_QPT_RC || init->recv_cq != init->send_cq || init->cap.max_send_wr == 0 ||
         init->cap.max_send_sge != 1 || init->cap.max_send_wr > setting(pd->context->device, "MAX_QP_WR", 16384)))
        error = EINVAL;
    else if (!error) {
        self = object_create(sizeof *self, QP);
        self->qp.context = pd->context;
        self->qp.pd = pd;
        self->qp.send_cq = self->qp.recv_cq = init->send_cq;
        self->qp.qp_type = init->qp_type;
        self->qp.qp_num = ++last_qp_number;
        self->qp.state = IBV_QPS_RESET;
        self->depth = init->cap.max_send_wr;
        self->work = calloc(self->depth, sizeof *self->work);
        parent->object.users++;
        cq->object.users++;
    }
    pthread_mutex_unlock(&fake_lock);
    errno = error;
    return self ? &self->qp : NULL;
}

EXPORT int ibv_destroy_qp(struct ibv_qp *qp)
{
    int error = 0, kept = 0;
    pthread_mutex_lock(&fake_lock);
    fake_qp *self = LIVE(fake_qp, qp);
    if (!fails("destroy_qp", &error)) {
        fake_cq *cq = LIVE(fake_cq, qp->send_cq);
        for (int i = 0; i < cq->n; i++)
            if (cq->wcs[i].qp_num != qp->qp_num) {
                cq->frees[kept] = cq->frees[i];
                cq->wcs[kept++] = cq->wcs[i];
            }
        cq->n = kept;
        cq->object.users--;
        LIVE(fake_pd, qp->pd)->object.users--;
        free(self->work);
        object_destroy(&self->object);
    }
    pthread_mutex_unlock(&fake_lock);
    return error;
}

void qp_break(fake_qp *self)
{
    fake_cq *cq = LIVE(fake_cq, self->qp.send_cq);
    self->qp.state = IBV_QPS_ERR;
    while (self->done < self->posted) {
        const fake_wr *work = &self->work[self->done++ % self->depth];
        cq_push(cq, self, work, IBV_WC_WR_FLUSH_ERR);
    }
}

/* ibv_modify_qp(3): the attributes that each step of an RC queue pair requires, and those that it may have besides
 * (InfiniBand Architecture Specification 1.2.1, table 91). */
static const struct step {
    enum ibv_qp_state from, to;
    const char *name;
    int required, optional;
} steps[] = {
    {IBV_QPS_RESET, IBV_QPS_INIT, "modify_qp.INIT", IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS, 0},
    {IBV_QPS_INIT, IBV_QPS_RTR, "modify_qp.RTR",
     IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN | IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER,
     IBV_QP_ACCESS_FLAGS | IBV_QP_PKEY_INDEX | IBV_QP_ALT_PATH},
    {IBV_QPS_RTR, IBV_QPS_RTS, "modify_qp.RTS",
     IBV_QP_SQ_PSN | IBV_QP_MAX_QP_RD_ATOMIC | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY | IBV_QP_TIMEOUT,
     IBV_QP_CUR_STATE | IBV_QP_ACCESS_FLAGS | IBV_QP_MIN_RNR_TIMER | IBV_QP_ALT_PATH | IBV_QP_PATH_MIG_STATE},
};

static int rtr_is_possible(const fake_qp *self, const struct ibv_qp_attr *attr)
{
    const struct ibv_device *device = self->qp.context->device;
    const struct ibv_ah_attr *path = &attr->ah_attr;
    union ibv_gid gid, none = {.raw = {0}};
    if (attr->path_mtu < IBV_MTU_256 || attr->path_mtu > (enum ibv_mtu)setting(device, "MTU", IBV_MTU_4096) ||
        attr->max_dest_rd_atomic > setting(device, "MAX_RD_ATOMIC", 16) || attr->dest_qp_num >> 24 ||
        attr->rq_psn >> 24 || attr->min_rnr_timer > 31 || path->port_num != self->attr.port_num)
        return EINVAL;
    if (setting(device, "LINK_LAYER", IBV_LINK_LAYER_ETHERNET) != IBV_LINK_LAYER_ETHERNET && !path->is_global)
        return path->dlid ? 0 : EINVAL;
    if (!path->is_global || !gid_at(device, path->grh.sgid_index, &gid) || memcmp(&gid, &none, sizeof gid) == 0)
        return EINVAL;
    return gid_is_known(&path->grh.dgid) ? 0 : ENETUNREACH;
}

static int rts_is_possible(const fake_qp *self, const struct ibv_qp_attr *attr)
{
    long most = setting(self->qp.context->device, "MAX_INIT_RD_ATOMIC", 16);
    return attr->max_rd_atomic > most || attr->sq_psn >> 24 || attr->timeout > 31 || attr->retry_cnt > 7 ||
                   attr->rnr_retry > 7
               ? EINVAL
               : 0;
}

static int qp_step(fake_qp *self, const struct ibv_qp_attr *attr, int mask)
{
    int error = 0;
    if (!(mask & IBV_QP_STATE))
        return EINVAL;
    if (attr->qp_state == IBV_QPS_ERR) {
        if (fails("modify_qp.ERR", &error))
            return error;
        if (mask != IBV_QP_STATE)
            return EINVAL;
        qp_break(self);
        return 0;
    }
    for (size_t i = 0; i < sizeof steps / sizeof *steps; i++) {
        const struct step *step = &steps[i];
        if (step->to != attr->qp_state)
            continue;
        if (fails(step->name, &error))
            return error;
        const int required = step->required | IBV_QP_STATE;
        if (self->qp.state != step->from || (mask & required) != required || (mask & ~(required | step->optional)))
            return EINVAL;
        if (step->to == IBV_QPS_INIT) {
            if (attr->port_num < 1 || attr->port_num > N_PORTS || attr->pkey_index != 0)
                return EINVAL;
            self->attr.port_num = attr->port_num;
            self->attr.qp_access_flags = attr->qp_access_flags;
        } else if (step->to == IBV_QPS_RTR) {
            error = rtr_is_possible(self, attr);
            if (error)
                return error;
            const struct ibv_qp_attr before = self->attr;
            self->attr = *attr;
            self->attr.port_num = before.port_num;
            self->attr.qp_access_flags = before.qp_access_flags;
        } else {
            error = rts_is_possible(self, attr);
            if (error)
                return error;
            self->attr.sq_psn = attr->sq_psn;
            self->attr.max_rd_atomic = attr->max_rd_atomic;
            self->attr.timeout = attr->timeout;
            self->attr.retry_cnt = attr->retry_cnt;
            self->attr.rnr_retry = attr->rnr_retry;
        }
        self->qp.state = step->to;
        return 0;
    }
    return EINVAL;
}

EXPORT int ibv_modify_qp(struct ibv_qp *qp, struct ibv_qp_attr *attr, int mask)
{
    pthread_mutex_lock(&fake_lock);
    int error = qp_step(LIVE(fake_qp, qp), attr, mask);
    pthread_mutex_unlock(&fake_lock);
    return error;
}

fake_qp *qp_find(uint32_t number)
{
    for (object *at = fake_live; at; at = at->next)
        if (at->kind == QP && ((fake_qp *)(void *)at)->qp.qp_num == number)
            return (fake_qp *)(void *)at;
    return NULL;
}

/* An attribute of a queue pair as it was set; -1 where there is no such queue pair or attribute. */
EXPORT long fake_qp_attribute(uint32_t number, const char *name)
{
    long value = -1;
    pthread_mutex_lock(&fake_lock);
    const fake_qp *qp = qp_find(number);
#define ATTRIBUTE(text, expression)                                                                                    \
    if (qp && strcmp(name, text) == 0)                                                                                 \
        value = (long)(expression);
    ATTRIBUTE("state", qp->qp.state)
    ATTRIBUTE("access", qp->attr.qp_access_flags)
    ATTRIBUTE("path_mtu", qp->attr.path_mtu)
    ATTRIBUTE("dest_qp_num", qp->attr.dest_qp_num)
    ATTRIBUTE("max_rd_atomic", qp->attr.max_rd_atomic)
    ATTRIBUTE("max_dest_rd_atomic", qp->attr.max_dest_rd_atomic)
    ATTRIBUTE("timeout", qp->attr.timeout)
    ATTRIBUTE("retry_cnt", qp->attr.retry_cnt)
    ATTRIBUTE("is_global", qp->attr.ah_attr.is_global)
    ATTRIBUTE("dlid", qp->attr.ah_attr.dlid)
    ATTRIBUTE("sl", qp->attr.ah_attr.sl)
    ATTRIBUTE("sgid_index", qp->attr.ah_attr.grh.sgid_index)
    ATTRIBUTE("hop_limit", qp->attr.ah_attr.grh.hop_limit)
    ATTRIBUTE("traffic_class", qp->attr.ah_attr.grh.traffic_class)
#undef ATTRIBUTE
    pthread_mutex_unlock(&fake_lock);
    return value;
}
