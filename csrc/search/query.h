/* A query, as nodes are compared with it: its vector, padded and normalised where the metric asks for it, and its
 * look-up table for neighbours' codes. */
#ifndef COTRA_SEARCH_QUERY_H
#define COTRA_SEARCH_QUERY_H

#include "distance/kernels.h"
#include "search/view.h"

#include <string.h>

typedef struct cotra_query {
    float *vector;  /* [dim padded to 32 floats] */
    float *scratch; /* [2 * code_dim] */
    cotra_query_codes codes;
} cotra_query;

int cotra_query_create(cotra_query *query, uint32_t max_dim, cotra_error *err);
void cotra_query_destroy(cotra_query *query);
/* Copies float32[dim] to where there is room for it padded to 32 floats, as the view's metric wants it. */
void cotra_query_copy(const cotra_view *view, const float *vector, float *to);
/* Makes the look-up table; it serves all shards of one graph. */
void cotra_query_encode(cotra_query *query, const cotra_view *view);
/* The squared length of a record's own vector. */
float cotra_query_norm2(cotra_query *query, const cotra_kernels *kernels, const cotra_image_info *info,
                        const uint8_t *vector);

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

/* Estimates of the block of a record's `count` neighbours that begins at `begin`; the bits of those below the limit. */
static inline uint32_t cotra_query_estimate(const cotra_query *query, const cotra_kernels *kernels,
                                            const cotra_view *view, const uint8_t *record, uint32_t begin,
                                            uint32_t count, float distance, float limit, float *estimates)
{
    const cotra_record_layout *layout = &view->record;
    uint32_t sums[COTRA_BLOCK];
    float f0[COTRA_BLOCK], f1[COTRA_BLOCK];
    kernels->scan(query->codes.table, record + layout->codes + begin / COTRA_BLOCK * layout->block_bytes,
                  view->info.code_dim, sums);
    cotra_load_factors(record + layout->f0 + 2 * begin, f0);
    cotra_load_factors(record + layout->f1 + 2 * begin, f1);
    const uint32_t below =
        kernels->estimate(sums, f0, f1, distance, query->codes.offset, query->codes.scale, limit, estimates);
    return count - begin < COTRA_BLOCK ? below & ((1u << (count - begin)) - 1) : below;
}

#endif
