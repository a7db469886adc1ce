/* A query, as nodes are compared with it: its vector, padded and normalised where the metric asks for it, and its
 * look-up table for neighbours' codes. */
#ifndef COTRA_SEARCH_QUERY_H
#define COTRA_SEARCH_QUERY_H

#include "kernels/kernels.h"
#include "search/view.h"

#include <string.h>

typedef struct cotra_query {
    float *vector;             /* [dim padded to 32 floats] */
    float *scratch;            /* [2 * code_dim] */
    float *own;                /* [dim]: of a centred record */
    cotra_query_codes codes;   /* of q - m, for all records that are not centred */
    cotra_query_codes near;    /* for the centred record that is expanded */
    cotra_query_sketch sketch; /* where the view has one */
    float norm2;               /* squared length; 0 for l2 */
} cotra_query;

/* A query at one node: what an estimate of its neighbours takes (format/codes.h). */
typedef struct cotra_hop {
    const cotra_query_codes *codes;
    float distance; /* d(q, c) */
    float t;
    float gap2;             /* |u|^2 */
    float spread, rounding; /* the standard deviation of an estimate is about f1 spread + |f0| rounding */
} cotra_hop;

int cotra_query_create(cotra_query *query, uint32_t max_dim, cotra_error *err);
void cotra_query_destroy(cotra_query *query);
/* Copies float32[dim] to where there is room for it padded to 32 floats, as the view's metric wants it. */
void cotra_query_copy(const cotra_view *view, const float *vector, float *to);
/* Makes the look-up table; it serves all shards of one graph. */
void cotra_query_encode(cotra_query *query, const cotra_kernels *kernels, const cotra_view *view);
/* Prepares for the neighbours of the node whose record this is, at its exact distance. */
void cotra_query_hop(cotra_query *query, const cotra_view *view, const cotra_record_head *head, const uint8_t *own,
                     float distance, cotra_hop *hop);
/* The scale of what estimates near a node are wrong by: half of |u| times the length of its links, on average. That is
 * about the distance itself for l2 and cosine; an inner product says nothing of it. */
float cotra_query_scale(const cotra_view *view, const uint8_t *record, uint32_t count, const cotra_hop *hop);

/* bf16 -> float, a block of them */
static inline void cotra_load_factors(const uint8_t *from, float *to)
{
    uint16_t halves[COTRA_BLOCK];
    uint32_t bits[COTRA_BLOCK];
    memcpy(halves, from, sizeof halves);
    for (int j = 0; j < COTRA_BLOCK; j++)
        bits[j] = (uint32_t)halves[j] << 16;
    memcpy(to, bits, sizeof bits);
}

/* Estimates of the block of a record's `count` neighbours that begins at `begin`, and what each counts for in a mean:
 * the inverse of its standard deviation; the bits of those below the limit. */
static inline uint32_t cotra_query_estimate(const cotra_hop *hop, const cotra_kernels *kernels, const cotra_view *view,
                                            const uint8_t *record, uint32_t begin, uint32_t count, float limit,
                                            float *estimates, float *weights)
{
    const cotra_record_layout *layout = &view->record;
    uint32_t sums[COTRA_BLOCK];
    float f0[COTRA_BLOCK], f1[COTRA_BLOCK];
    kernels->scan(hop->codes->table, record + layout->codes + begin / COTRA_BLOCK * layout->block_bytes,
                  view->info.code_dim, sums);
    cotra_load_factors(record + layout->f0 + 2 * begin, f0);
    cotra_load_factors(record + layout->f1 + 2 * begin, f1);
    const uint32_t below =
        kernels->estimate(sums, f0, f1, hop->distance, hop->t, hop->codes->offset, hop->codes->scale, limit, estimates);
    kernels->weigh(f0, f1, hop->spread, hop->rounding, weights);
    return count - begin < COTRA_BLOCK ? below & ((1u << (count - begin)) - 1) : below;
}

#endif
