/* What a walk knows of the nodes that it has heard of: the key of each, and whether it was chosen.
 *
 * Nodes lie in the order in which they were heard of: to add one and to change its key are a few stores, without a
 * branch that a CPU could guess wrong. The least key is looked for block by block; `floors` says where. A key is exact,
 * or the weighted mean of a node's estimates: each of the nodes that link to it has a code of its own for it, so their
 * errors are independent. A node that was chosen keeps its slot, with a key that is never chosen.
 *
 * The table of seen nodes needs no clearing: an entry counts only where the slot that it names holds its node (a sparse
 * set: Briggs and Torczon, ACM Letters on Programming Languages and Systems 2, 1993). No node is ever dropped: all
 * grow.
 */
#ifndef COTRA_SEARCH_GRAPH_CANDIDATES_H
#define COTRA_SEARCH_GRAPH_CANDIDATES_H

#include "kernels/kernels.h"
#include "format/image.h"

#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

enum { COTRA_KEYS_BLOCK = 32 };

#define COTRA_EXACT    1e38f   /* the weight of an exact distance: beside it, no estimate's counts */
#define COTRA_MOST_SUM 1e9f    /* times a weight: a lesser share than its inverse is none, and may be a slow denormal */
#define COTRA_CHOSEN   2e37f   /* the key of a node that was chosen: no estimate moves it below COTRA_OPEN */
#define COTRA_OPEN     1.5e37f /* keys of others are below it */

typedef struct cotra_seen {
    uint32_t number, slot;
} cotra_seen;

typedef struct cotra_candidates {
    cotra_seen *seen; /* open addressing, at most half full */
    uint32_t seen_mask;
    uint32_t count, capacity;
    float *keys;     /* [capacity]; infinite from `count` on */
    float *weights;  /* [capacity]: of the keys */
    uint32_t *nodes; /* [capacity] */
    float *floors;   /* [capacity / COTRA_KEYS_BLOCK, padded]: no key of the block is less */
} cotra_candidates;

int cotra_candidates_create(cotra_candidates *all, cotra_error *err);
void cotra_candidates_destroy(cotra_candidates *all);
static inline void cotra_candidates_clear(cotra_candidates *all)
{
    all->count = 0;
}
/* Makes room for a block of neighbours. */
int cotra_candidates_make_room(cotra_candidates *all, cotra_error *err);

static inline uint32_t cotra_candidates_hash(uint32_t node)
{
    uint32_t i = node * 0x9E3779B1u;
    return i ^ i >> 15;
}

/* The node's entry, or the place where it would be. */
static inline cotra_seen *cotra_candidates_find(const cotra_candidates *all, uint32_t node)
{
    for (uint32_t i = cotra_candidates_hash(node);; i++) {
        cotra_seen *place = &all->seen[i & all->seen_mask];
        if (place->number == node || place->slot >= all->count || all->nodes[place->slot] != place->number)
            return place;
    }
}

static inline void cotra_candidates_prefetch(const cotra_candidates *all, uint32_t node)
{
    __builtin_prefetch(&all->seen[cotra_candidates_hash(node) & all->seen_mask]);
}

/* Whether an entry that find() returned is the node's. */
static inline bool cotra_candidates_has(const cotra_candidates *all, const cotra_seen *place, uint32_t node)
{
    return place->slot < all->count && all->nodes[place->slot] == node;
}

static inline bool cotra_candidates_is_seen(const cotra_candidates *all, uint32_t node)
{
    return cotra_candidates_has(all, cotra_candidates_find(all, node), node);
}

static inline bool cotra_candidates_is_chosen(const cotra_candidates *all, uint32_t node)
{
    const cotra_seen *place = cotra_candidates_find(all, node);
    return cotra_candidates_has(all, place, node) && all->keys[place->slot] >= COTRA_OPEN;
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
    cotra_seen *place = cotra_candidates_find(all, node);
    const bool fresh = !cotra_candidates_has(all, place, node);
    const uint32_t slot = fresh ? all->count : place->slot;
    const float old = cotra_choose(fresh, key, all->keys[slot]);
    const float sum = cotra_choose(fresh, 0, all->weights[slot]) + weight;
    const float most = weight * COTRA_MOST_SUM;
    const float mean = old + (key - old) * (weight / (sum < most ? sum : most));
    float *floor = &all->floors[slot / COTRA_KEYS_BLOCK];
    *place = (cotra_seen){.number = node, .slot = slot};
    all->keys[slot] = mean;
    all->weights[slot] = sum;
    all->nodes[slot] = node;
    *floor = mean < *floor ? mean : *floor;
    all->count += (uint32_t)fresh;
}

/* The node with the least key below the limit, which then is chosen; COTRA_NO_NODE when there is none. */
static inline uint32_t cotra_candidates_choose(cotra_candidates *all, const cotra_kernels *kernels, float limit)
{
    const uint32_t blocks = (all->count + COTRA_KEYS_BLOCK - 1) / COTRA_KEYS_BLOCK;
    const uint32_t padded = (blocks + COTRA_LEAST_STEP - 1) / COTRA_LEAST_STEP * COTRA_LEAST_STEP;
    limit = limit < COTRA_OPEN ? limit : COTRA_OPEN;
    if (blocks == 0)
        return COTRA_NO_NODE;
    for (uint32_t i = blocks; i < padded; i++)
        all->floors[i] = INFINITY;
    for (;;) {
        const uint32_t block = kernels->least(all->floors, padded), first = block * COTRA_KEYS_BLOCK;
        if (!(all->floors[block] < limit))
            return COTRA_NO_NODE;
        const uint32_t slot = first + kernels->least(all->keys + first, COTRA_KEYS_BLOCK);
        if (all->keys[slot] <= all->floors[block]) {
            all->keys[slot] = COTRA_CHOSEN;
            all->weights[slot] = COTRA_EXACT;
            all->floors[block] = all->keys[first + kernels->least(all->keys + first, COTRA_KEYS_BLOCK)];
            return all->nodes[slot];
        }
        all->floors[block] = all->keys[slot]; /* it was an earlier mean */
    }
}

#endif
