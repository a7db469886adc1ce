/* shm: the region is mapped in this process (its own arena, or a same-host peer's memfd, mapped read-only).
 *
 * A READ is a pointer: nothing is copied. post() prefetches the record, so that by the time the engine comes back to
 * this query, having worked on others, the lines are in the cache: the same hiding of latency that a NIC's READ gets.
 * The memory may change while it is looked at (a broken or hostile owner keeps its writable mapping): users of a
 * completion load each number that steers them once, check it, and use the copy (search/graph/walk.c).
 */
#include "channel/channel.h"

#include "base/status.h"

#include <stdlib.h>

/* Of a record that is asked for: of a longer one the CPU fetches the rest by itself, sooner than more prefetches would,
 * which wait for each other (measured: docs/performance.md). */
enum { NEAR_BYTES = 1024 };

typedef struct shm_channel {
    cotra_channel base;
    const uint8_t *region;
    uint32_t n_ready;
    cotra_completion ready[]; /* [slots], in the order of posting */
} shm_channel;

static int shm_post(cotra_channel *channel, const cotra_read *reads, uint32_t n, uint32_t *posted, cotra_error *err)
{
    shm_channel *self = (shm_channel *)channel;
    (void)err;
    if (n > channel->slots - self->n_ready)
        n = channel->slots - self->n_ready;
    for (uint32_t i = 0; i < n; i++) {
        const uint8_t *data = self->region + reads[i].offset;
        uint32_t near = reads[i].length < NEAR_BYTES ? reads[i].length : NEAR_BYTES;
        for (uint32_t line = 0; line < near; line += 64)
            __builtin_prefetch(data + line);
        self->ready[self->n_ready++] = (cotra_completion){.data = data, .slot = reads[i].slot, .status = COTRA_OK};
        channel->read_bytes += reads[i].length;
    }
    channel->reads += n;
    channel->doorbells++;
    *posted = n;
    return COTRA_OK;
}

static int shm_poll(cotra_channel *channel, cotra_completion *out, uint32_t capacity, uint32_t *n, cotra_error *err)
{
    shm_channel *self = (shm_channel *)channel;
    (void)err;
    uint32_t count = self->n_ready < capacity ? self->n_ready : capacity;
    for (uint32_t i = 0; i < count; i++)
        out[i] = self->ready[i];
    for (uint32_t i = count; i < self->n_ready; i++)
        self->ready[i - count] = self->ready[i];
    self->n_ready -= count;
    *n = count;
    return COTRA_OK;
}

static void shm_close(cotra_channel *channel)
{
    free(channel);
}

static const cotra_channel_ops shm_ops = {.name = "shm", .post = shm_post, .poll = shm_poll, .close = shm_close};

int cotra_channel_open_shm(const cotra_arena *arena, uint32_t slots, uint32_t slot_bytes, cotra_channel **out,
                           cotra_error *err)
{
    *out = NULL;
    int status = cotra_channel_limits(&slots, &slot_bytes, err);
    if (status)
        return status;
    cotra_arena_info info;
    cotra_arena_get_info(arena, &info);
    if (info.address % 8) /* a READ is a pointer, and the numbers of a record are loaded through it */
        return cotra_fail(err, COTRA_ERR_ARGUMENT, "shm channel: a region must be 8-byte aligned in memory");
    shm_channel *self = calloc(1, sizeof *self + slots * sizeof self->ready[0]);
    if (!self)
        return cotra_fail(err, COTRA_ERR_NO_MEMORY, "shm channel: no memory for %u slots", slots);
    self->base.ops = &shm_ops;
    self->base.region_bytes = info.length_bytes;
    self->base.slots = slots;
    self->base.slot_bytes = slot_bytes;
    self->base.post_batch = 1;
    self->base.in_flight = 3; /* memory is a wire of ~100 ns; tables of more walks push each other out of L1 */
    self->region = (const uint8_t *)(uintptr_t)info.address;
    *out = &self->base;
    return COTRA_OK;
}
