/* Engines, and how a search is planned; csrc/search/graph/scheduler.c runs it. */
#include "search/graph/scheduler.h"

#include "base/arena.h"
#include "base/status.h"
#include "base/int_math.h"
#include "search/record_cache.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum {
    MAX_BEAM = 256,
    MAX_EF = 1 << 20,
    MAX_INFLIGHT = 1024,
    MAX_AUTOMATIC = 128,
    MAX_CANDIDATES = 1 << 26,
    DIRECT_WIDTH = 32,
};
/* Measured: a record is swept in a quarter of the time in which it is expanded, but takes a READ in both cases. */
enum { SWEEP_GAIN = 2 };
/* READs in progress on each shard, or graph, at first: more give nothing where memory is near. */
enum { NEAR_READS = 8 };
/* Candidates that a walk hears of, about, for each of ef. */
enum { CANDIDATES_OF_EF = 8 };
#define DEFAULT_TIMEOUT_NS 5000000000u

/* Of a walk's limit, in units of 1 / sqrt(D): docs/explanation/how-it-works.md. */
#define SLACK      0.25f
#define SLACK_OF_K 0.13f

/* What a shard must be to take its place in an engine. */
static int check_shard(const cotra_engine_shard *shard, uint32_t i, cotra_error *err)
{
    const cotra_image_info *info = &shard->view->info;
    if (shard->channel && info->record_bytes > shard->channel->slot_bytes)
        return cotra_fail(err, COTRA_ERR_ARGUMENT, "shard %u has records of %u bytes, its channel reads %u at most", i,
                          info->record_bytes, shard->channel->slot_bytes);
    if (shard->cache && !cotra_cache_is_of(shard->cache, info))
        return cotra_fail(err, COTRA_ERR_ARGUMENT, "the cache for shard %u is of another image", i);
    if (shard->channel || !shard->own)
        return COTRA_OK;
    cotra_arena_info memory;
    cotra_arena_get_info(shard->own, &memory);
    const cotra_image_header *header = (const cotra_image_header *)cotra_arena_data(shard->own);
    if (memory.length_bytes < info->image_bytes || memcmp(&header->info, info, sizeof *info) != 0)
        return cotra_fail(err, COTRA_ERR_FORMAT, "the memory for shard %u holds another image", i);
    return COTRA_OK;
}

static void set_path(cotra_path *path, const cotra_engine_shard *shard)
{
    path->channel = shard->channel;
    path->own = shard->channel || !shard->own ? NULL : cotra_arena_data(shard->own);
    path->cache = path->own ? NULL : shard->cache;
    path->queued = path->n_pushes = path->outstanding = path->idle_turns = 0;
}

static int check_shards(const cotra_engine_shard *shards, uint32_t n_shards, cotra_error *err)
{
    const cotra_image_info *first = &shards[0].view->info;
    for (uint32_t i = 0; i < n_shards; i++) {
        const cotra_image_info *info = &shards[i].view->info;
        if (info->dim != first->dim || info->metric != first->metric)
            return cotra_fail(err, COTRA_ERR_ARGUMENT, "shard %u has dim %u and metric %u, shard 0 has %u and %u", i,
                              info->dim, info->metric, first->dim, first->metric);
        for (uint32_t j = 0; j < i; j++)
            if (shards[i].channel && shards[j].channel == shards[i].channel)
                return cotra_fail(err, COTRA_ERR_ARGUMENT, "shards %u and %u have the same channel", j, i);
        int status = check_shard(&shards[i], i, err);
        if (status)
            return status;
    }
    return COTRA_OK;
}

static int make_spaces(cotra_engine *engine, const cotra_engine_shard *shards, uint32_t n_shards, cotra_error *err)
{
    cotra_view **views = malloc(n_shards * sizeof *views);
    if (!views)
        return cotra_fail(err, COTRA_ERR_NO_MEMORY, "engine: no memory for %u shards", n_shards);
    for (uint32_t i = 0; i < n_shards; i++)
        views[i] = shards[i].view;
    const bool one = cotra_space_is_one(views, n_shards);
    const uint32_t n_spaces = one ? 1 : n_shards;
    engine->spaces = calloc(n_spaces, sizeof *engine->spaces);
    engine->plans = calloc(n_spaces, sizeof *engine->plans);
    engine->rows = calloc(n_shards, sizeof *engine->rows);
    int status = COTRA_OK;
    if (!engine->spaces || !engine->plans || !engine->rows) {
        status = cotra_fail(err, COTRA_ERR_NO_MEMORY, "engine: no memory for %u shards", n_shards);
        goto done;
    }
    for (uint32_t s = 0; s < n_spaces; s++) {
        status = cotra_space_create(&engine->spaces[s], views, s, one ? n_shards : 1, err);
        if (status)
            goto done;
        engine->n_spaces++;
    }
done:
    free(views);
    return status;
}

int cotra_engine_create(const cotra_engine_shard *shards, uint32_t n_shards, int simd, cotra_engine **out,
                        cotra_error *err)
{
    *out = NULL;
    if (n_shards == 0)
        return cotra_fail(err, COTRA_ERR_ARGUMENT, "an engine needs at least one shard");
    const cotra_kernels *kernels = cotra_kernels_get(simd);
    if (!kernels)
        return cotra_fail(err, COTRA_ERR_ARGUMENT, "this CPU or build has no %s kernels", cotra_simd_name(simd));
    int status = check_shards(shards, n_shards, err);
    if (status)
        return status;
    cotra_engine *engine = calloc(1, sizeof *engine);
    if (!engine)
        return cotra_fail(err, COTRA_ERR_NO_MEMORY, "engine: no memory");
    engine->kernels = kernels;
    engine->n_shards = n_shards;
    engine->max_dim = shards[0].view->info.dim;
    engine->paths = calloc(n_shards, sizeof *engine->paths);
    if (!engine->paths) {
        status = cotra_fail(err, COTRA_ERR_NO_MEMORY, "engine: no memory for %u shards", n_shards);
        goto failed;
    }
    for (uint32_t i = 0; i < n_shards; i++) {
        const cotra_image_info *info = &shards[i].view->info;
        engine->paths[i].view = shards[i].view;
        set_path(&engine->paths[i], &shards[i]);
        if (engine->paths[i].cache && info->record_bytes > engine->copy_bytes)
            engine->copy_bytes = info->record_bytes;
        engine->max_degree = info->degree > engine->max_degree ? info->degree : engine->max_degree;
    }
    status = make_spaces(engine, shards, n_shards, err);
    if (status)
        goto failed;
    *out = engine;
    return COTRA_OK;
failed:
    cotra_engine_destroy(engine);
    return status;
}

static void drop_walks(cotra_engine *engine)
{
    for (uint32_t i = 0; i < engine->room.n_walks; i++) {
        cotra_running *run = &engine->room.walks[i];
        cotra_walk_destroy(&run->walk);
        free(run->states);
        free(run->records);
        free(run->copies);
        free(run->told);
        free(run->told_numbers);
        free(run->told_estimates);
        free(run->told_weights);
    }
    free(engine->room.walks);
    engine->room.walks = NULL;
    engine->room.n_walks = 0;
    for (uint32_t i = 0; engine->paths && i < engine->n_shards; i++) {
        cotra_path *path = &engine->paths[i];
        free(path->queue);
        free(path->pushes);
        free(path->pushed);
        path->queue = NULL;
        path->pushes = NULL;
        path->pushed = NULL;
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
    free(engine->rows);
    free(engine->paths);
    free(engine->call.started_ns);
    free(engine);
}

/* What a path queues in: READs, or pushes; room for both, where it may become the one or the other, is made then. */
static int make_queues(cotra_engine *engine, cotra_path *path, cotra_error *err)
{
    const size_t n = (size_t)engine->room.n_walks * engine->room.width;
    if (path->channel && !path->queue)
        path->queue = calloc(n, sizeof *path->queue);
    if (cotra_path_is_pushed(path) && !path->pushes) {
        path->pushes = calloc(n, sizeof *path->pushes);
        path->pushed = calloc(n, sizeof *path->pushed);
    }
    if ((!path->channel || path->queue) && (!cotra_path_is_pushed(path) || (path->pushes && path->pushed)))
        return COTRA_OK;
    return cotra_fail(err, COTRA_ERR_NO_MEMORY, "engine: no memory for %u walks", engine->room.n_walks);
}

static int make_walks(cotra_engine *engine, uint32_t n_walks, uint32_t k, uint32_t rank, uint32_t width,
                      cotra_error *err)
{
    if (engine->room.n_walks == n_walks && engine->room.k == k && engine->room.rank == rank &&
        engine->room.width == width)
        return COTRA_OK;
    drop_walks(engine);
    engine->room.walks = calloc(n_walks, sizeof *engine->room.walks);
    if (!engine->room.walks)
        return cotra_fail(err, COTRA_ERR_NO_MEMORY, "engine: no memory for %u walks", n_walks);
    engine->room.k = k;
    engine->room.rank = rank;
    engine->room.width = width;
    int status = COTRA_OK;
    for (uint32_t i = 0; i < n_walks; i++) {
        cotra_running *run = &engine->room.walks[i];
        status = cotra_walk_create(&run->walk, engine->max_dim, k, rank, width, err);
        if (status)
            goto failed;
        engine->room.n_walks++;
        run->states = calloc(width, sizeof *run->states);
        run->records = calloc(width, sizeof *run->records);
        if (engine->copy_bytes)
            run->copies = aligned_alloc(64, cotra_round_up((uint64_t)width * engine->copy_bytes, 64));
        if (!run->states || !run->records || (engine->copy_bytes && !run->copies)) {
            status = cotra_fail(err, COTRA_ERR_NO_MEMORY, "engine: no memory for %u walks", n_walks);
            goto failed;
        }
    }
    for (uint32_t i = 0; i < engine->n_shards; i++) {
        status = make_queues(engine, &engine->paths[i], err);
        if (status)
            goto failed;
    }
    return COTRA_OK;
failed:
    drop_walks(engine);
    return status;
}

static uint64_t count_rows(const uint8_t *filter, uint64_t count)
{
    uint64_t n = 0;
    for (uint64_t i = 0; i < count / 8; i++)
        n += (uint64_t)__builtin_popcount(filter[i]);
    return count % 8 ? n + (uint64_t)__builtin_popcount(filter[count / 8] & ((1u << count % 8) - 1)) : n;
}

/* A walk ends between hnswlib's rule for half of ef and that for ef: lists are fuller than hnswlib's, and find as much
 * with fewer expansions (measured: docs/explanation/how-it-works.md). */
static uint32_t choose_low_rank(const cotra_search_params *params)
{
    const uint32_t half = (params->ef + 1) / 2;
    return half > params->k ? half : params->k;
}

/* Counts the rows of a shard that may be returned: a little too high where some that a filter lets through are deleted.
 */
static int count_shard(cotra_engine *engine, uint32_t shard, const cotra_search_scope *scope, cotra_error *err)
{
    const cotra_image_info *info = &engine->paths[shard].view->info;
    const uint8_t *filter = scope && scope->filters ? scope->filters[shard] : NULL;
    const uint64_t live = info->count - info->deleted_count;
    engine->rows[shard] = live;
    if (!filter)
        return COTRA_OK;
    if (scope->filter_bytes[shard] < (info->count + 7) / 8)
        return cotra_fail(err, COTRA_ERR_ARGUMENT, "shard %u has %llu rows, its filter %llu bits", shard,
                          (unsigned long long)info->count, 8 * (unsigned long long)scope->filter_bytes[shard]);
    const uint64_t passed = count_rows(filter, info->count);
    engine->rows[shard] = passed < live ? passed : live;
    return COTRA_OK;
}

/* How each space is walked. Where filters let 1 of f rows through, a walk reads about f rows for each that counts; when
 * the rows they let through are fewer than that, they are read themselves. */
static int make_plans(cotra_engine *engine, const cotra_search_params *params, const cotra_search_scope *scope,
                      uint32_t *width, cotra_error *err)
{
    *width = params->beam;
    for (uint32_t shard = 0; shard < engine->n_shards; shard++) {
        int status = count_shard(engine, shard, scope, err);
        if (status)
            return status;
    }
    for (uint32_t s = 0; s < engine->n_spaces; s++) {
        const cotra_space *space = &engine->spaces[s];
        const float unit = 1 / sqrtf((float)space->views[0]->info.code_dim);
        const float by_ef = logf((float)params->ef / (float)params->k);
        const float by_k = SLACK_OF_K * logf((float)(params->k > 20 ? params->k : 20) / 10);
        cotra_walk_plan *plan = &engine->plans[s];
        *plan = (cotra_walk_plan){
            .low = choose_low_rank(params),
            .high = 2 * choose_low_rank(params),
            .most = params->most ? params->most : UINT32_MAX,
            .beam = params->beam,
            .slack = SLACK * unit,
            .slack_k = (SLACK + (by_ef > by_k ? by_ef : by_k)) * unit,
            .rows = engine->rows,
            .numbers = params->numbers != 0,
        };
        uint64_t count = 0, rows = 0;
        for (uint32_t i = 0; i < space->n; i++) {
            const uint32_t shard = space->shards[i];
            count += space->views[i]->info.count;
            rows += engine->rows[shard];
            if (scope && scope->filters && scope->filters[shard])
                plan->filters = scope->filters;
        }
        plan->direct = plan->filters && rows * rows / SWEEP_GAIN <= params->ef * count;
        plan->most_starved = (plan->filters ? rows : count) / SWEEP_GAIN;
        if (plan->direct && *width < DIRECT_WIDTH)
            *width = DIRECT_WIDTH;
    }
    return COTRA_OK;
}

/* The least number of slots that any channel has. */
static uint32_t count_slots(const cotra_engine *engine)
{
    uint32_t slots = COTRA_MOST_SLOTS;
    for (uint32_t s = 0; s < engine->n_shards; s++)
        if (engine->paths[s].channel)
            slots = cotra_min_u32(slots, engine->paths[s].channel->slots);
    return slots;
}

/* As many walks as have the READs in progress that the channels are worth; two for a shard without one. */
static uint32_t walks_of_channels(const cotra_engine *engine, uint32_t beam)
{
    uint32_t n = 0;
    for (uint32_t s = 0; s < engine->n_shards; s++) {
        const cotra_channel *channel = engine->paths[s].channel;
        const uint32_t in_flight = channel && channel->in_flight ? channel->in_flight : channel ? channel->slots : 0;
        n += in_flight > 2 * beam ? in_flight / beam : 2;
    }
    return n;
}

static bool has_pushed_path(const cotra_engine *engine)
{
    for (uint32_t s = 0; s < engine->n_shards; s++)
        if (cotra_path_is_pushed(&engine->paths[s]))
            return true;
    return false;
}

/* How many walks there are to be, and the READs a round that each can have. */
static int choose_walks(const cotra_engine *engine, const cotra_search_params *params, uint64_t n_queries,
                        uint32_t *width, uint32_t *n_walks, cotra_error *err)
{
    const uint32_t slots = count_slots(engine);
    if (params->beam > slots)
        return cotra_fail(err, COTRA_ERR_ARGUMENT, "beam %u needs as many READs in progress, the channel has %u slots",
                          params->beam, slots);
    *width = cotra_min_u32(*width, slots);
    uint32_t n = cotra_min_u32(params->inflight, MAX_INFLIGHT);
    if (params->inflight == 0) {
        const uint32_t by_memory = MAX_CANDIDATES / (CANDIDATES_OF_EF * params->ef);
        /* where owners expand nodes, a round is a message, for as many queries as there are */
        n = has_pushed_path(engine) ? MAX_INFLIGHT
                                    : cotra_min_u32(walks_of_channels(engine, params->beam), MAX_AUTOMATIC);
        n = cotra_min_u32(n, by_memory > 2 ? by_memory : 2);
    }
    n = cotra_min_u32(n, slots / *width);
    const uint64_t n_tasks = n_queries * engine->n_spaces;
    *n_walks = n < n_tasks ? n : (uint32_t)n_tasks;
    return COTRA_OK;
}

/* Runs, or goes on; an error that no shard is to blame for ends the search. */
static int run(cotra_engine *engine, uint64_t pause_ns, cotra_error *err)
{
    cotra_lookout_pause_in(&engine->call.lookout, pause_ns);
    const int status = cotra_engine_run(engine, err);
    if (status < 0)
        engine->is_broken = true;
    if (status == COTRA_OK) {
        free(engine->call.started_ns);
        engine->call.started_ns = NULL;
    }
    return status;
}

int cotra_engine_search(cotra_engine *engine, const float *queries, uint64_t n_queries,
                        const cotra_search_params *params, const cotra_search_scope *scope, int64_t *labels,
                        float *distances, cotra_query_stats *stats, cotra_error *err)
{
    if (engine->is_broken || engine->call.started_ns)
        return cotra_fail(err, COTRA_ERR_CLOSED, "this engine's channels broke in an earlier search");
    if (params->k == 0 || params->k > params->ef || params->ef > MAX_EF)
        return cotra_fail(err, COTRA_ERR_ARGUMENT, "k must be in [1, ef] and ef in [1, %d], not k %u, ef %u", MAX_EF,
                          params->k, params->ef);
    if (params->beam == 0 || params->beam > MAX_BEAM)
        return cotra_fail(err, COTRA_ERR_ARGUMENT, "beam must be in [1, %d], not %u", MAX_BEAM, params->beam);
    if (n_queries == 0)
        return COTRA_OK;
    if (n_queries > UINT32_MAX)
        return cotra_fail(err, COTRA_ERR_ARGUMENT, "%llu queries in one call", (unsigned long long)n_queries);
    uint32_t width = 0, n_walks = 0;
    int status = make_plans(engine, params, scope, &width, err);
    if (status)
        return status;
    for (uint32_t s = 0; s < engine->n_shards; s++) {
        status = engine->paths[s].channel ? cotra_channel_settle(engine->paths[s].channel, err) : COTRA_OK;
        if (status)
            return status;
    }
    status = choose_walks(engine, params, n_queries, &width, &n_walks, err);
    if (status)
        return status;
    status = make_walks(engine, n_walks, params->k, 2 * choose_low_rank(params), width, err);
    if (status)
        return status;
    const uint8_t *mask = scope ? scope->mask : NULL;
    for (uint64_t i = 0; mask && i < engine->n_shards * n_queries * params->k; i++) {
        labels[i] = -1;
        distances[i] = INFINITY;
    }
    uint64_t *started_ns = calloc(n_queries, sizeof *started_ns);
    if (!started_ns)
        return cotra_fail(err, COTRA_ERR_NO_MEMORY, "engine: no memory for %llu queries",
                          (unsigned long long)n_queries);
    const uint32_t n_start = engine->n_spaces * (NEAR_READS > 2 * params->beam ? NEAR_READS / params->beam : 2);
    engine->call = (cotra_call){
        .queries = queries,
        .mask = mask,
        .labels = labels,
        .distances = distances,
        .stats = stats,
        .started_ns = started_ns,
        .n_queries = n_queries,
        .timeout_ns = params->timeout_ns ? params->timeout_ns : DEFAULT_TIMEOUT_NS,
        .lookout = {.watch = params->watch, .deadline_ns = params->deadline_ns},
        .since_look = COTRA_LOOK_AFTER, /* it looks before anything else; after a pause, not before some work */
        .n_start = n_start < n_walks && !params->inflight ? n_start : n_walks,
    };
    memset(stats, 0, n_queries * sizeof *stats);
    for (uint32_t s = 0; s < engine->n_shards; s++) {
        cotra_path *path = &engine->paths[s];
        path->queued = path->n_pushes = path->outstanding = path->idle_turns = 0;
    }
    for (uint32_t w = 0; w < n_walks; w++)
        engine->room.walks[w].walk.view = NULL;
    return run(engine, params->pause_ns, err);
}

int cotra_engine_resume(cotra_engine *engine, uint64_t pause_ns, cotra_error *err)
{
    if (!engine->call.started_ns)
        return cotra_fail(err, COTRA_ERR_ARGUMENT, "no search is half-way");
    return run(engine, pause_ns, err);
}

void cotra_engine_get_pushes(const cotra_engine *engine, uint32_t shard, const cotra_push **out, uint64_t *n)
{
    *out = engine->paths[shard].pushes;
    *n = engine->paths[shard].n_pushes;
}

static int make_told(const cotra_engine *engine, cotra_running *run, cotra_error *err)
{
    const size_t n = (size_t)engine->room.width * engine->max_degree;
    if (run->told)
        return COTRA_OK;
    run->told_numbers = malloc(n * sizeof *run->told_numbers);
    run->told_estimates = malloc(n * sizeof *run->told_estimates);
    run->told_weights = malloc(n * sizeof *run->told_weights);
    if (run->told_numbers && run->told_estimates && run->told_weights)
        run->told = malloc(engine->room.width * sizeof *run->told);
    if (run->told)
        return COTRA_OK;
    free(run->told_numbers);
    free(run->told_estimates);
    free(run->told_weights);
    run->told_numbers = NULL;
    run->told_estimates = run->told_weights = NULL;
    return cotra_fail(err, COTRA_ERR_NO_MEMORY, "engine: no memory for expansions");
}

int cotra_engine_take_expansions(cotra_engine *engine, uint32_t shard, const cotra_expansion *found, uint64_t n,
                                 const uint32_t *numbers, const float *estimates, const float *weights,
                                 uint64_t n_neighbours, cotra_error *err)
{
    if (shard >= engine->n_shards)
        return cotra_fail(err, COTRA_ERR_ARGUMENT, "shard %u of %u", shard, engine->n_shards);
    cotra_path *path = &engine->paths[shard];
    uint64_t told = 0;
    for (uint64_t p = 0; p < n; p++) {
        if (found[p].count > path->view->info.degree)
            return cotra_at_shard(err, shard,
                                  cotra_fail(err, COTRA_ERR_FORMAT,
                                             "an expansion of %u neighbours, where %u are the most", found[p].count,
                                             path->view->info.degree));
        told += found[p].count;
    }
    if (n != path->n_pushes || told != n_neighbours)
        return cotra_at_shard(err, shard,
                              cotra_fail(err, COTRA_ERR_FORMAT, "%llu expansions of %llu neighbours to %u pushes",
                                         (unsigned long long)n, (unsigned long long)n_neighbours, path->n_pushes));
    for (uint64_t i = 0; i < n_neighbours; i++)
        if (numbers[i] >= path->view->info.graph_count)
            return cotra_at_shard(err, shard,
                                  cotra_fail(err, COTRA_ERR_FORMAT, "an expansion links to node %u of %llu", numbers[i],
                                             (unsigned long long)path->view->info.graph_count));
    for (uint64_t i = 0; i < n_neighbours; i++)
        if (!(weights[i] >= COTRA_LEAST_WEIGHT && weights[i] <= COTRA_MOST_WEIGHT)) /* nor is NaN */
            return cotra_at_shard(err, shard,
                                  cotra_fail(err, COTRA_ERR_FORMAT, "an expansion with the weight %g", weights[i]));
    for (uint64_t p = 0; p < n; p++) {
        int status = make_told(engine, &engine->room.walks[path->pushed[p] / engine->room.width], err);
        if (status)
            return status;
    }
    for (uint64_t p = 0; p < n; p++) {
        const uint32_t w = path->pushed[p] / engine->room.width, i = path->pushed[p] % engine->room.width;
        cotra_running *to = &engine->room.walks[w];
        const size_t first = (size_t)i * engine->max_degree;
        to->told[i] = found[p];
        memcpy(to->told_numbers + first, numbers, found[p].count * sizeof *numbers);
        memcpy(to->told_estimates + first, estimates, found[p].count * sizeof *estimates);
        memcpy(to->told_weights + first, weights, found[p].count * sizeof *weights);
        numbers += found[p].count;
        estimates += found[p].count;
        weights += found[p].count;
        to->states[i] = COTRA_NODE_TOLD;
        to->missing--;
    }
    path->n_pushes = 0;
    return COTRA_OK;
}

uint32_t cotra_engine_get_slots(const cotra_engine *engine)
{
    return engine->room.n_walks * engine->room.width;
}

/* Whether a way to a shard may take another one's place in the search in progress. */
static int check_replacement(const cotra_engine *engine, uint32_t shard, const cotra_engine_shard *with,
                             cotra_error *err)
{
    const cotra_image_info *info = &engine->paths[shard].view->info;
    int status = check_shard(with, shard, err);
    if (status)
        return status;
    if (memcmp(&with->view->info, info, sizeof *info) != 0)
        return cotra_fail(err, COTRA_ERR_FORMAT, "another owner of shard %u holds another image", shard);
    if (with->channel && with->channel->slots < cotra_engine_get_slots(engine))
        return cotra_fail(err, COTRA_ERR_ARGUMENT, "shard %u: a channel of %u slots, the search needs %u", shard,
                          with->channel->slots, cotra_engine_get_slots(engine));
    if (with->cache)
        return cotra_fail(err, COTRA_ERR_ARGUMENT, "shard %u: a cache cannot come in the middle of a search", shard);
    return with->channel ? cotra_channel_settle(with->channel, err) : COTRA_OK;
}

static void lose_shard(cotra_engine *engine, uint32_t shard)
{
    for (uint32_t s = 0; s < engine->n_spaces; s++)
        for (uint32_t place = 0; place < engine->spaces[s].n; place++)
            if (engine->spaces[s].shards[place] == shard)
                cotra_space_lose(&engine->spaces[s], place);
}

int cotra_engine_replace(cotra_engine *engine, uint32_t shard, const cotra_engine_shard *with, cotra_error *err)
{
    if (shard >= engine->n_shards || !engine->call.started_ns)
        return cotra_fail(err, COTRA_ERR_ARGUMENT, "no search over shard %u is half-way", shard);
    cotra_path *path = &engine->paths[shard];
    static const cotra_engine_shard nobody;
    cotra_cache *cache = with ? path->cache : NULL;
    if (with) {
        int status = check_replacement(engine, shard, with, err);
        if (status)
            return status;
    } else {
        lose_shard(engine, shard);
    }
    set_path(path, with ? with : &nobody);
    path->cache = path->own ? NULL : cache;
    if (with) {
        int status = make_queues(engine, path, err);
        if (status)
            return status;
    }
    cotra_engine_revisit(engine, shard);
    return COTRA_OK;
}
