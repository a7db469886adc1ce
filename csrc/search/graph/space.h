/* What a walk is over: one shard, or those of one graph over all shards that are at hand. Nodes have their numbers in
 * that graph; a shard's own nodes follow each other there, from its base on. */
#ifndef COTRA_SEARCH_GRAPH_SPACE_H
#define COTRA_SEARCH_GRAPH_SPACE_H

#include "search/view.h"

#include <stdbool.h>

typedef struct cotra_space {
    const cotra_view **views; /* [n], by their bases */
    uint32_t *shards;         /* [n]: the engine's number of each */
    uint32_t *bases;          /* [n] */
    float *centroids;         /* [n][padded_dim], of their upper nodes; not for one shard */
    uint64_t count;           /* of the graph's nodes */
    uint8_t *lost;            /* [n]: shards that are not at hand any more */
    uint32_t n, n_lost, padded_dim;
    int whole; /* all of the graph's nodes were at hand */
} cotra_space;

/* Whether views are of one graph, and not each a graph of its own. */
bool cotra_space_is_one(cotra_view *const *views, uint32_t n);
/* Of views [first, first + n). COTRA_ERR_FORMAT for several that are not of one graph, or overlap. */
int cotra_space_create(cotra_space *space, cotra_view *const *views, uint32_t first, uint32_t n, cotra_error *err);
void cotra_space_destroy(cotra_space *space);

/* From now on the shard at a place is walked around. */
void cotra_space_lose(cotra_space *space, uint32_t place);

static inline bool cotra_space_is_lost(const cotra_space *space, uint32_t place)
{
    return space->n_lost && space->lost[place];
}

/* The place of the shard whose node it is, if it is any of theirs. */
static inline uint32_t cotra_space_find(const cotra_space *space, uint32_t node)
{
    uint32_t place = 0;
    for (uint32_t n = space->n; n > 1;) {
        const uint32_t half = n / 2;
        place += space->bases[place + half] <= node ? half : 0;
        n -= half;
    }
    return place;
}

/* The row of a node in the shard at a place; not below its count for a node that is not its own. */
static inline uint32_t cotra_space_row(const cotra_space *space, uint32_t place, uint32_t node)
{
    return node - space->bases[place];
}

#endif
