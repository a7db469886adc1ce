#include "search/walk.h"

#include "base/status.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define CHOSEN ((uint64_t)1 << 31)

/* float -> an integer that sorts the same way; -0.0 and 0.0 become neighbours, NaN never gets here. */
static uint32_t to_key(float distance)
{
    uint32_t bits;
    memcpy(&bits, &distance, sizeof bits);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

static float from_key(uint32_t key)
{
    uint32_t bits = key & 0x80000000u ? key & 0x7FFFFFFFu : ~key;
    float distance;
    memcpy(&distance, &bits, sizeof distance);
    return distance;
}

static uint64_t to_word(float distance, uint32_t node)
{
    return (uint64_t)to_key(distance) << 32 | node;
}

static size_t padded_dim(uint32_t dim)
{
    return (dim + 31u) / 32 * 32;
}

static size_t round_up64(size_t bytes)
{
    return (bytes + 63) / 64 * 64;
}

int cotra_walk_create(cotra_walk *walk, uint32_t max_dim, uint32_t k, uint32_t ef, uint32_t beam, cotra_error *err)
{
    memset(walk, 0, sizeof *walk);
    walk->k = k;
    walk->ef = ef;
    walk->beam = beam;
    const size_t code_dim = cotra_code_dim(max_dim);
    uint32_t seen = 256;
    while (seen < 8 * ef)
        seen *= 2;
    walk->seen_mask = seen - 1;
    walk->codes.table = aligned_alloc(64, round_up64(code_dim * 4));
    walk->query = aligned_alloc(64, round_up64(padded_dim(max_dim) * sizeof(float)));
    walk->scratch = aligned_alloc(64, round_up64(2 * code_dim * sizeof(float)));
    walk->pool = malloc((ef + 1) * sizeof *walk->pool);
    walk->seen = calloc(seen, sizeof *walk->seen);
    walk->frontier = malloc(beam * sizeof *walk->frontier);
    walk->hits = malloc(k * sizeof *walk->hits);
    if (walk->codes.table && walk->query && walk->scratch && walk->pool && walk->seen && walk->frontier && walk->hits)
        return COTRA_OK;
    cotra_walk_destroy(walk);
    return cotra_fail(err, COTRA_ERR_NO_MEMORY, "search: no memory for a walk with ef %u", ef);
}

void cotra_walk_destroy(cotra_walk *walk)
{
    free(walk->codes.table);
    free(walk->query);
    free(walk->scratch);
    free(walk->pool);
    free(walk->seen);
    free(walk->frontier);
    free(walk->hits);
    memset(walk, 0, sizeof *walk);
}

/* ---- the set of numbers seen ---- */

static void seen_clear(cotra_walk *walk)
{
    walk->seen_count = 0;
    if (++walk->epoch == 0) { /* once in 2^32 walks */
        memset(walk->seen, 0, ((size_t)walk->seen_mask + 1) * sizeof *walk->seen);
        walk->epoch = 1;
    }
}

static uint64_t *seen_place(uint64_t *table, uint32_t mask, uint32_t epoch, uint32_t number)
{
    uint32_t i = number * 0x9E3779B1u;
    i ^= i >> 15;
    for (;; i++) {
        uint64_t *place = &table[i & mask];
        if (*place >> 32 != epoch || (uint32_t)*place == number)
            return place;
    }
}

/* Grows the table; only a walk that sees far more than ef nodes gets here. */
static int seen_grow(cotra_walk *walk, cotra_error *err)
{
    size_t old = (size_t)walk->seen_mask + 1;
    if (old > (size_t)1 << 30)
        return cotra_fail(err, COTRA_ERR_NO_MEMORY, "search: a walk saw more than 2^29 nodes");
    uint64_t *table = calloc(2 * old, sizeof *table);
    if (!table)
        return cotra_fail(err, COTRA_ERR_NO_MEMORY, "search: no memory for the set of seen nodes");
    uint32_t mask = (uint32_t)(2 * old - 1);
    for (size_t i = 0; i < old; i++)
        if (walk->seen[i] >> 32 == walk->epoch)
            *seen_place(table, mask, walk->epoch, (uint32_t)walk->seen[i]) = walk->seen[i];
    free(walk->seen);
    walk->seen = table;
    walk->seen_mask = mask;
    return COTRA_OK;
}

/* Returns 1 when the number is new, 0 when it was seen, < 0 on an error. */
static inline int seen_add(cotra_walk *walk, uint32_t number, cotra_error *err)
{
    uint64_t *place = seen_place(walk->seen, walk->seen_mask, walk->epoch, number);
    if (*place >> 32 == walk->epoch)
        return 0;
    *place = (uint64_t)walk->epoch << 32 | number;
    if (++walk->seen_count * 2 > walk->seen_mask) {
        int status = seen_grow(walk, err);
        if (status)
            return status;
    }
    return 1;
}

/* ---- the pool ---- */

/* Entries below this distance get in. */
static float pool_bound(const cotra_walk *walk, uint32_t capacity)
{
    return walk->pool_count < capacity ? INFINITY : from_key((uint32_t)(walk->pool[capacity - 1] >> 32));
}

static uint32_t pool_place(const cotra_walk *walk, uint64_t word)
{
    uint32_t low = 0, high = walk->pool_count;
    while (low < high) {
        uint32_t middle = (low + high) / 2;
        if (walk->pool[middle] < word)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

static void pool_insert(cotra_walk *walk, uint64_t word, uint32_t capacity)
{
    uint32_t place = pool_place(walk, word);
    if (place >= capacity)
        return;
    uint32_t tail = (walk->pool_count < capacity ? walk->pool_count : capacity - 1) - place;
    memmove(walk->pool + place + 1, walk->pool + place, tail * sizeof *walk->pool);
    walk->pool[place] = word;
    walk->pool_count += walk->pool_count < capacity;
    if (!(word & CHOSEN) && place < walk->first_open)
        walk->first_open = place;
}

/* An expanded node's exact distance takes the place of its estimate. */
static void pool_replace(cotra_walk *walk, uint64_t old, uint64_t word)
{
    uint32_t place = pool_place(walk, old);
    if (place < walk->pool_count && walk->pool[place] == old) {
        walk->pool_count--;
        memmove(walk->pool + place, walk->pool + place + 1, (walk->pool_count - place) * sizeof *walk->pool);
        if (place < walk->first_open)
            walk->first_open--;
    }
    uint32_t to = pool_place(walk, word);
    if (to < walk->first_open)
        walk->first_open++;
    pool_insert(walk, word, walk->ef);
}

/* ---- upper layers, in the view ---- */

static float upper_distance(cotra_walk *walk, uint32_t upper)
{
    const cotra_view *view = walk->view;
    walk->stats.cache_hits++;
    return cotra_metric_distance(walk->kernels, view->info.metric, view->info.vector_type, walk->query,
                                 cotra_view_vector(view, upper), view->info.dim);
}

/* Greedy on the levels above 1, then a best-first search on level 1 that leaves its nearest nodes in the pool: the first
 * frontier is then a whole beam. */
static int descend(cotra_walk *walk, cotra_error *err)
{
    const cotra_view *view = walk->view;
    uint32_t current = view->entry;
    float distance = upper_distance(walk, current);
    for (uint32_t level = view->info.max_level; level > 1; level--)
        for (int moved = 1; moved;) {
            moved = 0;
            const uint32_t *row = cotra_view_row(view, current, level);
            for (uint32_t j = 1; j <= row[0]; j++) {
                float d = upper_distance(walk, row[j]);
                if (d < distance) {
                    distance = d;
                    current = row[j];
                    moved = 1;
                }
            }
        }
    if (!(distance < INFINITY))
        distance = 3.4e38f; /* a start is a start */
    const uint32_t width = walk->beam < walk->ef ? walk->beam : walk->ef;
    int status = seen_add(walk, current, err);
    if (status < 0)
        return status;
    pool_insert(walk, to_word(distance, current), width);
    while (walk->first_open < walk->pool_count) {
        uint64_t *entry = &walk->pool[walk->first_open];
        if (*entry & CHOSEN) {
            walk->first_open++;
            continue;
        }
        *entry |= CHOSEN;
        const uint32_t *row = cotra_view_row(view, (uint32_t)*entry & INT32_MAX, 1);
        for (uint32_t j = 1; j <= row[0]; j++) {
            status = seen_add(walk, row[j], err);
            if (status < 0)
                return status;
            if (status == 0)
                continue;
            float d = upper_distance(walk, row[j]);
            if (d < pool_bound(walk, width))
                pool_insert(walk, to_word(d, row[j]), width);
        }
    }
    for (uint32_t i = 0; i < walk->pool_count; i++) /* from places among the upper nodes to node numbers, all open again */
        walk->pool[i] = (walk->pool[i] >> 32 << 32) | view->nodes[(uint32_t)walk->pool[i] & INT32_MAX];
    for (uint32_t i = 1; i < walk->pool_count; i++) /* equal distances sort by node number */
        for (uint32_t j = i; j > 0 && walk->pool[j] < walk->pool[j - 1]; j--) {
            uint64_t swap = walk->pool[j];
            walk->pool[j] = walk->pool[j - 1];
            walk->pool[j - 1] = swap;
        }
    seen_clear(walk);
    return COTRA_OK;
}

int cotra_walk_begin(cotra_walk *walk, const cotra_view *view, const cotra_kernels *kernels, const float *query,
                     cotra_error *err)
{
    const uint32_t dim = view->info.dim;
    walk->view = view;
    walk->kernels = kernels;
    walk->pool_count = walk->first_open = walk->hit_count = walk->frontier_count = 0;
    memset(&walk->stats, 0, sizeof walk->stats);
    memcpy(walk->query, query, dim * sizeof *query);
    memset(walk->query + dim, 0, (padded_dim(dim) - dim) * sizeof *query);
    if (view->info.metric == COTRA_METRIC_COSINE) { /* as hnswlib normalises */
        float norm = 0;
        for (uint32_t i = 0; i < dim; i++)
            norm += query[i] * query[i];
        norm = 1.0f / (sqrtf(norm) + 1e-30f);
        for (uint32_t i = 0; i < dim; i++)
            walk->query[i] *= norm;
    }
    cotra_query_codes_make(&view->rotation, walk->query, view->mean, walk->scratch, &walk->codes);
    seen_clear(walk);
    if (view->info.upper_count) {
        int status = descend(walk, err);
        if (status)
            return status;
    } else {
        pool_insert(walk, to_word(3.4e38f, view->info.entry_node), walk->ef);
    }
    for (uint32_t i = 0; i < walk->pool_count; i++) {
        int status = seen_add(walk, (uint32_t)walk->pool[i] & INT32_MAX, err);
        if (status < 0)
            return status;
    }
    walk->first_open = 0;
    return COTRA_OK;
}

uint32_t cotra_walk_choose(cotra_walk *walk)
{
    uint32_t n = 0, i = walk->first_open;
    for (; i < walk->pool_count && n < walk->beam; i++)
        if (!(walk->pool[i] & CHOSEN)) {
            walk->pool[i] |= CHOSEN;
            walk->frontier[n++] = walk->pool[i];
        }
    walk->first_open = i;
    walk->frontier_count = n;
    walk->stats.rounds += n > 0;
    return n;
}

static void hits_insert(cotra_walk *walk, float distance, int64_t label)
{
    uint32_t i = walk->hit_count;
    cotra_hit *hits = walk->hits;
    if (i == walk->k) {
        if (distance > hits[i - 1].distance || (distance == hits[i - 1].distance && label > hits[i - 1].label))
            return;
        i--;
    } else {
        walk->hit_count++;
    }
    for (; i > 0 && (distance < hits[i - 1].distance ||
                     (distance == hits[i - 1].distance && label < hits[i - 1].label));
         i--)
        hits[i] = hits[i - 1];
    hits[i] = (cotra_hit){.distance = distance, .label = label};
}

int cotra_walk_expand(cotra_walk *walk, uint32_t i, const uint8_t *record, cotra_error *err)
{
    const cotra_view *view = walk->view;
    const cotra_record_layout *layout = &view->record;
    const uint32_t node = cotra_walk_frontier_node(walk, i);
    int status = cotra_record_validate(record, &view->info, node, err);
    if (status)
        return status;
    /* What steers the walk is loaded once: the memory may be a live peer's. */
    const cotra_record_head head = *(const volatile cotra_record_head *)record;
    const uint32_t count = head.count <= view->info.degree ? head.count : view->info.degree;
    const float distance = cotra_metric_distance(walk->kernels, view->info.metric, view->info.vector_type, walk->query,
                                                 record + COTRA_RECORD_HEAD_BYTES, view->info.dim);
    walk->stats.expansions++;
    if (distance < INFINITY) { /* false for NaN */
        if (!(head.flags & COTRA_NODE_DELETED))
            hits_insert(walk, distance, head.label);
        if(0)pool_replace(walk, walk->frontier[i], to_word(distance, node) | CHOSEN);
    }
    const volatile uint32_t *numbers = (const volatile uint32_t *)(record + layout->numbers);
    for (uint32_t begin = 0; begin < count; begin += COTRA_BLOCK) {
        uint32_t sums[COTRA_BLOCK];
        float estimates[COTRA_BLOCK];
        walk->kernels->scan(walk->codes.table, record + layout->codes + begin / COTRA_BLOCK * layout->block_bytes,
                            view->info.code_dim, sums);
        walk->kernels->estimate(sums, (const float *)(record + layout->f0) + begin,
                                (const float *)(record + layout->f1) + begin, distance, walk->codes.offset,
                                walk->codes.scale, estimates);
        uint32_t n = count - begin < COTRA_BLOCK ? count - begin : COTRA_BLOCK;
        float bound = pool_bound(walk, walk->ef);
        for (uint32_t j = 0; j < n; j++) {
            if (!(estimates[j] < bound))
                continue;
            uint32_t neighbour = numbers[begin + j];
            if (neighbour >= view->info.count)
                return cotra_fail(err, COTRA_ERR_FORMAT, "record %u links to node %u of %llu", node, neighbour,
                                  (unsigned long long)view->info.count);
            status = seen_add(walk, neighbour, err);
            if (status < 0)
                return status;
            if (status == 0)
                continue;
            pool_insert(walk, to_word(estimates[j], neighbour), walk->ef);
            bound = pool_bound(walk, walk->ef);
        }
    }
    return COTRA_OK;
}
