/* One graph over all shards: the level-0 links of a shard's own graph, and those that lead into other shards.
 *
 *   create -> link (any threads, any ranges), each followed by append (in the order of the nodes) -> finish
 *
 * Records are written where the caller wants them, some at a time: a second image beside the first would double a
 * builder's memory. A node's neighbours are chosen anew, from those that it has and from candidates in other shards, by
 * the rule that fills lists (build/select_neighbours.h). The source image is only read, so that the order of nodes and
 * threads does not matter.
 */
#include "base/int_math.h"
#include "base/status.h"
#include "kernels/kernels.h"
#include "format/codes.h"
#include "format/vector_types.h"
#include "build/select_neighbours.h"

#include <math.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_WIDTH = 1024 };

struct cotra_relinker {
    const uint8_t *source;
    cotra_image_info info; /* of the copy */
    cotra_record_layout layout;
    cotra_rotation rotation;
    const cotra_kernels *kernels;
    uint64_t appended; /* nodes */
    uint32_t chain;    /* over their checksums */
};

/* What one thread needs. */
typedef struct work {
    float *vectors; /* [capacity][padded]: of the candidates */
    float *own;     /* [padded] */
    cotra_code_writer codes;
    uint64_t *words; /* [capacity]: distance << 32 | candidate, sorted */
    uint32_t *numbers;
    uint32_t *chosen; /* [degree] */
    uint32_t capacity, padded, n;
} work;

int cotra_relinker_create(const void *data, uint64_t length_bytes, const cotra_relink_params *params,
                          cotra_relinker **out, cotra_error *err)
{
    *out = NULL;
    cotra_image_info info;
    int status = cotra_image_validate(data, length_bytes, 0, &info, err);
    if (status)
        return status;
    if (info.graph_id || info.ivf_bytes)
        return cotra_fail(err, COTRA_ERR_ARGUMENT,
                          "relinker: takes a shard's own graph, without inverted lists: those come after it");
    info.graph_id = params->graph_id;
    info.graph_count = params->graph_count;
    info.graph_base = params->graph_base;
    if (info.graph_id == 0 || info.graph_count > COTRA_MAX_COUNT || info.graph_count < info.count ||
        info.graph_base > info.graph_count - info.count)
        return cotra_fail(err, COTRA_ERR_ARGUMENT, "relinker: nodes [%llu, + %llu) of a graph of %llu, number %llx",
                          (unsigned long long)info.graph_base, (unsigned long long)info.count,
                          (unsigned long long)info.graph_count, (unsigned long long)info.graph_id);
    cotra_relinker *relinker = calloc(1, sizeof *relinker);
    if (!relinker)
        return cotra_fail(err, COTRA_ERR_NO_MEMORY, "relinker: no memory");
    relinker->source = data;
    relinker->info = info;
    relinker->kernels = cotra_kernels_get(cotra_simd_best());
    cotra_record_layout_make(&info, &relinker->layout);
    status = cotra_rotation_create(info.seed, info.dim, &relinker->rotation, err);
    if (status) {
        cotra_relinker_destroy(relinker);
        return status;
    }
    *out = relinker;
    return COTRA_OK;
}

void cotra_relinker_destroy(cotra_relinker *relinker)
{
    if (!relinker)
        return;
    cotra_rotation_destroy(&relinker->rotation);
    free(relinker);
}

static void work_free(work *w)
{
    free(w->vectors);
    free(w->own);
    cotra_code_writer_destroy(&w->codes);
    free(w->words);
    free(w->numbers);
    free(w->chosen);
}

static int work_make(const cotra_relinker *relinker, work *w, uint32_t width, cotra_error *err)
{
    const cotra_image_info *info = &relinker->info;
    const float *mean = (const float *)(relinker->source + info->nav_offset);
    *w = (work){.capacity = info->degree + width, .padded = cotra_padded_dim(info->dim)};
    w->vectors = calloc((size_t)w->capacity * w->padded, sizeof *w->vectors);
    w->own = calloc(w->padded, sizeof *w->own);
    w->words = malloc(w->capacity * sizeof *w->words);
    w->numbers = malloc(w->capacity * sizeof *w->numbers);
    w->chosen = malloc(info->degree * sizeof *w->chosen);
    int status = cotra_code_writer_create(&w->codes, &relinker->rotation, info, &relinker->layout, mean, err);
    if (status)
        goto failed;
    if (!w->vectors || !w->own || !w->words || !w->numbers || !w->chosen) {
        status = cotra_fail(err, COTRA_ERR_NO_MEMORY, "relinker: no memory");
        goto failed;
    }
    return COTRA_OK;
failed:
    work_free(w);
    return status;
}

static const float *vector_of(const work *w, uint32_t candidate)
{
    return w->vectors + (size_t)candidate * w->padded;
}

static float distance_of(const cotra_relinker *relinker, const float *a, const float *b)
{
    return cotra_metric_distance(relinker->kernels, relinker->info.metric, COTRA_VECTOR_F32, a, b, relinker->info.dim);
}

/* Takes a candidate in; its place among the words is that of its distance. */
static void take(const cotra_relinker *relinker, work *w, uint32_t number, const uint8_t *vector)
{
    float *copy = w->vectors + (size_t)w->n * w->padded;
    cotra_own_load(&relinker->info, vector, copy);
    const uint64_t word = cotra_major(distance_of(relinker, w->own, copy), w->n);
    uint32_t place = w->n;
    w->numbers[w->n++] = number;
    for (; place > 0 && w->words[place - 1] > word; place--)
        w->words[place] = w->words[place - 1];
    w->words[place] = word;
}

static bool is_finite(const float *vector, uint32_t dim)
{
    for (uint32_t i = 0; i < dim; i++)
        if (!(fabsf(vector[i]) <= COTRA_MAX_COMPONENT))
            return 0;
    return 1;
}

/* What is_apart looks at. */
typedef struct selection {
    const cotra_relinker *relinker;
    const work *w;
} selection;

static int is_apart(void *context, uint64_t word, uint32_t count)
{
    const selection *of = context;
    const float bound = cotra_apart_bound(word);
    for (uint32_t i = 0; i < count; i++)
        if (distance_of(of->relinker, vector_of(of->w, (uint32_t)word), vector_of(of->w, of->w->chosen[i])) < bound)
            return 0;
    return 1;
}

/* Of all candidates, the neighbours; returns their number. */
static uint32_t choose(const cotra_relinker *relinker, work *w)
{
    selection of = {relinker, w};
    return cotra_select_neighbours(w->words, w->n, w->chosen, 0, relinker->info.degree, is_apart, &of);
}

static void write_record(const cotra_relinker *relinker, work *w, uint32_t count, uint8_t *record)
{
    const cotra_image_info *info = &relinker->info;
    const cotra_record_layout *layout = &relinker->layout;
    cotra_record_head *head = (cotra_record_head *)record;
    uint32_t *numbers = (uint32_t *)(record + layout->numbers);
    memset(record + layout->numbers, 0, info->record_bytes - layout->numbers);
    memset(numbers, 0xFF, 4 * (size_t)layout->slots);
    head->count = (uint16_t)count;
    memcpy(w->codes.own, w->own, info->dim * sizeof *w->own);
    cotra_code_writer_begin(&w->codes);
    for (uint32_t j = 0; j < count; j++) {
        numbers[j] = w->numbers[w->chosen[j]];
        memcpy(w->codes.neighbour, vector_of(w, w->chosen[j]), info->dim * sizeof *w->own);
        cotra_code_writer_add(&w->codes, record);
    }
    cotra_code_writer_end(&w->codes, record);
}

static int link_node(const cotra_relinker *relinker, work *w, uint64_t node, const uint32_t *candidates,
                     const cotra_relink_far *far, uint8_t *record, cotra_error *err)
{
    const cotra_image_info *info = &relinker->info;
    const uint8_t *records = relinker->source + info->records_offset;
    const uint8_t *source = records + node * info->record_bytes;
    cotra_record_head *head = (cotra_record_head *)record;
    memcpy(record, source, info->record_bytes);
    if (head->count > info->degree)
        return cotra_fail(err, COTRA_ERR_FORMAT, "record %llu has %u neighbours", (unsigned long long)node,
                          head->count);
    uint32_t *numbers = (uint32_t *)(record + relinker->layout.numbers);
    for (uint32_t j = 0; j < head->count; j++) {
        if (numbers[j] >= info->count)
            return cotra_fail(err, COTRA_ERR_FORMAT, "record %llu links to node %u of %llu", (unsigned long long)node,
                              numbers[j], (unsigned long long)info->count);
    }
    uint32_t n_far = 0;
    w->n = 0;
    cotra_own_load(info, source + COTRA_RECORD_HEAD_BYTES, w->own);
    for (uint32_t j = 0; j < far->width; j++) {
        if (candidates[j] == COTRA_NO_NODE)
            continue;
        if (candidates[j] >= far->count || far->numbers[candidates[j]] >= info->graph_count ||
            (uint32_t)(far->numbers[candidates[j]] - info->graph_base) < info->count)
            return cotra_fail(err, COTRA_ERR_ARGUMENT, "relinker: a candidate that is no node of another shard");
        take(relinker, w, far->numbers[candidates[j]], far->vectors + (size_t)candidates[j] * far->stride_bytes);
        if (!is_finite(vector_of(w, w->n - 1), info->dim))
            return cotra_fail(err, COTRA_ERR_FORMAT, "node %u of another shard: its vector is not finite",
                              far->numbers[candidates[j]]);
        n_far++;
    }
    if (n_far) {
        for (uint32_t j = 0; j < head->count; j++)
            take(relinker, w, (uint32_t)info->graph_base + numbers[j],
                 records + (size_t)numbers[j] * info->record_bytes + COTRA_RECORD_HEAD_BYTES);
        write_record(relinker, w, choose(relinker, w), record);
    } else {
        for (uint32_t j = 0; j < head->count; j++)
            numbers[j] += (uint32_t)info->graph_base;
    }
    head->checksum = cotra_record_checksum(record, info->record_bytes, head->node);
    return COTRA_OK;
}

int cotra_relinker_link(const cotra_relinker *relinker, uint64_t begin, uint64_t end, const cotra_relink_far *far,
                        void *records, cotra_error *err)
{
    const cotra_image_info *info = &relinker->info;
    if (begin > end || end > info->count || far->width > MAX_WIDTH || far->stride_bytes < relinker->layout.vector_bytes)
        return cotra_fail(err, COTRA_ERR_ARGUMENT, "relinker: nodes [%llu, %llu) of %llu, %u candidates each",
                          (unsigned long long)begin, (unsigned long long)end, (unsigned long long)info->count,
                          far->width);
    work w;
    int status = work_make(relinker, &w, far->width, err);
    if (status)
        return status;
    for (uint64_t i = 0; i < end - begin && !status; i++)
        status = link_node(relinker, &w, begin + i, far->candidates + i * far->width, far,
                           (uint8_t *)records + i * info->record_bytes, err);
    work_free(&w);
    return status;
}

int cotra_relinker_append(cotra_relinker *relinker, uint64_t begin, uint64_t end, const void *records, cotra_error *err)
{
    const cotra_image_info *info = &relinker->info;
    if (begin != relinker->appended || begin > end || end > info->count)
        return cotra_fail(err, COTRA_ERR_ARGUMENT, "relinker: nodes [%llu, %llu) where [%llu, %llu) are left",
                          (unsigned long long)begin, (unsigned long long)end, (unsigned long long)relinker->appended,
                          (unsigned long long)info->count);
    const uint8_t *record = records;
    for (; relinker->appended < end; relinker->appended++, record += info->record_bytes)
        relinker->chain = cotra_image_chain(relinker->chain, ((const cotra_record_head *)record)->checksum);
    return COTRA_OK;
}

int cotra_relinker_finish(cotra_relinker *relinker, void *header_bytes, cotra_error *err)
{
    cotra_image_info *info = &relinker->info;
    if (relinker->appended != info->count)
        return cotra_fail(err, COTRA_ERR_ARGUMENT, "relinker: %llu of %llu nodes were linked",
                          (unsigned long long)relinker->appended, (unsigned long long)info->count);
    info->image_checksum = (uint64_t)info->nav_checksum << 32 | relinker->chain;
    memset(header_bytes, 0, COTRA_HEADER_BYTES);
    cotra_image_header *header = header_bytes;
    cotra_image_seal(header, info);
    return COTRA_OK;
}
