/* The rule by which neighbours are chosen among candidates, for a shard's own lists and for links between shards.
 *
 * Nearest first, a candidate is taken if no neighbour so far is much nearer to it than the node is. That is the rule of
 * hnswlib's own lists, relaxed as in Vamana (Subramanya, Devvrit, Simhadri, Krishnaswamy, Kadekodi, NeurIPS 2019,
 * algorithm 2). Places that are left then go to the nearest of the others.
 */
#ifndef COTRA_BUILD_SELECT_NEIGHBOURS_H
#define COTRA_BUILD_SELECT_NEIGHBOURS_H

#include "base/ranked.h"

/* A neighbour stands in the way where it is nearer by this factor: squared distances, 1 - products. Measured: 1.1
 * to 1.3 does not matter much. */
#define COTRA_RELAXED 1.2f

/* A neighbour that is nearer to the candidate than this stands in its way. */
static inline float cotra_apart_bound(uint64_t candidate)
{
    return cotra_unkey((uint32_t)(candidate >> 32)) / COTRA_RELAXED;
}

/* Adds to the `count` numbers that were chosen before, up to `degree`; returns how many there are then.
 *
 * candidates: [n], distance << 32 | number, sorted; overwritten.
 * is_apart: whether none of the first `count` neighbours stands in a candidate's way.
 */
static inline uint32_t cotra_select_neighbours(uint64_t *candidates, uint32_t n, uint32_t *chosen, uint32_t count,
                                               uint32_t degree,
                                               int (*is_apart)(void *context, uint64_t candidate, uint32_t count),
                                               void *context)
{
    uint32_t n_left = 0;
    for (uint32_t i = 0; i < n && count < degree; i++) {
        if (is_apart(context, candidates[i], count))
            chosen[count++] = (uint32_t)candidates[i];
        else
            candidates[n_left++] = candidates[i];
    }
    for (uint32_t i = 0; i < n_left && count < degree; i++)
        chosen[count++] = (uint32_t)candidates[i];
    return count;
}

#endif
