/* A rough copy of the upper layers' vectors: 8 bits a component, by which a query descends.
 *
 * A descent looks at a hundred vectors and wants no more than a good place to start from. As floats, long vectors cost
 * more than all the rest of a short walk: they come from memory. A sketch is a quarter of that. Its distances err by
 * what rounding adds; sums are of integers, so they are the same bits on every machine.
 */
#ifndef COTRA_SEARCH_SKETCH_H
#define COTRA_SEARCH_SKETCH_H

#include "kernels/kernels.h"
#include "format/image.h"

typedef struct cotra_sketch {
    int8_t *values;  /* [n][stride], of x - m for l2 and x for ip and cosine; zero-padded */
    float *scales;   /* [n]: of one step */
    float *norms2;   /* [n]: squared lengths */
    uint32_t stride; /* dim to a multiple of 64 */
} cotra_sketch;

/* A query as sketches are compared with it. */
typedef struct cotra_query_sketch {
    int16_t *values; /* [stride] */
    float scale, norm2;
} cotra_query_sketch;

/* Whether vectors of that type and dim are long enough for a sketch to be worth it. */
int cotra_sketch_pays(uint32_t vector_type, uint32_t dim);
uint32_t cotra_sketch_stride(uint32_t dim);
/* Of an image's upper vectors, stride_bytes apart. mean: float32[dim], or NULL: 0. */
int cotra_sketch_create(cotra_sketch *sketch, const cotra_image_info *info, const uint8_t *vectors,
                        uint32_t stride_bytes, const float *mean, cotra_error *err);
void cotra_sketch_destroy(cotra_sketch *sketch);
uint64_t cotra_sketch_bytes(const cotra_sketch *sketch, uint64_t n);

/* Of vector - mean, float32[dim], into values of cotra_sketch_stride(dim). */
void cotra_query_sketch_make(const float *vector, const float *mean, uint32_t dim, cotra_query_sketch *query);
/* A vector's distance from the query, and the weight of it as an estimate. */
static inline float cotra_sketch_distance(const cotra_sketch *sketch, const cotra_kernels *kernels, uint32_t metric,
                                          const cotra_query_sketch *query, uint32_t i, float *weight)
{
    const int32_t sum = kernels->dot_i8(query->values, sketch->values + (size_t)i * sketch->stride, sketch->stride);
    const float product = query->scale * sketch->scales[i] * (float)sum;
    /* each component errs evenly by up to half a step, along the query: |q| step / sqrt(12) */
    const float error = query->norm2 * sketch->scales[i] * sketch->scales[i] / 3;
    *weight = error > 1e-30f ? 1 / error : COTRA_MOST_WEIGHT;
    return metric == COTRA_METRIC_L2 ? query->norm2 + sketch->norms2[i] - 2 * product : 1 - product;
}

#endif
