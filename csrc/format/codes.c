#include "format/codes.h"

#include "base/random.h"
#include "base/status.h"

#include <math.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

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

/* Eight values; the compiler makes of it what the target has. */
typedef float eight __attribute__((vector_size(32), aligned(4), may_alias));
typedef int32_t eight_integers __attribute__((vector_size(32), may_alias));

#if defined(__clang__)
#define SHUFFLE(x, ...) __builtin_shufflevector(x, x, __VA_ARGS__)
#else
#define SHUFFLE(x, ...) __builtin_shuffle(x, (eight_integers){__VA_ARGS__})
#endif

static const eight sign_1 = {1, -1, 1, -1, 1, -1, 1, -1};
static const eight sign_2 = {1, 1, -1, -1, 1, 1, -1, -1};
static const eight sign_4 = {1, 1, 1, 1, -1, -1, -1, -1};

/* Flips n values' signs, then their fast Walsh-Hadamard transform (n: a power of two, >= 64), scaled to keep lengths.
 * A level of 4, 8, ... values a step, two levels a pass. */
WIDE static void hadamard(float *restrict values, const float *restrict signs, uint32_t n, float scale)
{
    eight *x = (eight *)values;
    const eight *sign = (const eight *)signs;
    n /= 8;
    for (uint32_t i = 0; i < n; i++) {
        eight v = x[i] * sign[i];
        v = SHUFFLE(v, 1, 0, 3, 2, 5, 4, 7, 6) + v * sign_1;
        v = SHUFFLE(v, 2, 3, 0, 1, 6, 7, 4, 5) + v * sign_2;
        x[i] = SHUFFLE(v, 4, 5, 6, 7, 0, 1, 2, 3) + v * sign_4;
    }
    uint32_t half = 1;
    for (; half * 2 < n; half *= 4) {
        const float factor = half * 4 == n ? scale : 1;
        for (uint32_t i = 0; i < n; i += 4 * half)
            for (uint32_t j = i; j < i + half; j++) {
                eight a = x[j], b = x[j + half], c = x[j + 2 * half], d = x[j + 3 * half];
                eight s = a + b, t = a - b, u = c + d, v = c - d;
                x[j] = (s + u) * factor;
                x[j + half] = (t + v) * factor;
                x[j + 2 * half] = (s - u) * factor;
                x[j + 3 * half] = (t - v) * factor;
            }
    }
    if (half < n)
        for (uint32_t j = 0; j < half; j++) {
            eight a = x[j], b = x[j + half];
            x[j] = (a + b) * scale;
            x[j + half] = (a - b) * scale;
        }
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
        const float *signs = rotation->signs + (size_t)round * n;
        const uint32_t begin = round % 2 ? n - window : 0, rest = round % 2 ? 0 : window;
        hadamard(out + begin, signs + begin, window, scale);
        if (window != n) {
            flip(out + rest, signs + rest, n - window);
            mix_halves(out, n);
        }
    }
}

/* A group's entry v is the sum over its dimensions of +x or -x as v's bits say, shifted by its width to be >= 0. */
WIDE static void fill_table(const float *restrict rotated, const float *restrict widths, uint32_t n, float inverse,
                            uint8_t *restrict table)
{
    eight_integers entries[32];
    for (uint32_t begin = 0; begin < n; begin += 64) {
        for (uint32_t g = 0; g < 16; g++) {
            const float *x = rotated + begin + 4 * (size_t)g, width = widths[begin / 4 + g];
            const eight pair = -(sign_1 * x[0]) - sign_2 * x[1], third = -(sign_4 * x[2]);
            const eight low = (pair + (third - x[3] + width)) * inverse + 0.5f;
            const eight high = (pair + (third + x[3] + width)) * inverse + 0.5f;
            entries[2 * g] = __builtin_convertvector(low, eight_integers);
            entries[2 * g + 1] = __builtin_convertvector(high, eight_integers);
        }
        const int32_t *values = (const int32_t *)entries;
        for (uint32_t i = 0; i < 256; i++)
            table[4 * (size_t)begin + i] = (uint8_t)(values[i] < 255 ? values[i] : 255);
    }
}

void cotra_query_codes_make(const cotra_rotation *rotation, const float *vector, const float *centre, float *scratch,
                            cotra_query_codes *codes)
{
    const uint32_t n = rotation->code_dim;
    float *rotated = scratch, *centred = scratch + n, *widths = centred;
    for (uint32_t i = 0; i < rotation->dim; i++)
        centred[i] = centre ? vector[i] - centre[i] : vector[i];
    cotra_rotation_apply(rotation, centred, rotated);
    float widest = 0, offset = 0;
    for (uint32_t g = 0; g < n; g += 4) {
        float width = fabsf(rotated[g]) + fabsf(rotated[g + 1]) + fabsf(rotated[g + 2]) + fabsf(rotated[g + 3]);
        widths[g / 4] = width;
        offset -= width;
        widest = width > widest ? width : widest;
    }
    const float step = widest > 1e-30f ? 2 * widest / 255 : 1;
    fill_table(rotated, widths, n, 1 / step, codes->table);
    codes->offset = offset;
    codes->scale = step;
    codes->rounding2 = widest > 1e-30f ? step * step * (float)(n / 4) / 12 : 0; /* each errs by up to half a step */
}

/* The upper half of a float, rounded to nearest even: finite for every value that is far from overflow. */
static uint16_t to_bf16(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return (uint16_t)((bits + 0x7FFFu + (bits >> 16 & 1)) >> 16);
}

typedef float eight_floats __attribute__((vector_size(32)));
typedef uint32_t eight_words __attribute__((vector_size(32)));

/* What a residual is to its code: the signs in nibbles, one byte for each 4 dimensions, and three sums. Eight running
 * sums, the same at every vector width. */
WIDE static void measure(const float *restrict residual, const float *restrict own_rotated, uint32_t n,
                         uint8_t *restrict nibbles, float *restrict sums)
{
    eight_floats length2 = {0}, absolute = {0}, own_signed = {0};
    for (uint32_t i = 0; i < n; i += 8) {
        eight_floats r, own;
        memcpy(&r, residual + i, sizeof r);
        memcpy(&own, own_rotated + i, sizeof own);
        const eight_words sign = (eight_words)r & 0x80000000u;
        length2 += r * r;
        absolute += (eight_floats)((eight_words)r ^ sign);
        own_signed += (eight_floats)((eight_words)own ^ sign);
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
#if defined(__SSE2__)
    for (uint32_t i = 0; i < n; i += 4)
        nibbles[i / 4] = (uint8_t)(15 ^ _mm_movemask_ps(_mm_loadu_ps(residual + i)));
#else
    for (uint32_t i = 0; i < n; i += 4) {
        uint64_t low, high;
        memcpy(&low, residual + i, sizeof low);
        memcpy(&high, residual + i + 2, sizeof high);
        nibbles[i / 4] = (uint8_t)(15 ^ ((low >> 31 & 1) | (low >> 62 & 2) | (high >> 29 & 4) | (high >> 60 & 8)));
    }
#endif
}

static float from_bf16(uint16_t half)
{
    const uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

int cotra_code_writer_create(cotra_code_writer *writer, const cotra_rotation *rotation, const cotra_image_info *info,
                             const cotra_record_layout *layout, const float *mean, cotra_error *err)
{
    const size_t n = rotation->code_dim;
    *writer = (cotra_code_writer){.rotation = rotation,
                                  .layout = layout,
                                  .mean = info->metric == COTRA_METRIC_L2 ? mean : NULL,
                                  .metric = info->metric};
    float *memory = writer->memory = malloc((5 * n + 2 * (size_t)layout->slots) * sizeof *memory);
    if (!memory)
        return cotra_fail(err, COTRA_ERR_NO_MEMORY, "codes: no memory");
    writer->own = memory;
    writer->neighbour = memory + n;
    writer->rotated = memory + 2 * n;
    writer->scratch = memory + 3 * n;
    writer->rest = memory + 5 * n;
    writer->shift = writer->rest + layout->slots;
    return COTRA_OK;
}

void cotra_code_writer_destroy(cotra_code_writer *writer)
{
    free(writer->memory);
    writer->memory = NULL;
}

void cotra_code_writer_begin(cotra_code_writer *writer)
{
    const cotra_rotation *rotation = writer->rotation;
    for (uint32_t i = 0; i < rotation->dim; i++)
        writer->scratch[i] = writer->mean ? writer->own[i] - writer->mean[i] : writer->own[i];
    writer->gap2 = 0;
    for (uint32_t i = 0; i < rotation->dim; i++)
        writer->gap2 += writer->scratch[i] * writer->scratch[i];
    cotra_rotation_apply(rotation, writer->scratch, writer->rotated);
    writer->nearest2 = INFINITY;
    writer->count = 0;
}

void cotra_code_writer_add(cotra_code_writer *writer, uint8_t *record)
{
    const cotra_rotation *rotation = writer->rotation;
    const cotra_record_layout *layout = writer->layout;
    const uint32_t n = rotation->code_dim, slot = writer->count++;
    float *residual = writer->scratch, *difference = writer->scratch + n;
    uint8_t nibbles[COTRA_MAX_DIM / 4];
    float sums[3]; /* |r|^2, S1, <b, P(c - m)> */
    for (uint32_t i = 0; i < rotation->dim; i++)
        difference[i] = writer->neighbour[i] - writer->own[i];
    cotra_rotation_apply(rotation, difference, residual);
    measure(residual, writer->rotated, n, nibbles, sums);

    uint8_t *codes = record + layout->codes + (size_t)(slot / COTRA_BLOCK) * layout->block_bytes + slot % 16;
    const int shift = slot % COTRA_BLOCK < 16 ? 0 : 4;
    for (uint32_t g = 0; g < n / 4; g++)
        codes[(size_t)g * 16] |= (uint8_t)(nibbles[g] << shift);
    const float slope = sums[1] > 0 ? sums[0] / sums[1] : 0;
    const uint16_t f1 = to_bf16(writer->metric == COTRA_METRIC_L2 ? 2 * slope : slope);
    ((uint16_t *)(record + layout->f1))[slot] = f1;
    writer->shift[slot] = from_bf16(f1) * sums[2]; /* by the slope as it will be read */
    if (sums[0] > 0 && sums[0] < writer->nearest2)
        writer->nearest2 = sums[0];
    writer->rest[slot] = sums[0];
    if (writer->metric != COTRA_METRIC_L2) {
        double own_dot = 0;
        for (uint32_t i = 0; i < rotation->dim; i++)
            own_dot += (double)writer->own[i] * difference[i];
        writer->rest[slot] = -(float)own_dot;
    }
}

void cotra_code_writer_end(cotra_code_writer *writer, uint8_t *record)
{
    cotra_record_head *head = (cotra_record_head *)record;
    const bool centred = writer->gap2 > COTRA_CENTRED * COTRA_CENTRED * writer->nearest2;
    uint16_t *f0 = (uint16_t *)(record + writer->layout->f0);
    for (uint32_t j = 0; j < writer->count; j++)
        f0[j] = to_bf16(centred ? writer->rest[j] : writer->rest[j] + writer->shift[j]);
    head->flags = (head->flags & ~(uint32_t)COTRA_NODE_CENTRED) | (centred ? COTRA_NODE_CENTRED : 0);
}
