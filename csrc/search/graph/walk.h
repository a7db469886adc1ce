/* A walk: one query on one space, as a state machine that never touches a channel.
 *
 *            begin                 frontier read                      nothing left to expand
 *   (free) ---------> choosing --------------------> expanding ------> ... ------------------> done
 *                        ^   frontier of <= beam        |
 *                        +------------------------------+
 *
 * begin() descends the upper layers in the views of the shards nearest to the query; choose() takes the nearest
 * candidates as the next frontier; the engine READs their records, in any order, whenever they come; expand() takes
 * them in the order of the frontier. So the answer depends on the image and the parameters alone.
 *
 * A walk ends when no candidate is below its limit (docs/explanation/how-it-works.md). With d_n the n-th least exact
 * distance so far, and `scale` that of an estimate's error, the limit is
 *
 *   d_k + slack_k scale, but at least d_low + slack scale, and at most d_high + slack scale
 *
 * hnswlib's rule is d_ef alone. There is no limit before `low` rows that may be returned were found. Rows that a filter
 * excludes or that are deleted lead on and do not count. Where shards in which a walk started are lost meanwhile, or it
 * ends with too few answers and not all of the graph is open to it, it starts anew in the next nearest.
 *
 * A walk that found too few answers sweeps: it reads the rows that may be returned and that it has not read, one after
 * the other. So does one that has expanded so many nodes for so few answers that a sweep is cheaper. A direct plan
 * begins with it.
 */
#ifndef COTRA_SEARCH_GRAPH_WALK_H
#define COTRA_SEARCH_GRAPH_WALK_H

#include "search/graph/candidates.h"
#include "search/query.h"
#include "search/graph/space.h"

#include <stdbool.h>

enum { COTRA_START_SHARDS = 2 };

typedef struct cotra_hit {
    float distance;
    float scale; /* of errors near it; only kept for inner products, where the limit needs it */
    int64_t label;
    uint32_t place; /* of its shard in the space */
} cotra_hit;

/* The least exact distances so far: a heap, the greatest on top. */
typedef struct cotra_least {
    float *heap;
    uint32_t count, capacity;
} cotra_least;

/* How a space is walked in one search. */
typedef struct cotra_walk_plan {
    uint32_t low, high; /* ranks of the limit: at least k */
    uint32_t most;      /* expansions at most, by the caller's wish */
    uint32_t beam;      /* expansions a round at most: two in the first, two more in each that follows */
    float slack, slack_k;
    const uint8_t *const *filters; /* NULL, or for each of the engine's shards NULL or a bit for each row */
    uint64_t most_starved;         /* expansions after which a walk that ranks too few rows sweeps */
    const uint64_t *rows;          /* for each of the engine's shards: how many may be returned, or a little more */
    bool direct;                   /* no walk: every row that the filters let through is read */
    bool numbers;                  /* hits get their nodes' numbers for labels */
} cotra_walk_plan;

typedef struct cotra_walk {
    const cotra_space *space;
    const cotra_view *view; /* of its first shard: what all of them have alike */
    const cotra_kernels *kernels;
    cotra_walk_plan plan;
    const uint8_t *mask; /* NULL, or by the engine's shards: 0: its nodes are left out */
    cotra_query query;
    uint32_t k;
    uint32_t width;    /* READs a round at most: of `frontier` */
    uint64_t rows;     /* that may be returned, of all shards that are open to it */
    uint64_t next_row; /* of a sweep, in the shard at next_place */
    uint32_t next_place;
    bool sweeping;
    uint32_t starts[COTRA_START_SHARDS]; /* places of the shards that it descended in */
    uint32_t n_starts;
    uint64_t next_start; /* distance << 32 | place: the least that the next one may have */
    cotra_candidates candidates;
    uint64_t *nearest;  /* [width + 1]: upper nodes, while begin() descends */
    uint32_t beam;      /* of the next frontier: wider each time, up to the plan's */
    uint32_t *frontier; /* [width]: the nodes being read */
    uint32_t *places;   /* [width]: of their shards in the space */
    uint32_t frontier_count;
    uint32_t taken;  /* of the frontier, from its beginning: their hits are in */
    cotra_hit *hits; /* [k], sorted by distance, then label */
    uint32_t hit_count;
    cotra_least low, high;
    float limit; /* infinite while there are fewer than plan.low */
    cotra_query_stats stats;
} cotra_walk;

/* For plans whose ranks and READs a round are at most these. */
int cotra_walk_create(cotra_walk *walk, uint32_t max_dim, uint32_t k, uint32_t max_rank, uint32_t max_width,
                      cotra_error *err);
void cotra_walk_destroy(cotra_walk *walk);

/* Starts a query (float32[dim]). */
int cotra_walk_begin(cotra_walk *walk, const cotra_space *space, const cotra_walk_plan *plan, const uint8_t *mask,
                     const cotra_kernels *kernels, const float *query, cotra_error *err);
/* Chooses the next frontier: empty when the walk is done. */
int cotra_walk_choose(cotra_walk *walk, cotra_error *err);
/* The row of frontier node i in its shard, which is at places[i] of the space. */
static inline uint32_t cotra_walk_row(const cotra_walk *walk, uint32_t i)
{
    return cotra_space_row(walk->space, walk->places[i], walk->frontier[i]);
}
/* Takes the record of frontier node i. The bytes may be anybody's and may change meanwhile, unless they are checked:
 * then nobody else can write them, and they were found valid. */
int cotra_walk_expand(cotra_walk *walk, uint32_t i, const uint8_t *record, bool checked, cotra_error *err);
/* Takes what an owner made of it for cotra_walk_push_limit(): the walk then is where the record would have brought it.
 */
int cotra_walk_take(cotra_walk *walk, uint32_t i, const cotra_expansion *found, const uint32_t *numbers,
                    const float *estimates, const float *weights, cotra_error *err);
/* No estimate that is not below it will be of use. Of inner products the limit may rise again. */
static inline float cotra_walk_push_limit(const cotra_walk *walk)
{
    if (walk->sweeping)
        return -INFINITY;
    return walk->view->info.metric == COTRA_METRIC_IP ? INFINITY : walk->limit;
}

#endif
