#include "search/probe.h"

#include "base/status.h"
#include "layout/vectors.h"
#include "search/query.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define FARTHEST 1e37f /* of all estimates and margins: what is further is only a hostile list's to say */
#define MARGIN   1.5f  /* standard deviations that an estimate may be wrong by; measured (docs/explanation/spire.md) */
enum { READ_COST = 1024 };  /* of a READ beside its bytes, in bytes: a network card's time */
enum { MOST_AT_ONCE = 8 };  /* lists read once more, as a multiple of those before, at most */
enum { MORE_THOROUGH = 4 }; /* times as many entries when a query is begun anew */
#define NO_LIST UINT32_MAX

static size_t padded(size_t n, size_t unit)
{
    return (n + unit - 1) / unit * unit;
}

static cotra_heap heap_make(uint32_t capacity)
{
    return (cotra_heap){.items = malloc((capacity ? capacity : 1) * sizeof(cotra_ranked)), .capacity = capacity};
}

/* Room for n items of `size` bytes, at least twice as much as there was. */
static int make_room(void **items, uint32_t *capacity, uint64_t n, size_t size, cotra_error *err)
{
    if (n <= *capacity)
        return COTRA_OK;
    n = n > 2 * (uint64_t)*capacity ? n : 2 * (uint64_t)*capacity;
    void *more = n <= UINT32_MAX ? realloc(*items, n * size) : NULL;
    if (!more)
        return cotra_fail(err, COTRA_ERR_NO_MEMORY, "search: no memory for %llu lists, pieces or candidates",
                          (unsigned long long)n);
    *items = more;
    *capacity = (uint32_t)n;
    return COTRA_OK;
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
    probe->centroid = malloc(dim * sizeof(float));
    probe->codes = calloc(n_shards, sizeof *probe->codes);
    probe->tables = aligned_alloc(64, (n_shards + (size_t)1) * code_dim * 4);
    probe->nearest = heap_make(limits->n_probe);
    probe->candidates = heap_make(limits->batch);
    probe->tau = heap_make(limits->n_rerank ? 0 : limits->k);
    probe->hits = heap_make(limits->k);
    if (probe->query && probe->scratch && probe->centroid && probe->codes && probe->tables && probe->nearest.items &&
        probe->candidates.items && probe->tau.items && probe->hits.items) {
        for (uint32_t s = 0; s < n_shards; s++)
            probe->codes[s].table = probe->tables + s * code_dim * 4;
        probe->near.table = probe->tables + n_shards * code_dim * 4;
        return COTRA_OK;
    }
    cotra_probe_destroy(probe);
    return cotra_fail(err, COTRA_ERR_NO_MEMORY, "search: no memory to probe %u lists", limits->n_probe);
}

void cotra_probe_destroy(cotra_probe *probe)
{
    free(probe->query);
    free(probe->scratch);
    free(probe->centroid);
    free(probe->codes);
    free(probe->tables);
    free(probe->nearest.items);
    free(probe->lists);
    free(probe->pieces);
    free(probe->candidates.items);
    free(probe->tau.items);
    free(probe->hits.items);
    memset(probe, 0, sizeof *probe);
}

static int is_open(const cotra_probe *probe, uint32_t shard)
{
    return !probe->mask || probe->mask[shard];
}

/* ---- which lists ---- */

/* Finds the n nearest lists of those that come after the ones before. */
static int find_lists(cotra_probe *probe, uint64_t n, cotra_error *err)
{
    int status = make_room((void **)&probe->nearest.items, &probe->nearest.capacity, n, sizeof(cotra_ranked), err);
    if (status)
        return status;
    cotra_heap nearest = probe->nearest;
    nearest.capacity = (uint32_t)n;
    nearest.count = 0;
    for (uint32_t s = 0; s < probe->n_shards; s++) {
        if (!is_open(probe, s))
            continue;
        const cotra_ivf_table *table = probe->shards[s].table;
        const uint32_t metric = probe->shards[s].view->info.metric;
        for (uint32_t i = 0; i < table->info.n_lists; i++) {
            const float distance =
                cotra_metric_distance(probe->kernels, metric, table->info.centroid_type, probe->query,
                                      table->centroids + (size_t)i * table->layout.stride, table->dim);
            if (!table->sizes[i] || !(distance < INFINITY)) /* NaN is not below infinity */
                continue;
            const cotra_ranked item = {.major = cotra_major(distance, s), .minor = i};
            if (!probe->has_last || cotra_ranked_less(&probe->last, &item))
                cotra_heap_offer(&nearest, item);
        }
    }
    cotra_heap_sort(&nearest);
    probe->nearest.count = nearest.count;
    if (nearest.count) {
        probe->last = nearest.items[nearest.count - 1];
        probe->has_last = 1;
    }
    return COTRA_OK;
}

/* Makes the table that a list's codes are looked up in, where it is not there, and sets the list's margin.
 *
 * The margin is MARGIN standard deviations of an estimate. What it is wrong by is f1 <e, P(u)> with the code's error e,
 * which the table of lists tells, and f1 times the rounding of the query's table: uniform in a step for each of
 * code_dim / 4 entries and each plane, where f1 |v| is about 2 |r| and a plane's share of |v| about 2^b /
 * sqrt(code_dim). */
static const cotra_query_codes *aim(cotra_probe *probe, uint32_t list_number)
{
    cotra_probe_list *list = &probe->lists[list_number];
    const cotra_probe_shard *shard = &probe->shards[list->shard];
    const cotra_ivf_table *table = shard->table;
    const int l2 = shard->view->info.metric == COTRA_METRIC_L2;
    const float radius = table->radii[list->number];
    cotra_query_codes *codes = &probe->codes[list->shard];
    if (cotra_ivf_is_centred(radius)) {
        codes = &probe->near;
        if (probe->near_list == list_number)
            return codes;
        probe->near_list = list_number;
        cotra_vector_load(table->info.centroid_type, table->centroids + (size_t)list->number * table->layout.stride,
                          table->dim, probe->centroid);
        list->gap2 = 0;
        for (uint32_t i = 0; i < table->dim; i++) {
            probe->centroid[i] *= list->t;
            const float gap = probe->query[i] - probe->centroid[i];
            list->gap2 += gap * gap;
        }
        cotra_query_codes_make(&shard->view->rotation, probe->query, probe->centroid, probe->scratch, codes);
    } else if (codes->scale == 0) {
        cotra_query_codes_make(&shard->view->rotation, probe->query, l2 ? shard->view->mean : NULL, probe->scratch,
                               codes);
    }
    if (!probe->limits.n_rerank) {
        const float code = sqrtf(list->gap2 > 0 ? list->gap2 : 0) * table->errors[list->number];
        const float rounding = 0.29f * fabsf(radius) * codes->scale;
        const float margin = MARGIN * (l2 ? 2.0f : 1.0f) * sqrtf(code * code + rounding * rounding);
        list->margin = margin < FARTHEST ? margin : FARTHEST;
    }
    return codes;
}

static int add_list(cotra_probe *probe, const cotra_ranked *near, cotra_error *err)
{
    const uint32_t s = (uint32_t)near->major, number = (uint32_t)near->minor, place = probe->n_lists;
    const cotra_probe_shard *shard = &probe->shards[s];
    const uint64_t blocks = cotra_ivf_blocks(shard->table->sizes[number]);
    const uint64_t pieces = (blocks + shard->piece_blocks - 1) / shard->piece_blocks;
    int status = make_room((void **)&probe->lists, &probe->max_lists, place + (uint64_t)1, sizeof *probe->lists, err);
    if (!status)
        status = make_room((void **)&probe->pieces, &probe->max_pieces, probe->n_pieces + pieces, sizeof *probe->pieces,
                           err);
    if (status)
        return status;
    cotra_probe_list *list = &probe->lists[probe->n_lists++];
    *list = (cotra_probe_list){.shard = s, .number = number, .distance = cotra_unkey((uint32_t)(near->major >> 32))};
    list->t = 1;
    list->gap2 = list->distance;
    if (shard->view->info.metric != COTRA_METRIC_L2) {
        const float product = 1 - list->distance, centroid_norm2 = shard->table->norms2[number];
        list->t = centroid_norm2 > 0 ? product / centroid_norm2 : 0;
        list->gap2 = probe->norm2 - list->t * product;
    }
    if (!cotra_ivf_is_centred(shard->table->radii[number]))
        aim(probe, place);
    for (uint64_t b = 0; b < blocks; b += shard->piece_blocks) {
        const uint64_t rest = blocks - b;
        probe->pieces[probe->n_pieces++] =
            (cotra_probe_piece){.list = place,
                                .first_block = b,
                                .n_blocks = rest < shard->piece_blocks ? (uint32_t)rest : shard->piece_blocks};
        list->missing++;
    }
    return COTRA_OK;
}

/* The nearest lists of those that are left: as many as what was found in those before lets expect to be enough. */
static int choose_lists(cotra_probe *probe, cotra_error *err)
{
    uint64_t n = probe->limits.n_probe;
    if (probe->n_lists) {
        const double missing = (double)(probe->n_wanted - probe->n_found);
        const double times = probe->n_found ? missing / (double)probe->n_found : MOST_AT_ONCE;
        n = (uint64_t)ceil(probe->n_lists * (times < 1 ? 1 : times > MOST_AT_ONCE ? MOST_AT_ONCE : times));
    }
    uint64_t all = 0;
    for (uint32_t s = 0; s < probe->n_shards; s++)
        all += is_open(probe, s) ? probe->shards[s].table->info.n_lists : 0;
    int status = find_lists(probe, n < all ? n : all, err);
    for (uint32_t i = 0; i < probe->nearest.count && !status; i++)
        status = add_list(probe, &probe->nearest.items[i], err);
    probe->stats.lists += probe->nearest.count;
    return status;
}

/* Forgets all that was read but the exact distances. */
static void start(cotra_probe *probe)
{
    probe->candidates.count = probe->tau.count = 0;
    probe->n_lists = probe->n_pieces = probe->n_vectors = probe->first_vector = 0;
    probe->n_found = 0;
    probe->near_list = NO_LIST;
    probe->has_last = probe->left_out = probe->is_ranked = 0;
}

/* What a query wants of its shards, and whether to read all rows that filters let through is less work. */
static void plan(cotra_probe *probe)
{
    uint64_t entries = 0, n_lists = 0;
    double all_lists = 0, all_rows = 0;
    int can_read = 1;
    probe->n_rows = 0;
    for (uint32_t s = 0; s < probe->n_shards; s++) {
        const cotra_probe_shard *shard = &probe->shards[s];
        const cotra_image_info *info = &shard->view->info;
        if (!is_open(probe, s))
            continue;
        probe->n_rows += shard->rows;
        entries += shard->table->info.entries;
        n_lists += shard->table->info.n_lists;
        all_lists += (double)shard->pieces * READ_COST + (double)shard->table->info.list_bytes;
        all_rows += (double)shard->rows * (READ_COST + info->record_bytes);
        can_read &= shard->piece_blocks * (uint64_t)shard->table->info.block_bytes >= info->record_bytes;
    }
    probe->n_wanted = probe->limits.k;
    probe->direct = 0;
    if (probe->n_rows < entries) {
        const uint64_t usual = probe->limits.n_probe * entries / n_lists;
        probe->n_wanted = usual > probe->limits.k ? usual : probe->limits.k;
        const double part = (double)probe->n_wanted / (double)(probe->n_rows ? probe->n_rows : 1);
        probe->direct = can_read && all_rows <= all_lists * (part < 1 ? part : 1);
    }
    if (probe->n_wanted > probe->n_rows)
        probe->n_wanted = probe->n_rows;
}

void cotra_probe_begin(cotra_probe *probe, const float *query, const uint8_t *mask)
{
    memset(&probe->stats, 0, sizeof probe->stats);
    start(probe);
    probe->mask = mask;
    probe->hits.count = 0;
    probe->thorough = 0;
    probe->next_row = probe->next_shard = 0;
    cotra_query_copy(probe->shards[0].view, query, probe->query);
    probe->norm2 = probe->kernels->dot[COTRA_VECTOR_F32](probe->query, probe->query, probe->shards[0].table->dim);
    for (uint32_t s = 0; s < probe->n_shards; s++)
        probe->codes[s].scale = 0;
    plan(probe);
}

/* ---- what their codes say ---- */

/* Everything at or above it is no candidate: a little more than margin + limit, for how floats are rounded. */
static float bound_of(const cotra_probe *probe, float margin)
{
    const cotra_heap *heap = probe->limits.n_rerank ? &probe->candidates : &probe->tau;
    const uint32_t full = probe->limits.n_rerank ? probe->limits.n_rerank : heap->capacity;
    if (heap->count < full || probe->thorough)
        return INFINITY;
    const float limit = cotra_unkey((uint32_t)(heap->items[0].major >> 32));
    return limit + margin + (fabsf(limit) + margin) * 1e-6f + 1e-37f;
}

/* Drops the candidates that tau leaves out. */
static void drop_far(cotra_probe *probe)
{
    cotra_heap *all = &probe->candidates;
    if (probe->limits.n_rerank || probe->thorough || probe->tau.count < probe->tau.capacity)
        return;
    const uint64_t limit = probe->tau.items[0].major >> 32;
    uint32_t kept = 0;
    for (uint32_t i = 0; i < all->count; i++)
        if (all->items[i].major >> 32 <= limit)
            all->items[kept++] = all->items[i];
    probe->left_out |= kept < all->count;
    all->count = kept;
}

static int take_estimate(cotra_probe *probe, const cotra_probe_list *list, float estimate, uint32_t row,
                         uint32_t checksum, cotra_error *err)
{
    estimate = fmaxf(-FARTHEST, fminf(estimate, FARTHEST));
    cotra_heap *all = &probe->candidates;
    const cotra_ranked candidate = {
        .major = cotra_major(estimate - list->margin, list->shard), .minor = row, .extra = checksum};
    if (probe->limits.n_rerank && !probe->thorough) {
        probe->left_out |= all->count == probe->limits.n_rerank;
        cotra_heap rerank = {.items = all->items, .count = all->count, .capacity = probe->limits.n_rerank};
        cotra_heap_offer(&rerank, candidate);
        all->count = rerank.count;
        return COTRA_OK;
    }
    if (!probe->limits.n_rerank)
        cotra_heap_offer(&probe->tau,
                         (cotra_ranked){.major = cotra_major(estimate + list->margin, list->shard), .minor = row});
    if (all->count == all->capacity) {
        drop_far(probe);
        if (all->count > all->capacity / 2) {
            int status =
                make_room((void **)&all->items, &all->capacity, all->capacity + (uint64_t)1, sizeof *all->items, err);
            if (status)
                return status;
        }
    }
    all->items[all->count++] = candidate;
    return COTRA_OK;
}

static int bad_row(const cotra_probe_shard *shard, uint32_t list, uint32_t row, cotra_error *err)
{
    return cotra_fail(err, COTRA_ERR_FORMAT, "inverted list %u has row %u of %llu", list, row,
                      (unsigned long long)shard->view->info.count);
}

/* The bits of a block's n entries that a filter lets through. The memory may be a live peer's. */
static int look_through(const cotra_probe_shard *shard, uint32_t list, const volatile uint32_t *rows, uint32_t n,
                        uint32_t *out, cotra_error *err)
{
    *out = 0;
    for (uint32_t j = 0; j < n; j++) {
        const uint32_t row = rows[j];
        if (row >= shard->view->info.count)
            return bad_row(shard, list, row, err);
        *out |= (uint32_t)(shard->filter[row / 8] >> row % 8 & 1) << j;
    }
    return COTRA_OK;
}

static int take_block(cotra_probe *probe, const cotra_probe_list *list, const cotra_query_codes *codes,
                      const uint8_t *block, uint32_t n, cotra_error *err)
{
    const cotra_probe_shard *shard = &probe->shards[list->shard];
    const cotra_ivf_layout *layout = &shard->table->layout;
    const uint32_t bits = shard->table->info.bits, code_dim = shard->table->info.code_dim;
    const float offset = codes->offset * (float)((1u << bits) - 1);
    const volatile uint32_t *rows = (const volatile uint32_t *)(block + layout->rows);
    const uint32_t *sums_of_vectors = (const uint32_t *)(block + layout->sums);
    uint32_t sums[COTRA_BLOCK], plane[COTRA_BLOCK], allowed = n < COTRA_BLOCK ? (1u << n) - 1 : UINT32_MAX;
    float estimates[COTRA_BLOCK];
    int status = shard->filter ? look_through(shard, list->number, rows, n, &allowed, err) : COTRA_OK;
    if (status)
        return status;
    probe->stats.estimated += n;
    probe->n_found += (uint32_t)__builtin_popcount(allowed);
    if (!allowed)
        return COTRA_OK;
    probe->kernels->scan(codes->table, block, code_dim, sums);
    for (uint32_t p = 1; p < bits; p++) {
        probe->kernels->scan(codes->table, block + (size_t)p * layout->plane_bytes, code_dim, plane);
        for (uint32_t j = 0; j < COTRA_BLOCK; j++)
            sums[j] += plane[j] << p;
    }
    const float bound = bound_of(probe, list->margin);
    const uint32_t below = allowed & probe->kernels->estimate(sums, (const float *)(block + layout->f0),
                                                              (const float *)(block + layout->f1), list->distance,
                                                              list->t, offset, codes->scale, bound, estimates);
    probe->left_out |= below != allowed;
    for (uint32_t left = below; left && !status; left &= left - 1) {
        const uint32_t j = (uint32_t)__builtin_ctz(left);
        const uint32_t row = rows[j]; /* loaded once more, so looked at once more: what is read of it is checked */
        status = row < shard->view->info.count ? take_estimate(probe, list, estimates[j], row, sums_of_vectors[j], err)
                                               : bad_row(shard, list->number, row, err);
    }
    return status;
}

int cotra_probe_take_piece(cotra_probe *probe, uint32_t piece_number, const uint8_t *blocks, cotra_error *err)
{
    const cotra_probe_piece *piece = &probe->pieces[piece_number];
    cotra_probe_list *list = &probe->lists[piece->list];
    const cotra_ivf_table *table = probe->shards[list->shard].table;
    const uint32_t block_bytes = table->layout.block_bytes;
    const cotra_query_codes *codes = aim(probe, piece->list);
    for (uint32_t b = 0; b < piece->n_blocks; b++)
        list->checksum +=
            cotra_ivf_block_checksum(blocks + (size_t)b * block_bytes, block_bytes, piece->first_block + b);
    if (--list->missing == 0 && list->checksum != table->checksums[list->number])
        return cotra_fail(err, COTRA_ERR_CHECKSUM,
                          "inverted list %u: torn, corrupt, or rebuilt since its table was read: connect again",
                          list->number);
    for (uint32_t b = 0; b < piece->n_blocks; b++) {
        const uint64_t left = table->sizes[list->number] - (piece->first_block + b) * COTRA_BLOCK;
        int status = take_block(probe, list, codes, blocks + (size_t)b * block_bytes,
                                left < COTRA_BLOCK ? (uint32_t)left : COTRA_BLOCK, err);
        if (status)
            return status;
    }
    return COTRA_OK;
}

/* ---- which vectors ---- */

static int by_rank(const void *a, const void *b)
{
    return cotra_ranked_less(a, b) ? -1 : cotra_ranked_less(b, a);
}

/* The next candidates that may be among the answers. */
static void choose_vectors(cotra_probe *probe)
{
    const cotra_heap *all = &probe->candidates, *hits = &probe->hits;
    const uint32_t first = probe->first_vector, rest = all->count - first;
    uint32_t n = rest;
    if (!probe->limits.n_rerank && n > probe->limits.batch)
        n = probe->limits.batch;
    if (!probe->limits.n_rerank && hits->count == hits->capacity) {
        const uint64_t limit = hits->items[0].major >> 32;
        while (n && all->items[first + n - 1].major >> 32 > limit)
            n--;
    }
    probe->n_vectors = n;
}

/* The next rows that filters let through. */
static void choose_rows(cotra_probe *probe)
{
    cotra_heap *rows = &probe->candidates;
    rows->count = 0;
    for (; probe->next_shard < probe->n_shards; probe->next_shard++, probe->next_row = 0) {
        const uint32_t s = probe->next_shard;
        const uint8_t *filter = probe->shards[s].filter;
        const uint64_t count = is_open(probe, s) ? probe->shards[s].view->info.count : 0;
        for (; probe->next_row < count && rows->count < probe->limits.batch; probe->next_row++) {
            const uint64_t row = probe->next_row;
            if (filter && row % 8 == 0 && filter[row / 8] == 0)
                probe->next_row += 7;
            else if (!filter || (filter[row / 8] >> row % 8 & 1))
                rows->items[rows->count++] = (cotra_ranked){.major = s, .minor = row};
        }
        if (rows->count == probe->limits.batch)
            break;
    }
    probe->first_vector = 0;
    probe->n_vectors = rows->count;
}

/* Whether there may be more answers in what was left out. */
static int lacks_hits(const cotra_probe *probe)
{
    return probe->hits.count < probe->limits.k && probe->hits.count < probe->n_rows;
}

int cotra_probe_next(cotra_probe *probe, cotra_error *err)
{
    probe->first_vector += probe->n_vectors;
    probe->n_pieces = probe->n_vectors = 0;
    if (probe->direct)
        choose_rows(probe);
    while (!probe->direct) {
        if (!probe->is_ranked && probe->n_found < probe->n_wanted) {
            int status = choose_lists(probe, err);
            if (status || probe->n_pieces)
                return status;
            probe->n_wanted = probe->n_rows; /* all lists were read */
        }
        if (!probe->is_ranked) {
            drop_far(probe);
            qsort(probe->candidates.items, probe->candidates.count, sizeof *probe->candidates.items, by_rank);
            probe->is_ranked = 1;
        }
        choose_vectors(probe);
        const int is_all = probe->n_wanted == probe->n_rows && (probe->thorough || !probe->left_out);
        if (probe->n_vectors || !lacks_hits(probe) || is_all)
            break;
        probe->n_wanted =
            probe->n_rows / MORE_THOROUGH > probe->n_wanted ? probe->n_wanted * MORE_THOROUGH : probe->n_rows;
        probe->thorough = 1;
        start(probe);
    }
    probe->stats.reranked += probe->n_vectors;
    return COTRA_OK;
}

uint32_t cotra_probe_vector_bytes(const cotra_probe *probe, uint32_t shard)
{
    return probe->direct ? probe->shards[shard].view->info.record_bytes : probe->shards[shard].prefix_bytes;
}

/* Checks the bytes of a candidate's record. */
static int check_vector(const cotra_probe *probe, const cotra_ranked *candidate, const uint8_t *record,
                        const cotra_record_head *head, cotra_error *err)
{
    const cotra_probe_shard *shard = &probe->shards[(uint32_t)candidate->major];
    const cotra_image_info *info = &shard->view->info;
    const uint32_t row = (uint32_t)candidate->minor;
    if (probe->direct)
        return cotra_record_validate(record, info, row, err);
    if (cotra_prefix_checksum(record, shard->prefix_bytes, row) == candidate->extra)
        return COTRA_OK;
    if (head->generation != (uint32_t)info->generation)
        return cotra_fail(err, COTRA_ERR_STALE,
                          "record %u is of generation %u, the header that was read of %llu: connect again", row,
                          head->generation, (unsigned long long)info->generation);
    return cotra_fail(err, COTRA_ERR_CHECKSUM, "record %u (it says %u): its vector is torn or corrupt", row,
                      head->node);
}

/* Keeps the k best, each label once: where it is nearest. */
static void take_hit(cotra_heap *hits, cotra_ranked hit)
{
    if (hits->count == hits->capacity && !cotra_ranked_less(&hit, &hits->items[0]))
        return;
    for (uint32_t i = 0; i < hits->count; i++) {
        if (hits->items[i].minor != hit.minor)
            continue;
        if (cotra_ranked_less(&hit, &hits->items[i]))
            cotra_heap_sift(hits->items, hits->count, i, hit);
        return;
    }
    cotra_heap_offer(hits, hit);
}

int cotra_probe_take_vector(cotra_probe *probe, uint32_t number, const uint8_t *record, cotra_error *err)
{
    const cotra_ranked *candidate = &probe->candidates.items[number];
    const uint32_t s = (uint32_t)candidate->major, row = (uint32_t)candidate->minor;
    const cotra_image_info *info = &probe->shards[s].view->info;
    /* What is used of the head is loaded once: the memory may be a live peer's. */
    const cotra_record_head head = *(const volatile cotra_record_head *)record;
    int status = check_vector(probe, candidate, record, &head, err);
    if (status)
        return status;
    if (head.label < 0)
        return cotra_fail(err, COTRA_ERR_FORMAT, "record %u has the label %lld", row, (long long)head.label);
    const float distance = cotra_metric_distance(probe->kernels, info->metric, info->vector_type, probe->query,
                                                 record + COTRA_RECORD_HEAD_BYTES, info->dim);
    if (distance < INFINITY && !(head.flags & COTRA_NODE_DELETED)) /* NaN is not below infinity */
        take_hit(&probe->hits, (cotra_ranked){.major = cotra_major(distance, s), .minor = (uint64_t)head.label});
    return COTRA_OK;
}

void cotra_probe_answer(cotra_probe *probe, int64_t *labels, float *distances, int32_t *shards)
{
    cotra_heap_sort(&probe->hits);
    for (uint32_t i = 0; i < probe->limits.k; i++) {
        const cotra_ranked *hit = &probe->hits.items[i];
        const int found = i < probe->hits.count;
        labels[i] = found ? (int64_t)hit->minor : -1;
        distances[i] = found ? cotra_unkey((uint32_t)(hit->major >> 32)) : INFINITY;
        shards[i] = found ? (int32_t)(uint32_t)hit->major : -1;
    }
}
