/* What all channels share: limits, bounds, and the blocking reads built from post and poll. */
#include "channel/channel.h"

#include "base/status.h"

#include <stdio.h>
#include <string.h>

int cotra_channel_limits(uint32_t *slots, uint32_t *slot_bytes, cotra_error *err)
{
    if (*slots == 0)
        *slots = COTRA_DEFAULT_SLOTS;
    if (*slot_bytes == 0)
        *slot_bytes = COTRA_DEFAULT_SLOT_BYTES;
    if (*slots > COTRA_MAX_SLOTS)
        return cotra_fail(err, COTRA_ERR_ARGUMENT, "a channel has at most %d slots, not %u", COTRA_MAX_SLOTS, *slots);
    if (*slot_bytes > 1u << 30)
        return cotra_fail(err, COTRA_ERR_ARGUMENT, "a READ is at most 1 GiB, not %u bytes", *slot_bytes);
    return COTRA_OK;
}

int cotra_channel_post(cotra_channel *channel, const cotra_read *reads, uint32_t n, uint32_t *posted, cotra_error *err)
{
    *posted = 0;
    for (uint32_t i = 0; i < n; i++) {
        const cotra_read *read = &reads[i];
        if (read->length > channel->region_bytes || read->offset > channel->region_bytes - read->length)
            return cotra_fail(err, COTRA_ERR_BOUNDS, "READ of %u bytes at %llu is outside a region of %llu bytes",
                              read->length, (unsigned long long)read->offset,
                              (unsigned long long)channel->region_bytes);
        if (read->length > channel->slot_bytes || read->slot >= channel->slots)
            return cotra_fail(err, COTRA_ERR_ARGUMENT,
                              "READ of %u bytes into slot %u: the channel has %u slots of %u bytes", read->length,
                              read->slot, channel->slots, channel->slot_bytes);
    }
    int status = channel->ops->post(channel, reads, n, posted, err);
    channel->in_progress += *posted;
    return status;
}

int cotra_channel_poll(cotra_channel *channel, cotra_completion *out, uint32_t capacity, uint32_t *n, cotra_error *err)
{
    *n = 0;
    int status = channel->ops->poll(channel, out, capacity, n, err);
    channel->in_progress -= *n;
    return status;
}

int cotra_channel_settle(cotra_channel *channel, cotra_error *err)
{
    while (channel->in_progress) {
        cotra_completion forgotten[16];
        uint32_t n;
        int status = cotra_channel_poll(channel, forgotten, 16, &n, err);
        if (status < 0)
            return status;
        if (n == 0)
            return cotra_fail(
                err, COTRA_ERR_CLOSED,
                "%s channel: %u READs of an earlier call that failed are still in progress: open another one",
                channel->ops->name, channel->in_progress);
    }
    return COTRA_OK;
}

int cotra_channel_report(const cotra_channel *channel, int status, cotra_error *err)
{
    if (channel->error.status == COTRA_OK)
        return cotra_fail(err, status, "%s channel: %s", channel->ops->name, cotra_status_name(status));
    if (err)
        *err = channel->error;
    return channel->error.status;
}

void cotra_channel_get_info(const cotra_channel *channel, cotra_channel_info *out)
{
    memset(out, 0, sizeof *out);
    snprintf(out->transport, sizeof out->transport, "%s", channel->ops->name);
    out->region_bytes = channel->region_bytes;
    out->slots = channel->slots;
    out->slot_bytes = channel->slot_bytes;
    out->reads = channel->reads;
    out->read_bytes = channel->read_bytes;
    out->doorbells = channel->doorbells;
}

void cotra_channel_close(cotra_channel *channel)
{
    if (channel)
        channel->ops->close(channel);
}

enum { BATCH = 64, IDLE_POLLS = 1024 /* between looks at the clock, which is a system call on some machines */ };

/* The one loop behind the blocking reads: n READs, READ i at offset(i) of length(i) bytes, at most depth in progress,
 * each copied to its place or timed. */
typedef struct transfer {
    const uint64_t *offsets; /* NULL: consecutive pieces from first_offset */
    uint64_t first_offset;
    uint64_t total_bytes; /* of consecutive pieces */
    uint32_t piece_bytes;
    uint64_t n;
    uint8_t *destination;
    uint64_t *latencies_ns;
} transfer;

static uint32_t piece_length(const transfer *job, uint64_t i)
{
    if (job->offsets || (i + 1) * job->piece_bytes <= job->total_bytes)
        return job->piece_bytes;
    return (uint32_t)(job->total_bytes - i * job->piece_bytes);
}

static int transfer_run(cotra_channel *channel, const transfer *job, uint32_t depth, uint64_t timeout_ns,
                        cotra_error *err)
{
    /* slot s holds READ number busy[s]; free slots are kept on a stack */
    uint64_t started[BATCH], busy[BATCH];
    uint32_t idle[BATCH], n_idle = 0;
    uint64_t next = 0, done = 0, now = cotra_clock_ns(), last_progress = now;
    uint32_t idle_polls = 0;
    int failed = cotra_channel_settle(channel, err);

    if (failed)
        return failed;
    depth = depth < channel->slots ? depth : channel->slots;
    depth = depth < BATCH ? depth : BATCH;
    for (uint32_t s = depth; s-- > 0;)
        idle[n_idle++] = s;
    while (done < job->n) {
        cotra_read reads[BATCH];
        uint32_t n = 0, posted = 0;
        while (!failed && n < n_idle && next + n < job->n) {
            uint64_t i = next + n;
            uint32_t slot = idle[n_idle - 1 - n];
            reads[n].offset = job->offsets ? job->offsets[i] : job->first_offset + i * job->piece_bytes;
            reads[n].length = piece_length(job, i);
            reads[n].slot = slot;
            busy[slot] = i;
            n++;
        }
        if (n) { /* at the time when their slots became free: one look at the clock a READ */
            for (uint32_t i = 0; i < n; i++)
                started[reads[i].slot] = now;
            failed = cotra_channel_post(channel, reads, n, &posted, err);
            n_idle -= posted;
            next += posted;
        }
        if (failed && next == done)
            return failed;

        cotra_completion completions[BATCH];
        uint32_t n_completions;
        int status = cotra_channel_poll(channel, completions, BATCH, &n_completions, err);
        if (status < 0)
            return status;
        if (n_completions || ++idle_polls % IDLE_POLLS == 0)
            now = cotra_clock_ns();
        for (uint32_t c = 0; c < n_completions; c++) {
            uint32_t slot = completions[c].slot;
            if (completions[c].status != COTRA_OK) {
                failed = cotra_channel_report(channel, completions[c].status, err);
            } else {
                if (job->destination)
                    memcpy(job->destination + busy[slot] * job->piece_bytes, completions[c].data,
                           piece_length(job, busy[slot]));
                if (job->latencies_ns)
                    job->latencies_ns[busy[slot]] = now - started[slot];
            }
            idle[n_idle++] = slot;
            done++;
        }
        if (n_completions)
            last_progress = now;
        if (failed && next == done)
            return failed;
        if (now - last_progress > timeout_ns) {
            if (failed)
                return failed;
            return cotra_fail(err, COTRA_ERR_DEADLINE, "%s channel: a READ did not complete within %llu ms",
                              channel->ops->name, (unsigned long long)(timeout_ns / 1000000u));
        }
    }
    return failed;
}

int cotra_channel_read(cotra_channel *channel, uint64_t offset, uint64_t length_bytes, void *destination,
                       uint64_t timeout_ns, cotra_error *err)
{
    if (length_bytes > channel->region_bytes || offset > channel->region_bytes - length_bytes)
        return cotra_fail(err, COTRA_ERR_BOUNDS, "READ of %llu bytes at %llu is outside a region of %llu bytes",
                          (unsigned long long)length_bytes, (unsigned long long)offset,
                          (unsigned long long)channel->region_bytes);
    transfer job = {.first_offset = offset,
                    .total_bytes = length_bytes,
                    .piece_bytes = channel->slot_bytes,
                    .n = (length_bytes + channel->slot_bytes - 1) / channel->slot_bytes,
                    .destination = destination};
    return transfer_run(channel, &job, BATCH, timeout_ns, err);
}

int cotra_channel_gather(cotra_channel *channel, const uint64_t *offsets, uint64_t n, uint32_t length_bytes,
                         void *destination, uint64_t timeout_ns, cotra_error *err)
{
    transfer job = {.offsets = offsets, .piece_bytes = length_bytes, .n = n, .destination = destination};
    return transfer_run(channel, &job, BATCH, timeout_ns, err);
}

int cotra_channel_read_loop(cotra_channel *channel, const uint64_t *offsets, uint64_t n, uint32_t length_bytes,
                            uint32_t depth, uint64_t timeout_ns, uint64_t *latencies_ns, uint64_t *elapsed_ns,
                            cotra_error *err)
{
    if (depth == 0)
        return cotra_fail(err, COTRA_ERR_ARGUMENT, "read loop: depth must be at least 1");
    transfer job = {.offsets = offsets, .piece_bytes = length_bytes, .n = n, .latencies_ns = latencies_ns};
    uint64_t start = cotra_clock_ns();
    int status = transfer_run(channel, &job, depth, timeout_ns, err);
    *elapsed_ns = cotra_clock_ns() - start;
    return status;
}
