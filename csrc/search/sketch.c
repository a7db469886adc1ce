#include "search/sketch.h"

#include "base/status.h"
#include "format/vector_types.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { MIN_BYTES = 192, UNIT = 64 }; /* a shorter vector is as soon read itself: measured */
#define MOST_Q 4095                  /* 4096 products with 127 fit 32 bits */
#define MOST_X 127

int cotra_sketch_pays(uint32_t vector_type, uint32_t dim)
{
    return vector_type != COTRA_VECTOR_U8 && cotra_vector_bytes(vector_type, dim) >= MIN_BYTES;
}

uint32_t cotra_sketch_stride(uint32_t dim)
{
    return (dim + UNIT - 1) / UNIT * UNIT;
}

/* The step that brings float32[n] into [-most, most], 0 where they are all 0 or not all finite; and the length. */
static float find_step(const float *values, uint32_t n, float most, float *norm2)
{
    float largest = 0;
    *norm2 = 0;
    for (uint32_t i = 0; i < n; i++) {
        const float absolute = fabsf(values[i]);
        largest = absolute > largest ? absolute : largest;
        *norm2 += values[i] * values[i];
    }
    if (!(*norm2 < INFINITY)) /* NaN is not below infinity */
        *norm2 = INFINITY;
    return *norm2 < INFINITY && largest > 1e-30f ? largest / most : 0;
}

static int round_to(float value)
{
    return (int)(value + (value < 0 ? -0.5f : 0.5f));
}

int cotra_sketch_create(cotra_sketch *sketch, const cotra_image_info *info, const uint8_t *vectors,
                        uint32_t stride_bytes, const float *mean, cotra_error *err)
{
    const uint64_t n = info->upper_count;
    const uint32_t dim = info->dim;
    float x[COTRA_MAX_DIM];
    sketch->stride = cotra_sketch_stride(dim);
    sketch->values = calloc(n, sketch->stride);
    sketch->scales = malloc(n * sizeof *sketch->scales);
    sketch->norms2 = malloc(n * sizeof *sketch->norms2);
    if (!sketch->values || !sketch->scales || !sketch->norms2) {
        cotra_sketch_destroy(sketch);
        return cotra_fail(err, COTRA_ERR_NO_MEMORY, "view: no memory for a sketch of %llu vectors",
                          (unsigned long long)n);
    }
    for (uint64_t u = 0; u < n; u++) {
        cotra_own_load(info, vectors + u * stride_bytes, x);
        for (uint32_t i = 0; i < dim && mean; i++)
            x[i] -= mean[i];
        const float step = find_step(x, dim, MOST_X, &sketch->norms2[u]);
        sketch->scales[u] = step;
        for (uint32_t i = 0; i < dim && step > 0; i++)
            sketch->values[u * sketch->stride + i] = (int8_t)round_to(x[i] / step);
    }
    return COTRA_OK;
}

void cotra_sketch_destroy(cotra_sketch *sketch)
{
    free(sketch->values);
    free(sketch->scales);
    free(sketch->norms2);
    memset(sketch, 0, sizeof *sketch);
}

uint64_t cotra_sketch_bytes(const cotra_sketch *sketch, uint64_t n)
{
    return sketch->values ? n * (sketch->stride + sizeof *sketch->scales + sizeof *sketch->norms2) : 0;
}

void cotra_query_sketch_make(const float *vector, const float *mean, uint32_t dim, cotra_query_sketch *query)
{
    float x[COTRA_MAX_DIM];
    for (uint32_t i = 0; i < dim; i++)
        x[i] = mean ? vector[i] - mean[i] : vector[i];
    const float step = find_step(x, dim, MOST_Q, &query->norm2);
    const float inverse = step > 0 ? 1 / step : 0;
    query->scale = step;
    memset(query->values, 0, cotra_sketch_stride(dim) * sizeof *query->values);
    for (uint32_t i = 0; i < dim; i++)
        query->values[i] = (int16_t)round_to(x[i] * inverse);
}
