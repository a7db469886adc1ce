/* The arithmetic of a hop, one table of functions for each SIMD level, chosen once when an engine is made.
 *
 * Vectors and queries are padded with zeros: a query to a multiple of 32 floats, a stored vector to a multiple of 32
 * bytes, so that no kernel has a tail. Estimates are made of integer sums and single float operations, so they are the
 * same bits at every level; exact distances differ between levels by the order of their sums: |difference| <= 1e-5 x
 * (|q| + |x|)^2.
 */
#ifndef COTRA_KERNELS_KERNELS_H
#define COTRA_KERNELS_KERNELS_H

#include "cotra.h"

/* Squared distance, or inner product, of query float32[dim] and a vector of one type. */
typedef float (*cotra_pair_kernel)(const float *query, const void *vector, uint32_t dim);

enum { COTRA_LEAST_STEP = 16 };

#define COTRA_LEAST_WEIGHT 1e-30f
#define COTRA_MOST_WEIGHT  1e30f

typedef struct cotra_kernels {
    cotra_pair_kernel l2[3], dot[3]; /* by vector type */
    /* sums[32] of a 4-bit look-up table over one block of codes; laid out as in format/{codes,image}.h */
    void (*scan)(const uint8_t *table, const uint8_t *codes, uint32_t code_dim, uint32_t *sums);
    /* out[32] = distance + t f0 - f1 (offset + scale x sums); the bits of those below `bound` (a NaN is not) */
    uint32_t (*estimate)(const uint32_t *sums, const float *f0, const float *f1, float distance, float t, float offset,
                         float scale, float bound, float *out);
    /* out[32] = 1 / (f1 spread + |f0| rounding), within COTRA_LEAST_WEIGHT and COTRA_MOST_WEIGHT (the most for NaN) */
    void (*weigh)(const float *f0, const float *f1, float spread, float rounding, float *out);
    /* the inner product of integers, n a multiple of 64 and at most COTRA_MAX_DIM: the same at every level */
    int32_t (*dot_i8)(const int16_t *query, const int8_t *vector, uint32_t n);
    /* the place of the least of n keys, the first where there are several; n is a multiple of COTRA_LEAST_STEP, keys
     * are 64-byte aligned and no NaN */
    uint32_t (*least)(const float *keys, uint32_t n);
} cotra_kernels;

extern const cotra_kernels cotra_kernels_portable;
extern const cotra_kernels cotra_kernels_avx2;
extern const cotra_kernels cotra_kernels_avx512;

/* NULL where this CPU or this build does not have the level. */
const cotra_kernels *cotra_kernels_get(int simd);
/* The distance of `metric` from a pair kernel's result. */
static inline float cotra_metric_distance(const cotra_kernels *kernels, uint32_t metric, uint32_t vector_type,
                                          const float *query, const void *vector, uint32_t dim)
{
    return metric == COTRA_METRIC_L2 ? kernels->l2[vector_type](query, vector, dim)
                                     : 1.0f - kernels->dot[vector_type](query, vector, dim);
}

#endif
