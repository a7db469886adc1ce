/* model: another channel seen through a fabric that we do not own.
 *
 * Every READ of the inner channel is held back until the modelled fabric would have delivered it: a NIC that starts at
 * most reads_per_second, a link that carries bytes_per_second, and a round trip on top. Faults are counted in READs, so
 * a test that asks for one gets it at the same place each time.
 */
#include "channel/channel.h"

#include "base/status.h"

#include <stdlib.h>
#include <string.h>

typedef struct flight { /* a READ in progress */
    uint64_t due_ns;
    uint64_t ordinal; /* which READ, counted from 1 */
    cotra_completion completion;
    uint32_t length;
} flight;

typedef struct model_channel {
    cotra_channel base;
    cotra_channel *inner;
    cotra_model_params params;
    uint64_t ns_per_read;
    double ns_per_byte;
    uint64_t nic_free_ns;  /* when the NIC may start the next READ */
    uint64_t link_free_ns; /* when the link may carry the next byte */
    uint64_t started;      /* READs posted since open */
    uint32_t n_held, first_held;
    uint8_t *scratch; /* [slots][slot_bytes], only where corrupt_every needs a copy */
    flight *flights;  /* [slots] */
    uint32_t *ring;   /* [slots]: those completed by the inner channel and not due yet, in order of completion */
} model_channel;

static int model_post(cotra_channel *channel, const cotra_read *reads, uint32_t n, uint32_t *posted, cotra_error *err)
{
    model_channel *self = (model_channel *)channel;
    int status = cotra_channel_post(self->inner, reads, n, posted, err);
    if (*posted)
        channel->doorbells++;
    uint64_t now = cotra_clock_ns();
    for (uint32_t i = 0; i < *posted; i++) {
        const uint64_t start = self->nic_free_ns > now ? self->nic_free_ns : now;
        self->nic_free_ns = start + self->ns_per_read;
        const uint64_t end = start + self->params.round_trip_ns;
        self->link_free_ns = (self->link_free_ns > end ? self->link_free_ns : end) +
                             (uint64_t)((double)reads[i].length * self->ns_per_byte);
        flight *of = &self->flights[reads[i].slot];
        of->due_ns = self->link_free_ns;
        of->length = reads[i].length;
        of->ordinal = ++self->started;
    }
    return status;
}

/* Applies the faults to one completion; returns 0 when it is to be swallowed. */
static int model_fault(model_channel *self, cotra_completion *completion)
{
    const cotra_model_params *params = &self->params;
    const uint64_t ordinal = self->flights[completion->slot].ordinal;
    if (completion->status != COTRA_OK) {
        if (self->base.error.status == COTRA_OK)
            self->base.error = self->inner->error;
        return 1;
    }
    if (params->drop_after_reads && ordinal > params->drop_after_reads)
        return 0;
    if (params->fail_after_reads && ordinal > params->fail_after_reads) {
        completion->status = params->fail_status;
        if (self->base.error.status == COTRA_OK) {
            cotra_fail(&self->base.error, params->fail_status, "model: READ %llu failed as asked",
                       (unsigned long long)ordinal);
            self->base.error.wc_status = params->fail_wc_status;
        }
    } else if (params->corrupt_every && ordinal % params->corrupt_every == 0) {
        const uint32_t length = self->flights[completion->slot].length;
        uint8_t *copy = self->scratch + (size_t)completion->slot * self->base.slot_bytes;
        memcpy(copy, completion->data, length);
        copy[ordinal % length] ^= 1;
        completion->data = copy;
    }
    return 1;
}

static int model_poll(cotra_channel *channel, cotra_completion *out, uint32_t capacity, uint32_t *n, cotra_error *err)
{
    model_channel *self = (model_channel *)channel;
    for (;;) {
        cotra_completion completions[64];
        uint32_t got;
        int status = cotra_channel_poll(self->inner, completions, 64, &got, err);
        if (status < 0)
            return status;
        for (uint32_t i = 0; i < got; i++) {
            if (!model_fault(self, &completions[i]))
                continue;
            const uint32_t place = self->first_held + self->n_held++;
            self->ring[place < channel->slots ? place : place - channel->slots] = completions[i].slot;
            self->flights[completions[i].slot].completion = completions[i];
        }
        if (got < 64)
            break;
    }
    const uint64_t now = self->n_held ? cotra_clock_ns() : 0;
    while (self->n_held && *n < capacity) {
        const flight *first = &self->flights[self->ring[self->first_held]];
        if (first->due_ns > now)
            break;
        if (first->completion.status == COTRA_OK) {
            channel->reads++;
            channel->read_bytes += first->length;
        }
        out[(*n)++] = first->completion;
        self->first_held = self->first_held + 1 < channel->slots ? self->first_held + 1 : 0;
        self->n_held--;
    }
    return COTRA_OK;
}

static void model_close(cotra_channel *channel)
{
    model_channel *self = (model_channel *)channel;
    free(self->scratch);
    free(self->flights);
    free(self->ring);
    free(self);
}

static const cotra_channel_ops model_over_shm = {"model+shm", model_post, model_poll, model_close};
static const cotra_channel_ops model_over_verbs = {"model+verbs", model_post, model_poll, model_close};
static const cotra_channel_ops model_over_other = {"model", model_post, model_poll, model_close};

int cotra_channel_open_model(cotra_channel *inner, const cotra_model_params *params, cotra_channel **out,
                             cotra_error *err)
{
    *out = NULL;
    if (params->fail_after_reads && params->fail_status >= 0)
        return cotra_fail(err, COTRA_ERR_ARGUMENT, "model: fail_status must be an error, not %d", params->fail_status);
    model_channel *self = calloc(1, sizeof *self);
    if (!self)
        return cotra_fail(err, COTRA_ERR_NO_MEMORY, "model channel: no memory");
    const char *name = inner->ops->name;
    self->base.ops = strcmp(name, "shm") == 0     ? &model_over_shm
                     : strcmp(name, "verbs") == 0 ? &model_over_verbs
                                                  : &model_over_other;
    self->base.region_bytes = inner->region_bytes;
    self->base.slots = inner->slots;
    self->base.slot_bytes = inner->slot_bytes;
    self->base.post_batch = inner->post_batch;
    self->inner = inner;
    self->params = *params;
    self->ns_per_read = params->reads_per_second ? 1000000000u / params->reads_per_second : 0;
    self->ns_per_byte = params->bytes_per_second ? 1e9 / (double)params->bytes_per_second : 0;
    size_t slots = inner->slots;
    self->flights = calloc(slots, sizeof *self->flights);
    self->ring = calloc(slots, sizeof *self->ring);
    if (params->corrupt_every)
        self->scratch = malloc(slots * inner->slot_bytes);
    if (!self->flights || !self->ring || (params->corrupt_every && !self->scratch)) {
        model_close(&self->base);
        return cotra_fail(err, COTRA_ERR_NO_MEMORY, "model channel: no memory for %zu slots", slots);
    }
    *out = &self->base;
    return COTRA_OK;
}
