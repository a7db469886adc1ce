/* The packer: hnswlib's state in, a graph image out.
 *
 *   create -> read (once, one thread) -> link, then encode (any threads, disjoint ranges that cover all nodes) ->
 * finish
 *
 * read() puts own vectors and links straight into their places in the image while the state streams by, so that at no
 * time there is more than hnswlib's index, the image and one buffer. link() and encode() need only the image.
 */
#include "base/arena.h"
#include "base/checksum.h"
#include "base/int_math.h"
#include "base/ranked.h"
#include "base/status.h"
#include "format/codes.h"
#include "build/hnswlib_reader.h"
#include "build/fill_links.h"
#include "format/vector_types.h"

#include <math.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#define MAX_FLOAT16 65504.0f

struct cotra_packer {
    cotra_packer_params params;
    cotra_image_info info; /* complete but for checksums once read() is done; count 0 before */
    cotra_record_layout layout;
    cotra_rotation rotation;
    cotra_arena *arena;
    float *mean;           /* [dim] */
    int own_mean;          /* it is to be made of the vectors */
    uint32_t *number;      /* with ids: [count], the node that hnswlib's internal number stands for; NULL: the same */
    uint32_t *upper_nodes; /* [upper_count] */
    uint32_t *first_row;   /* [upper_count + 1] */
    uint32_t *rows;        /* [n_rows][1 + M] */
    uint64_t n_rows, row_capacity, upper_capacity;
    atomic_uint_fast64_t linked, encoded;
};

int cotra_packer_create(const cotra_packer_params *params, cotra_packer **out, cotra_error *err)
{
    *out = NULL;
    if (params->dim < COTRA_MIN_DIM || params->dim > COTRA_MAX_DIM)
        return cotra_fail(err, COTRA_ERR_ARGUMENT, "dim must be in [%d, %d], not %u", COTRA_MIN_DIM, COTRA_MAX_DIM,
                          params->dim);
    if (params->metric > COTRA_METRIC_COSINE || params->vector_type > COTRA_VECTOR_U8)
        return cotra_fail(err, COTRA_ERR_ARGUMENT, "metric %u or vector type %u is unknown", params->metric,
                          params->vector_type);
    cotra_packer *packer = calloc(1, sizeof *packer);
    if (!packer)
        return cotra_fail(err, COTRA_ERR_NO_MEMORY, "packer: no memory");
    packer->params = *params;
    packer->mean = calloc(params->dim, sizeof *packer->mean);
    if (!packer->mean) {
        cotra_packer_destroy(packer);
        return cotra_fail(err, COTRA_ERR_NO_MEMORY, "packer: no memory");
    }
    packer->own_mean = !params->mean;
    if (params->mean)
        memcpy(packer->mean, params->mean, params->dim * sizeof *packer->mean);
    int status = cotra_rotation_create(params->seed, params->dim, &packer->rotation, err);
    if (status) {
        cotra_packer_destroy(packer);
        return status;
    }
    *out = packer;
    return COTRA_OK;
}

void cotra_packer_destroy(cotra_packer *packer)
{
    if (!packer)
        return;
    cotra_rotation_destroy(&packer->rotation);
    cotra_arena_destroy(packer->arena);
    free(packer->mean);
    free(packer->number);
    free(packer->upper_nodes);
    free(packer->first_row);
    free(packer->rows);
    free(packer);
}

uint64_t cotra_packer_count(const cotra_packer *packer)
{
    return packer->info.count;
}

static uint8_t *record_of(const cotra_packer *packer, uint64_t node)
{
    return cotra_arena_data(packer->arena) + packer->info.records_offset + node * packer->info.record_bytes;
}

static void info_make(cotra_packer *packer, const cotra_hnswlib_stream *stream)
{
    cotra_image_info *info = &packer->info;
    info->count = info->graph_count = stream->count;
    info->generation = packer->params.generation;
    info->seed = packer->params.seed;
    info->dim = packer->params.dim;
    info->code_dim = cotra_code_dim(info->dim);
    info->metric = packer->params.metric;
    info->vector_type = packer->params.vector_type;
    info->M = (uint32_t)stream->M;
    info->degree = ((uint32_t)stream->degree + COTRA_BLOCK - 1) / COTRA_BLOCK * COTRA_BLOCK; /* they are paid for */
    info->ef_construction = (uint32_t)stream->ef_construction;
    info->max_level = stream->max_level;
    info->entry_node = stream->entry_node;
    info->format_version = COTRA_FORMAT_VERSION;
    cotra_record_layout_make(info, &packer->layout);
    info->record_bytes = packer->layout.record_bytes;
    info->records_offset = COTRA_HEADER_BYTES;
    info->nav_offset = info->records_offset + info->count * info->record_bytes;
}

static uint32_t node_of(const cotra_packer *packer, uint64_t internal)
{
    return packer->number ? packer->number[internal] : (uint32_t)internal;
}

/* The node that an element becomes: hnswlib numbers elements in the order in which its threads came by, rows have their
 * own.
 */
static int place_element(cotra_packer *packer, uint64_t internal, int64_t *label, uint64_t *node, cotra_error *err)
{
    *node = internal;
    if (!packer->number)
        return COTRA_OK;
    cotra_record_head *head = NULL;
    if (*label >= 0 && (uint64_t)*label < packer->info.count)
        head = (cotra_record_head *)record_of(packer, (uint64_t)*label);
    if (!head || head->checksum)
        return cotra_fail(err, COTRA_ERR_FORMAT, "hnswlib state: label %lld is no row of %llu, or there twice",
                          (long long)*label, (unsigned long long)packer->info.count);
    *node = (uint64_t)*label;
    packer->number[internal] = (uint32_t)*node;
    head->checksum = 1; /* taken; encode() writes the real one */
    *label = packer->params.ids[*node];
    return COTRA_OK;
}

/* Whether float16 only rounds a vector, and does not overflow. */
static bool is_near_float16(const float *vector, const cotra_image_info *info)
{
    for (uint32_t i = 0; i < info->dim; i++)
        if (!(fabsf(vector[i]) <= MAX_FLOAT16))
            return 0;
    return info->vector_type == COTRA_VECTOR_F16;
}

/* The squared length of an own vector as it is stored. */
static float stored_norm2(const cotra_image_info *info, const uint8_t *own, float *scratch)
{
    double norm2 = 0;
    cotra_vector_load(info->vector_type, own, info->dim, scratch);
    for (uint32_t i = 0; i < info->dim; i++)
        norm2 += (double)scratch[i] * scratch[i];
    return (float)norm2;
}

/* One element of level 0: u16 count, u8 flags, u8 | u32 links[degree] | float32 vector[dim] | u64 label */
static int read_element(cotra_packer *packer, cotra_hnswlib_stream *stream, uint64_t internal, double *sums,
                        cotra_error *err)
{
    const cotra_image_info *info = &packer->info;
    const uint8_t *element;
    int status = cotra_hnswlib_take(stream, stream->element_bytes, &element, err);
    if (status)
        return status;
    const uint8_t *data = element + 4 + 4 * (size_t)stream->degree;
    int64_t label;
    uint64_t node;
    memcpy(&label, data + 4 * (size_t)info->dim, sizeof label);
    status = place_element(packer, internal, &label, &node, err);
    if (status)
        return status;
    uint8_t *record = record_of(packer, node);
    cotra_record_head *head = (cotra_record_head *)record;
    uint32_t *numbers = (uint32_t *)(record + packer->layout.numbers);
    memcpy(&head->count, element, sizeof head->count);
    if (head->count > stream->degree)
        return cotra_fail(err, COTRA_ERR_FORMAT, "hnswlib state: node %llu has %u links", (unsigned long long)node,
                          head->count);
    head->flags = element[2] & 1 ? COTRA_NODE_DELETED : 0;
    packer->info.deleted_count += head->flags & COTRA_NODE_DELETED;
    head->node = (uint32_t)node;
    head->generation = (uint32_t)info->generation;
    memset(numbers, 0xFF, 4 * (size_t)packer->layout.slots);
    memcpy(numbers, element + 4, 4 * (size_t)head->count);
    for (uint32_t j = 0; j < head->count; j++)
        if (numbers[j] >= info->count)
            return cotra_fail(err, COTRA_ERR_FORMAT, "hnswlib state: node %llu links to node %u of %llu",
                              (unsigned long long)node, numbers[j], (unsigned long long)info->count);
    float vector[COTRA_MAX_DIM];
    memcpy(vector, data, 4 * (size_t)info->dim);
    for (uint32_t i = 0; i < info->dim; i++) {
        if (!(fabsf(vector[i]) <= COTRA_MAX_COMPONENT))
            return cotra_fail(err, COTRA_ERR_ARGUMENT,
                              "node %llu: component %u of its vector is not finite, or beyond 1e15",
                              (unsigned long long)node, i);
        sums[i] += vector[i];
    }
    head->label = label;
    if (head->label < 0)
        return cotra_fail(err, COTRA_ERR_ARGUMENT, "node %llu: labels must be below 2^63", (unsigned long long)node);
    uint8_t *own = record + COTRA_RECORD_HEAD_BYTES;
    int exact = cotra_is_scaled(info) && cotra_scaled_store(info, vector, own);
    if (!exact)
        exact = cotra_vector_store(info->vector_type, vector, info->dim, own);
    head->norm2 = info->metric == COTRA_METRIC_L2 ? 0 : stored_norm2(info, own, vector);
    if (!exact && !(packer->params.round_vectors && is_near_float16(vector, info)))
        return cotra_fail(err, COTRA_ERR_LOSSY, "the vector with label %lld is not exact as %s", (long long)head->label,
                          info->vector_type == COTRA_VECTOR_U8 ? "uint8" : "float16");
    return COTRA_OK;
}

static int reserve(void **array, uint64_t *capacity, uint64_t wanted, size_t item_bytes, cotra_error *err)
{
    if (wanted <= *capacity)
        return COTRA_OK;
    uint64_t grown = *capacity ? *capacity * 2 : 1024;
    grown = grown < wanted ? wanted : grown;
    void *bigger = realloc(*array, grown * item_bytes);
    if (!bigger)
        return cotra_fail(err, COTRA_ERR_NO_MEMORY, "packer: no memory for the upper layers");
    *array = bigger;
    *capacity = grown;
    return COTRA_OK;
}

/* The rows of one node on levels 1 and above: u32 bytes | for each level: u16 count, u16 | u32 links[M] */
static int read_upper(cotra_packer *packer, cotra_hnswlib_stream *stream, uint64_t node, cotra_error *err)
{
    const uint32_t width = 1 + packer->info.M;
    const uint8_t *bytes;
    int status = cotra_hnswlib_take(stream, 4, &bytes, err);
    if (status)
        return status;
    uint32_t list_bytes;
    memcpy(&list_bytes, bytes, sizeof list_bytes);
    uint32_t levels = list_bytes / (4 * width);
    if (list_bytes % (4 * width) || levels > packer->info.max_level)
        return cotra_fail(err, COTRA_ERR_FORMAT, "hnswlib state: node %llu has %u bytes of upper links",
                          (unsigned long long)node, list_bytes);
    if (levels == 0)
        return COTRA_OK;
    uint64_t upper = packer->info.upper_count, capacity = packer->upper_capacity;
    status = reserve((void **)&packer->upper_nodes, &capacity, upper + 1, 4, err);
    if (status)
        return status;
    status = reserve((void **)&packer->first_row, &packer->upper_capacity, upper + 1, 4, err);
    if (status)
        return status;
    status = reserve((void **)&packer->rows, &packer->row_capacity, packer->n_rows + levels, 4 * (size_t)width, err);
    if (status)
        return status;
    packer->upper_nodes[upper] = (uint32_t)node;
    packer->first_row[upper] = (uint32_t)packer->n_rows;
    packer->info.upper_count++;
    for (uint32_t level = 0; level < levels; level++) {
        status = cotra_hnswlib_take(stream, 4 * (size_t)width, &bytes, err);
        if (status)
            return status;
        uint32_t *row = packer->rows + packer->n_rows++ * width;
        memcpy(row, bytes, 4 * (size_t)width);
        row[0] &= 0xFFFFu; /* the rest are hnswlib's flags */
        if (row[0] > packer->info.M)
            return cotra_fail(err, COTRA_ERR_FORMAT, "hnswlib state: node %llu has %u links on level %u",
                              (unsigned long long)node, row[0], level + 1);
        memset(row + 1 + row[0], 0, 4 * (size_t)(packer->info.M - row[0]));
    }
    return COTRA_OK;
}

/* Links of upper rows from node numbers to positions among the upper nodes. */
static int renumber_upper(cotra_packer *packer, cotra_error *err)
{
    const uint32_t n = (uint32_t)packer->info.upper_count, width = 1 + packer->info.M;
    uint32_t *position = malloc(packer->info.count * sizeof *position);
    if (!position)
        return cotra_fail(err, COTRA_ERR_NO_MEMORY, "packer: no memory for the upper layers");
    memset(position, 0xFF, packer->info.count * sizeof *position);
    for (uint32_t u = 0; u < n; u++)
        position[packer->upper_nodes[u]] = u;
    int status = COTRA_OK;
    for (uint64_t r = 0; r < packer->n_rows && !status; r++) {
        uint32_t *row = packer->rows + r * width;
        for (uint32_t j = 1; j <= row[0] && !status; j++) {
            uint32_t u = row[j] < packer->info.count ? position[row[j]] : COTRA_NO_NODE;
            if (u == COTRA_NO_NODE)
                status = cotra_fail(err, COTRA_ERR_FORMAT, "hnswlib state: an upper layer links to node %u", row[j]);
            row[j] = u;
        }
    }
    free(position);
    return status;
}

/* The upper nodes in the order of their node numbers, as a reader wants them. */
static int sort_upper(cotra_packer *packer, cotra_error *err)
{
    const size_t n = packer->info.upper_count, width = 1 + packer->info.M;
    uint64_t *order = malloc((n + 1) * sizeof *order); /* node, then old position */
    uint32_t *place = malloc((n + 1) * sizeof *place); /* of an old position */
    uint32_t *first = malloc((n + 1) * sizeof *first), *rows = malloc((packer->n_rows + 1) * width * sizeof *rows);
    int status = COTRA_OK;
    if (!order || !place || !first || !rows) {
        status = cotra_fail(err, COTRA_ERR_NO_MEMORY, "packer: no memory for the upper layers");
        goto free_all;
    }
    for (size_t u = 0; u < n; u++)
        order[u] = (uint64_t)node_of(packer, packer->upper_nodes[u]) << 32 | u;
    qsort(order, n, sizeof *order, cotra_by_word);
    for (size_t p = 0; p < n; p++)
        place[(uint32_t)order[p]] = (uint32_t)p;
    uint64_t n_rows = 0;
    for (size_t p = 0; p < n; p++) {
        const uint32_t u = (uint32_t)order[p];
        const uint64_t end = u + 1 < n ? packer->first_row[u + 1] : packer->n_rows;
        first[p] = (uint32_t)n_rows;
        for (uint64_t from = packer->first_row[u]; from < end; from++, n_rows++) {
            uint32_t *row = rows + n_rows * width;
            memcpy(row, packer->rows + from * width, width * sizeof *row);
            for (uint32_t j = 1; j <= row[0]; j++)
                row[j] = place[row[j]];
        }
    }
    memcpy(packer->rows, rows, packer->n_rows * width * sizeof *rows);
    for (size_t p = 0; p < n; p++) {
        packer->first_row[p] = first[p];
        packer->upper_nodes[p] = (uint32_t)(order[p] >> 32);
    }
free_all:
    free(order);
    free(place);
    free(first);
    free(rows);
    return status;
}

/* From hnswlib's numbers to those of rows, everywhere. */
static int renumber(cotra_packer *packer, cotra_error *err)
{
    for (uint64_t node = 0; node < packer->info.count; node++) {
        uint8_t *record = record_of(packer, node);
        uint32_t *numbers = (uint32_t *)(record + packer->layout.numbers);
        for (uint32_t j = 0; j < ((const cotra_record_head *)record)->count; j++)
            numbers[j] = packer->number[numbers[j]];
    }
    packer->info.entry_node = packer->number[packer->info.entry_node];
    return packer->info.upper_count ? sort_upper(packer, err) : COTRA_OK;
}

/* Where ids are given, hnswlib's labels are rows, and nodes are numbered by them. */
static int make_numbers(cotra_packer *packer, uint64_t count, cotra_error *err)
{
    if (!packer->params.ids)
        return COTRA_OK;
    if (packer->params.n_ids != count)
        return cotra_fail(err, COTRA_ERR_ARGUMENT, "packer: %llu ids for %llu vectors",
                          (unsigned long long)packer->params.n_ids, (unsigned long long)count);
    packer->number = malloc(count * sizeof *packer->number);
    return packer->number ? COTRA_OK : cotra_fail(err, COTRA_ERR_NO_MEMORY, "packer: no memory");
}

/* Takes in all nodes, and their mean where none is given. `sums` is [dim], and zero. */
static int read_stream(cotra_packer *packer, cotra_hnswlib_stream *stream, double *sums, cotra_error *err)
{
    int status = make_numbers(packer, stream->count, err);
    if (status)
        return status;
    status =
        cotra_arena_create(packer->info.nav_offset, packer->params.arena_flags & COTRA_ARENA_HUGE, &packer->arena, err);
    if (status)
        return status;
    for (uint64_t node = 0; node < stream->count; node++) {
        status = read_element(packer, stream, node, sums, err);
        if (status)
            return status;
    }
    for (uint64_t node = 0; node < stream->count; node++) {
        status = read_upper(packer, stream, node, err);
        if (status)
            return status;
    }
    status = renumber_upper(packer, err);
    if (status)
        return status;
    if (packer->number) {
        status = renumber(packer, err);
        if (status)
            return status;
    }
    if (packer->info.upper_count == 0)
        packer->info.max_level = 0;
    for (uint32_t i = 0; i < packer->info.dim && packer->own_mean; i++)
        packer->mean[i] = (float)(sums[i] / (double)packer->info.count);
    return COTRA_OK;
}

int cotra_packer_read(cotra_packer *packer, int fd, uint64_t timeout_ns, cotra_error *err)
{
    if (packer->info.count)
        return cotra_fail(err, COTRA_ERR_ARGUMENT, "packer: it was read already");
    cotra_hnswlib_stream stream;
    int status = cotra_hnswlib_open(&stream, fd, packer->params.dim, timeout_ns, err);
    if (status)
        return status;
    info_make(packer, &stream);
    double *sums = calloc(packer->info.dim, sizeof *sums);
    status = sums ? read_stream(packer, &stream, sums, err) : cotra_fail(err, COTRA_ERR_NO_MEMORY, "packer: no memory");
    free(sums);
    cotra_hnswlib_close(&stream);
    return status;
}

static int check_range(const cotra_packer *packer, uint64_t begin, uint64_t end, cotra_error *err)
{
    if (packer->arena && begin <= end && end <= packer->info.count)
        return COTRA_OK;
    return cotra_fail(err, COTRA_ERR_ARGUMENT, "packer: nodes [%llu, %llu) of %llu", (unsigned long long)begin,
                      (unsigned long long)end, (unsigned long long)packer->info.count);
}

int cotra_packer_link(cotra_packer *packer, uint64_t begin, uint64_t end, cotra_error *err)
{
    cotra_linker linker;
    int status = check_range(packer, begin, end, err);
    if (status)
        return status;
    status = cotra_linker_create(&linker, &packer->info, &packer->layout, record_of(packer, 0), err);
    if (status)
        return status;
    for (uint64_t node = begin; node < end; node++)
        cotra_linker_fill(&linker, node);
    cotra_linker_destroy(&linker);
    atomic_fetch_add(&packer->linked, end - begin);
    return COTRA_OK;
}

int cotra_packer_encode(cotra_packer *packer, uint64_t begin, uint64_t end, cotra_error *err)
{
    const cotra_image_info *info = &packer->info;
    int status = check_range(packer, begin, end, err);
    if (status)
        return status;
    if (atomic_load(&packer->linked) != info->count)
        return cotra_fail(err, COTRA_ERR_ARGUMENT, "packer: all nodes must be linked before one is encoded");
    cotra_code_writer writer;
    status = cotra_code_writer_create(&writer, &packer->rotation, info, &packer->layout, packer->mean, err);
    if (status)
        return status;
    for (uint64_t node = begin; node < end; node++) {
        uint8_t *record = record_of(packer, node);
        cotra_record_head *head = (cotra_record_head *)record;
        const uint32_t *numbers = (const uint32_t *)(record + packer->layout.numbers);
        while (head->count < info->degree && numbers[head->count] != COTRA_NO_NODE)
            head->count++;
        cotra_own_load(info, record + COTRA_RECORD_HEAD_BYTES, writer.own);
        cotra_code_writer_begin(&writer);
        for (uint32_t j = 0; j < head->count; j++) {
            if (j + 1 < head->count)
                __builtin_prefetch(record_of(packer, numbers[j + 1]) + COTRA_RECORD_HEAD_BYTES);
            cotra_own_load(info, record_of(packer, numbers[j]) + COTRA_RECORD_HEAD_BYTES, writer.neighbour);
            cotra_code_writer_add(&writer, record);
        }
        cotra_code_writer_end(&writer, record);
        head->checksum = cotra_record_checksum(record, info->record_bytes, head->node);
    }
    cotra_code_writer_destroy(&writer);
    atomic_fetch_add(&packer->encoded, end - begin);
    return COTRA_OK;
}

static void write_nav(cotra_packer *packer, const cotra_nav_layout *layout, uint8_t *nav)
{
    const cotra_image_info *info = &packer->info;
    const size_t n = info->upper_count, row_bytes = 4 * (1 + (size_t)info->M);
    const size_t stride = cotra_round_up(packer->layout.vector_bytes, 32);
    memcpy(nav, packer->mean, info->dim * sizeof *packer->mean);
    if (n) {
        memcpy(nav + layout->nodes, packer->upper_nodes, 4 * n);
        memcpy(nav + layout->first_row, packer->first_row, 4 * n);
        memcpy(nav + layout->rows, packer->rows, packer->n_rows * row_bytes);
    }
    uint32_t last_row = (uint32_t)packer->n_rows;
    memcpy(nav + layout->first_row + 4 * n, &last_row, 4);
    for (size_t u = 0; u < n; u++)
        memcpy(nav + layout->vectors + u * stride, record_of(packer, packer->upper_nodes[u]) + COTRA_RECORD_HEAD_BYTES,
               packer->layout.vector_bytes);
}

int cotra_packer_finish(cotra_packer *packer, cotra_arena **out, cotra_error *err)
{
    cotra_image_info *info = &packer->info;
    *out = NULL;
    if (!packer->arena || atomic_load(&packer->encoded) != info->count)
        return cotra_fail(err, COTRA_ERR_ARGUMENT, "packer: %llu of %llu nodes were encoded",
                          (unsigned long long)atomic_load(&packer->encoded), (unsigned long long)info->count);
    cotra_nav_layout layout;
    cotra_nav_layout_make(info, packer->n_rows, &layout);
    info->nav_bytes = layout.total;
    info->image_bytes = info->nav_offset + info->nav_bytes;
    int status = cotra_arena_grow(packer->arena, info->image_bytes, err);
    if (status)
        return status;
    uint8_t *nav = cotra_arena_data(packer->arena) + info->nav_offset;
    write_nav(packer, &layout, nav);
    info->nav_checksum = cotra_checksum(nav, info->nav_bytes, 1);
    uint32_t chain = 0;
    for (uint64_t i = 0; i < info->count; i++)
        chain = cotra_image_chain(chain, ((const cotra_record_head *)record_of(packer, i))->checksum);
    info->image_checksum = (uint64_t)info->nav_checksum << 32 | chain;

    cotra_image_header *header = (cotra_image_header *)cotra_arena_data(packer->arena);
    cotra_image_seal(header, info);
    cotra_image_info checked;
    status = cotra_image_validate(header, info->image_bytes, 0, &checked, err);
    if (status)
        return status;
    *out = packer->arena;
    packer->arena = NULL;
    return COTRA_OK;
}
