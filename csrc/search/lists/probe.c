#include "search/lists/probe.h"

#include "base/status.h"
#include "format/vector_types.h"
#include "kernels/own_distance.h"
#include "search/query.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define FARTHEST 1e37f /* of all estimates and margins: what is further is only a hostile list's to say */
#define MARGIN   1.5f  /* standard deviations that an estimate may be wrong by; measured (docs/explanation/spire.md) */

static size_t padded(size_t n, size_t unit)
{
    return (n + unit - 1) / unit * unit;
}

static cotra_heap heap_make(uint32_t capacity)
{
    return (cotra_heap){.items = malloc((capacity ? capacity : 1) * sizeof(cotra_ranked)), .capacity = capacity};
}

int cotra_probe_create(cotra_probe *probe, const cotra_probe_shard *shards, uint32_t n_shards,
                       const cotra_kernels *kernels, const cotra_probe_limits *limits, cotra_error *err)
{
    memset(probe, 0, sizeof *probe);
    const size_t dim = shards[0].view->info.dim, code_dim = shards[0].view->info.code_dim;
    probe->limits = *limits;
    probe->shards = shards;
    probe->n_shards = n_shards;
    probe->kernels = kernels;
    probe->query = aligned_alloc(64, padded(padded(dim, 32) * sizeof(float), 64));
    probe->scratch = aligned_alloc(64, 2 * code_dim * sizeof(float));
    probe->centre = aligned_alloc(64, code_dim * sizeof(float));
    probe->codes.table = aligned_alloc(64, code_dim * 4);
    probe->nearest = heap_make(limits->n_probe);
    probe->lists = malloc(limits->n_probe * sizeof *probe->lists);
    probe->pieces = malloc((limits->n_pieces ? limits->n_pieces : 1) * sizeof *probe->pieces);
    probe->candidates = heap_make(limits->capacity);
    probe->tau = heap_make(limits->automatic ? limits->k : 0);
    probe->hits = heap_make(limits->capacity);
    if (probe->query && probe->scratch && probe->centre && probe->codes.table && probe->nearest.items && probe->lists &&
        probe->pieces && probe->candidates.items && probe->tau.items && probe->hits.items)
        return COTRA_OK;
    cotra_probe_destroy(probe);
    return cotra_fail(err, COTRA_ERR_NO_MEMORY, "search: no memory to probe %u lists", limits->n_probe);
}

void cotra_probe_destroy(cotra_probe *probe)
{
    free(probe->query);
    free(probe->scratch);
    free(probe->centre);
    free(probe->codes.table);
    free(probe->nearest.items);
    free(probe->lists);
    free(probe->pieces);
    free(probe->candidates.items);
    free(probe->tau.items);
    free(probe->hits.items);
    memset(probe, 0, sizeof *probe);
}

static void choose_lists(cotra_probe *probe, const uint8_t *mask)
{
    probe->nearest.count = 0;
    for (uint32_t s = 0; s < probe->n_shards; s++) {
        if (mask && !mask[s])
            continue;
        const cotra_ivf_table *table = probe->shards[s].table;
        const uint32_t metric = probe->shards[s].view->info.metric;
        for (uint32_t i = 0; i < table->info.n_lists; i++) {
            float distance = cotra_metric_distance(probe->kernels, metric, table->info.centroid_type, probe->query,
                                                   table->centroids + (size_t)i * table->layout.stride, table->dim);
            if (table->sizes[i] && distance < INFINITY) /* NaN is not below infinity */
                cotra_heap_offer(&probe->nearest, (cotra_ranked){.major = cotra_major(distance, s), .minor = i});
        }
    }
    cotra_heap_sort(&probe->nearest);
}

/* A query at one list: what an estimate of its entries takes (format/lists.h). */
typedef struct list_hop {
    float t, margin;
} list_hop;

/* Makes the table of u = q - t c, and tells how far an estimate may be wrong: MARGIN standard deviations. What it is
 * wrong by is f1 <e, P(u)> with the code's error e, which the list's table tells, and f1 times the rounding of the
 * query's table: uniform in a step for each of code_dim / 4 entries and each plane, where f1 |v| is about 2 |r| and a
 * plane's share of |v| about 2^b / sqrt(code_dim). */
static list_hop approach(cotra_probe *probe, const cotra_probe_list *list)
{
    const cotra_probe_shard *shard = &probe->shards[list->shard];
    const cotra_ivf_table *table = shard->table;
    const int l2 = shard->view->info.metric == COTRA_METRIC_L2;
    const float norm2 = table->norms2[list->number];
    const float t = l2 ? 1 : norm2 > 0 ? (1 - list->distance) / norm2 : 0;
    float gap2 = 0;
    cotra_vector_load(table->info.centroid_type, table->centroids + (size_t)list->number * table->layout.stride,
                      table->dim, probe->centre);
    for (uint32_t i = 0; i < table->dim; i++) {
        probe->centre[i] *= t;
        gap2 += (probe->query[i] - probe->centre[i]) * (probe->query[i] - probe->centre[i]);
    }
    cotra_query_codes_make(&shard->view->rotation, probe->query, probe->centre, probe->scratch, &probe->codes);
    if (!probe->limits.automatic)
        return (list_hop){.t = t};
    const float code = sqrtf(gap2) * table->errors[list->number];
    const float rounding = 0.29f * table->radii[list->number] * probe->codes.scale;
    const float margin = MARGIN * (l2 ? 2.0f : 1.0f) * sqrtf(code * code + rounding * rounding);
    return (list_hop){.t = t, .margin = margin < FARTHEST ? margin : FARTHEST};
}

void cotra_probe_begin(cotra_probe *probe, const float *query, const uint8_t *mask)
{
    memset(&probe->stats, 0, sizeof probe->stats);
    probe->candidates.count = probe->tau.count = probe->hits.count = 0;
    probe->n_lists = probe->n_pieces = 0;
    cotra_query_copy(probe->shards[0].view, query, probe->query);
    choose_lists(probe, mask);
    for (uint32_t i = 0; i < probe->nearest.count; i++) {
        const cotra_ranked *near = &probe->nearest.items[i];
        cotra_probe_list *list = &probe->lists[probe->n_lists++];
        *list = (cotra_probe_list){.shard = (uint32_t)near->major,
                                   .number = (uint32_t)near->minor,
                                   .distance = cotra_unkey((uint32_t)(near->major >> 32))};
        const cotra_probe_shard *shard = &probe->shards[list->shard];
        const uint64_t blocks = cotra_ivf_blocks(shard->table->sizes[list->number]);
        for (uint64_t b = 0; b < blocks; b += shard->piece_blocks) {
            const uint64_t rest = blocks - b;
            probe->pieces[probe->n_pieces++] =
                (cotra_probe_piece){.list = i,
                                    .first_block = b,
                                    .n_blocks = rest < shard->piece_blocks ? (uint32_t)rest : shard->piece_blocks};
            list->missing++;
        }
    }
    probe->stats.lists = probe->n_lists;
}

/* Everything at or above it is no candidate: a little more than margin + limit, for how floats are rounded. */
static float bound_of(const cotra_probe *probe, float margin)
{
    const cotra_heap *heap = probe->limits.automatic ? &probe->tau : &probe->candidates;
    if (heap->count < heap->capacity)
        return INFINITY;
    const float limit = cotra_unkey((uint32_t)(heap->items[0].major >> 32));
    return limit + margin + (fabsf(limit) + margin) * 1e-6f + 1e-37f;
}

static void take_estimate(cotra_probe *probe, const cotra_probe_list *list, float margin, float estimate, uint32_t row,
                          uint32_t checksum)
{
    estimate = fmaxf(-FARTHEST, fminf(estimate, FARTHEST));
    if (probe->limits.automatic)
        cotra_heap_offer(&probe->tau,
                         (cotra_ranked){.major = cotra_major(estimate + margin, list->shard), .minor = row});
    cotra_heap_offer(
        &probe->candidates,
        (cotra_ranked){.major = cotra_major(estimate - margin, list->shard), .minor = row, .extra = checksum});
}

static uint32_t count_allowed(const cotra_probe_shard *shard, const volatile uint32_t *rows, uint32_t n)
{
    if (!shard->filter)
        return n;
    uint32_t allowed = 0;
    for (uint32_t j = 0; j < n; j++) {
        const uint32_t row = rows[j];
        allowed += row < shard->view->info.count && (shard->filter[row / 8] >> row % 8 & 1);
    }
    return allowed;
}

int cotra_probe_take_piece(cotra_probe *probe, uint32_t piece_number, const uint8_t *blocks, cotra_error *err)
{
    const cotra_probe_piece *piece = &probe->pieces[piece_number];
    cotra_probe_list *list = &probe->lists[piece->list];
    const cotra_probe_shard *shard = &probe->shards[list->shard];
    const cotra_ivf_table *table = shard->table;
    const cotra_ivf_layout *layout = &table->layout;
    const cotra_query_codes *codes = &probe->codes;
    const uint32_t bits = table->info.bits, code_dim = table->info.code_dim;
    for (uint32_t b = 0; b < piece->n_blocks; b++)
        list->checksum += cotra_ivf_block_checksum(blocks + (size_t)b * layout->block_bytes, layout->block_bytes,
                                                   piece->first_block + b);
    if (--list->missing == 0 && list->checksum != table->checksums[list->number])
        return cotra_fail(err, COTRA_ERR_CHECKSUM,
                          "inverted list %u: torn, corrupt, or rebuilt since its table was read: connect again",
                          list->number);
    const list_hop hop = approach(probe, list);
    const float offset = codes->offset * (float)((1u << bits) - 1);
    for (uint32_t b = 0; b < piece->n_blocks; b++) {
        const uint8_t *block = blocks + (size_t)b * layout->block_bytes;
        const volatile uint32_t *rows = (const volatile uint32_t *)(block + layout->rows);
        const uint32_t *sums_of_vectors = (const uint32_t *)(block + layout->sums);
        uint32_t sums[COTRA_BLOCK], plane[COTRA_BLOCK];
        float estimates[COTRA_BLOCK];
        probe->kernels->scan(codes->table, block, code_dim, sums);
        for (uint32_t p = 1; p < bits; p++) {
            probe->kernels->scan(codes->table, block + (size_t)p * layout->plane_bytes, code_dim, plane);
            for (uint32_t j = 0; j < COTRA_BLOCK; j++)
                sums[j] += plane[j] << p;
        }
        const float bound = bound_of(probe, hop.margin);
        uint32_t below =
            probe->kernels->estimate(sums, (const float *)(block + layout->f0), (const float *)(block + layout->f1),
                                     list->distance, hop.t, offset, codes->scale, bound, estimates);
        const uint64_t left = table->sizes[list->number] - (piece->first_block + b) * COTRA_BLOCK;
        if (left < COTRA_BLOCK)
            below &= (1u << left) - 1;
        const uint32_t n = left < COTRA_BLOCK ? (uint32_t)left : COTRA_BLOCK;
        probe->stats.estimated += n;
        probe->stats.allowed += count_allowed(shard, rows, n);
        for (; below; below &= below - 1) {
            const uint32_t j = (uint32_t)__builtin_ctz(below);
            const uint32_t row = rows[j]; /* loaded once: the memory may be a live peer's */
            if (row >= shard->view->info.count)
                return cotra_fail(err, COTRA_ERR_FORMAT, "inverted list %u has row %u of %llu", list->number, row,
                                  (unsigned long long)shard->view->info.count);
            if (shard->filter && !(shard->filter[row / 8] >> row % 8 & 1))
                continue;
            take_estimate(probe, list, hop.margin, estimates[j], row, sums_of_vectors[j]);
        }
    }
    return COTRA_OK;
}

uint32_t cotra_probe_rerank(cotra_probe *probe)
{
    cotra_heap *candidates = &probe->candidates;
    if (probe->tau.count && probe->tau.count == probe->tau.capacity) {
        const uint64_t limit = probe->tau.items[0].major >> 32;
        uint32_t kept = 0;
        for (uint32_t i = 0; i < candidates->count; i++)
            if (candidates->items[i].major >> 32 <= limit)
                candidates->items[kept++] = candidates->items[i];
        candidates->count = kept;
    }
    probe->stats.reranked = candidates->count;
    return candidates->count;
}

int cotra_probe_take_vector(cotra_probe *probe, uint32_t number, const uint8_t *record, cotra_error *err)
{
    const cotra_ranked *candidate = &probe->candidates.items[number];
    const uint32_t s = (uint32_t)candidate->major, row = (uint32_t)candidate->minor;
    const cotra_probe_shard *shard = &probe->shards[s];
    const cotra_image_info *info = &shard->view->info;
    const uint32_t checksum = cotra_prefix_checksum(record, shard->prefix_bytes, row);
    /* What is used of the head is loaded once: the memory may be a live peer's. */
    const cotra_record_head head = *(const volatile cotra_record_head *)record;
    if (checksum != candidate->extra) {
        if (head.generation != (uint32_t)info->generation)
            return cotra_fail(err, COTRA_ERR_STALE,
                              "record %u is of generation %u, the header that was read of %llu: connect again", row,
                              head.generation, (unsigned long long)info->generation);
        return cotra_fail(err, COTRA_ERR_CHECKSUM, "record %u (it says %u): its vector is torn or corrupt", row,
                          head.node);
    }
    if (head.label < 0)
        return cotra_fail(err, COTRA_ERR_FORMAT, "record %u has the label %lld", row, (long long)head.label);
    const float distance =
        cotra_own_distance(probe->kernels, info, probe->query, record + COTRA_RECORD_HEAD_BYTES, head.norm2);
    if (distance < INFINITY && !(head.flags & COTRA_NODE_DELETED)) /* NaN is not below infinity */
        cotra_heap_offer(&probe->hits,
                         (cotra_ranked){.major = cotra_major(distance, s), .minor = (uint64_t)head.label});
    return COTRA_OK;
}

void cotra_probe_answer(cotra_probe *probe, int64_t *labels, float *distances, int32_t *shards)
{
    uint32_t n = 0;
    cotra_heap_sort(&probe->hits);
    for (uint32_t i = 0; i < probe->hits.count && n < probe->limits.k; i++) {
        const cotra_ranked *hit = &probe->hits.items[i];
        const int64_t label = (int64_t)hit->minor;
        uint32_t j = 0;
        while (j < n && labels[j] != label)
            j++;
        if (j < n)
            continue;
        labels[n] = label;
        distances[n] = cotra_unkey((uint32_t)(hit->major >> 32));
        shards[n++] = (int32_t)(uint32_t)hit->major;
    }
    for (; n < probe->limits.k; n++) {
        labels[n] = -1;
        distances[n] = INFINITY;
        shards[n] = -1;
    }
}
