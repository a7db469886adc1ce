/* The scheduler: many walks in flight on one thread, so that the wire, and not its latency, is the limit.
 *
 * Nothing here waits for an owner: when all that is left does, the caller is told, and comes back with the answers.
 */
#include "search/graph/scheduler.h"

#include "base/status.h"
#include "search/record_cache.h"

#include <math.h>
#include <string.h>

enum { POLL_BATCH = 64 };
enum { IDLE_TURNS = 1024 }; /* between looks at the clock, which is a system call on some machines */
enum { BEGIN_WORK = 8 };    /* what it takes to begin a task, in expansions */

static int post_queue(cotra_path *to, cotra_error *err)
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

/* Tasks are begun in the order of the queries: so many of them are as good as a query that is answered. */
static void note_task(cotra_engine *engine)
{
    if (++engine->call.finished % engine->n_spaces == 0)
        cotra_lookout_note(&engine->call.lookout);
}

static void finish(cotra_engine *engine, cotra_running *run)
{
    const cotra_walk *walk = &run->walk;
    const cotra_space *space = &engine->spaces[run->space];
    for (uint32_t place = 0; place < space->n; place++) { /* each shard's part of the answer */
        size_t row = ((size_t)space->shards[place] * engine->call.n_queries + run->query) * engine->room.k;
        uint32_t n = 0;
        for (uint32_t i = 0; i < walk->hit_count; i++) {
            if (walk->hits[i].place != place)
                continue;
            engine->call.labels[row + n] = walk->hits[i].label;
            engine->call.distances[row + n++] = walk->hits[i].distance;
        }
        for (; n < engine->room.k; n++) {
            engine->call.labels[row + n] = -1;
            engine->call.distances[row + n] = INFINITY;
        }
    }
    cotra_query_stats *stats = &engine->call.stats[run->query];
    uint64_t latency = cotra_clock_ns() - engine->call.started_ns[run->query];
    stats->reads += walk->stats.reads;
    stats->expansions += walk->stats.expansions;
    stats->cache_hits += walk->stats.cache_hits;
    stats->cached_records += walk->stats.cached_records;
    stats->own += walk->stats.own;
    stats->pushed += walk->stats.pushed;
    stats->incomplete += walk->stats.incomplete;
    stats->read_bytes += (uint64_t)walk->stats.reads * walk->view->info.record_bytes;
    stats->rounds = walk->stats.rounds > stats->rounds ? walk->stats.rounds : stats->rounds;
    stats->latency_ns = latency > stats->latency_ns ? latency : stats->latency_ns;
    engine->call.active--;
    note_task(engine);
}

static cotra_path *path_of(cotra_engine *engine, const cotra_running *run, uint32_t i)
{
    return &engine->paths[engine->spaces[run->space].shards[run->walk.places[i]]];
}

/* Whether the mask leaves all of a task's shards out. */
static bool is_left_out(const cotra_engine *engine, uint64_t task)
{
    if (!engine->call.mask)
        return 0;
    if (engine->n_spaces == engine->n_shards)
        return !engine->call.mask[task];
    for (uint32_t i = 0; i < engine->n_shards; i++)
        if (engine->call.mask[task * engine->n_shards + i])
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

/* Expands what is left of the frontier, which is all there. A node that its shard failed to tell is missing then. */
static int expand(cotra_engine *engine, cotra_running *run, cotra_error *err)
{
    cotra_walk *walk = &run->walk;
    const uint32_t record_bytes = walk->view->info.record_bytes; /* alike in all shards of a space */
    for (; run->expanded < walk->frontier_count; run->expanded++) {
        const uint32_t i = run->expanded;
        const cotra_path *from = path_of(engine, run, i);
        int status = COTRA_OK;
        if (run->states[i] == COTRA_NODE_LOST)
            continue;
        if (i + 1 < walk->frontier_count)
            prefetch_record(run->records[i + 1], record_bytes);
        if (run->states[i] == COTRA_NODE_TOLD) {
            const size_t first = (size_t)i * engine->max_degree;
            status = cotra_walk_take(walk, i, &run->told[i], run->told_numbers + first, run->told_estimates + first,
                                     run->told_weights + first, err);
        } else {
            const uint8_t *record = run->records[i];
            const bool cached = from->cache && record == run->copies + (size_t)i * engine->copy_bytes;
            status = cotra_walk_expand(walk, i, record, cached, err);
            if (status == COTRA_ERR_STALE && from->cache)
                cotra_cache_retire(from->cache);
            if (!status && from->cache && !cached)
                cotra_cache_offer(from->cache, cotra_walk_row(walk, i), record);
        }
        if (status) {
            run->states[i] = COTRA_NODE_MISSING;
            run->missing++;
            return cotra_at_shard(err, (uint32_t)(from - engine->paths), status);
        }
    }
    return COTRA_OK;
}

/* Has a node of the frontier brought: its record, unless it is at hand, or its owner's word. */
static void fetch_node(cotra_engine *engine, uint32_t w, uint32_t i)
{
    cotra_running *run = &engine->room.walks[w];
    cotra_walk *walk = &run->walk;
    cotra_path *to = path_of(engine, run, i);
    const uint32_t row = cotra_walk_row(walk, i), record_bytes = walk->view->info.record_bytes;
    const uint64_t offset = to->view->info.records_offset + (uint64_t)row * record_bytes;
    const uint32_t slot = w * engine->room.width + i;
    if (to->own) {
        run->states[i] = COTRA_NODE_READ;
        run->records[i] = to->own + offset;
        prefetch_record(run->records[i], record_bytes);
        walk->stats.own++;
        return;
    }
    if (to->cache) {
        uint8_t *copy = run->copies + (size_t)i * engine->copy_bytes;
        if (cotra_cache_take(to->cache, row, copy)) {
            run->states[i] = COTRA_NODE_READ;
            run->records[i] = copy;
            walk->stats.cached_records++;
            return;
        }
    }
    run->states[i] = COTRA_NODE_MISSING;
    run->missing++;
    if (to->channel) {
        to->queue[to->queued++] = (cotra_read){.offset = offset, .length = record_bytes, .slot = slot};
        walk->stats.reads++;
        return;
    }
    to->pushed[to->n_pushes] = slot;
    to->pushes[to->n_pushes++] =
        (cotra_push){.query = (uint32_t)run->query, .row = row, .limit = cotra_walk_push_limit(walk)};
    walk->stats.pushed++;
}

static void fetch(cotra_engine *engine, uint32_t w)
{
    cotra_running *run = &engine->room.walks[w];
    run->missing = run->expanded = 0;
    for (uint32_t i = 0; i < run->walk.frontier_count; i++)
        fetch_node(engine, w, i);
    run->walk.stats.rounds += run->missing > 0;
}

/* Posts what waits for the shards that the frontier reads, where it is worth a post. */
static int post_frontier(cotra_engine *engine, cotra_running *run, cotra_error *err)
{
    for (uint32_t i = 0; i < run->walk.frontier_count; i++) {
        cotra_path *to = path_of(engine, run, i);
        if (to->queued == 0 || to->queued < to->channel->post_batch)
            continue;
        int status = post_queue(to, err);
        if (status)
            return cotra_at_shard(err, (uint32_t)(to - engine->paths), status);
    }
    return COTRA_OK;
}

/* Begins the next task that no mask leaves out; 0 when there is none. */
static int begin_task(cotra_engine *engine, cotra_running *run, cotra_error *err)
{
    const uint64_t n_tasks = engine->call.n_queries * engine->n_spaces;
    for (; engine->call.next_task < n_tasks && is_left_out(engine, engine->call.next_task); engine->call.next_task++)
        note_task(engine);
    if (engine->call.next_task == n_tasks)
        return 0;
    const uint64_t task = engine->call.next_task++;
    engine->call.since_look += BEGIN_WORK;
    run->query = task / engine->n_spaces;
    run->space = (uint32_t)(task % engine->n_spaces);
    engine->call.active++;
    if (engine->call.started_ns[run->query] == 0)
        engine->call.started_ns[run->query] = cotra_clock_ns();
    const cotra_space *space = &engine->spaces[run->space];
    const uint8_t *mask = engine->call.mask && space->n > 1 ? engine->call.mask + run->query * engine->n_shards : NULL;
    int status = cotra_walk_begin(&run->walk, space, &engine->plans[run->space], mask, engine->kernels,
                                  engine->call.queries + run->query * engine->max_dim, err);
    return status ? cotra_at_shard(err, space->shards[0], status) : 1;
}

/* Expands the frontier, chooses the next one and queues its READs, again where the cache has all of it; at the walk's
 * end, takes the next task. Where it pauses before that, nothing of the frontier is missing, and it can be called
 * again.
 */
static int advance(cotra_engine *engine, uint32_t w, cotra_error *err)
{
    cotra_running *run = &engine->room.walks[w];
    cotra_walk *walk = &run->walk;
    do {
        int status = COTRA_OK;
        engine->call.since_look += walk->frontier_count;
        if (engine->call.since_look >= COTRA_LOOK_AFTER) {
            engine->call.since_look = 0;
            status = cotra_look(&engine->call.lookout, err);
            if (status)
                return status;
        }
        if (walk->view)
            status = expand(engine, run, err);
        if (!status && walk->view)
            status = cotra_walk_choose(walk, err);
        if (status)
            return status;
        while (!walk->view || walk->frontier_count == 0) {
            if (walk->view)
                finish(engine, run);
            walk->view = NULL;
            status = begin_task(engine, run, err);
            if (status <= 0)
                return status;
            status = cotra_walk_choose(walk, err);
            if (status)
                return status;
        }
        fetch(engine, w);
    } while (run->missing == 0);
    return post_frontier(engine, run, err);
}

/* One turn over one shard's channel: completions, then what is queued. Returns COTRA_AGAIN when something happened. */
static int turn(cotra_engine *engine, uint32_t shard, cotra_error *err)
{
    cotra_path *path = &engine->paths[shard];
    cotra_completion completions[POLL_BATCH];
    uint32_t ready[POLL_BATCH], n = 0, n_ready = 0;
    int status = COTRA_OK, failed = COTRA_OK;
    if (path->outstanding) {
        status = cotra_channel_poll(path->channel, completions, POLL_BATCH, &n, err);
        if (status < 0)
            return cotra_at_shard(err, shard, status);
    }
    for (uint32_t c = 0; c < n; c++) { /* all are noted before anything else: a failure must not forget the others */
        const cotra_completion *completion = &completions[c];
        path->outstanding--;
        if (completion->status != COTRA_OK) {
            failed = completion->status;
            continue;
        }
        const uint32_t w = completion->slot / engine->room.width;
        cotra_running *run = &engine->room.walks[w];
        const uint32_t i = completion->slot % engine->room.width;
        run->states[i] = COTRA_NODE_READ;
        run->records[i] = completion->data;
        if (--run->missing == 0)
            ready[n_ready++] = w;
    }
    if (failed)
        return cotra_at_shard(err, shard, cotra_channel_report(path->channel, failed, err));
    for (uint32_t r = 0; r < n_ready; r++) {
        if (r + 1 < n_ready)
            prefetch_record(engine->room.walks[ready[r + 1]].records[0], path->view->info.record_bytes);
        status = advance(engine, ready[r], err);
        if (status)
            return status;
    }
    const uint32_t queued = path->queued;
    if (queued) {
        status = post_queue(path, err);
        if (status)
            return cotra_at_shard(err, shard, status);
    }
    if (n || queued != path->queued) {
        path->last_progress_ns = 0;
        return COTRA_AGAIN;
    }
    if ((path->outstanding || path->queued) && ++path->idle_turns == IDLE_TURNS) {
        path->idle_turns = 0;
        status = cotra_look(&engine->call.lookout, err);
        const bool is_late = status == COTRA_ERR_DEADLINE;
        if (status && !is_late)
            return status;
        const uint64_t now = cotra_clock_ns();
        if (path->last_progress_ns == 0)
            path->last_progress_ns = now;
        const uint64_t silent_ns = now - path->last_progress_ns;
        if (silent_ns >
            (is_late ? engine->call.timeout_ns / 2 : engine->call.timeout_ns)) /* it is what the search waited for */
            return cotra_at_shard(err, shard,
                                  cotra_fail(err, COTRA_ERR_DEADLINE, "a READ did not complete within %llu ms",
                                             (unsigned long long)(silent_ns / 1000000u)));
        return status;
    }
    return 0;
}

/* Whether no READ is queued or on its way. */
static bool wire_is_silent(const cotra_engine *engine)
{
    for (uint32_t s = 0; s < engine->n_shards; s++)
        if (engine->paths[s].queued || engine->paths[s].outstanding)
            return 0;
    return 1;
}

/* n_start walks run at first. When no channel has anything to do, the wire is what is waited for, and another walk
 * joins them: so there are as many as hide its latency, and no more, for each one costs cache. */
int cotra_engine_run(cotra_engine *engine, cotra_error *err)
{
    for (uint32_t w = 0; w < engine->call.started; w++) { /* those that were left half-way, or that owners answered */
        int status = engine->room.walks[w].missing == 0 ? advance(engine, w, err) : COTRA_OK;
        if (status)
            return status;
    }
    while (engine->call.started < engine->call.n_start || engine->call.active) {
        bool busy = false;
        while (engine->call.started < engine->call.n_start) {
            int status = advance(engine, engine->call.started++, err);
            if (status)
                return status;
        }
        for (uint32_t s = 0; s < engine->n_shards; s++) {
            if (!engine->paths[s].channel)
                continue;
            int status = turn(engine, s, err);
            if (status < 0 || status == COTRA_PAUSED)
                return status;
            busy |= status == COTRA_AGAIN;
        }
        if (busy)
            continue;
        if (engine->call.n_start < engine->room.n_walks)
            engine->call.n_start++;
        else if (engine->call.active && wire_is_silent(engine))
            return COTRA_AGAIN;
#if defined(__x86_64__)
        else
            __builtin_ia32_pause();
#endif
    }
    return COTRA_OK;
}

void cotra_engine_revisit(cotra_engine *engine, uint32_t shard)
{
    const cotra_path *path = &engine->paths[shard];
    for (uint32_t w = 0; w < engine->call.started; w++) {
        cotra_running *run = &engine->room.walks[w];
        for (uint32_t i = run->expanded; run->walk.view && i < run->walk.frontier_count; i++) {
            if (path_of(engine, run, i) != path)
                continue;
            run->missing -= run->states[i] == COTRA_NODE_MISSING; /* what came from the old one may be a lie, too */
            if (cotra_space_is_lost(run->walk.space, run->walk.places[i]))
                run->states[i] = COTRA_NODE_LOST;
            else
                fetch_node(engine, w, i);
        }
    }
}
