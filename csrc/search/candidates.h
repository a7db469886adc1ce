/* What a walk knows of the nodes that it has heard of: which it has seen, and the keys of those that are open.
 *
 * Open nodes are in no order: to add one and to change its key are a few stores, without a branch that a CPU could
 * guess wrong. The least key is looked for block by block; `floors` says where. A key is exact, or the weighted mean of
 * a node's estimates: each of the nodes that link to it has a code of its own for it, so their errors are independent.
 *
 * No open node below the limit is ever dropped: the arrays grow.
 *
 * Slot 0 is a bin: estimates of nodes that are not open any more are written there.
 */
#ifndef COTRA_SEARCH_CANDIDATES_H
#define COTRA_SEARCH_CANDIDATES_H

#include "distance/kernels.h"
#include "layout/image.h"

#include <math.h>
#include <stdint.h>
#include <string.h>

enum { COTRA_BIN = 0, COTRA_KEYS_BLOCK = 32 };

#define COTRA_EXACT 1e38f /* the weight of an exact distance: beside it, no estimate's counts */

typedef struct cotra_seen {
    uint32_t epoch; /* of the walk that wrote it: a new walk needs no clearing */
    uint32_t number;
    uint32_t slot; /* COTRA_BIN once it is not open any more */
    float weight;  /* of its key */
} cotra_seen;

typedef struct cotra_candidates {
    cotra_seen *seen; /* open addressing, at most half full */
    uint32_t seen_mask, seen_count, epoch;
    float *keys;              /* [allocated]; infinite where nothing is open */
    uint32_t *nodes;          /* [allocated] */
    float *floors;            /* [allocated / COTRA_KEYS_BLOCK, padded]: no key of the block is less */
    uint32_t count, capacity; /* of this walk: what is done with its nodes does not depend on walks before it */
    uint32_t allocated;
} cotra_candidates;

int cotra_candidates_create(cotra_candidates *all, cotra_error *err);
void cotra_candidates_destroy(cotra_candidates *all);
void cotra_candidates_clear(cotra_candidates *all);
/* Makes room for a block of neighbours. Where there is none left, nodes that are not below the limit go; where most are
 * below it, the arrays grow. */
int cotra_candidates_make_room(cotra_candidates *all, float limit, cotra_error *err);

static inline uint32_t cotra_candidates_hash(uint32_t node)
{
    uint32_t i = node * 0x9E3779B1u;
    return i ^ i >> 15;
}

static inline cotra_seen *cotra_candidates_find(cotra_seen *table, uint32_t mask, uint32_t epoch, uint32_t node)
{
    for (uint32_t i = cotra_candidates_hash(node);; i++) {
        cotra_seen *place = &table[i & mask];
        if (place->epoch != epoch || place->number == node)
            return place;
    }
}

static inline void cotra_candidates_prefetch(const cotra_candidates *all, uint32_t node)
{
    __builtin_prefetch(&all->seen[cotra_candidates_hash(node) & all->seen_mask]);
}

/* Whether a node was chosen, or dropped; of one that was never seen, 0. */
static inline int cotra_candidates_is_closed(const cotra_candidates *all, uint32_t node)
{
    const cotra_seen *place = cotra_candidates_find(all->seen, all->seen_mask, all->epoch, node);
    return place->epoch == all->epoch && place->slot == COTRA_BIN;
}

/* yes ? a : b, without a branch: a compiler makes a jump of it where it can, and a CPU guesses half of them wrong. */
static inline float cotra_choose(int yes, float a, float b)
{
    uint32_t x, y;
    memcpy(&x, &a, sizeof x);
    memcpy(&y, &b, sizeof y);
    x = (x & (uint32_t)-yes) | (y & ((uint32_t)yes - 1));
    memcpy(&a, &x, sizeof a);
    return a;
}

/* Takes an exact distance (weight COTRA_EXACT) or an estimate of a node, for which there must be room. */
static inline void cotra_candidates_take(cotra_candidates *all, uint32_t node, float key, float weight)
{
    cotra_seen *place = cotra_candidates_find(all->seen, all->seen_mask, all->epoch, node);
    const int fresh = place->epoch != all->epoch;
    const uint32_t slot = fresh ? all->count : place->slot;
    const float old = cotra_choose(fresh, key, all->keys[slot]);
    const float sum = cotra_choose(fresh, 0, place->weight) + weight;
    const float mean = old + (key - old) * (weight / sum);
    float *floor = &all->floors[slot / COTRA_KEYS_BLOCK];
    *place = (cotra_seen){.epoch = all->epoch, .number = node, .slot = slot, .weight = sum};
    all->keys[slot] = mean;
    all->nodes[slot] = node;
    *floor = mean < *floor ? mean : *floor;
    all->count += (uint32_t)fresh;
    all->seen_count += (uint32_t)fresh;
}

/* After nodes were taken in: what went into the bin is nothing. */
static inline void cotra_candidates_empty_bin(cotra_candidates *all)
{
    all->keys[COTRA_BIN] = 0;
    all->floors[COTRA_BIN] = INFINITY;
}

/* The node with the least key below the limit, which is then not open any more; COTRA_NO_NODE when there is none. */
static inline uint32_t cotra_candidates_choose(cotra_candidates *all, const cotra_kernels *kernels, float limit)
{
    const uint32_t blocks = (all->count + COTRA_KEYS_BLOCK - 1) / COTRA_KEYS_BLOCK;
    const uint32_t padded = (blocks + COTRA_LEAST_STEP - 1) / COTRA_LEAST_STEP * COTRA_LEAST_STEP;
    for (uint32_t i = blocks; i < padded; i++)
        all->floors[i] = INFINITY;
    for (;;) {
        const uint32_t block = kernels->least(all->floors, padded), first = block * COTRA_KEYS_BLOCK;
        if (!(all->floors[block] < limit))
            return COTRA_NO_NODE;
        const uint32_t slot = first + kernels->least(all->keys + first, COTRA_KEYS_BLOCK);
        const float key = all->keys[slot];
        if (key <= all->floors[block]) {
            const uint32_t node = all->nodes[slot];
            all->keys[slot] = INFINITY;
            cotra_candidates_find(all->seen, all->seen_mask, all->epoch, node)->slot = COTRA_BIN;
            return node;
        }
        all->floors[block] = key; /* it was of a node that was chosen, or an earlier mean */
    }
}

#endif
