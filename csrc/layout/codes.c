#include "layout/codes.h"

#include "base/random.h"
#include "base/status.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { ROUNDS = 4 };

/* Element by element the same operations at every vector width, so the same result on every machine. */
#if defined(__x86_64__) && !defined(__SANITIZE_ADDRESS__)
#define WIDE __attribute__((target_clones("avx2", "default")))
#else
#define WIDE
#endif

int cotra_rotation_create(uint64_t seed, uint32_t dim, cotra_rotation *out, cotra_error *err)
{
    out->dim = dim;
    out->code_dim = cotra_code_dim(dim);
    out->window = 1;
    while (out->window * 2 <= out->code_dim)
        out->window *= 2;
    size_t n = (size_t)ROUNDS * out->code_dim;
    out->signs = malloc(n * sizeof *out->signs);
    if (!out->signs)
        return cotra_fail(err, COTRA_ERR_NO_MEMORY, "rotation: no memory");
    for (size_t i = 0; i < n; i += 64) {
        uint64_t bits = cotra_random_next(&seed);
        for (size_t j = 0; j < 64; j++)
            out->signs[i + j] = bits >> j & 1 ? 1.0f : -1.0f;
    }
    return COTRA_OK;
}

void cotra_rotation_destroy(cotra_rotation *rotation)
{
    free(rotation->signs);
    rotation->signs = NULL;
}

/* The fast Walsh-Hadamard transform of n (a power of two, >= 64) values, scaled to keep lengths. */
WIDE static void hadamard(float *restrict x, uint32_t n, float scale)
{
    for (uint32_t i = 0; i < n; i += 8) { /* the first three levels, within 8 values */
        float a0 = x[i] + x[i + 1], a1 = x[i] - x[i + 1], a2 = x[i + 2] + x[i + 3], a3 = x[i + 2] - x[i + 3];
        float a4 = x[i + 4] + x[i + 5], a5 = x[i + 4] - x[i + 5], a6 = x[i + 6] + x[i + 7], a7 = x[i + 6] - x[i + 7];
        float b0 = a0 + a2, b1 = a1 + a3, b2 = a0 - a2, b3 = a1 - a3;
        float b4 = a4 + a6, b5 = a5 + a7, b6 = a4 - a6, b7 = a5 - a7;
        x[i] = b0 + b4, x[i + 1] = b1 + b5, x[i + 2] = b2 + b6, x[i + 3] = b3 + b7;
        x[i + 4] = b0 - b4, x[i + 5] = b1 - b5, x[i + 6] = b2 - b6, x[i + 7] = b3 - b7;
    }
    for (uint32_t half = 8; half < n; half *= 2)
        for (uint32_t i = 0; i < n; i += 2 * half)
            for (uint32_t j = i; j < i + half; j++) {
                float a = x[j], b = x[j + half];
                x[j] = a + b;
                x[j + half] = a - b;
            }
    for (uint32_t i = 0; i < n; i++)
        x[i] *= scale;
}

WIDE static void flip(float *restrict x, const float *restrict signs, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++)
        x[i] *= signs[i];
}

/* Rotates each pair (i, i + n/2) by 45 degrees: mixes the part that the window left out (a step of Kac's walk). */
WIDE static void mix_halves(float *restrict x, uint32_t n)
{
    const float s = 0.70710678118654752f;
    for (uint32_t i = 0; i < n / 2; i++) {
        float a = x[i], b = x[i + n / 2];
        x[i] = (a + b) * s;
        x[i + n / 2] = (a - b) * s;
    }
}

void cotra_rotation_apply(const cotra_rotation *rotation, const float *in, float *out)
{
    const uint32_t n = rotation->code_dim, window = rotation->window;
    const float scale = 1.0f / sqrtf((float)window);
    memcpy(out, in, rotation->dim * sizeof *out);
    memset(out + rotation->dim, 0, (n - rotation->dim) * sizeof *out);
    for (int round = 0; round < ROUNDS; round++) {
        flip(out, rotation->signs + (size_t)round * n, n);
        hadamard(round % 2 ? out + (n - window) : out, window, scale);
        if (window != n)
            mix_halves(out, n);
    }
}

void cotra_query_codes_make(const cotra_rotation *rotation, const float *query, const float *mean, float *scratch,
                            cotra_query_codes *codes)
{
    const uint32_t n = rotation->code_dim;
    float *rotated = scratch, *centred = scratch + n;
    for (uint32_t i = 0; i < rotation->dim; i++)
        centred[i] = query[i] - mean[i];
    cotra_rotation_apply(rotation, centred, rotated);

    /* A group's entry v is the sum over its dimensions of +x or -x as v's bits say, shifted to be >= 0. */
    float widest = 0, low_sum = 0;
    for (uint32_t g = 0; g < n; g += 4) {
        float low = fabsf(rotated[g]) + fabsf(rotated[g + 1]) + fabsf(rotated[g + 2]) + fabsf(rotated[g + 3]);
        low_sum -= low;
        widest = low > widest ? low : widest;
    }
    const float step = widest > 1e-30f ? 2 * widest / 255 : 1, inverse = 1 / step;
    for (uint32_t g = 0; g < n; g += 4) {
        const float *x = rotated + g;
        uint8_t *entry = codes->table + (size_t)g * 4;
        float low = -(fabsf(x[0]) + fabsf(x[1]) + fabsf(x[2]) + fabsf(x[3]));
        float pair[4] = {-x[0] - x[1], x[0] - x[1], -x[0] + x[1], x[0] + x[1]};
        float high[4] = {-x[2] - x[3] - low, x[2] - x[3] - low, -x[2] + x[3] - low, x[2] + x[3] - low};
        for (int v = 0; v < 16; v++) {
            float value = (pair[v & 3] + high[v >> 2]) * inverse + 0.5f;
            entry[v] = (uint8_t)(value < 255 ? value : 255);
        }
    }
    codes->offset = low_sum;
    codes->scale = step;
}

/* The upper half of a float, rounded to nearest even: finite for every value that is far from overflow. */
static uint16_t to_bf16(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return (uint16_t)((bits + 0x7FFFu + (bits >> 16 & 1)) >> 16);
}

/* What a residual is to its code: the signs in nibbles, one byte for each 4 dimensions, and three sums. Eight running
 * sums, the same at every vector width. */
WIDE static void measure(const float *restrict residual, const float *restrict own_rotated, uint32_t n,
                         uint8_t *restrict nibbles, float *restrict sums)
{
    float length2[8] = {0}, absolute[8] = {0}, own_signed[8] = {0};
    for (uint32_t i = 0; i < n; i += 8)
        for (uint32_t j = 0; j < 8; j++) {
            const float r = residual[i + j];
            length2[j] += r * r;
            absolute[j] += fabsf(r);
            own_signed[j] += copysignf(1.0f, r) * own_rotated[i + j];
        }
    for (uint32_t j = 4; j > 0; j /= 2)
        for (uint32_t i = 0; i < j; i++) {
            length2[i] += length2[i + j];
            absolute[i] += absolute[i + j];
            own_signed[i] += own_signed[i + j];
        }
    sums[0] = length2[0];
    sums[1] = absolute[0];
    sums[2] = own_signed[0];
    for (uint32_t i = 0; i < n; i += 4) {
        uint64_t low, high;
        memcpy(&low, residual + i, sizeof low);
        memcpy(&high, residual + i + 2, sizeof high);
        nibbles[i / 4] = (uint8_t)(15 ^ ((low >> 31 & 1) | (low >> 62 & 2) | (high >> 29 & 4) | (high >> 60 & 8)));
    }
}

void cotra_code_write(const cotra_rotation *rotation, uint32_t metric, const float *own, const float *own_rotated,
                      const float *neighbour, float *scratch, const cotra_record_layout *layout, uint8_t *record,
                      uint32_t slot)
{
    const uint32_t n = rotation->code_dim;
    float *residual = scratch, *difference = scratch + n;
    uint8_t nibbles[COTRA_MAX_DIM / 4];
    float sums[3];
    for (uint32_t i = 0; i < rotation->dim; i++)
        difference[i] = neighbour[i] - own[i];
    cotra_rotation_apply(rotation, difference, residual);
    measure(residual, own_rotated, n, nibbles, sums);

    uint8_t *codes = record + layout->codes + (size_t)(slot / COTRA_BLOCK) * layout->block_bytes + slot % 16;
    const int shift = slot % COTRA_BLOCK < 16 ? 0 : 4;
    for (uint32_t g = 0; g < n / 4; g++)
        codes[(size_t)g * 16] |= (uint8_t)(nibbles[g] << shift);
    float f1 = sums[1] > 0 ? sums[0] / sums[1] : 0, f0;
    if (metric == COTRA_METRIC_L2) {
        f1 *= 2;
        f0 = sums[0] + f1 * sums[2];
    } else {
        double own_dot = 0;
        for (uint32_t i = 0; i < rotation->dim; i++)
            own_dot += (double)own[i] * difference[i];
        f0 = f1 * sums[2] - (float)own_dot;
    }
    ((uint16_t *)(record + layout->f0))[slot] = to_bf16(f0);
    ((uint16_t *)(record + layout->f1))[slot] = to_bf16(f1);
}
