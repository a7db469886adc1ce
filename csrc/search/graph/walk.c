#include "search/graph/walk.h"

#include "base/ranked.h"
#include "base/status.h"
#include "base/int_math.h"
#include "kernels/own_distance.h"
#include "format/vector_types.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define DONE ((uint32_t)1 << 31)
enum { MAX_STARTS = 4 }; /* eight save 2 % of the READs, and take as long as six more would (measured) */
#define FARTHEST                                                                                                       \
    1e37f /* of all pool keys: what is further, or nearer than its negative, is only a hostile record's to say */

/* fmaxf and fminf are calls */
static float clamp(float distance)
{
    distance = distance < FARTHEST ? distance : FARTHEST;
    return distance > -FARTHEST ? distance : -FARTHEST;
}

int cotra_walk_create(cotra_walk *walk, uint32_t max_dim, uint32_t k, uint32_t max_rank, uint32_t max_width,
                      cotra_error *err)
{
    memset(walk, 0, sizeof *walk);
    walk->k = k;
    walk->width = max_width;
    walk->nearest = malloc(((size_t)max_width + 1) * sizeof *walk->nearest);
    walk->frontier = malloc(max_width * sizeof *walk->frontier);
    walk->places = malloc(max_width * sizeof *walk->places);
    walk->hits = malloc(k * sizeof *walk->hits);
    walk->low.heap = malloc(max_rank * sizeof(float));
    walk->high.heap = malloc(max_rank * sizeof(float));
    int status = cotra_query_create(&walk->query, max_dim, err);
    if (status)
        goto failed;
    status = cotra_candidates_create(&walk->candidates, err);
    if (status)
        goto failed;
    if (!(walk->nearest && walk->frontier && walk->places && walk->hits && walk->low.heap && walk->high.heap)) {
        status = cotra_fail(err, COTRA_ERR_NO_MEMORY, "search: no memory for a walk");
        goto failed;
    }
    return COTRA_OK;
failed:
    cotra_walk_destroy(walk);
    return status;
}

void cotra_walk_destroy(cotra_walk *walk)
{
    cotra_query_destroy(&walk->query);
    cotra_candidates_destroy(&walk->candidates);
    free(walk->nearest);
    free(walk->frontier);
    free(walk->places);
    free(walk->hits);
    free(walk->low.heap);
    free(walk->high.heap);
    memset(walk, 0, sizeof *walk);
}

/* Takes a distance in, where it is one of the least. */
static void rank(cotra_least *ranked, float distance)
{
    float *heap = ranked->heap;
    const uint32_t n = ranked->capacity;
    uint32_t i;
    if (ranked->count < n) {
        for (i = ranked->count++; i > 0 && heap[(i - 1) / 2] < distance; i = (i - 1) / 2)
            heap[i] = heap[(i - 1) / 2];
        heap[i] = distance;
    } else if (distance < heap[0]) {
        for (i = 0; 2 * i + 1 < n;) {
            uint32_t child = 2 * i + 1;
            child += child + 1 < n && heap[child + 1] > heap[child];
            if (heap[child] <= distance)
                break;
            heap[i] = heap[child];
            i = child;
        }
        heap[i] = distance;
    }
}

/* ---- upper layers, in the view ---- */

static float exact_distance(const cotra_walk *walk, const cotra_view *view, uint32_t upper)
{
    return cotra_own_distance(walk->kernels, &view->info, walk->query.vector, cotra_view_vector(view, upper),
                              view->norms2 ? view->norms2[upper] : 1);
}

/* By the sketch, where there is one. */
static float upper_distance(cotra_walk *walk, const cotra_view *view, uint32_t upper, float *weight)
{
    walk->stats.cache_hits++;
    if (view->sketch.values)
        return cotra_sketch_distance(&view->sketch, walk->kernels, view->info.metric, &walk->query.sketch, upper,
                                     weight);
    *weight = COTRA_EXACT;
    return exact_distance(walk, view, upper);
}

/* The row of links of an upper node, whose vectors are on their way. */
static const uint32_t *upper_row(const cotra_view *view, uint32_t upper, uint32_t level)
{
    const uint8_t *vectors = view->sketch.values ? (const uint8_t *)view->sketch.values : view->vectors;
    const uint32_t stride = view->sketch.values ? view->sketch.stride : view->vector_stride;
    const uint32_t *row = cotra_view_row(view, upper, level);
    for (uint32_t j = 1; j <= row[0]; j++)
        for (uint32_t line = 0; line < stride && line < 512; line += 64)
            __builtin_prefetch(vectors + (size_t)row[j] * stride + line);
    return row;
}

/* Has the row of links of a node brought that may be the next to be looked at. */
static void prefetch_row(const cotra_view *view, uint32_t upper, uint32_t level)
{
    const uint8_t *row = (const uint8_t *)cotra_view_row(view, upper, level);
    __builtin_prefetch(row);
    __builtin_prefetch(row + 64);
}

static uint32_t node_of(const cotra_view *view, uint32_t upper)
{
    return (uint32_t)view->info.graph_base + view->nodes[upper];
}

/* Takes an upper node in; returns its distance, infinite where it was seen before. */
static float take_upper(cotra_walk *walk, const cotra_view *view, uint32_t upper)
{
    cotra_candidates *all = &walk->candidates;
    const uint32_t node = node_of(view, upper);
    if (cotra_candidates_is_seen(all, node))
        return INFINITY;
    float weight;
    const float distance = upper_distance(walk, view, upper, &weight);
    if (!(distance < FARTHEST))
        return INFINITY;
    cotra_candidates_take(all, node, clamp(distance), weight);
    return clamp(distance);
}

/* Greedy on the levels above 1. */
static uint32_t descend_to_level_1(cotra_walk *walk, const cotra_view *view, float *distance)
{
    uint32_t current = view->entry;
    float weight;
    *distance = upper_distance(walk, view, current, &weight);
    for (uint32_t level = view->info.max_level; level > 1; level--)
        for (int moved = 1; moved;) {
            moved = 0;
            const uint32_t *row = upper_row(view, current, level);
            for (uint32_t j = 1; j <= row[0]; j++) {
                float d = upper_distance(walk, view, row[j], &weight);
                if (d < *distance) {
                    *distance = d;
                    current = row[j];
                    prefetch_row(view, current, level);
                    moved = 1;
                }
            }
        }
    return current;
}

/* The only node of a shard without upper layers that a walk can start from; its distance is not known yet. */
static int start_at_entry(cotra_walk *walk, const cotra_view *view, cotra_error *err)
{
    int status = cotra_candidates_make_room(&walk->candidates, err);
    if (status)
        return status;
    cotra_candidates_take(&walk->candidates, (uint32_t)view->info.graph_base + view->info.entry_node, FARTHEST,
                          COTRA_EXACT);
    return COTRA_OK;
}

/* Takes the neighbours of an upper node on level 1 in, and among the nearest those that are; returns the first place
 * there that changed, or their number. */
static int take_row(cotra_walk *walk, const cotra_view *view, uint32_t upper, uint32_t width, uint32_t *n,
                    uint32_t *first, cotra_error *err)
{
    const uint32_t *row = upper_row(view, upper, 1);
    *first = *n;
    for (uint32_t j = 1; j <= row[0]; j++) {
        if ((j - 1) % COTRA_BLOCK == 0) {
            int status = cotra_candidates_make_room(&walk->candidates, err);
            if (status)
                return status;
        }
        const uint64_t word = cotra_major(take_upper(walk, view, row[j]), row[j]);
        if (word >= cotra_major(INFINITY, 0))
            continue;
        const uint32_t place = cotra_insert_word(walk->nearest, n, width, word);
        if (place < width)
            prefetch_row(view, row[j], 1);
        *first = place < *first ? place : *first;
    }
    return COTRA_OK;
}

/* A best-first search on level 1 from one node; leaves the `*n` nearest, `width` at most, in walk->nearest. All nodes
 * that were looked at are candidates. */
static int search_level_1(cotra_walk *walk, const cotra_view *view, uint32_t from, float distance, uint32_t width,
                          uint32_t *n, cotra_error *err)
{
    uint64_t *nearest = walk->nearest; /* distance << 32 | DONE | upper node, sorted */
    nearest[0] = cotra_major(distance, from);
    *n = 1;
    for (uint32_t i = 0; i < *n;) {
        if (nearest[i] & DONE) {
            i++;
            continue;
        }
        nearest[i] |= DONE;
        uint32_t first;
        int status = take_row(walk, view, (uint32_t)nearest[i] & ~DONE, width, n, &first, err);
        if (status)
            return status;
        i = first < i ? first : i;
    }
    return COTRA_OK;
}

/* Greedy on the levels above 1, then a search on level 1 for the plan's beam of nearest nodes: the first frontiers then
 * have something to choose from. The nearest have their exact distances. */
static int descend(cotra_walk *walk, const cotra_view *view, cotra_error *err)
{
    if (view->info.upper_count == 0)
        return start_at_entry(walk, view, err);
    float distance;
    const uint32_t current = descend_to_level_1(walk, view, &distance);
    int status = cotra_candidates_make_room(&walk->candidates, err);
    if (status)
        return status;
    distance = clamp(distance); /* a start is a start */
    cotra_candidates_take(&walk->candidates, node_of(view, current), distance, COTRA_LEAST_WEIGHT);
    uint32_t n;
    status = search_level_1(walk, view, current, distance, cotra_min_u32(walk->plan.beam, MAX_STARTS), &n, err);
    for (uint32_t i = 0; i < n && !status; i++) {
        const uint32_t upper = (uint32_t)walk->nearest[i] & ~DONE;
        cotra_candidates_take(&walk->candidates, node_of(view, upper), clamp(exact_distance(walk, view, upper)),
                              COTRA_EXACT);
    }
    return status;
}

static bool is_open(const cotra_walk *walk, uint32_t place)
{
    return (!walk->mask || walk->mask[walk->space->shards[place]]) && !cotra_space_is_lost(walk->space, place);
}

/* Descends in the shards whose centroids are nearest, of those that are open and come after the ones before. */
static int start(cotra_walk *walk, uint32_t n_wanted, cotra_error *err)
{
    const cotra_space *space = walk->space;
    const uint32_t metric = walk->view->info.metric == COTRA_METRIC_IP ? COTRA_METRIC_IP : COTRA_METRIC_L2;
    uint64_t nearest[COTRA_START_SHARDS];
    uint32_t n = 0;
    for (uint32_t i = 0; i < space->n; i++) {
        if (!is_open(walk, i))
            continue;
        const float distance =
            cotra_metric_distance(walk->kernels, metric, COTRA_VECTOR_F32, walk->query.vector,
                                  space->centroids + (size_t)i * space->padded_dim, walk->view->info.dim);
        const uint64_t word = cotra_major(clamp(distance), i);
        if (word >= walk->next_start)
            cotra_insert_word(nearest, &n, n_wanted, word);
    }
    int status = COTRA_OK;
    for (uint32_t i = 0; i < n && !status; i++) {
        walk->next_start = nearest[i] + 1;
        walk->starts[walk->n_starts < COTRA_START_SHARDS ? walk->n_starts++ : COTRA_START_SHARDS - 1] =
            (uint32_t)nearest[i];
        status = descend(walk, space->views[(uint32_t)nearest[i]], err);
    }
    return status;
}

/* In how many shards a walk that has nothing left to expand should start anew: as many as it started in and were lost;
 * where it has too few answers and not all of the graph is open to it, one, for what leads there may not be. */
static uint32_t count_restarts(cotra_walk *walk)
{
    const cotra_space *space = walk->space;
    uint32_t kept = 0;
    for (uint32_t i = 0; i < walk->n_starts; i++)
        if (!cotra_space_is_lost(space, walk->starts[i]))
            walk->starts[kept++] = walk->starts[i];
    const uint32_t n_lost = walk->n_starts - kept;
    walk->n_starts = kept;
    if (n_lost)
        return n_lost;
    return walk->hit_count < walk->k && (space->n_lost || !space->whole || walk->mask || walk->plan.filters);
}

int cotra_walk_begin(cotra_walk *walk, const cotra_space *space, const cotra_walk_plan *plan, const uint8_t *mask,
                     const cotra_kernels *kernels, const float *query, cotra_error *err)
{
    const cotra_view *view = space->views[0];
    walk->space = space;
    walk->view = view;
    walk->plan = *plan;
    walk->mask = mask;
    walk->next_row = walk->next_place = walk->n_starts = 0;
    walk->next_start = 0;
    walk->kernels = kernels;
    walk->hit_count = walk->frontier_count = walk->beam = 0;
    walk->sweeping = plan->direct;
    walk->low.count = walk->high.count = 0;
    walk->low.capacity = plan->low;
    walk->high.capacity = plan->high;
    walk->rows = 0;
    for (uint32_t i = 0; i < space->n; i++)
        walk->rows += is_open(walk, i) ? plan->rows[space->shards[i]] : 0;
    memset(&walk->stats, 0, sizeof walk->stats);
    cotra_query_copy(view, query, walk->query.vector);
    walk->limit = INFINITY;
    if (plan->direct)
        return COTRA_OK;
    cotra_query_encode(&walk->query, kernels, view);
    cotra_candidates_clear(&walk->candidates);
    return space->n == 1 ? descend(walk, view, err) : start(walk, COTRA_START_SHARDS, err);
}

/* NULL: all rows of the shard may be returned. */
static const uint8_t *filter_of(const cotra_walk *walk, uint32_t place)
{
    return walk->plan.filters ? walk->plan.filters[walk->space->shards[place]] : NULL;
}

static bool lets_through(const uint8_t *filter, uint64_t row)
{
    return !filter || (filter[row / 8] >> row % 8 & 1);
}

/* The records of a round that the bound leaves; one where it leaves none: whether there is one says if the bound ends
 * it. */
static uint32_t within_bound(const cotra_walk *walk, uint32_t wanted)
{
    const uint32_t left = walk->plan.most - walk->stats.expansions;
    return cotra_min_u32(wanted, left ? left : 1);
}

/* The next rows of a sweep: that the filters let through, and that were not read before. */
static void choose_rows(cotra_walk *walk)
{
    const cotra_space *space = walk->space;
    const uint32_t width = within_bound(walk, walk->width);
    uint32_t n = 0;
    for (; walk->next_place < space->n; walk->next_place++, walk->next_row = 0) {
        const uint32_t place = walk->next_place;
        const uint8_t *filter = filter_of(walk, place);
        const uint64_t count = is_open(walk, place) ? space->views[place]->info.count : 0;
        for (; walk->next_row < count && n < width; walk->next_row++) {
            if (filter && walk->next_row % 8 == 0 && filter[walk->next_row / 8] == 0) {
                walk->next_row += 7;
                continue;
            }
            const uint32_t node = space->bases[place] + (uint32_t)walk->next_row;
            if (!lets_through(filter, walk->next_row) ||
                (!walk->plan.direct && cotra_candidates_is_chosen(&walk->candidates, node)))
                continue;
            walk->frontier[n] = node;
            walk->places[n++] = place;
        }
        if (n == width)
            break;
    }
    walk->frontier_count = n;
}

static void choose_nearest(cotra_walk *walk)
{
    const uint32_t width = within_bound(walk, walk->beam);
    uint32_t n = 0;
    while (n < width) {
        const uint32_t node = cotra_candidates_choose(&walk->candidates, walk->kernels, walk->limit);
        if (node == COTRA_NO_NODE)
            break;
        const uint32_t place = cotra_space_find(walk->space, node);
        if (cotra_space_is_lost(walk->space, place))
            continue;
        walk->frontier[n] = node;
        walk->places[n++] = place;
    }
    walk->frontier_count = n;
}

/* Whether there may be rows to return that only a sweep finds. */
static bool lacks_hits(const cotra_walk *walk)
{
    return walk->hit_count < walk->k && walk->hit_count < walk->rows;
}

/* The nearest candidates, or where there are none, those of a new start. */
static int choose_next(cotra_walk *walk, cotra_error *err)
{
    /* What is nearest after a round or two is worth more than what was nearest at the start. */
    walk->beam = cotra_min_u32(walk->beam + 2, walk->plan.beam);
    choose_nearest(walk);
    while (walk->frontier_count == 0 && walk->space->n > 1) {
        const uint64_t before = walk->next_start;
        const uint32_t n = count_restarts(walk);
        int status = n ? start(walk, n, err) : COTRA_OK;
        if (status || walk->next_start == before)
            return status;
        choose_nearest(walk);
    }
    return COTRA_OK;
}

static int choose(cotra_walk *walk, cotra_error *err)
{
    if (!walk->sweeping) {
        if (walk->low.count >= walk->rows) /* nothing is left to be found */
            return COTRA_OK;
        const bool starves = walk->low.count < walk->plan.low && walk->stats.expansions >= walk->plan.most_starved;
        int status = starves ? COTRA_OK : choose_next(walk, err);
        if (status || walk->frontier_count || !(starves || lacks_hits(walk)))
            return status;
        walk->sweeping = true;
    }
    choose_rows(walk);
    return COTRA_OK;
}

int cotra_walk_choose(cotra_walk *walk, cotra_error *err)
{
    walk->taken = 0;
    walk->frontier_count = 0;
    int status = choose(walk, err);
    if (!status && walk->frontier_count && walk->stats.expansions >= walk->plan.most) {
        walk->stats.incomplete = 1;
        walk->frontier_count = 0;
    }
    return status;
}

static void set_limit(cotra_walk *walk)
{
    if (walk->low.count < walk->low.capacity || walk->hit_count < walk->k)
        return;
    const cotra_hit *last = &walk->hits[walk->k - 1];
    float scale = walk->view->info.metric == COTRA_METRIC_IP ? last->scale : last->distance;
    scale = scale > 0 ? scale : 0;
    const float least = walk->low.heap[0] + walk->plan.slack * scale;
    const float most =
        walk->high.count == walk->high.capacity ? walk->high.heap[0] + walk->plan.slack * scale : INFINITY;
    const float limit = last->distance + walk->plan.slack_k * scale;
    walk->limit = limit < least ? least : limit > most ? most : limit;
}

/* Keeps the k best. */
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
}

/* Whether a node is of a shard that is there, and open to the query. */
static bool is_at_hand(const cotra_walk *walk, uint32_t node)
{
    const uint32_t place = cotra_space_find(walk->space, node);
    return cotra_space_row(walk->space, place, node) < walk->space->views[place]->info.count && is_open(walk, place);
}

/* Takes the estimates in that are below the limit: nothing above it will ever be expanded. */
static int take_estimates(cotra_walk *walk, const volatile uint32_t *numbers, const float *estimates,
                          const float *weights, uint32_t below, cotra_error *err)
{
    cotra_candidates *all = &walk->candidates;
    int status = cotra_candidates_make_room(all, err);
    if (status)
        return status;
    uint32_t nodes[COTRA_BLOCK], n = 0, highest = 0;
    float keys[COTRA_BLOCK], counts[COTRA_BLOCK];
    for (; below; below &= below - 1) {
        const uint32_t j = (uint32_t)__builtin_ctz(below), node = numbers[j];
        highest = node > highest ? node : highest;
        cotra_candidates_prefetch(all, node);
        nodes[n] = node;
        counts[n] = weights[j];
        keys[n++] = estimates[j];
    }
    if (highest >= walk->space->count)
        return cotra_fail(err, COTRA_ERR_FORMAT, "a record links to node %u of %llu", highest,
                          (unsigned long long)walk->space->count);
    const bool some = !walk->space->whole || walk->space->n_lost || walk->mask;
    for (uint32_t i = 0; i < n; i++)
        if (!some || is_at_hand(walk, nodes[i]))
            cotra_candidates_take(all, nodes[i], clamp(keys[i]), counts[i]);
    return COTRA_OK;
}

/* A node's exact distance, where it may be an answer: once, though its links were a lie and another owner told them
 * anew.
 */
static void take_hit(cotra_walk *walk, uint32_t i, float distance, float scale, int64_t label, uint32_t flags)
{
    if (i < walk->taken)
        return;
    walk->taken = i + 1;
    const uint32_t place = walk->places[i];
    walk->stats.expansions++;
    if (!(distance < INFINITY) || flags & COTRA_NODE_DELETED || /* NaN is not below infinity */
        !lets_through(filter_of(walk, place), cotra_walk_row(walk, i)))
        return;
    if (walk->plan.numbers)
        label = walk->frontier[i];
    hits_insert(walk, (cotra_hit){.distance = distance, .scale = scale, .label = label, .place = place});
    rank(&walk->low, distance);
    rank(&walk->high, distance);
    set_limit(walk);
}

int cotra_walk_expand(cotra_walk *walk, uint32_t i, const uint8_t *record, bool checked, cotra_error *err)
{
    const uint32_t row = cotra_walk_row(walk, i);
    const cotra_view *view = walk->space->views[walk->places[i]];
    const cotra_image_info *info = &view->info;
    int status = checked ? COTRA_OK : cotra_record_validate(record, info, row, err);
    if (status)
        return status;
    /* What steers the walk is loaded once: the memory may be a live peer's. */
    const cotra_record_head head = *(const volatile cotra_record_head *)record;
    const uint32_t count = head.count <= info->degree ? head.count : info->degree;
    const uint8_t *own = record + COTRA_RECORD_HEAD_BYTES;
    const float distance = cotra_own_distance(walk->kernels, info, walk->query.vector, own, head.norm2);
    if (walk->sweeping) {
        take_hit(walk, i, distance, 0, head.label, head.flags);
        return COTRA_OK;
    }
    cotra_hop hop;
    cotra_query_hop(&walk->query, view, &head, own, distance, &hop);
    const float scale = info->metric == COTRA_METRIC_IP ? cotra_query_scale(view, record, count, &hop) : 0;
    take_hit(walk, i, distance, scale, head.label, head.flags);
    const volatile uint32_t *numbers = (const volatile uint32_t *)(record + view->record.numbers);
    for (uint32_t begin = 0; begin < count; begin += COTRA_BLOCK) {
        float estimates[COTRA_BLOCK], weights[COTRA_BLOCK];
        const uint32_t below =
            cotra_query_estimate(&hop, walk->kernels, view, record, begin, count, walk->limit, estimates, weights);
        status = take_estimates(walk, numbers + begin, estimates, weights, below, err);
        if (status)
            return status;
    }
    return COTRA_OK;
}

int cotra_walk_take(cotra_walk *walk, uint32_t i, const cotra_expansion *found, const uint32_t *numbers,
                    const float *estimates, const float *weights, cotra_error *err)
{
    take_hit(walk, i, found->distance, found->scale, found->label, found->flags);
    if (walk->sweeping)
        return COTRA_OK;
    for (uint32_t begin = 0; begin < found->count; begin += COTRA_BLOCK) {
        const uint32_t n = found->count - begin < COTRA_BLOCK ? found->count - begin : COTRA_BLOCK;
        uint32_t below = 0;
        for (uint32_t j = 0; j < n; j++)
            below |= (uint32_t)(estimates[begin + j] < walk->limit) << j;
        int status = take_estimates(walk, numbers + begin, estimates + begin, weights + begin, below, err);
        if (status)
            return status;
    }
    return COTRA_OK;
}
