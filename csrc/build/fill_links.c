#include "build/fill_links.h"

#include "build/select_neighbours.h"
#include "base/status.h"
#include "base/int_math.h"
#include "kernels/own_distance.h"
#include "format/vector_types.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* Measured: more candidates cost time and save no READs. */
enum { MAX_FAR = 512, MAX_SEEN = 4096, MAX_CANDIDATES = 40, MAX_LISTS = 12, PREFETCH_BYTES = 512, AHEAD = 6 };

int cotra_linker_create(cotra_linker *linker, const cotra_image_info *info, const cotra_record_layout *layout,
                        uint8_t *records, cotra_error *err)
{
    const uint32_t padded = cotra_padded_dim(info->dim);
    *linker = (cotra_linker){.info = info,
                             .layout = layout,
                             .records = records,
                             .kernels = cotra_kernels_get(cotra_simd_best()),
                             .padded = padded,
                             .seen_mask = MAX_SEEN - 1};
    linker->seen = malloc(MAX_SEEN * sizeof *linker->seen);
    linker->far = malloc(MAX_FAR * sizeof *linker->far);
    linker->candidates = malloc((MAX_CANDIDATES + 1) * sizeof *linker->candidates);
    linker->vectors = calloc((size_t)(2 + info->degree) * padded, sizeof *linker->vectors);
    if (linker->seen && linker->far && linker->candidates && linker->vectors)
        return COTRA_OK;
    cotra_linker_destroy(linker);
    return cotra_fail(err, COTRA_ERR_NO_MEMORY, "packer: no memory");
}

void cotra_linker_destroy(cotra_linker *linker)
{
    free(linker->seen);
    free(linker->far);
    free(linker->candidates);
    free(linker->vectors);
    memset(linker, 0, sizeof *linker);
}

static const uint8_t *record_of(const cotra_linker *linker, uint32_t node)
{
    return linker->records + (size_t)node * linker->info->record_bytes;
}

/* Loads a node's vector to place i, and returns it: float32[padded]. */
static const float *load(cotra_linker *linker, uint32_t node, uint32_t i)
{
    float *vector = linker->vectors + (size_t)i * linker->padded;
    cotra_own_load(linker->info, record_of(linker, node) + COTRA_RECORD_HEAD_BYTES, vector);
    return vector;
}

/* Returns 0 where the node was seen before. */
static int see(cotra_linker *linker, uint32_t node)
{
    for (uint32_t i = node * 0x9E3779B1u >> 8;; i++) {
        uint32_t *place = &linker->seen[i & linker->seen_mask];
        if (*place == node + 1)
            return 0;
        if (*place == 0) {
            *place = node + 1;
            return 1;
        }
    }
}

static void prefetch(const uint8_t *bytes, uint32_t length)
{
    for (uint32_t line = 0; line < length && line < PREFETCH_BYTES; line += 64)
        __builtin_prefetch(bytes + line);
}

/* Keeps the nearest of the neighbours' neighbours in `candidates`; returns how many. */
static uint32_t find_candidates(cotra_linker *linker, const float *own, const uint32_t *numbers, uint32_t count)
{
    const cotra_image_info *info = linker->info;
    const uint32_t vector_end = COTRA_RECORD_HEAD_BYTES + linker->layout->vector_bytes;
    uint32_t *far = linker->far, n_far = 0, n = 0;
    count = count < MAX_LISTS ? count : MAX_LISTS;
    for (uint32_t i = 0; i < count; i++)
        prefetch(record_of(linker, numbers[i]) + linker->layout->numbers, 4 * linker->layout->slots);
    for (uint32_t i = 0; i < count; i++) {
        const uint8_t *record = record_of(linker, numbers[i]);
        const uint32_t *theirs = (const uint32_t *)(record + linker->layout->numbers);
        const uint32_t n_theirs = ((const cotra_record_head *)record)->count;
        for (uint32_t j = 0; j < n_theirs && n_far < MAX_FAR; j++)
            if (see(linker, theirs[j]))
                far[n_far++] = theirs[j];
    }
    for (uint32_t i = 0; i < n_far; i++) {
        if (i + AHEAD < n_far)
            prefetch(record_of(linker, far[i + AHEAD]), vector_end);
        const float d = cotra_record_distance(linker->kernels, info, own, record_of(linker, far[i]));
        if (d < INFINITY)
            cotra_insert_word(linker->candidates, &n, MAX_CANDIDATES, cotra_major(d, far[i]));
    }
    return n;
}

/* Whether no neighbour so far, in places 1 to count, is much nearer to a candidate than the node is. Leaves the
 * candidate's vector in the place behind them. */
static int is_apart(void *context, uint64_t candidate, uint32_t count)
{
    cotra_linker *linker = context;
    const cotra_image_info *info = linker->info;
    const float bound = cotra_apart_bound(candidate);
    const float *vector = load(linker, (uint32_t)candidate, count + 1);
    for (uint32_t i = 1; i <= count; i++)
        if (cotra_metric_distance(linker->kernels, info->metric, COTRA_VECTOR_F32, vector,
                                  linker->vectors + (size_t)i * linker->padded, info->dim) < bound)
            return 0;
    return 1;
}

void cotra_linker_fill(cotra_linker *linker, uint64_t node)
{
    uint8_t *record = linker->records + node * linker->info->record_bytes;
    uint32_t *numbers = (uint32_t *)(record + linker->layout->numbers);
    uint32_t count = ((const cotra_record_head *)record)->count;
    const uint32_t degree = linker->info->degree;
    if (count >= degree)
        return;
    memset(linker->seen, 0, (linker->seen_mask + (size_t)1) * sizeof *linker->seen);
    see(linker, (uint32_t)node);
    for (uint32_t i = 0; i < count; i++) {
        see(linker, numbers[i]);
        load(linker, numbers[i], i + 1);
    }
    const uint32_t n = find_candidates(linker, load(linker, (uint32_t)node, 0), numbers, count);
    cotra_select_neighbours(linker->candidates, n, numbers, count, degree, is_apart, linker);
}
