#include "format/vector_types.h"

#include "cotra.h"

#include <math.h>
#include <string.h>

float cotra_f16_to_f32(uint16_t half)
{
    uint32_t sign = (uint32_t)(half & 0x8000u) << 16, exponent = half >> 10 & 31u, fraction = half & 1023u, bits;
    if (exponent == 0) { /* zero or subnormal: fraction x 2^-24, exact in float32 */
        float value = (float)fraction * 0x1p-24f;
        return sign ? -value : value;
    }
    bits = exponent == 31 ? sign | 0x7F800000u | fraction << 13 : sign | (exponent + 112) << 23 | fraction << 13;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

uint16_t cotra_f32_to_f16(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    uint16_t sign = (uint16_t)(bits >> 16 & 0x8000u);
    uint32_t magnitude = bits & 0x7FFFFFFFu;
    if (magnitude >= 0x47800000u) /* 65536 and above, infinity, NaN */
        return (uint16_t)(sign | (magnitude > 0x7F800000u ? 0x7E00u : 0x7C00u));
    if (magnitude < 0x38800000u) { /* below 2^-14: a multiple of 2^-24 */
        float absolute;
        memcpy(&absolute, &magnitude, sizeof absolute);
        float scaled = absolute * 0x1p24f + 0x1p23f; /* adding 2^23 rounds to an integer, ties to even */
        memcpy(&bits, &scaled, sizeof bits);
        return (uint16_t)(sign | (bits & 0x7FFu));
    }
    magnitude += 0xFFFu + (magnitude >> 13 & 1u);
    return (uint16_t)(sign | (magnitude - 0x38000000u) >> 13);
}

void cotra_vector_load(uint32_t vector_type, const void *vector, uint32_t dim, float *out)
{
    if (vector_type == COTRA_VECTOR_F32) {
        memcpy(out, vector, 4 * (size_t)dim);
    } else if (vector_type == COTRA_VECTOR_F16) {
        const uint16_t *halves = vector;
        for (uint32_t i = 0; i < dim; i++)
            out[i] = cotra_f16_to_f32(halves[i]);
    } else {
        const uint8_t *bytes = vector;
        for (uint32_t i = 0; i < dim; i++)
            out[i] = (float)bytes[i];
    }
}

int cotra_vector_store(uint32_t vector_type, const float *values, uint32_t dim, void *out)
{
    int exact = 1;
    if (vector_type == COTRA_VECTOR_F32) {
        memcpy(out, values, 4 * (size_t)dim);
    } else if (vector_type == COTRA_VECTOR_F16) {
        uint16_t *halves = out;
        for (uint32_t i = 0; i < dim; i++) {
            halves[i] = cotra_f32_to_f16(values[i]);
            exact &= cotra_f16_to_f32(halves[i]) == values[i];
        }
    } else {
        uint8_t *bytes = out;
        for (uint32_t i = 0; i < dim; i++) {
            float value = values[i];
            bytes[i] = value >= 0 && value <= 255 ? (uint8_t)value : 0;
            exact &= (float)bytes[i] == value;
        }
    }
    return exact;
}

bool cotra_is_scaled(const cotra_image_info *info)
{
    return info->metric == COTRA_METRIC_COSINE && info->vector_type != COTRA_VECTOR_F32;
}

void cotra_own_load(const cotra_image_info *info, const void *vector, float *out)
{
    cotra_vector_load(info->vector_type, vector, info->dim, out);
    if (!cotra_is_scaled(info))
        return;
    double length2 = 0;
    for (uint32_t i = 0; i < info->dim; i++)
        length2 += (double)out[i] * out[i];
    const float inverse = length2 > 0 ? (float)(1 / sqrt(length2)) : 0;
    for (uint32_t i = 0; i < info->dim; i++)
        out[i] *= inverse;
}

#define SCALED_ERROR 6e-7 /* relative: of a component that was normalised in float32 */

/* Whether scale x normalised is, but for rounding, a vector of the type; writes it. */
static int try_scale(const cotra_image_info *info, const float *normalised, double scale, void *out)
{
    uint8_t *bytes = out;
    uint16_t *halves = out;
    for (uint32_t i = 0; i < info->dim; i++) {
        const double wanted = scale * normalised[i];
        double found;
        if (info->vector_type == COTRA_VECTOR_U8) {
            if (!(wanted > -0.5 && wanted < 255.5))
                return 0;
            bytes[i] = (uint8_t)(wanted + 0.5);
            found = bytes[i];
        } else {
            halves[i] = cotra_f32_to_f16((float)wanted);
            found = cotra_f16_to_f32(halves[i]);
        }
        if (!(fabs(found - wanted) <= SCALED_ERROR * fabs(wanted)))
            return 0;
    }
    return 1;
}

/* The largest component of what is looked for is one of 255 numbers, or has one of 1,024 fractions: its exponent does
 * not matter, for what float16 holds it holds at any larger exponent too. */
int cotra_scaled_store(const cotra_image_info *info, const float *normalised, void *out)
{
    float largest = 0;
    for (uint32_t i = 0; i < info->dim; i++)
        largest = fabsf(normalised[i]) > largest ? fabsf(normalised[i]) : largest;
    if (!(largest > 0))
        return try_scale(info, normalised, 1, out);
    const int u8 = info->vector_type == COTRA_VECTOR_U8;
    for (int i = u8 ? 1 : 1024; i < (u8 ? 256 : 2048); i++)
        if (try_scale(info, normalised, (u8 ? 1.0 : 16.0) * i / largest, out))
            return 1;
    return 0;
}
