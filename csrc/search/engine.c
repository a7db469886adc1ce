/* The scheduler: many walks in flight on one thread, so that the wire, and not its latency, is the limit.
 *
 * Walk w owns slots [w * width, (w + 1) * width) of the channel that it reads; the READ of its frontier's i-th node
 * goes to slot w * width + i. A walk is expanded when the last READ of its frontier is there, in the frontier's order.
 * What a cache has of the frontier is copied when the frontier is chosen, and not read.
 */
#include "base/status.h"
#include "search/cache.h"
#include "search/walk.h"
#include "transport/transport.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum {
    MAX_BEAM = 256,
    MAX_EF = 1 << 20,
    MAX_INFLIGHT = 1024,
    MAX_AUTOMATIC = 128,
    MAX_CANDIDATES = 1 << 26,
    POLL_BATCH = 64,
    DIRECT_WIDTH = 32
};
enum { IDLE_TURNS = 1024 }; /* between looks at the clock, which is a system call on some machines */
enum { NEAR_READS = 8 };    /* in progress on each shard, or graph, at first: more give nothing where memory is near */
#define DEFAULT_TIMEOUT_NS 5000000000u

typedef struct lane { /* one shard */
    const cotra_view *view;
    cotra_channel *channel;
    cotra_cache *cache; /* or NULL */
    cotra_read *queue;  /* READs waiting for a post: [n_walks * width] */
    uint32_t queued;
    uint32_t outstanding;      /* posted, not completed */
    uint32_t idle_turns;       /* since the clock was read */
    uint64_t last_progress_ns; /* by the first look at the clock after it; 0: none yet */
} lane;

typedef struct running {
    cotra_walk walk;
    const uint8_t **records; /* [width] */
    uint8_t *copies;         /* [width][copy_bytes]: of cached records; NULL where there is no cache */
    uint64_t query;
    uint32_t space;
    uint32_t missing; /* READs of the frontier that are not there yet */
} running;

struct cotra_engine {
    const cotra_kernels *kernels;
    lane *lanes;
    cotra_space *spaces; /* [n_spaces]: of one shard each, or one of all */
    cotra_walk_plan *plans;
    running *walks;
    uint64_t *started_ns; /* [n_queries] of the call in progress */
    uint32_t n_shards, n_spaces, max_dim;
    uint32_t copy_bytes;              /* the longest record of a shard with a cache; 0: there is none */
    uint32_t n_walks, k, pool, width; /* what `walks` was made for */
    int broken;                       /* READs of a failed call may still be on their way into the slots */
    /* the call in progress */
    const float *queries;
    const uint8_t *mask; /* NULL, or [n_queries, n_shards] */
    uint64_t n_queries, next_task;
    uint32_t active;
    int64_t *labels;
    float *distances;
    cotra_query_stats *stats;
};

int cotra_engine_create(cotra_view *const *views, cotra_channel *const *channels, cotra_cache *const *caches,
                        uint32_t n_shards, int simd, cotra_engine **out, cotra_error *err)
{
    *out = NULL;
    if (n_shards == 0)
        return cotra_fail(err, COTRA_ERR_ARGUMENT, "an engine needs at least one shard");
    const cotra_kernels *kernels = cotra_kernels_get(simd);
    if (!kernels)
        return cotra_fail(err, COTRA_ERR_ARGUMENT, "this CPU or build has no %s kernels", cotra_simd_name(simd));
    for (uint32_t i = 0; i < n_shards; i++) {
        const cotra_image_info *info = &views[i]->info;
        if (info->dim != views[0]->info.dim || info->metric != views[0]->info.metric)
            return cotra_fail(err, COTRA_ERR_ARGUMENT, "shard %u has dim %u and metric %u, shard 0 has %u and %u", i,
                              info->dim, info->metric, views[0]->info.dim, views[0]->info.metric);
        for (uint32_t j = 0; j < i; j++)
            if (channels[j] == channels[i])
                return cotra_fail(err, COTRA_ERR_ARGUMENT, "shards %u and %u have the same channel", j, i);
        if (info->record_bytes > channels[i]->slot_bytes)
            return cotra_fail(err, COTRA_ERR_ARGUMENT, "shard %u has records of %u bytes, its channel reads %u at most",
                              i, info->record_bytes, channels[i]->slot_bytes);
        if (caches && caches[i] && !cotra_cache_is_of(caches[i], info))
            return cotra_fail(err, COTRA_ERR_ARGUMENT, "the cache for shard %u is of another image", i);
    }
    cotra_engine *engine = calloc(1, sizeof *engine);
    if (!engine)
        return cotra_fail(err, COTRA_ERR_NO_MEMORY, "engine: no memory");
    engine->kernels = kernels;
    engine->n_shards = n_shards;
    engine->max_dim = views[0]->info.dim;
    engine->lanes = calloc(n_shards, sizeof *engine->lanes);
    if (!engine->lanes) {
        cotra_engine_destroy(engine);
        return cotra_fail(err, COTRA_ERR_NO_MEMORY, "engine: no memory for %u shards", n_shards);
    }
    for (uint32_t i = 0; i < n_shards; i++) {
        engine->lanes[i].view = views[i];
        engine->lanes[i].channel = channels[i];
        engine->lanes[i].cache = caches ? caches[i] : NULL;
        if (engine->lanes[i].cache && views[i]->info.record_bytes > engine->copy_bytes)
            engine->copy_bytes = views[i]->info.record_bytes;
    }
    const int one = cotra_space_is_one(views, n_shards);
    const uint32_t n_spaces = one ? 1 : n_shards;
    engine->spaces = calloc(n_spaces, sizeof *engine->spaces);
    engine->plans = calloc(n_spaces, sizeof *engine->plans);
    int status = COTRA_OK;
    if (!engine->spaces || !engine->plans)
        status = cotra_fail(err, COTRA_ERR_NO_MEMORY, "engine: no memory for %u shards", n_shards);
    for (; engine->n_spaces < n_spaces && !status; engine->n_spaces += !status)
        status =
            cotra_space_create(&engine->spaces[engine->n_spaces], views, engine->n_spaces, one ? n_shards : 1, err);
    if (status) {
        cotra_engine_destroy(engine);
        return status;
    }
    *out = engine;
    return COTRA_OK;
}

static void drop_walks(cotra_engine *engine)
{
    for (uint32_t i = 0; i < engine->n_walks; i++) {
        cotra_walk_destroy(&engine->walks[i].walk);
        free(engine->walks[i].records);
        free(engine->walks[i].copies);
    }
    free(engine->walks);
    engine->walks = NULL;
    engine->n_walks = 0;
    for (uint32_t i = 0; engine->lanes && i < engine->n_shards; i++) {
        free(engine->lanes[i].queue);
        engine->lanes[i].queue = NULL;
    }
}

void cotra_engine_destroy(cotra_engine *engine)
{
    if (!engine)
        return;
    drop_walks(engine);
    for (uint32_t i = 0; i < engine->n_spaces; i++)
        cotra_space_destroy(&engine->spaces[i]);
    free(engine->spaces);
    free(engine->plans);
    free(engine->lanes);
    free(engine->started_ns);
    free(engine);
}

static int make_walks(cotra_engine *engine, uint32_t n_walks, uint32_t k, uint32_t pool, uint32_t width,
                      cotra_error *err)
{
    if (engine->n_walks == n_walks && engine->k == k && engine->pool == pool && engine->width == width)
        return COTRA_OK;
    drop_walks(engine);
    engine->walks = calloc(n_walks, sizeof *engine->walks);
    if (!engine->walks)
        return cotra_fail(err, COTRA_ERR_NO_MEMORY, "engine: no memory for %u walks", n_walks);
    engine->k = k;
    engine->pool = pool;
    engine->width = width;
    for (uint32_t i = 0; i < n_walks; i++) {
        int status = cotra_walk_create(&engine->walks[i].walk, engine->max_dim, k, pool, width, err);
        if (status) {
            drop_walks(engine);
            return status;
        }
        engine->n_walks++;
        engine->walks[i].records = calloc(width, sizeof *engine->walks[i].records);
        if (engine->copy_bytes)
            engine->walks[i].copies = aligned_alloc(64, ((size_t)width * engine->copy_bytes + 63) / 64 * 64);
        if (!engine->walks[i].records || (engine->copy_bytes && !engine->walks[i].copies)) {
            drop_walks(engine);
            return cotra_fail(err, COTRA_ERR_NO_MEMORY, "engine: no memory for %u walks", n_walks);
        }
    }
    for (uint32_t i = 0; i < engine->n_shards; i++) {
        engine->lanes[i].queue = calloc((size_t)n_walks * width, sizeof *engine->lanes[i].queue);
        if (!engine->lanes[i].queue) {
            drop_walks(engine);
            return cotra_fail(err, COTRA_ERR_NO_MEMORY, "engine: no memory for %u walks", n_walks);
        }
    }
    return COTRA_OK;
}

/* A failure belongs to the shard at hand: a completion of one may start a query on another. */
static int at_shard(cotra_error *err, uint32_t shard, int status)
{
    if (status < 0 && err)
        err->shard = (int32_t)shard;
    return status;
}

static int post_queue(lane *to, cotra_error *err)
{
    uint32_t posted = 0;
    int status = cotra_channel_post(to->channel, to->queue, to->queued, &posted, err);
    if (posted && to->outstanding == 0)
        to->last_progress_ns = 0;
    to->outstanding += posted;
    to->queued -= posted;
    if (to->queued && posted)
        memmove(to->queue, to->queue + posted, to->queued * sizeof *to->queue);
    return status < 0 ? status : COTRA_OK;
}

static void finish(cotra_engine *engine, running *run)
{
    const cotra_walk *walk = &run->walk;
    const cotra_space *space = &engine->spaces[run->space];
    for (uint32_t place = 0; place < space->n; place++) { /* each shard's part of the answer */
        size_t row = ((size_t)space->shards[place] * engine->n_queries + run->query) * engine->k;
        uint32_t n = 0;
        for (uint32_t i = 0; i < walk->hit_count; i++) {
            if (walk->hits[i].place != place)
                continue;
            engine->labels[row + n] = walk->hits[i].label;
            engine->distances[row + n++] = walk->hits[i].distance;
        }
        for (; n < engine->k; n++) {
            engine->labels[row + n] = -1;
            engine->distances[row + n] = INFINITY;
        }
    }
    cotra_query_stats *stats = &engine->stats[run->query];
    uint64_t latency = cotra_clock_ns() - engine->started_ns[run->query];
    stats->reads += walk->stats.reads;
    stats->expansions += walk->stats.expansions;
    stats->cache_hits += walk->stats.cache_hits;
    stats->cached_records += walk->stats.expansions - walk->stats.reads;
    stats->read_bytes += (uint64_t)walk->stats.reads * walk->view->info.record_bytes;
    stats->rounds = walk->stats.rounds > stats->rounds ? walk->stats.rounds : stats->rounds;
    stats->latency_ns = latency > stats->latency_ns ? latency : stats->latency_ns;
    engine->active--;
}

static lane *lane_of(cotra_engine *engine, const running *run, uint32_t i)
{
    return &engine->lanes[engine->spaces[run->space].shards[run->walk.places[i]]];
}

/* Whether the mask leaves all of a task's shards out. */
static int is_left_out(const cotra_engine *engine, uint64_t task)
{
    if (!engine->mask)
        return 0;
    if (engine->n_spaces == engine->n_shards)
        return !engine->mask[task];
    for (uint32_t i = 0; i < engine->n_shards; i++)
        if (engine->mask[task * engine->n_shards + i])
            return 0;
    return 1;
}

/* A completion over shared memory is a pointer, and a CPU drops prefetches when it has too many in progress: asked for
 * again while the record before is worked on, the record is there when its turn comes. */
static void prefetch_record(const uint8_t *record, uint32_t record_bytes)
{
    for (uint32_t line = 0; line < record_bytes && line < 4096; line += 64)
        __builtin_prefetch(record + line);
}

/* Expands the frontier, whose records are all there. */
static int expand(cotra_engine *engine, running *run, cotra_error *err)
{
    cotra_walk *walk = &run->walk;
    const uint32_t record_bytes = walk->view->info.record_bytes; /* alike in all shards of a space */
    for (uint32_t i = 0; i < walk->frontier_count; i++) {
        const lane *from = lane_of(engine, run, i);
        const uint8_t *record = run->records[i];
        if (i + 1 < walk->frontier_count)
            prefetch_record(run->records[i + 1], record_bytes);
        const int cached = from->cache && record == run->copies + (size_t)i * engine->copy_bytes;
        int status = cotra_walk_expand(walk, i, record, cached, err);
        if (status == COTRA_ERR_STALE && from->cache)
            cotra_cache_retire(from->cache);
        if (status)
            return at_shard(err, (uint32_t)(from - engine->lanes), status);
        if (from->cache && !cached)
            cotra_cache_offer(from->cache, cotra_walk_row(walk, i), record);
    }
    return COTRA_OK;
}

/* Queues READs of the frontier's n records, but for those that a cache has. */
static void fetch(cotra_engine *engine, uint32_t w, uint32_t n)
{
    running *run = &engine->walks[w];
    const uint32_t record_bytes = run->walk.view->info.record_bytes;
    run->missing = 0;
    for (uint32_t i = 0; i < n; i++) {
        lane *to = lane_of(engine, run, i);
        const uint32_t row = cotra_walk_row(&run->walk, i);
        if (to->cache) {
            uint8_t *copy = run->copies + (size_t)i * engine->copy_bytes;
            run->records[i] = copy;
            if (cotra_cache_take(to->cache, row, copy))
                continue;
        }
        to->queue[to->queued++] = (cotra_read){.offset = to->view->info.records_offset + (uint64_t)row * record_bytes,
                                               .length = record_bytes,
                                               .slot = w * engine->width + i};
        run->missing++;
    }
    run->walk.stats.reads += run->missing;
    run->walk.stats.rounds += run->missing > 0;
}

/* Posts what waits for the shards that the frontier reads, where it is worth a post. */
static int post_frontier(cotra_engine *engine, running *run, cotra_error *err)
{
    for (uint32_t i = 0; i < run->walk.frontier_count; i++) {
        lane *to = lane_of(engine, run, i);
        if (to->queued == 0 || to->queued < to->channel->post_batch)
            continue;
        int status = post_queue(to, err);
        if (status)
            return at_shard(err, (uint32_t)(to - engine->lanes), status);
    }
    return COTRA_OK;
}

/* Begins the next task that no mask leaves out; 0 when there is none. */
static int begin_task(cotra_engine *engine, running *run, cotra_error *err)
{
    const uint64_t n_tasks = engine->n_queries * engine->n_spaces;
    while (engine->next_task < n_tasks && is_left_out(engine, engine->next_task))
        engine->next_task++;
    if (engine->next_task == n_tasks)
        return 0;
    const uint64_t task = engine->next_task++;
    run->query = task / engine->n_spaces;
    run->space = (uint32_t)(task % engine->n_spaces);
    engine->active++;
    if (engine->started_ns[run->query] == 0)
        engine->started_ns[run->query] = cotra_clock_ns();
    const cotra_space *space = &engine->spaces[run->space];
    const uint8_t *mask = engine->mask && space->n > 1 ? engine->mask + run->query * engine->n_shards : NULL;
    int status = cotra_walk_begin(&run->walk, space, &engine->plans[run->space], mask, engine->kernels,
                                  engine->queries + run->query * engine->max_dim, err);
    return status ? at_shard(err, space->shards[0], status) : 1;
}

/* Expands the frontier, chooses the next one and queues its READs, again where the cache has all of it; at the walk's
 * end, takes the next task. */
static int advance(cotra_engine *engine, uint32_t w, cotra_error *err)
{
    running *run = &engine->walks[w];
    cotra_walk *walk = &run->walk;
    do {
        uint32_t n = 0;
        if (walk->view) {
            int status = expand(engine, run, err);
            if (status)
                return status;
            n = cotra_walk_choose(walk);
        }
        while (n == 0) {
            if (walk->view)
                finish(engine, run);
            walk->view = NULL;
            int status = begin_task(engine, run, err);
            if (status <= 0)
                return status;
            n = cotra_walk_choose(walk);
        }
        fetch(engine, w, n);
    } while (run->missing == 0);
    return post_frontier(engine, run, err);
}

static int take_completion(cotra_engine *engine, const cotra_completion *completion, lane *from, cotra_error *err)
{
    from->outstanding--;
    if (completion->status != COTRA_OK)
        return at_shard(err, (uint32_t)(from - engine->lanes),
                        cotra_channel_report(from->channel, completion->status, err));
    uint32_t w = completion->slot / engine->width;
    running *run = &engine->walks[w];
    run->records[completion->slot % engine->width] = completion->data;
    return --run->missing ? COTRA_OK : advance(engine, w, err);
}

/* One turn over one shard's channel: completions, then what is queued. Returns 1 when something happened. */
static int turn(cotra_engine *engine, lane *lane_, uint64_t timeout_ns, cotra_error *err)
{
    const uint32_t shard = (uint32_t)(lane_ - engine->lanes);
    cotra_completion completions[POLL_BATCH];
    uint32_t n = 0;
    int status = COTRA_OK;
    if (lane_->outstanding) {
        status = cotra_channel_poll(lane_->channel, completions, POLL_BATCH, &n, err);
        if (status < 0)
            return at_shard(err, shard, status);
    }
    for (uint32_t c = 0; c < n; c++) {
        if (c + 1 < n && completions[c + 1].data)
            prefetch_record(completions[c + 1].data, lane_->view->info.record_bytes);
        status = take_completion(engine, &completions[c], lane_, err);
        if (status)
            return status;
    }
    uint32_t queued = lane_->queued;
    if (queued) {
        status = post_queue(lane_, err);
        if (status)
            return at_shard(err, shard, status);
    }
    if (n || queued != lane_->queued) {
        lane_->last_progress_ns = 0;
        return 1;
    }
    if ((lane_->outstanding || lane_->queued) && ++lane_->idle_turns == IDLE_TURNS) {
        lane_->idle_turns = 0;
        uint64_t now = cotra_clock_ns();
        if (lane_->last_progress_ns == 0)
            lane_->last_progress_ns = now;
        else if (now - lane_->last_progress_ns > timeout_ns)
            return at_shard(err, shard,
                            cotra_fail(err, COTRA_ERR_DEADLINE, "a READ did not complete within %llu ms",
                                       (unsigned long long)(timeout_ns / 1000000u)));
    }
    return 0;
}

/* n_start walks run at first. When no channel has anything to do, the wire is what is waited for, and another walk
 * joins them: so there are as many as hide its latency, and no more, for each one costs cache. */
static int run_all(cotra_engine *engine, uint32_t n_start, uint64_t timeout_ns, cotra_error *err)
{
    uint32_t started = 0;
    while (started < n_start || engine->active) {
        int busy = 0;
        for (; started < n_start; started++) {
            int status = advance(engine, started, err);
            if (status)
                return status;
        }
        for (uint32_t s = 0; s < engine->n_shards; s++) {
            int status = turn(engine, &engine->lanes[s], timeout_ns, err);
            if (status < 0)
                return status;
            busy |= status;
        }
        if (!busy && n_start < engine->n_walks)
            n_start++;
#if defined(__x86_64__)
        else if (!busy)
            __builtin_ia32_pause();
#endif
    }
    return COTRA_OK;
}

static uint64_t count_rows(const uint8_t *filter, uint64_t count)
{
    uint64_t n = 0;
    for (uint64_t i = 0; i < count / 8; i++)
        n += (uint64_t)__builtin_popcount(filter[i]);
    return count % 8 ? n + (uint64_t)__builtin_popcount(filter[count / 8] & ((1u << count % 8) - 1)) : n;
}

/* How each space is walked. Filters that let 1 of f rows through need a pool f times as large for as many answers, and
 * about as many READs; when the rows they let through are fewer than that, they are read themselves. */
static int make_plans(cotra_engine *engine, const cotra_search_params *params, const cotra_search_scope *scope,
                      uint32_t *pool, uint32_t *width, cotra_error *err)
{
    const uint8_t *const *filters = scope ? scope->filters : NULL;
    *pool = 1;
    *width = params->beam;
    for (uint32_t s = 0; s < engine->n_spaces; s++) {
        const cotra_space *space = &engine->spaces[s];
        cotra_walk_plan *plan = &engine->plans[s];
        *plan = (cotra_walk_plan){.ef = params->ef,
                                  .pool = COTRA_POOL_FACTOR * params->ef,
                                  .beam = params->beam,
                                  .numbers = params->numbers != 0};
        uint64_t count = 0, rows = 0;
        for (uint32_t i = 0; i < space->n; i++) {
            const uint64_t here = space->views[i]->info.count;
            const uint32_t shard = space->shards[i];
            count += here;
            if (!filters || !filters[shard]) {
                rows += here;
                continue;
            }
            if (scope->filter_bytes[shard] < (here + 7) / 8)
                return cotra_fail(err, COTRA_ERR_ARGUMENT, "shard %u has %llu rows, its filter %llu bits", shard,
                                  (unsigned long long)here, 8 * (unsigned long long)scope->filter_bytes[shard]);
            rows += count_rows(filters[shard], here);
            plan->filters = filters;
        }
        if (plan->filters && rows * rows <= params->ef * count) {
            plan->direct = 1;
            *width = params->beam > DIRECT_WIDTH ? params->beam : DIRECT_WIDTH;
            continue;
        }
        const uint64_t grown = plan->filters ? (plan->pool * count + rows - 1) / rows : plan->pool;
        const uint64_t most = count < COTRA_POOL_FACTOR * MAX_EF ? count : COTRA_POOL_FACTOR * MAX_EF;
        plan->pool = (uint32_t)(grown < most ? grown : most); /* no walk expands more than all */
        *pool = plan->pool > *pool ? plan->pool : *pool;
    }
    return COTRA_OK;
}

int cotra_engine_search(cotra_engine *engine, const float *queries, uint64_t n_queries,
                        const cotra_search_params *params, const cotra_search_scope *scope, int64_t *labels,
                        float *distances, cotra_query_stats *stats, cotra_error *err)
{
    if (engine->broken)
        return cotra_fail(err, COTRA_ERR_CLOSED, "this engine's channels broke in an earlier search");
    if (params->k == 0 || params->k > params->ef || params->ef > MAX_EF)
        return cotra_fail(err, COTRA_ERR_ARGUMENT, "k must be in [1, ef] and ef in [1, %d], not k %u, ef %u", MAX_EF,
                          params->k, params->ef);
    if (params->beam == 0 || params->beam > MAX_BEAM)
        return cotra_fail(err, COTRA_ERR_ARGUMENT, "beam must be in [1, %d], not %u", MAX_BEAM, params->beam);
    if (n_queries == 0)
        return COTRA_OK;
    uint32_t slots = UINT32_MAX, wanted = 0, n_start, pool, width;
    int status = make_plans(engine, params, scope, &pool, &width, err);
    if (status)
        return status;
    for (uint32_t s = 0; s < engine->n_shards; s++) {
        const cotra_channel *channel = engine->lanes[s].channel;
        status = cotra_channel_settle(engine->lanes[s].channel, err);
        if (status)
            return status;
        slots = channel->slots < slots ? channel->slots : slots;
        const uint32_t in_flight = channel->in_flight ? channel->in_flight : channel->slots;
        wanted += in_flight > 2 * params->beam ? in_flight / params->beam : 2;
    }
    n_start = engine->n_spaces * (NEAR_READS > 2 * params->beam ? NEAR_READS / params->beam : 2);
    if (params->beam > slots)
        return cotra_fail(err, COTRA_ERR_ARGUMENT, "beam %u needs as many READs in progress, the channel has %u slots",
                          params->beam, slots);
    width = width < slots ? width : slots;
    uint32_t n_walks = params->inflight ? params->inflight : wanted;
    n_walks = n_walks < slots / width ? n_walks : slots / width;
    const uint32_t most = params->inflight ? MAX_INFLIGHT : MAX_AUTOMATIC;
    n_walks = n_walks < most ? n_walks : most;
    const uint32_t affordable = MAX_CANDIDATES / pool > 2 ? MAX_CANDIDATES / pool : 2; /* of huge ef: memory */
    n_walks = n_walks < affordable || params->inflight ? n_walks : affordable;
    if (n_walks > n_queries * engine->n_spaces)
        n_walks = (uint32_t)(n_queries * engine->n_spaces);
    status = make_walks(engine, n_walks, params->k, pool, width, err);
    if (status)
        return status;
    engine->mask = scope ? scope->mask : NULL;
    for (uint64_t i = 0; engine->mask && i < engine->n_shards * n_queries * params->k; i++) {
        labels[i] = -1;
        distances[i] = INFINITY;
    }
    engine->started_ns = calloc(n_queries, sizeof *engine->started_ns);
    if (!engine->started_ns)
        return cotra_fail(err, COTRA_ERR_NO_MEMORY, "engine: no memory for %llu queries",
                          (unsigned long long)n_queries);
    engine->queries = queries;
    engine->n_queries = n_queries;
    engine->next_task = 0;
    engine->active = 0;
    engine->labels = labels;
    engine->distances = distances;
    engine->stats = stats;
    memset(stats, 0, n_queries * sizeof *stats);
    for (uint32_t s = 0; s < engine->n_shards; s++)
        engine->lanes[s].queued = engine->lanes[s].outstanding = engine->lanes[s].idle_turns = 0;
    for (uint32_t w = 0; w < n_walks; w++)
        engine->walks[w].walk.view = NULL;
    n_start = n_start < n_walks && !params->inflight ? n_start : n_walks;
    status = run_all(engine, n_start, params->timeout_ns ? params->timeout_ns : DEFAULT_TIMEOUT_NS, err);
    free(engine->started_ns);
    engine->started_ns = NULL;
    engine->broken = status != COTRA_OK;
    return status;
}
