/* A walk: one query on one shard, as a state machine that never touches a channel.
 *
 *            begin                 frontier read                      nothing left to expand
 *   (free) ---------> choosing --------------------> expanding ------> ... ------------------> done
 *                        ^   frontier of <= beam        |
 *                        +------------------------------+
 *
 * begin() descends the upper layers in the view and fills the pool; choose() takes the nearest unexpanded entries as the next
 * frontier; the engine READs their records, in any order, whenever they come; expand() takes them in the order of the frontier.
 * So the answer depends on the image and the parameters alone.
 *
 * The pool holds the ef nearest nodes seen: one word each, so that it sorts by key, then by number.
 *   bits 63..32  the distance (exact for upper and expanded nodes, else estimated), mapped to an ordered integer
 *   bit  31      set once the node has been chosen for expansion
 *   bits 30..0   the node's number
 */
#ifndef COTRA_SEARCH_WALK_H
#define COTRA_SEARCH_WALK_H

#include "distance/kernels.h"
#include "search/view.h"

typedef struct cotra_hit {
    float distance;
    int64_t label;
} cotra_hit;

typedef struct cotra_walk {
    const cotra_view *view;
    const cotra_kernels *kernels;
    cotra_query_codes codes;
    uint32_t k, ef, beam;
    float *query;        /* [dim padded to 32 floats] */
    float *scratch;      /* [2 * code_dim] */
    uint64_t *pool;      /* [ef + 1] */
    uint32_t pool_count; /* <= ef */
    uint32_t first_open; /* no unexpanded entry is below this place */
    uint64_t *seen;      /* open addressing: epoch << 32 | number; at most half full */
    uint32_t seen_mask, seen_count, epoch;
    uint64_t *frontier; /* [beam]: pool words of the nodes being read */
    uint32_t frontier_count;
    cotra_hit *hits; /* [k], sorted by distance, then label */
    uint32_t hit_count; uint32_t last_change;
    cotra_query_stats stats;
} cotra_walk;

int cotra_walk_create(cotra_walk *walk, uint32_t max_dim, uint32_t k, uint32_t ef, uint32_t beam, cotra_error *err);
void cotra_walk_destroy(cotra_walk *walk);

/* Starts a query (float32[dim]). */
int cotra_walk_begin(cotra_walk *walk, const cotra_view *view, const cotra_kernels *kernels, const float *query,
                     cotra_error *err);
/* Chooses the next frontier; returns its size, 0 when the walk is done. */
uint32_t cotra_walk_choose(cotra_walk *walk);
static inline uint32_t cotra_walk_frontier_node(const cotra_walk *walk, uint32_t i)
{
    return (uint32_t)walk->frontier[i] & INT32_MAX;
}
/* Takes the record of frontier node i. The bytes may be anybody's and may change meanwhile. */
int cotra_walk_expand(cotra_walk *walk, uint32_t i, const uint8_t *record, cotra_error *err);

#endif
