#include "search/walk.h"

#include "base/status.h"
#include "layout/vectors.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define CHOSEN ((uint64_t)1 << 31)
#define FARTHEST                                                                                                       \
    1e37f /* of all pool keys: what is further, or nearer than its negative, is only a hostile record's to say */

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

int cotra_walk_create(cotra_walk *walk, uint32_t max_dim, uint32_t k, uint32_t max_pool, uint32_t max_width,
                      cotra_error *err)
{
    memset(walk, 0, sizeof *walk);
    walk->k = k;
    walk->width = max_width;
    const size_t code_dim = cotra_code_dim(max_dim);
    uint32_t seen = 256;
    while (seen < 4 * max_pool)
        seen *= 2;
    walk->seen_mask = seen - 1;
    walk->codes.table = aligned_alloc(64, round_up64(code_dim * 4));
    walk->query = aligned_alloc(64, round_up64(padded_dim(max_dim) * sizeof(float)));
    walk->scratch = aligned_alloc(64, round_up64(2 * code_dim * sizeof(float)));
    walk->pool = malloc(((size_t)max_pool + 1) * sizeof *walk->pool);
    walk->seen = calloc(seen, sizeof *walk->seen);
    walk->frontier = malloc(max_width * sizeof *walk->frontier);
    walk->hits = malloc(k * sizeof *walk->hits);
    if (walk->codes.table && walk->query && walk->scratch && walk->pool && walk->seen && walk->frontier && walk->hits)
        return COTRA_OK;
    cotra_walk_destroy(walk);
    return cotra_fail(err, COTRA_ERR_NO_MEMORY, "search: no memory for a walk of %u candidates", max_pool);
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

/* ---- the nodes seen ---- */

static void seen_clear(cotra_walk *walk)
{
    walk->seen_count = 0;
    if (++walk->epoch == 0) { /* once in 2^32 walks */
        memset(walk->seen, 0, ((size_t)walk->seen_mask + 1) * sizeof *walk->seen);
        walk->epoch = 1;
    }
}

static cotra_seen *seen_place(cotra_seen *table, uint32_t mask, uint32_t epoch, uint32_t number)
{
    uint32_t i = number * 0x9E3779B1u;
    i ^= i >> 15;
    for (;; i++) {
        cotra_seen *place = &table[i & mask];
        if (place->epoch != epoch || place->number == number)
            return place;
    }
}

/* Doubles the table; only a walk that sees far more than ef nodes gets here. */
static int seen_grow(cotra_walk *walk, cotra_error *err)
{
    size_t old = (size_t)walk->seen_mask + 1;
    if (old > (size_t)1 << 30)
        return cotra_fail(err, COTRA_ERR_NO_MEMORY, "search: a walk saw more than 2^29 nodes");
    cotra_seen *table = calloc(2 * old, sizeof *table);
    if (!table)
        return cotra_fail(err, COTRA_ERR_NO_MEMORY, "search: no memory for the nodes seen");
    uint32_t mask = (uint32_t)(2 * old - 1);
    for (size_t i = 0; i < old; i++)
        if (walk->seen[i].epoch == walk->epoch)
            *seen_place(table, mask, walk->epoch, walk->seen[i].number) = walk->seen[i];
    free(walk->seen);
    walk->seen = table;
    walk->seen_mask = mask;
    return COTRA_OK;
}

/* The entry of a number; a new one has the walk's epoch only after seen_add. */
static inline cotra_seen *seen_find(cotra_walk *walk, uint32_t number)
{
    return seen_place(walk->seen, walk->seen_mask, walk->epoch, number);
}

static int seen_add(cotra_walk *walk, cotra_seen *place, uint32_t number, float distance, uint32_t estimates,
                    cotra_error *err)
{
    *place = (cotra_seen){.epoch = walk->epoch, .number = number, .distance = distance, .estimates = estimates};
    return ++walk->seen_count * 2 > walk->seen_mask ? seen_grow(walk, err) : COTRA_OK;
}

/* ---- the pool ---- */

/* Entries below this distance get in. */
static float pool_bound(const cotra_walk *walk, uint32_t capacity)
{
    return walk->pool_count < capacity ? INFINITY : from_key((uint32_t)(walk->pool[capacity - 1] >> 32));
}

/* Where an open entry is, or belongs. Choosing an entry does not move it, so its mark must not count: among entries of
 * the same distance it would break the order. Without a branch that a CPU could guess wrong. */
static uint32_t pool_place(const cotra_walk *walk, uint64_t word)
{
    const uint64_t *pool = walk->pool, *low = pool;
    for (uint32_t n = walk->pool_count; n > 0;) {
        uint32_t half = n / 2;
        int right = (low[half] & ~CHOSEN) < word;
        low = right ? low + half + 1 : low;
        n = right ? n - half - 1 : half;
    }
    return (uint32_t)(low - pool);
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

/* Gives the open entry at a place another distance. */
static void pool_move(cotra_walk *walk, uint32_t from, uint64_t word)
{
    uint64_t *pool = walk->pool;
    uint32_t to = pool_place(walk, word);
    if (to > from) { /* the place was counted with the old entry still below it */
        to--;
        memmove(pool + from, pool + from + 1, (to - from) * sizeof *pool);
    } else {
        memmove(pool + to + 1, pool + to, (from - to) * sizeof *pool);
    }
    pool[to] = word;
    if (to < walk->first_open)
        walk->first_open = to;
}

/* ---- upper layers, in the view ---- */

static float upper_distance(cotra_walk *walk, uint32_t upper)
{
    const cotra_view *view = walk->view;
    walk->stats.cache_hits++;
    return cotra_metric_distance(walk->kernels, view->info.metric, view->info.vector_type, walk->query,
                                 cotra_view_vector(view, upper), view->info.dim);
}

/* Greedy on the levels above 1, then a best-first search on level 1 that leaves its nearest nodes in the pool: the
 * first frontier is then a whole beam. */
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
        distance = FARTHEST; /* a start is a start */
    const uint32_t width = walk->plan.beam < walk->plan.ef ? walk->plan.beam : walk->plan.ef;
    int status = seen_add(walk, seen_find(walk, current), current, distance, 0, err);
    if (status)
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
            cotra_seen *place = seen_find(walk, row[j]);
            if (place->epoch == walk->epoch)
                continue;
            float d = upper_distance(walk, row[j]);
            status = seen_add(walk, place, row[j], d, 0, err);
            if (status)
                return status;
            if (d < pool_bound(walk, width))
                pool_insert(walk, to_word(d, row[j]), width);
        }
    }
    for (uint32_t i = 0; i < walk->pool_count;
         i++) /* from places among the upper nodes to node numbers, all open again */
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

int cotra_walk_begin(cotra_walk *walk, const cotra_view *view, const cotra_walk_plan *plan,
                     const cotra_kernels *kernels, const float *query, cotra_error *err)
{
    const uint32_t dim = view->info.dim;
    walk->view = view;
    walk->plan = *plan;
    walk->next_row = 0;
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
    walk->limit = INFINITY;
    walk->query_norm2 =
        view->info.metric == COTRA_METRIC_IP ? kernels->dot[COTRA_VECTOR_F32](walk->query, walk->query, dim) : 0;
    /* One bit a dimension estimates a squared distance with an error of about 1.5 / sqrt(D) of it (RaBitQ, theorem 3.2,
     * for a residual as long as the distance). How many of those are worth waiting for is what ef / k asks for; the
     * factor is measured (bench/README.md). */
    walk->slack = 0.75f / sqrtf((float)view->info.code_dim) * (sqrtf((float)plan->ef / (float)walk->k) - 1);
    if (plan->direct)
        return COTRA_OK;
    cotra_query_codes_make(&view->rotation, walk->query, view->mean, walk->scratch, &walk->codes);
    seen_clear(walk);
    if (view->info.upper_count) {
        int status = descend(walk, err);
        if (status)
            return status;
    } else {
        pool_insert(walk, to_word(3.4e38f, view->info.entry_node), walk->plan.pool);
    }
    for (uint32_t i = 0; i < walk->pool_count; i++) {
        uint32_t node = (uint32_t)walk->pool[i] & INT32_MAX;
        int status = seen_add(walk, seen_find(walk, node), node, 0, 0, err);
        if (status)
            return status;
    }
    walk->first_open = 0;
    return COTRA_OK;
}

static int lets_through(const uint8_t *filter, uint64_t row)
{
    return filter[row / 8] >> row % 8 & 1;
}

/* The next rows that the filter of a direct plan lets through. */
static uint32_t choose_rows(cotra_walk *walk)
{
    const uint64_t count = walk->view->info.count;
    uint32_t n = 0;
    for (; walk->next_row < count && n < walk->width; walk->next_row++) {
        if (walk->next_row % 8 == 0 && walk->plan.filter[walk->next_row / 8] == 0)
            walk->next_row += 7;
        else if (lets_through(walk->plan.filter, walk->next_row))
            walk->frontier[n++] = (uint32_t)walk->next_row;
    }
    walk->frontier_count = n;
    walk->stats.rounds += n > 0;
    return n;
}

uint32_t cotra_walk_choose(cotra_walk *walk)
{
    if (walk->plan.direct)
        return choose_rows(walk);
    const uint64_t limit = to_word(walk->limit, 0);
    uint32_t n = 0, i = walk->first_open;
    for (; i < walk->pool_count && n < walk->plan.beam && walk->pool[i] < limit; i++) {
        if (!(walk->pool[i] & CHOSEN)) {
            walk->pool[i] |= CHOSEN;
            walk->frontier[n] = (uint32_t)walk->pool[i] & INT32_MAX;
            seen_find(walk, walk->frontier[n++])->estimates = 0;
        }
    }
    walk->first_open = i;
    walk->frontier_count = n;
    walk->stats.rounds += n > 0;
    return n;
}

/* Keeps the k best, and the limit that follows from them. */
static void hits_insert(cotra_walk *walk, cotra_hit hit)
{
    const uint32_t k = walk->k;
    uint32_t i = walk->hit_count;
    cotra_hit *hits = walk->hits;
    if (i == k) {
        const cotra_hit *last = &hits[k - 1];
        if (hit.distance > last->distance || (hit.distance == last->distance && hit.label > last->label))
            return;
        i--;
    } else {
        walk->hit_count++;
    }
    for (; i > 0; i--) {
        if (hits[i - 1].distance < hit.distance ||
            (hits[i - 1].distance == hit.distance && hits[i - 1].label < hit.label))
            break;
        hits[i] = hits[i - 1];
    }
    hits[i] = hit;
    if (walk->hit_count == k) {
        float far = hits[k - 1].distance, scale = far; /* l2: |q - x|^2; cosine: |q - x|^2 / 2 */
        if (walk->view->info.metric == COTRA_METRIC_IP)
            scale = (walk->query_norm2 + hits[k - 1].norm2) / 2 + far - 1; /* the same half, of vectors of any length */
        walk->limit = far + walk->slack * (scale > 0 ? scale : 0);
    }
}

/* A neighbour's estimate: a new node enters the pool, an open one moves to the mean of its estimates. */
static int take_estimate(cotra_walk *walk, uint32_t node, float estimate, cotra_error *err)
{
    cotra_seen *seen = seen_find(walk, node);
    if (seen->epoch == walk->epoch) {
        if (seen->estimates == 0)
            return COTRA_OK;
        uint64_t old = to_word(seen->distance, node);
        uint32_t place = pool_place(walk, old);
        seen->distance += (estimate - seen->distance) / (float)++seen->estimates;
        if (place < walk->pool_count && walk->pool[place] == old)
            pool_move(walk, place, to_word(seen->distance, node));
        else
            pool_insert(walk, to_word(seen->distance, node), walk->plan.pool);
        return COTRA_OK;
    }
    pool_insert(walk, to_word(estimate, node), walk->plan.pool);
    return seen_add(walk, seen, node, estimate, 1, err);
}

int cotra_walk_expand(cotra_walk *walk, uint32_t i, const uint8_t *record, cotra_error *err)
{
    const cotra_view *view = walk->view;
    const cotra_image_info *info = &view->info;
    const cotra_record_layout *layout = &view->record;
    const uint32_t node = walk->frontier[i];
    int status = cotra_record_validate(record, info, node, err);
    if (status)
        return status;
    /* What steers the walk is loaded once: the memory may be a live peer's. */
    const cotra_record_head head = *(const volatile cotra_record_head *)record;
    const uint32_t count = head.count <= info->degree ? head.count : info->degree;
    const uint8_t *own = record + COTRA_RECORD_HEAD_BYTES;
    const float distance =
        cotra_metric_distance(walk->kernels, info->metric, info->vector_type, walk->query, own, info->dim);
    walk->stats.expansions++;
    if (distance < INFINITY && !(head.flags & COTRA_NODE_DELETED) && /* NaN is not below infinity */
        (!walk->plan.filter || lets_through(walk->plan.filter, node))) {
        cotra_hit hit = {.distance = distance, .label = head.label};
        if (info->metric == COTRA_METRIC_IP) {
            cotra_vector_load(info->vector_type, own, info->dim, walk->scratch);
            memset(walk->scratch + info->dim, 0, (padded_dim(info->dim) - info->dim) * sizeof *walk->scratch);
            hit.norm2 = walk->kernels->dot[COTRA_VECTOR_F32](walk->scratch, walk->scratch, info->dim);
        }
        hits_insert(walk, hit);
    }
    if (walk->plan.direct)
        return COTRA_OK;
    const volatile uint32_t *numbers = (const volatile uint32_t *)(record + layout->numbers);
    for (uint32_t begin = 0; begin < count; begin += COTRA_BLOCK) {
        uint32_t sums[COTRA_BLOCK];
        float estimates[COTRA_BLOCK];
        walk->kernels->scan(walk->codes.table, record + layout->codes + begin / COTRA_BLOCK * layout->block_bytes,
                            info->code_dim, sums);
        /* Nothing above the limit will ever be expanded, so it need not be kept. */
        float bound = pool_bound(walk, walk->plan.pool);
        bound = walk->limit < bound ? walk->limit : bound;
        uint32_t below = walk->kernels->estimate(sums, (const float *)(record + layout->f0) + begin,
                                                 (const float *)(record + layout->f1) + begin, distance,
                                                 walk->codes.offset, walk->codes.scale, bound, estimates);
        if (count - begin < COTRA_BLOCK)
            below &= (1u << (count - begin)) - 1;
        for (; below; below &= below - 1) {
            const uint32_t j = (uint32_t)__builtin_ctz(below);
            if (!(estimates[j] < pool_bound(walk, walk->plan.pool))) /* it sinks as the pool fills */
                continue;
            uint32_t neighbour = numbers[begin + j];
            if (neighbour >= info->count)
                return cotra_fail(err, COTRA_ERR_FORMAT, "record %u links to node %u of %llu", node, neighbour,
                                  (unsigned long long)info->count);
            status = take_estimate(walk, neighbour, fmaxf(-FARTHEST, fminf(estimates[j], FARTHEST)), err);
            if (status)
                return status;
        }
    }
    return COTRA_OK;
}
