/* What a walk knows of the nodes that it has heard of: which it has seen, and the keys of those that are open.
 *
 * Open nodes are in no order: to add one and to change its key are a few stores, without a branch that a CPU could
 * guess wrong. The least key is looked for block by block; `floors` says where. A key is exact, or the mean of a node's
 * estimates: each of the nodes that link to it has a code of its own for it, so their errors are independent.
 *
 * Slot 0 is a bin: estimates of nodes that are not open any more are written there.
 */
#ifndef COTRA_SEARCH_CANDIDATES_H
#define COTRA_SEARCH_CANDIDATES_H

#include "distance/kernels.h"
#include "layout/image.h"

#include <math.h>
#include <stdint.h>

enum { COTRA_BIN = 0, COTRA_KEYS_BLOCK = 64, COTRA_EXACT = 16 };

typedef struct cotra_seen {
    uint32_t epoch; /* of the walk that wrote it: a new walk needs no clearing */
    uint32_t number;
    uint32_t slot;      /* COTRA_BIN once it is not open any more */
    uint32_t estimates; /* that its key is the mean of, below COTRA_EXACT: that one is not to be changed */
} cotra_seen;

typedef struct cotra_candidates {
    cotra_seen *seen; /* open addressing, at most half full */
    uint32_t seen_mask, seen_count, epoch;
    float *keys;              /* [allocated]; infinite where nothing is open */
    uint32_t *nodes;          /* [allocated] */
    float *floors;            /* [allocated / COTRA_KEYS_BLOCK, padded]: no key of the block is less */
    uint64_t *words;          /* for sorting out; made when it is needed */
    uint32_t count, capacity; /* of this walk */
    uint32_t allocated;       /* for any walk */
} cotra_candidates;

/* For walks that keep at most `kept` open nodes, and as many more (4,096 at least) before they are sorted out. */
int cotra_candidates_create(cotra_candidates *all, uint32_t kept, cotra_error *err);
void cotra_candidates_destroy(cotra_candidates *all);
void cotra_candidates_clear(cotra_candidates *all, uint32_t kept);
/* Makes room for a block of neighbours. Where there is none left, keeps the `kept` least of the keys below the limit.
 */
int cotra_candidates_make_room(cotra_candidates *all, uint32_t kept, float limit, cotra_error *err);

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

/* Takes an exact distance (estimates COTRA_EXACT) or an estimate (0) of a node, for which there must be room. */
static inline void cotra_candidates_take(cotra_candidates *all, uint32_t node, float key, uint32_t estimates)
{
    static const float share[COTRA_EXACT + 1] = {0,         1,         1.0f / 2,  1.0f / 3,  1.0f / 4,  1.0f / 5,
                                                 1.0f / 6,  1.0f / 7,  1.0f / 8,  1.0f / 9,  1.0f / 10, 1.0f / 11,
                                                 1.0f / 12, 1.0f / 13, 1.0f / 14, 1.0f / 15, 0};
    cotra_seen *place = cotra_candidates_find(all->seen, all->seen_mask, all->epoch, node);
    const int fresh = place->epoch != all->epoch;
    const uint32_t slot = fresh ? all->count : place->slot;
    const float old = fresh ? key : all->keys[slot];
    uint32_t n = fresh ? estimates : place->estimates;
    n += n < COTRA_EXACT - 1;
    const float mean = old + (key - old) * share[n];
    float *floor = &all->floors[slot / COTRA_KEYS_BLOCK];
    *place = (cotra_seen){.epoch = all->epoch, .number = node, .slot = slot, .estimates = n};
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
