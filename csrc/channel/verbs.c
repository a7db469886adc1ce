/* verbs: READs of a remote region over a connected queue pair.
 *
 * One post is one chain of work requests and one doorbell; only its last one is signalled, for a reliable connection
 * completes in order, so its completion stands for all before it. The order of posting is kept in a ring:
 *
 *     first                      acknowledged                     next
 *       |  done, not yet polled       |  posted, not yet done       |
 *       v                             v                             v
 *   ----#############################################################----   positions count up for ever, mod depth
 *
 * A work request's id is its position, so a completion says how far `acknowledged` moves. At most `depth` READs lie in
 * the ring, so the send queue never overflows; and every chain ends signalled, so it is always drained again.
 *
 * An error is reported with the id of the READ that failed; the queue pair is then in the error state, and all others
 * are flushed. So after the first error every outstanding READ has failed, whether or not its own completion was seen.
 */
#ifdef COTRA_HAVE_VERBS
#include "channel/channel.h"
#include "verbs/verbs.h"

#include <errno.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum { CHAIN = 64, DRAIN_NS = 1000000000 };

typedef struct place { /* in the ring */
    uint32_t slot, length;
} place;

typedef struct verbs_channel {
    cotra_channel base;
    cotra_qp *qp;
    cotra_remote_region region;
    struct ibv_mr *landing_mr;
    uint8_t *landing; /* [slots][slot_bytes] */
    size_t landing_bytes;
    uint32_t depth;
    uint64_t first, acknowledged, next;
    uint64_t drained; /* work requests before it are done with, well or not: the queue pair will not touch their slots
                         again */
    bool open_ended;  /* a chain was taken in part, without its signalled end */
    uint64_t failed;  /* the position of the first READ that failed, when base.error says that one did */
    place *ring;      /* [depth] */
    struct ibv_send_wr work[CHAIN];
    struct ibv_sge pieces[CHAIN];
} verbs_channel;

static const char *remedy(enum ibv_wc_status status)
{
    switch (status) {
    case IBV_WC_REM_ACCESS_ERR:
        return "the rkey is wrong, the READ passes the region's end, or the owner deregistered the memory";
    case IBV_WC_RETRY_EXC_ERR:
        return "the owner does not answer: its process or host is gone, or GID, MTU or path are wrong";
    case IBV_WC_REM_INV_REQ_ERR:
        return "the owner's queue pair does not allow READs, or not so many at once";
    case IBV_WC_REM_OP_ERR:
        return "the owner's side failed";
    case IBV_WC_WR_FLUSH_ERR:
        return "the queue pair was in the error state";
    case IBV_WC_LOC_PROT_ERR:
        return "the landing buffer is not registered";
    default:
        return "see ibv_poll_cq(3)";
    }
}

static void record_failure(verbs_channel *self, const struct ibv_wc *wc)
{
    cotra_error *error = &self->base.error;
    if (error->status)
        return;
    self->failed = wc->wr_id;
    cotra_fail(error, COTRA_ERR_COMPLETION, "RDMA READ completed with status %d (%s), vendor error 0x%x: %s",
               wc->status, self->qp->device->verbs->wc_status_str(wc->status), wc->vendor_err, remedy(wc->status));
    error->wc_status = (int32_t)wc->status;
    error->vendor_error = wc->vendor_err;
}

static int verbs_post(cotra_channel *channel, const cotra_read *reads, uint32_t n, uint32_t *posted, cotra_error *err)
{
    verbs_channel *self = (verbs_channel *)channel;
    if (channel->error.status) {
        if (err)
            *err = channel->error;
        return channel->error.status;
    }
    while (*posted < n) {
        uint64_t room = self->depth - (self->next - self->first);
        uint32_t count = n - *posted < CHAIN ? n - *posted : CHAIN;
        count = count < room ? count : (uint32_t)room;
        if (count == 0)
            return COTRA_OK;
        for (uint32_t i = 0; i < count; i++) {
            const cotra_read *read = &reads[*posted + i];
            uint64_t position = self->next + i;
            self->ring[position % self->depth] = (place){read->slot, read->length};
            self->pieces[i].addr = (uint64_t)(uintptr_t)(self->landing + (size_t)read->slot * channel->slot_bytes);
            self->pieces[i].length = read->length;
            self->pieces[i].lkey = self->landing_mr->lkey;
            struct ibv_send_wr *work = &self->work[i];
            work->wr_id = position;
            work->next = i + 1 < count ? work + 1 : NULL;
            work->send_flags = i + 1 < count ? 0 : IBV_SEND_SIGNALED;
            work->wr.rdma.remote_addr = self->region.address + read->offset;
        }
        struct ibv_send_wr *refused = NULL;
        int error = ibv_post_send(self->qp->qp, self->work, &refused);
        uint32_t taken = error == 0 ? count : refused ? (uint32_t)(refused - self->work) : 0;
        channel->doorbells++;
        *posted += taken;
        self->next += taken;
        if (error) {
            /* What was taken of the chain has no signalled end: the queue pair cannot be used any further. */
            cotra_fail_errno(&channel->error, COTRA_ERR_TRANSPORT, error, "ibv_post_send of %u READs on %s", count,
                             self->qp->device->info.name);
            self->failed = self->acknowledged;
            self->open_ended = taken > 0;
            if (err)
                *err = channel->error;
            return COTRA_ERR_TRANSPORT;
        }
    }
    return COTRA_OK;
}

static void note_drained(verbs_channel *self, const struct ibv_wc *wc)
{
    if (wc->wr_id >= self->drained && wc->wr_id < self->next)
        self->drained = wc->wr_id + 1;
}

static int verbs_poll(cotra_channel *channel, cotra_completion *out, uint32_t capacity, uint32_t *n, cotra_error *err)
{
    verbs_channel *self = (verbs_channel *)channel;
    (void)err;
    if (self->acknowledged != self->next && !channel->error.status) {
        struct ibv_wc wcs[16];
        int count = ibv_poll_cq(self->qp->cq, 16, wcs);
        if (count < 0) {
            self->failed = self->acknowledged;
            cotra_fail(&channel->error, COTRA_ERR_TRANSPORT, "ibv_poll_cq on %s returned %d",
                       self->qp->device->info.name, count);
        }
        for (int i = 0; i < count; i++) {
            note_drained(self, &wcs[i]);
            if (wcs[i].status != IBV_WC_SUCCESS)
                record_failure(self, &wcs[i]);
            else if (!channel->error.status && wcs[i].wr_id >= self->acknowledged && wcs[i].wr_id < self->next)
                self->acknowledged = wcs[i].wr_id + 1;
        }
        /* READs before the one that failed did complete; it and all after it did not. */
        if (channel->error.status && self->failed >= self->acknowledged && self->failed < self->next)
            self->acknowledged = self->failed;
    }
    uint64_t end = channel->error.status ? self->next : self->acknowledged;
    for (; self->first != end && *n < capacity; self->first++) {
        const place at = self->ring[self->first % self->depth];
        int done = self->first < self->acknowledged;
        out[(*n)++] = (cotra_completion){.data = done ? self->landing + (size_t)at.slot * channel->slot_bytes : NULL,
                                         .slot = at.slot,
                                         .status = done ? COTRA_OK : channel->error.status};
        channel->reads += (uint64_t)done;
        channel->read_bytes += done ? at.length : 0;
    }
    return COTRA_OK;
}

/* READs in flight write into the landing memory: stop them before it goes. In the error state the queue pair starts
 * none, and once its outstanding work is flushed none is left. */
static void drain(verbs_channel *self)
{
    struct ibv_wc wc;
    cotra_qp_abort(self->qp);
    if (self->open_ended) {
        /* What was done of such a chain gives no completion; one more work request, flushed after it, does. */
        struct ibv_send_wr *refused = NULL;
        self->work[0].wr_id = self->next;
        self->work[0].next = NULL;
        self->work[0].send_flags = IBV_SEND_SIGNALED;
        if (ibv_post_send(self->qp->qp, self->work, &refused) == 0)
            self->next++;
    }
    uint64_t give_up = cotra_clock_ns() + DRAIN_NS;
    while (self->drained != self->next && cotra_clock_ns() < give_up) {
        int count = ibv_poll_cq(self->qp->cq, 1, &wc);
        if (count < 0)
            return;
        if (count == 1)
            note_drained(self, &wc);
    }
}

static void verbs_close(cotra_channel *channel)
{
    verbs_channel *self = (verbs_channel *)channel;
    if (self->qp && self->drained != self->next)
        drain(self);
    if (self->landing_mr)
        self->qp->device->verbs->dereg_mr(self->landing_mr);
    if (self->landing)
        munmap(self->landing, self->landing_bytes);
    free(self->ring);
    free(self);
}

static const cotra_channel_ops verbs_ops = {
    .name = "verbs", .post = verbs_post, .poll = verbs_poll, .close = verbs_close};

int cotra_channel_open_verbs(cotra_qp *qp, const cotra_remote_region *region, uint32_t slots, uint32_t slot_bytes,
                             cotra_channel **out, cotra_error *err)
{
    *out = NULL;
    if (!qp->connected)
        return cotra_fail(err, COTRA_ERR_ARGUMENT, "verbs channel: the queue pair is not connected");
    if (slots == 0)
        slots = qp->options.send_depth;
    int status = cotra_channel_limits(&slots, &slot_bytes, err);
    if (status)
        return status;
    verbs_channel *self = calloc(1, sizeof *self);
    if (!self)
        return cotra_fail(err, COTRA_ERR_NO_MEMORY, "verbs channel: no memory");
    self->base.ops = &verbs_ops;
    self->base.region_bytes = region->length_bytes;
    self->base.slots = slots;
    self->base.slot_bytes = slot_bytes;
    self->base.post_batch = CHAIN;
    self->qp = qp;
    self->region = *region;
    self->depth = qp->options.send_depth;
    for (int i = 0; i < CHAIN; i++) {
        self->work[i].sg_list = &self->pieces[i];
        self->work[i].num_sge = 1;
        self->work[i].opcode = IBV_WR_RDMA_READ;
        self->work[i].wr.rdma.rkey = region->rkey;
    }
    self->ring = calloc(self->depth, sizeof *self->ring);
    if (!self->ring) {
        status = cotra_fail(err, COTRA_ERR_NO_MEMORY, "verbs channel: no memory for %u READs", self->depth);
        goto close_self;
    }
    self->landing_bytes = (size_t)slots * slot_bytes;
    void *landing = mmap(NULL, self->landing_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (landing == MAP_FAILED) {
        status = cotra_fail_errno(err, COTRA_ERR_NO_MEMORY, errno, "verbs channel: %zu bytes of landing buffers",
                                  self->landing_bytes);
        goto close_self;
    }
    self->landing = landing;
    /* After fork() a child must not share these pages copy-on-write with the NIC (ibv_fork_init(3)). */
    (void)madvise(landing, self->landing_bytes, MADV_DONTFORK);
    status =
        cotra_mr_register(qp->device, landing, self->landing_bytes, IBV_ACCESS_LOCAL_WRITE, &self->landing_mr, err);
    if (status)
        goto close_self;
    *out = &self->base;
    return COTRA_OK;
close_self:
    verbs_close(&self->base);
    return status;
}
#else
typedef int cotra_no_verbs_channel_here;
#endif
