#include "kernels/kernels.h"

#include "format/vector_types.h"

#include <math.h>

/* Eight running sums, as a vector unit would keep them. */
#define PAIR_KERNEL(name, type, load, term)                                                                            \
    static float name(const float *query, const void *vector, uint32_t dim)                                            \
    {                                                                                                                  \
        const type *x = vector;                                                                                        \
        float sums[8] = {0};                                                                                           \
        for (uint32_t i = 0; i < dim; i += 8)                                                                          \
            for (uint32_t j = 0; j < 8; j++) {                                                                         \
                float a = query[i + j], b = load(x[i + j]);                                                            \
                sums[j] += term(a, b);                                                                                 \
            }                                                                                                          \
        return ((sums[0] + sums[4]) + (sums[1] + sums[5])) + ((sums[2] + sums[6]) + (sums[3] + sums[7]));              \
    }

#define AS_IS(v)      (v)
#define TO_FLOAT(v)   ((float)(v))
#define SQUARE(a, b)  ((a) - (b)) * ((a) - (b))
#define PRODUCT(a, b) (a) * (b)

PAIR_KERNEL(l2_f32, float, AS_IS, SQUARE)
PAIR_KERNEL(l2_f16, uint16_t, cotra_f16_to_f32, SQUARE)
PAIR_KERNEL(l2_u8, uint8_t, TO_FLOAT, SQUARE)
PAIR_KERNEL(dot_f32, float, AS_IS, PRODUCT)
PAIR_KERNEL(dot_f16, uint16_t, cotra_f16_to_f32, PRODUCT)
PAIR_KERNEL(dot_u8, uint8_t, TO_FLOAT, PRODUCT)

static void scan(const uint8_t *table, const uint8_t *codes, uint32_t code_dim, uint32_t *sums)
{
    for (int j = 0; j < 32; j++)
        sums[j] = 0;
    for (uint32_t g = 0; g < code_dim / 4; g++)
        for (int j = 0; j < 16; j++) {
            uint8_t code = codes[g * 16 + j];
            sums[j] += table[g * 16 + (code & 15)];
            sums[j + 16] += table[g * 16 + (code >> 4)];
        }
}

static uint32_t estimate(const uint32_t *sums, const float *f0, const float *f1, float distance, float t, float offset,
                         float scale, float bound, float *out)
{
    uint32_t below = 0;
    for (int j = 0; j < 32; j++) {
        float product = offset + scale * (float)sums[j];
        out[j] = distance + t * f0[j] - f1[j] * product;
        below |= (uint32_t)(out[j] < bound) << j;
    }
    return below;
}

static void weigh(const float *f0, const float *f1, float spread, float rounding, float *out)
{
    for (int j = 0; j < 32; j++) {
        const float weight = 1 / (f1[j] * spread + fabsf(f0[j]) * rounding);
        const float bounded = weight < COTRA_MOST_WEIGHT ? weight : COTRA_MOST_WEIGHT; /* nor is NaN */
        out[j] = bounded > COTRA_LEAST_WEIGHT ? bounded : COTRA_LEAST_WEIGHT;
    }
}

static int32_t dot_i8(const int16_t *query, const int8_t *vector, uint32_t n)
{
    int32_t sum = 0;
    for (uint32_t i = 0; i < n; i++)
        sum += query[i] * vector[i];
    return sum;
}

static uint32_t least(const float *keys, uint32_t n)
{
    uint32_t place = 0;
    for (uint32_t i = 1; i < n; i++)
        if (keys[i] < keys[place])
            place = i;
    return place;
}

const cotra_kernels cotra_kernels_portable = {.l2 = {l2_f32, l2_f16, l2_u8},
                                              .dot = {dot_f32, dot_f16, dot_u8},
                                              .scan = scan,
                                              .estimate = estimate,
                                              .weigh = weigh,
                                              .dot_i8 = dot_i8,
                                              .least = least};
