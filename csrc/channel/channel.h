/* The small interface that the search engine calls: one-sided READs of one region.
 *
 * A channel has `slots` places for READs in progress, numbered from 0; the caller picks a free slot for each READ and
 * it is free again when the completion with that number has been polled. The bytes of a completed READ stay valid until
 * the same slot is posted again. Which READ completes first is not promised.
 *
 * Bounds are checked here, once, for every implementation: cotra_channel_post refuses a READ outside the region or
 * longer than slot_bytes before any implementation sees it.
 */
#ifndef COTRA_CHANNEL_CHANNEL_H
#define COTRA_CHANNEL_CHANNEL_H

#include "cotra.h"

typedef struct cotra_read {
    uint64_t offset; /* in the region */
    uint32_t length; /* bytes, <= slot_bytes */
    uint32_t slot;   /* < slots, free */
} cotra_read;

typedef struct cotra_completion {
    const uint8_t *data; /* the READ's bytes, when status is COTRA_OK */
    uint32_t slot;
    int32_t status; /* COTRA_OK or an error; details of the first error: cotra_channel.error */
} cotra_completion;

typedef struct cotra_channel_ops {
    const char *name;
    /* Starts READs, all in one doorbell where there is such a thing. *posted <= n says how many were taken, in order;
     * fewer than n is back-pressure (poll first) and not an error. */
    int (*post)(cotra_channel *channel, const cotra_read *reads, uint32_t n, uint32_t *posted, cotra_error *err);
    /* Takes up to capacity completions, without waiting. A READ that failed is a completion with its status; an error
     * return is for a channel that can never complete anything again. */
    int (*poll)(cotra_channel *channel, cotra_completion *out, uint32_t capacity, uint32_t *n, cotra_error *err);
    void (*close)(cotra_channel *channel); /* frees the channel too */
} cotra_channel_ops;

/* The common head: an implementation's own struct begins with it. */
struct cotra_channel {
    const cotra_channel_ops *ops;
    uint64_t region_bytes;
    uint32_t slots;
    uint32_t slot_bytes;
    uint32_t post_batch;  /* READs that are worth collecting for one post; 1 where a doorbell costs nothing */
    uint32_t in_flight;   /* READs that are worth having in progress; 0: as many as there are slots */
    uint32_t in_progress; /* READs posted, their completions not polled yet: counted by cotra_channel_post and _poll */
    uint64_t reads;       /* completed well */
    uint64_t read_bytes;
    uint64_t doorbells;
    cotra_error error; /* the first error completion, in full: status 0 while there is none */
};

enum { COTRA_DEFAULT_SLOTS = 1024, COTRA_DEFAULT_SLOT_BYTES = 64 * 1024, COTRA_MAX_SLOTS = 65536 };

/* Checks and defaults for the two limits; used by every open. */
int cotra_channel_limits(uint32_t *slots, uint32_t *slot_bytes, cotra_error *err);
int cotra_channel_post(cotra_channel *channel, const cotra_read *reads, uint32_t n, uint32_t *posted, cotra_error *err);
int cotra_channel_poll(cotra_channel *channel, cotra_completion *out, uint32_t capacity, uint32_t *n, cotra_error *err);
/* Before a call that numbers the slots anew: takes and forgets completions of READs that an earlier call, which failed
 * or ran out of time, no longer waited for. COTRA_ERR_CLOSED while some of them are still on their way: their slots are
 * not free. */
int cotra_channel_settle(cotra_channel *channel, cotra_error *err);
/* Reports the channel's first error completion (or the bare status where it has none) in err; returns the status. */
int cotra_channel_report(const cotra_channel *channel, int status, cotra_error *err);

#endif
