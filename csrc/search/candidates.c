#include "search/candidates.h"

#include "base/status.h"

#include <stdlib.h>
#include <string.h>

enum { ROOM = 4096, SEEN = 512 }; /* both grow */

static uint32_t padded_floors(uint32_t slots)
{
    return (slots / COTRA_KEYS_BLOCK + COTRA_LEAST_STEP - 1u) / COTRA_LEAST_STEP * COTRA_LEAST_STEP;
}

/* Gives the arrays room for so many slots, of which the first `count` are kept. */
static int allocate(cotra_candidates *all, uint32_t slots, cotra_error *err)
{
    const uint32_t blocks = (all->count + COTRA_KEYS_BLOCK - 1) / COTRA_KEYS_BLOCK;
    float *keys = aligned_alloc(64, slots * sizeof *keys);
    float *floors = aligned_alloc(64, padded_floors(slots) * sizeof *floors);
    uint32_t *nodes = malloc(slots * sizeof *nodes);
    if (!keys || !floors || !nodes) {
        free(keys);
        free(floors);
        free(nodes);
        return cotra_fail(err, COTRA_ERR_NO_MEMORY, "search: no memory for a walk of %u candidates", slots);
    }
    if (all->count) {
        memcpy(keys, all->keys, (size_t)blocks * COTRA_KEYS_BLOCK * sizeof *keys);
        memcpy(floors, all->floors, blocks * sizeof *floors);
        memcpy(nodes, all->nodes, all->count * sizeof *nodes);
    }
    free(all->keys);
    free(all->floors);
    free(all->nodes);
    all->keys = keys;
    all->floors = floors;
    all->nodes = nodes;
    all->allocated = slots;
    return COTRA_OK;
}

int cotra_candidates_create(cotra_candidates *all, cotra_error *err)
{
    memset(all, 0, sizeof *all);
    all->seen_mask = SEEN - 1;
    all->seen = calloc(SEEN, sizeof *all->seen);
    int status = all->seen ? allocate(all, ROOM, err) : cotra_fail(err, COTRA_ERR_NO_MEMORY, "search: no memory");
    if (status)
        cotra_candidates_destroy(all);
    return status;
}

void cotra_candidates_destroy(cotra_candidates *all)
{
    free(all->seen);
    free(all->keys);
    free(all->nodes);
    free(all->floors);
    memset(all, 0, sizeof *all);
}

void cotra_candidates_clear(cotra_candidates *all)
{
    all->capacity = ROOM;
    all->count = COTRA_KEYS_BLOCK;
    all->seen_count = 0;
    cotra_candidates_empty_bin(all);
    if (++all->epoch == 0) { /* once in 2^32 walks */
        memset(all->seen, 0, ((size_t)all->seen_mask + 1) * sizeof *all->seen);
        all->epoch = 1;
    }
}

/* The table begins small, and is kept for the next walk. */
static int grow_seen(cotra_candidates *all, cotra_error *err)
{
    const size_t old = (size_t)all->seen_mask + 1;
    if (old > (size_t)1 << 30)
        return cotra_fail(err, COTRA_ERR_NO_MEMORY, "search: a walk saw more than 2^29 nodes");
    cotra_seen *table = calloc(2 * old, sizeof *table);
    if (!table)
        return cotra_fail(err, COTRA_ERR_NO_MEMORY, "search: no memory for the nodes seen");
    const uint32_t mask = (uint32_t)(2 * old - 1);
    for (size_t i = 0; i < old; i++)
        if (all->seen[i].epoch == all->epoch)
            *cotra_candidates_find(table, mask, all->epoch, all->seen[i].number) = all->seen[i];
    free(all->seen);
    all->seen = table;
    all->seen_mask = mask;
    return COTRA_OK;
}

static void prepare(cotra_candidates *all, uint32_t n)
{
    const uint32_t end = (all->count + n + COTRA_KEYS_BLOCK - 1) / COTRA_KEYS_BLOCK;
    for (uint32_t block = (all->count + COTRA_KEYS_BLOCK - 1) / COTRA_KEYS_BLOCK; block < end; block++) {
        all->floors[block] = INFINITY;
        for (uint32_t i = 0; i < COTRA_KEYS_BLOCK; i++)
            all->keys[block * COTRA_KEYS_BLOCK + i] = INFINITY;
    }
}

/* Leaves the nodes below the limit, in their order. */
static void sort_out(cotra_candidates *all, float limit)
{
    const uint32_t count = all->count;
    uint32_t kept = COTRA_KEYS_BLOCK;
    for (uint32_t slot = COTRA_KEYS_BLOCK; slot < count; slot++) {
        const float key = all->keys[slot];
        const uint32_t node = all->nodes[slot], to = key < limit ? kept++ : COTRA_BIN;
        cotra_candidates_find(all->seen, all->seen_mask, all->epoch, node)->slot = to;
        if (to == COTRA_BIN)
            continue;
        float *floor = &all->floors[to / COTRA_KEYS_BLOCK];
        *floor = to % COTRA_KEYS_BLOCK && *floor < key ? *floor : key;
        all->keys[to] = key;
        all->nodes[to] = node;
    }
    for (uint32_t slot = kept; slot < count; slot++)
        all->keys[slot] = INFINITY;
    all->count = kept;
}

int cotra_candidates_make_room(cotra_candidates *all, float limit, cotra_error *err)
{
    if (all->count + COTRA_BLOCK > all->capacity) {
        sort_out(all, limit);
        if (all->count > all->capacity / 2) {
            if (all->capacity > UINT32_MAX / 4)
                return cotra_fail(err, COTRA_ERR_NO_MEMORY, "search: a walk of more than 2^30 candidates");
            all->capacity *= 2;
        }
        int status = all->capacity > all->allocated ? allocate(all, all->capacity, err) : COTRA_OK;
        if (status)
            return status;
    }
    prepare(all, COTRA_BLOCK);
    return (all->seen_count + COTRA_BLOCK) * 2 > all->seen_mask ? grow_seen(all, err) : COTRA_OK;
}
