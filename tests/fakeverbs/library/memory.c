/* Protection domains, memory regions and completion queues. */
#include "fake.h"

static uint32_t last_key;

EXPORT struct ibv_pd *ibv_alloc_pd(struct ibv_context *context)
{
    int error = 0;
    fake_pd *self = NULL;
    pthread_mutex_lock(&fake_lock);
    fake_context *parent = LIVE(fake_context, context);
    if (!fails("alloc_pd", &error)) {
        self = object_create(sizeof *self, PD);
        self->pd.context = context;
        parent->object.users++;
    }
    pthread_mutex_unlock(&fake_lock);
    errno = error;
    return self ? &self->pd : NULL;
}

EXPORT int ibv_dealloc_pd(struct ibv_pd *pd)
{
    int error = 0;
    pthread_mutex_lock(&fake_lock);
    fake_pd *self = LIVE(fake_pd, pd);
    if (!fails("dealloc_pd", &error) && self->object.users)
        error = EBUSY;
    if (!error) {
        LIVE(fake_context, pd->context)->object.users--;
        object_destroy(&self->object);
    }
    pthread_mutex_unlock(&fake_lock);
    return error;
}

EXPORT struct ibv_mr *ibv_reg_mr(struct ibv_pd *pd, void *address, size_t length, int access)
{
    const int writes = IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_ATOMIC;
    int error = 0;
    fake_mr *self = NULL;
    pthread_mutex_lock(&fake_lock);
    fake_pd *parent = LIVE(fake_pd, pd);
    if (!fails("reg_mr", &error) && (length == 0 || ((access & writes) && !(access & IBV_ACCESS_LOCAL_WRITE))))
        error = EINVAL;
    else if (!error) {
        self = object_create(sizeof *self, MR);
        self->access = access;
        self->mr.context = pd->context;
        self->mr.pd = pd;
        self->mr.addr = address;
        self->mr.length = length;
        self->mr.lkey = 0x1000 + ++last_key;
        self->mr.rkey = 0x800000 + (last_key << 8);
        parent->object.users++;
    }
    pthread_mutex_unlock(&fake_lock);
    errno = error;
    return self ? &self->mr : NULL;
}

EXPORT int ibv_dereg_mr(struct ibv_mr *mr)
{
    int error = 0;
    pthread_mutex_lock(&fake_lock);
    fake_mr *self = LIVE(fake_mr, mr);
    if (!fails("dereg_mr", &error)) {
        LIVE(fake_pd, mr->pd)->object.users--;
        object_destroy(&self->object);
    }
    pthread_mutex_unlock(&fake_lock);
    return error;
}

fake_mr *mr_find(uint32_t lkey, uint32_t rkey)
{
    for (object *at = fake_live; at; at = at->next) {
        fake_mr *self = (fake_mr *)(void *)at;
        if (at->kind == MR && (self->mr.lkey == lkey || self->mr.rkey == rkey))
            return self;
    }
    return NULL;
}

int mr_allows(const fake_mr *self, const struct ibv_pd *pd, int access, uint64_t address, uint64_t length)
{
    if (!self || self->mr.pd != pd || (self->access & access) != access)
        return 0;
    uint64_t begin = (uint64_t)(uintptr_t)self->mr.addr;
    return address >= begin && length <= self->mr.length && address - begin <= self->mr.length - length;
}

/* The access flags of the region with that rkey, -1 where there is none. */
EXPORT int fake_mr_access(uint32_t rkey)
{
    pthread_mutex_lock(&fake_lock);
    const fake_mr *mr = mr_find(0, rkey);
    int access = mr ? mr->access : -1;
    pthread_mutex_unlock(&fake_lock);
    return access;
}

EXPORT struct ibv_cq *ibv_create_cq(struct ibv_context *context, int cqe, void *cq_context,
                                    struct ibv_comp_channel *channel, int vector)
{
    int error = 0;
    fake_cq *self = NULL;
    (void)vector;
    pthread_mutex_lock(&fake_lock);
    fake_context *parent = LIVE(fake_context, context);
    if (!fails("create_cq", &error) && (cqe < 1 || cqe > setting(context->device, "MAX_CQE", 65535)))
        error = EINVAL;
    else if (!error) {
        self = object_create(sizeof *self, CQ);
        self->cq.context = context;
        self->cq.channel = channel;
        self->cq.cq_context = cq_context;
        self->cq.cqe = cqe;
        self->wcs = calloc((size_t)cqe, sizeof *self->wcs);
        self->frees = calloc((size_t)cqe, sizeof *self->frees);
        parent->object.users++;
    }
    pthread_mutex_unlock(&fake_lock);
    errno = error;
    return self ? &self->cq : NULL;
}

EXPORT int ibv_destroy_cq(struct ibv_cq *cq)
{
    int error = 0;
    pthread_mutex_lock(&fake_lock);
    fake_cq *self = LIVE(fake_cq, cq);
    if (!fails("destroy_cq", &error) && self->object.users)
        error = EBUSY;
    if (!error) {
        LIVE(fake_context, cq->context)->object.users--;
        free(self->wcs);
        free(self->frees);
        object_destroy(&self->object);
    }
    pthread_mutex_unlock(&fake_lock);
    return error;
}

void cq_push(fake_cq *self, const fake_qp *qp, const fake_wr *work, enum ibv_wc_status status)
{
    if (self->n == self->cq.cqe)
        violated("completion queue", "overrun");
    struct ibv_wc *wc = &self->wcs[self->n];
    memset(wc, status == IBV_WC_SUCCESS ? 0 : UNSET, sizeof *wc);
    wc->wr_id = work->id;
    wc->status = status;
    wc->qp_num = qp->qp.qp_num;
    wc->vendor_err = status == IBV_WC_SUCCESS ? 0 : 0x80u + (uint32_t)status;
    if (status == IBV_WC_SUCCESS) {
        wc->opcode = IBV_WC_RDMA_READ;
        wc->byte_len = work->piece.length;
    }
    self->frees[self->n++] = qp->done;
}
