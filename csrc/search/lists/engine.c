/* The scheduler of probes: two rounds of READs a query (SPIRE), several queries in flight on one thread.
 *
 *   probe begins -> round 1: all pieces of its lists -> round 2: all vectors to re-rank -> answer, next query
 *
 * All READs of a round are queued at once, each on its shard's path; a path posts what its channel has free slots for
 * and keeps the rest for when some complete (back-pressure). A completion is worked off before its slot is free again,
 * so a landing buffer is never looked at later.
 */
#include "base/status.h"
#include "search/lookout.h"
#include "search/lists/probe.h"
#include "channel/channel.h"

#include <stdlib.h>
#include <string.h>

enum { MAX_K = 1 << 20, MAX_INFLIGHT = 64, AUTO_RERANK = 1024, AUTO_RERANK_OF_K = 32, BATCH = 64 };
/* A query takes the CPU tens of microseconds: as many of them as hide two round trips on a wire, or the memory's
 * latency.
 */
enum { INFLIGHT_FAR = 8, INFLIGHT_NEAR = 2 };
enum { LOOK_AFTER = 256, BEGIN_WORK = 64 }; /* READs worked off, and what it takes to begin a query */
#define DEFAULT_TIMEOUT_NS 5000000000u

typedef struct pending {
    uint64_t offset;
    uint32_t length;
    uint32_t run;  /* whose */
    uint32_t item; /* piece in round 1, candidate in round 2 */
} pending;

typedef struct owner {
    uint32_t run, item;
} owner;

typedef struct path { /* one shard */
    cotra_channel *channel;
    owner *owners;     /* [slots]: of the READs in progress */
    uint32_t *idle;    /* [slots]: free slots, a stack */
    uint32_t n_idle;   /* slots - n_idle READs are in progress */
    pending *queue;    /* [capacity]: a ring of READs to be posted */
    uint32_t capacity; /* as many as all runs can have on this path in a round */
    uint32_t first, queued;
    uint64_t last_progress_ns;
} path;

typedef struct running {
    cotra_probe probe;
    uint64_t query, started_ns;
    uint32_t missing; /* READs of the round that are not there yet */
    int round;        /* 0: free, 1: lists, 2: vectors */
} running;

struct cotra_spire {
    const cotra_kernels *kernels;
    uint32_t n_shards, dim;
    cotra_probe_shard *shards; /* [n_shards] */
    path *paths;               /* [n_shards] */
    running *runs;
    uint32_t n_runs;
    cotra_probe_limits limits; /* what `runs` were made for */
    int broken;                /* READs of a failed call may still be on their way into the slots */
    /* the call in progress */
    const float *queries;
    const uint8_t *mask;
    uint64_t n_queries, next_query, timeout_ns;
    uint32_t active;
    uint32_t since_look; /* work done since, in READs */
    bool is_half_way;
    cotra_lookout lookout;
    int64_t *labels;
    float *distances;
    int32_t *answer_shards;
    cotra_spire_stats *stats;
};

static int check_shards(cotra_view *const *views, cotra_ivf_table *const *tables, cotra_channel *const *channels,
                        uint32_t n_shards, cotra_error *err)
{
    for (uint32_t i = 0; i < n_shards; i++) {
        const cotra_image_info *info = &views[i]->info;
        if (info->dim != views[0]->info.dim || info->metric != views[0]->info.metric)
            return cotra_fail(err, COTRA_ERR_ARGUMENT, "shard %u has dim %u and metric %u, shard 0 has %u and %u", i,
                              info->dim, info->metric, views[0]->info.dim, views[0]->info.metric);
        if (tables[i]->ivf_checksum != info->ivf_checksum || tables[i]->dim != info->dim)
            return cotra_fail(err, COTRA_ERR_ARGUMENT, "shard %u: the table of lists is not the view's", i);
        for (uint32_t j = 0; j < i; j++)
            if (channels[j] == channels[i])
                return cotra_fail(err, COTRA_ERR_ARGUMENT, "shards %u and %u have the same channel", j, i);
        const uint32_t prefix_bytes = cotra_prefix_bytes(info), block_bytes = tables[i]->info.block_bytes;
        const uint32_t longest = prefix_bytes > block_bytes ? prefix_bytes : block_bytes;
        if (longest > channels[i]->slot_bytes)
            return cotra_fail(err, COTRA_ERR_ARGUMENT,
                              "shard %u needs READs of %u bytes (a block of 32 codes is %u), its channel reads %u at "
                              "most: open it with a larger slot_bytes",
                              i, longest, block_bytes, channels[i]->slot_bytes);
    }
    return COTRA_OK;
}

int cotra_spire_create(cotra_view *const *views, cotra_ivf_table *const *tables, cotra_channel *const *channels,
                       uint32_t n_shards, int simd, cotra_spire **out, cotra_error *err)
{
    *out = NULL;
    if (n_shards == 0)
        return cotra_fail(err, COTRA_ERR_ARGUMENT, "an engine needs at least one shard");
    const cotra_kernels *kernels = cotra_kernels_get(simd);
    if (!kernels)
        return cotra_fail(err, COTRA_ERR_ARGUMENT, "this CPU or build has no %s kernels", cotra_simd_name(simd));
    int status = check_shards(views, tables, channels, n_shards, err);
    if (status)
        return status;
    cotra_spire *engine = calloc(1, sizeof *engine);
    if (!engine)
        return cotra_fail(err, COTRA_ERR_NO_MEMORY, "engine: no memory");
    engine->kernels = kernels;
    engine->n_shards = n_shards;
    engine->dim = views[0]->info.dim;
    engine->shards = calloc(n_shards, sizeof *engine->shards);
    engine->paths = calloc(n_shards, sizeof *engine->paths);
    if (!engine->shards || !engine->paths)
        goto no_memory;
    for (uint32_t i = 0; i < n_shards; i++) {
        path *to = &engine->paths[i];
        engine->shards[i] = (cotra_probe_shard){.view = views[i],
                                                .table = tables[i],
                                                .prefix_bytes = cotra_prefix_bytes(&views[i]->info),
                                                .piece_blocks = channels[i]->slot_bytes / tables[i]->info.block_bytes};
        to->channel = channels[i];
        to->owners = calloc(channels[i]->slots, sizeof *to->owners);
        to->idle = calloc(channels[i]->slots, sizeof *to->idle);
        if (!to->owners || !to->idle)
            goto no_memory;
    }
    *out = engine;
    return COTRA_OK;
no_memory:
    cotra_spire_destroy(engine);
    return cotra_fail(err, COTRA_ERR_NO_MEMORY, "engine: no memory for %u shards", n_shards);
}

static void drop_runs(cotra_spire *engine)
{
    for (uint32_t i = 0; i < engine->n_runs; i++)
        cotra_probe_destroy(&engine->runs[i].probe);
    free(engine->runs);
    engine->runs = NULL;
    engine->n_runs = 0;
    for (uint32_t i = 0; engine->paths && i < engine->n_shards; i++) {
        free(engine->paths[i].queue);
        engine->paths[i].queue = NULL;
    }
}

void cotra_spire_destroy(cotra_spire *engine)
{
    if (!engine)
        return;
    drop_runs(engine);
    for (uint32_t i = 0; engine->paths && i < engine->n_shards; i++) {
        free(engine->paths[i].owners);
        free(engine->paths[i].idle);
    }
    free(engine->paths);
    free(engine->shards);
    free(engine);
}

/* Pieces of at most n_probe lists of a shard. */
static uint64_t pieces_of(const cotra_probe_shard *shard, uint64_t n_probe)
{
    const cotra_ivf_table *table = shard->table;
    uint64_t all = 0, most = 0;
    for (uint32_t i = 0; i < table->info.n_lists; i++) {
        const uint64_t pieces = (cotra_ivf_blocks(table->sizes[i]) + shard->piece_blocks - 1) / shard->piece_blocks;
        all += pieces;
        most = pieces > most ? pieces : most;
    }
    return all < n_probe * most ? all : n_probe * most;
}

static int make_runs(cotra_spire *engine, uint32_t n_runs, const cotra_probe_limits *limits, cotra_error *err)
{
    if (engine->n_runs == n_runs && engine->limits.k == limits->k && engine->limits.n_probe == limits->n_probe &&
        engine->limits.capacity == limits->capacity && engine->limits.automatic == limits->automatic)
        return COTRA_OK;
    drop_runs(engine);
    engine->limits = *limits;
    engine->limits.n_pieces = 0;
    bool failed = false;
    for (uint32_t i = 0; i < engine->n_shards; i++) {
        const uint64_t pieces = pieces_of(&engine->shards[i], limits->n_probe);
        const uint64_t capacity = (pieces > limits->capacity ? pieces : limits->capacity) * n_runs;
        path *to = &engine->paths[i];
        if (capacity > UINT32_MAX || engine->limits.n_pieces + pieces > UINT32_MAX)
            return cotra_fail(err, COTRA_ERR_ARGUMENT, "%u lists of shard %u are %llu READs: too many at once",
                              limits->n_probe, i, (unsigned long long)pieces);
        engine->limits.n_pieces += (uint32_t)pieces;
        to->capacity = (uint32_t)capacity;
        to->queue = malloc((capacity ? capacity : 1) * sizeof *to->queue);
        failed |= !to->queue;
    }
    engine->runs = calloc(n_runs, sizeof *engine->runs);
    if (failed || !engine->runs) {
        drop_runs(engine);
        return cotra_fail(err, COTRA_ERR_NO_MEMORY, "engine: no memory for %u queries at once", n_runs);
    }
    for (; engine->n_runs < n_runs; engine->n_runs++) {
        int status = cotra_probe_create(&engine->runs[engine->n_runs].probe, engine->shards, engine->n_shards,
                                        engine->kernels, &engine->limits, err);
        if (status) {
            drop_runs(engine);
            return status;
        }
    }
    return COTRA_OK;
}

static void enqueue(cotra_spire *engine, uint32_t r, uint32_t shard, uint64_t offset, uint32_t length, uint32_t item)
{
    path *to = &engine->paths[shard];
    running *run = &engine->runs[r];
    to->queue[(to->first + to->queued++) % to->capacity] =
        (pending){.offset = offset, .length = length, .run = r, .item = item};
    run->missing++;
    run->probe.stats.reads++;
    run->probe.stats.read_bytes += length;
}

/* Posts what there are slots for. */
static int post_queue(path *to, cotra_error *err)
{
    while (to->queued && to->n_idle) {
        cotra_read reads[BATCH];
        uint32_t n = 0, posted = 0;
        for (; n < BATCH && n < to->queued && n < to->n_idle; n++) {
            const pending *next = &to->queue[(to->first + n) % to->capacity];
            const uint32_t slot = to->idle[to->n_idle - 1 - n];
            reads[n] = (cotra_read){.offset = next->offset, .length = next->length, .slot = slot};
            to->owners[slot] = (owner){.run = next->run, .item = next->item};
        }
        int status = cotra_channel_post(to->channel, reads, n, &posted, err);
        if (posted)
            to->last_progress_ns = 0;
        to->n_idle -= posted;
        to->queued -= posted;
        to->first = (to->first + posted) % to->capacity;
        if (status < 0)
            return status;
        if (posted < n)
            break;
    }
    return COTRA_OK;
}

static void queue_lists(cotra_spire *engine, uint32_t r)
{
    running *run = &engine->runs[r];
    for (uint32_t i = 0; i < run->probe.n_pieces; i++) {
        const cotra_probe_piece *piece = &run->probe.pieces[i];
        const cotra_probe_list *list = &run->probe.lists[piece->list];
        const cotra_ivf_table *table = engine->shards[list->shard].table;
        const uint64_t offset = table->offsets[list->number] + piece->first_block * table->info.block_bytes;
        enqueue(engine, r, list->shard, offset, piece->n_blocks * table->info.block_bytes, i);
    }
    run->round = 1;
    run->probe.stats.rounds = run->missing ? 1 : 0;
    run->probe.stats.list_bytes = run->probe.stats.read_bytes;
}

static void queue_vectors(cotra_spire *engine, uint32_t r)
{
    running *run = &engine->runs[r];
    const uint32_t n = cotra_probe_rerank(&run->probe);
    for (uint32_t i = 0; i < n; i++) {
        const cotra_ranked *candidate = &run->probe.candidates.items[i];
        const uint32_t s = (uint32_t)candidate->major;
        const cotra_image_info *info = &engine->shards[s].view->info;
        enqueue(engine, r, s, info->records_offset + candidate->minor * info->record_bytes,
                engine->shards[s].prefix_bytes, i);
    }
    run->round = 2;
    run->probe.stats.rounds += n > 0;
}

static void finish(cotra_spire *engine, running *run)
{
    const size_t row = run->query * engine->limits.k;
    cotra_probe_answer(&run->probe, engine->labels + row, engine->distances + row, engine->answer_shards + row);
    run->probe.stats.latency_ns = cotra_clock_ns() - run->started_ns;
    engine->stats[run->query] = run->probe.stats;
    run->round = 0;
    engine->active--;
    cotra_lookout_note(&engine->lookout);
}

/* Goes on to the round, or the query, that has something to read. */
static void advance(cotra_spire *engine, uint32_t r)
{
    running *run = &engine->runs[r];
    while (run->missing == 0) {
        if (run->round == 1) {
            queue_vectors(engine, r);
            continue;
        }
        if (run->round == 2)
            finish(engine, run);
        if (engine->next_query == engine->n_queries)
            return;
        run->query = engine->next_query++;
        run->started_ns = cotra_clock_ns();
        engine->active++;
        engine->since_look += BEGIN_WORK;
        cotra_probe_begin(&run->probe, engine->queries + run->query * engine->dim,
                          engine->mask ? engine->mask + run->query * engine->n_shards : NULL);
        queue_lists(engine, r);
    }
}

static int take_completion(cotra_spire *engine, const cotra_completion *completion, path *from, cotra_error *err)
{
    const owner whose = from->owners[completion->slot];
    from->idle[from->n_idle++] = completion->slot;
    if (completion->status != COTRA_OK)
        return cotra_channel_report(from->channel, completion->status, err);
    running *run = &engine->runs[whose.run];
    int status = run->round == 1 ? cotra_probe_take_piece(&run->probe, whose.item, completion->data, err)
                                 : cotra_probe_take_vector(&run->probe, whose.item, completion->data, err);
    if (status)
        return status;
    if (--run->missing == 0)
        advance(engine, whose.run);
    return COTRA_OK;
}

/* One turn over one shard's channel: completions, then what is queued. Returns 1 when something happened. */
static int turn(cotra_spire *engine, path *to, cotra_error *err)
{
    cotra_completion completions[BATCH];
    uint32_t n = 0;
    int status = post_queue(to, err);
    if (status)
        return status;
    if (to->n_idle == to->channel->slots && !to->queued)
        return 0;
    status = cotra_channel_poll(to->channel, completions, BATCH, &n, err);
    if (status < 0)
        return status;
    for (uint32_t c = 0; c < n; c++) {
        status = take_completion(engine, &completions[c], to, err);
        if (status)
            return status;
    }
    engine->since_look += n ? n : 1;
    if (n) {
        to->last_progress_ns = 0;
        return 1;
    }
    const uint64_t now = cotra_clock_ns();
    if (to->last_progress_ns == 0)
        to->last_progress_ns = now;
    const bool is_late = engine->lookout.deadline_ns && now >= engine->lookout.deadline_ns;
    const uint64_t silent_ns = now - to->last_progress_ns;
    if (silent_ns > (is_late ? engine->timeout_ns / 2 : engine->timeout_ns)) /* it is what the search waited for */
        return cotra_fail(err, COTRA_ERR_DEADLINE, "a READ did not complete within %llu ms",
                          (unsigned long long)(silent_ns / 1000000u));
    return 0;
}

static int run_all(cotra_spire *engine, cotra_error *err)
{
    while (engine->active) {
        bool busy = false;
        if (engine->since_look >= LOOK_AFTER) {
            engine->since_look = 0;
            int status = cotra_look(&engine->lookout, err);
            if (status)
                return status;
        }
        for (uint32_t s = 0; s < engine->n_shards; s++) {
            int status = turn(engine, &engine->paths[s], err);
            if (status < 0) {
                if (err)
                    err->shard = (int32_t)s;
                return status;
            }
            busy |= status;
        }
        if (!busy) {
#if defined(__x86_64__)
            __builtin_ia32_pause();
#endif
        }
    }
    return COTRA_OK;
}

/* Runs, or goes on. */
static int run(cotra_spire *engine, uint64_t pause_ns, cotra_error *err)
{
    cotra_lookout_pause_in(&engine->lookout, pause_ns);
    const int status = run_all(engine, err);
    engine->broken = status < 0;
    engine->is_half_way = status > 0;
    return status;
}

static int check_params(const cotra_spire *engine, const cotra_spire_params *params, const cotra_search_scope *scope,
                        cotra_error *err)
{
    if (engine->broken || engine->is_half_way)
        return cotra_fail(err, COTRA_ERR_CLOSED, "this engine's channels broke in an earlier search");
    if (params->k < 1 || params->k > MAX_K)
        return cotra_fail(err, COTRA_ERR_ARGUMENT, "k must be in [1, %d], not %u", MAX_K, params->k);
    if (params->n_probe < 1)
        return cotra_fail(err, COTRA_ERR_ARGUMENT, "n_probe must be at least 1");
    if (params->n_rerank && (params->n_rerank < params->k || params->n_rerank > MAX_K))
        return cotra_fail(err, COTRA_ERR_ARGUMENT, "n_rerank must be 0 or in [k, %d], not %u where k is %u", MAX_K,
                          params->n_rerank, params->k);
    for (uint32_t s = 0; s < engine->n_shards && scope && scope->filters; s++) {
        const uint64_t rows = engine->shards[s].view->info.count;
        if (scope->filters[s] && scope->filter_bytes[s] < (rows + 7) / 8)
            return cotra_fail(err, COTRA_ERR_ARGUMENT, "shard %u has %llu rows, its filter %llu bits", s,
                              (unsigned long long)rows, 8 * (unsigned long long)scope->filter_bytes[s]);
    }
    return COTRA_OK;
}

/* The limits of a call, and how many queries are worth having in flight. */
static uint32_t plan(const cotra_spire *engine, const cotra_spire_params *params, cotra_probe_limits *limits)
{
    uint64_t n_lists = 0, rows = 0;
    bool far = false;
    for (uint32_t s = 0; s < engine->n_shards; s++) {
        n_lists += engine->shards[s].table->info.n_lists;
        rows += engine->shards[s].table->info.entries;
        far |= engine->paths[s].channel->in_flight == 0;
    }
    uint64_t capacity = params->n_rerank ? params->n_rerank : AUTO_RERANK + AUTO_RERANK_OF_K * (uint64_t)params->k;
    capacity = capacity < rows ? capacity : rows;
    *limits = (cotra_probe_limits){.k = params->k,
                                   .n_probe = params->n_probe < n_lists ? params->n_probe : (uint32_t)n_lists,
                                   .capacity = (uint32_t)capacity,
                                   .automatic = params->n_rerank == 0};
    const uint32_t wanted = params->inflight ? params->inflight : far ? INFLIGHT_FAR : INFLIGHT_NEAR;
    return wanted < MAX_INFLIGHT ? wanted : MAX_INFLIGHT;
}

int cotra_spire_search(cotra_spire *engine, const float *queries, uint64_t n_queries, const cotra_spire_params *params,
                       const cotra_search_scope *scope, int64_t *labels, float *distances, int32_t *shards,
                       cotra_spire_stats *stats, cotra_error *err)
{
    int status = check_params(engine, params, scope, err);
    if (status || n_queries == 0)
        return status;
    cotra_probe_limits limits;
    uint32_t n_runs = plan(engine, params, &limits);
    status = make_runs(engine, n_runs < n_queries ? n_runs : (uint32_t)n_queries, &limits, err);
    for (uint32_t s = 0; s < engine->n_shards && !status; s++) {
        path *to = &engine->paths[s];
        status = cotra_channel_settle(to->channel, err);
        if (status && err)
            err->shard = (int32_t)s;
        engine->shards[s].filter = scope && scope->filters ? scope->filters[s] : NULL;
        to->first = to->queued = 0;
        to->last_progress_ns = 0;
        to->n_idle = to->channel->slots;
        for (uint32_t i = 0; i < to->n_idle; i++)
            to->idle[i] = to->n_idle - 1 - i;
    }
    if (status)
        return status;
    for (uint32_t r = 0; r < engine->n_runs; r++)
        engine->runs[r].round = engine->runs[r].missing = 0;
    engine->queries = queries;
    engine->mask = scope ? scope->mask : NULL;
    engine->n_queries = n_queries;
    engine->next_query = 0;
    engine->since_look = LOOK_AFTER; /* it looks before anything else; after a pause, not before some work */
    engine->active = 0;
    engine->labels = labels;
    engine->distances = distances;
    engine->answer_shards = shards;
    engine->stats = stats;
    engine->timeout_ns = params->timeout_ns ? params->timeout_ns : DEFAULT_TIMEOUT_NS;
    engine->lookout = (cotra_lookout){
        .watch = params->watch,
        .deadline_ns = params->deadline_ns,
    };
    for (uint32_t r = 0; r < engine->n_runs; r++)
        advance(engine, r);
    return run(engine, params->pause_ns, err);
}

int cotra_spire_resume(cotra_spire *engine, uint64_t pause_ns, cotra_error *err)
{
    if (!engine->is_half_way)
        return cotra_fail(err, COTRA_ERR_ARGUMENT, "no search is half-way");
    return run(engine, pause_ns, err);
}
