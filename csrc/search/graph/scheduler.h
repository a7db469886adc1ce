/* The state of a search in progress, and what runs it: engine.c makes engines and plans searches, scheduler.c runs
 * them.
 *
 * Walk w owns slots [w * width, (w + 1) * width) of the channels that it reads; the READ of its frontier's i-th node
 * goes to slot w * width + i. A node of the frontier is
 *   - COTRA_NODE_READ: records[i] is its record (READ, copied from a cache, or in this process's own memory);
 *   - COTRA_NODE_TOLD: told[i] is what its owner made of it;
 *   - COTRA_NODE_MISSING: it is queued, posted, or waits for its shard's owner;
 *   - COTRA_NODE_LOST, with its shard.
 * A walk with nothing missing is expanded, in the frontier's order, from `expanded` on; so it can be left and taken up
 * anywhere. All that a path had to do can be found again from its walks' frontiers: that is how one way to a shard is
 * replaced by another in the middle of a search.
 */
#ifndef COTRA_SEARCH_GRAPH_SCHEDULER_H
#define COTRA_SEARCH_GRAPH_SCHEDULER_H

#include "search/lookout.h"
#include "search/graph/walk.h"
#include "channel/channel.h"

#include <stdbool.h>

typedef struct cotra_path { /* one shard */
    const cotra_view *view;
    cotra_channel *channel; /* or NULL */
    const uint8_t *own;     /* the image in this process's memory, or NULL; with neither, its owner is asked */
    cotra_cache *cache;     /* or NULL */
    cotra_read *queue;      /* READs waiting for a post: [n_walks * width] */
    cotra_push *pushes;     /* nodes waiting for the owner: [n_walks * width], allocated where any path has an owner */
    uint32_t *pushed;       /* [n_walks * width]: the slot of each */
    uint32_t queued, n_pushes;
    uint32_t outstanding;      /* posted, not completed */
    uint32_t idle_turns;       /* since the clock was read */
    uint64_t last_progress_ns; /* by the first look at the clock after it; 0: none yet */
} cotra_path;

enum { COTRA_NODE_MISSING, COTRA_NODE_READ, COTRA_NODE_TOLD, COTRA_NODE_LOST };

typedef struct cotra_running {
    cotra_walk walk;
    uint8_t *states;         /* [width]: COTRA_NODE_* */
    const uint8_t **records; /* [width] */
    uint8_t *copies;         /* [width][copy_bytes]: of cached records; NULL where there is no cache */
    /* [width], with [width][degree] numbers, estimates and weights; NULL until an owner answers */
    cotra_expansion *told;
    uint32_t *told_numbers;
    float *told_estimates, *told_weights;
    uint64_t query;
    uint32_t space;
    uint32_t missing;  /* of the frontier */
    uint32_t expanded; /* of the frontier, from its beginning */
} cotra_running;

enum { COTRA_LOOK_AFTER = 1024 }; /* expansions: 0.5 ms, or 10 of the longest vectors */

/* Walks, and what each has room for. They are kept for the next search of the same size. */
typedef struct cotra_room {
    cotra_running *walks;
    uint32_t n_walks;
    uint32_t k, rank; /* answers, and ranks of the limit */
    uint32_t width;   /* READs a round of one walk */
} cotra_room;

/* The search in progress. */
typedef struct cotra_call {
    const float *queries;
    const uint8_t *mask; /* NULL, or [n_queries, n_shards] */
    int64_t *labels;
    float *distances;
    cotra_query_stats *stats;
    uint64_t *started_ns; /* [n_queries]; NULL: no search is in progress */
    uint64_t n_queries, next_task, timeout_ns;
    uint64_t finished; /* tasks that are over, those that the mask leaves out included */
    cotra_lookout lookout;
    uint32_t since_look; /* work done since the last look, about in expansions */
    uint32_t active;     /* walks that have a task */
    uint32_t started;    /* walks that run */
    uint32_t n_start;    /* walks that should run */
} cotra_call;

struct cotra_engine {
    const cotra_kernels *kernels;
    cotra_path *paths;
    cotra_space *spaces;    /* [n_spaces]: of one shard each, or one of all */
    cotra_walk_plan *plans; /* [n_spaces], of the search in progress */
    uint64_t *rows;         /* [n_shards]: that may be returned, in the search in progress */
    uint32_t n_shards, n_spaces, max_dim, max_degree;
    uint32_t copy_bytes; /* the longest record of a shard with a cache; 0: there is none */
    bool is_broken;      /* READs of a failed call may still be on their way into the slots */
    cotra_room room;
    cotra_call call;
};

/* Whether the shard's owner expands its nodes. */
static inline bool cotra_path_is_pushed(const cotra_path *path)
{
    return !path->channel && !path->own;
}

/* A failure belongs to the shard at hand: a completion of one may start a query on another. */
static inline int cotra_at_shard(cotra_error *err, uint32_t shard, int status)
{
    if (status < 0 && err)
        err->shard = (int32_t)shard;
    return status;
}

/* Goes on until the search is over, or all that is left waits for owners: COTRA_AGAIN; or until it is to pause:
 * COTRA_PAUSED. */
int cotra_engine_run(cotra_engine *engine, cotra_error *err);
/* What was not expanded of a shard is asked for again, by the path as it is now; where the shard is lost, it is given
 * up. */
void cotra_engine_revisit(cotra_engine *engine, uint32_t shard);

#endif
