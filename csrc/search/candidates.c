#include "search/candidates.h"

#include "base/ranked.h"
#include "base/status.h"

#include <stdlib.h>
#include <string.h>

enum {
    ROOM = 4096,
    SEEN = 512
}; /* sorting out costs more than memory; a table of seen nodes that is too small grows */

static uint32_t capacity_for(uint32_t kept)
{
    const uint32_t open = 2 * kept < ROOM ? ROOM : 2 * kept;
    return (2 + (open + COTRA_BLOCK) / COTRA_KEYS_BLOCK) * COTRA_KEYS_BLOCK;
}

int cotra_candidates_create(cotra_candidates *all, uint32_t kept, cotra_error *err)
{
    memset(all, 0, sizeof *all);
    all->allocated = capacity_for(kept);
    const size_t padded =
        (all->allocated / COTRA_KEYS_BLOCK + COTRA_LEAST_STEP - 1u) / COTRA_LEAST_STEP * COTRA_LEAST_STEP;
    all->seen_mask = SEEN - 1;
    all->seen = calloc(SEEN, sizeof *all->seen);
    all->keys = aligned_alloc(64, all->allocated * sizeof *all->keys);
    all->nodes = malloc(all->allocated * sizeof *all->nodes);
    all->floors = aligned_alloc(64, padded * sizeof *all->floors);
    if (all->seen && all->keys && all->nodes && all->floors)
        return COTRA_OK;
    cotra_candidates_destroy(all);
    return cotra_fail(err, COTRA_ERR_NO_MEMORY, "search: no memory for a walk of %u candidates", kept);
}

void cotra_candidates_destroy(cotra_candidates *all)
{
    free(all->seen);
    free(all->keys);
    free(all->nodes);
    free(all->floors);
    free(all->words);
    memset(all, 0, sizeof *all);
}

void cotra_candidates_clear(cotra_candidates *all, uint32_t kept)
{
    all->capacity = capacity_for(kept); /* when they are sorted out is the walk's own matter, not that of memory */
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

static int sort_out(cotra_candidates *all, uint32_t kept, float limit, cotra_error *err)
{
    if (!all->words && !(all->words = malloc(all->allocated * sizeof *all->words)))
        return cotra_fail(err, COTRA_ERR_NO_MEMORY, "search: no memory for %u candidates", all->allocated);
    uint32_t n = 0;
    for (uint32_t slot = COTRA_KEYS_BLOCK; slot < all->count; slot++) {
        const uint32_t node = all->nodes[slot];
        if (all->keys[slot] < limit)
            all->words[n++] = (uint64_t)cotra_key(all->keys[slot]) << 32 | node;
        else
            cotra_candidates_find(all->seen, all->seen_mask, all->epoch, node)->slot = COTRA_BIN;
    }
    qsort(all->words, n, sizeof *all->words, cotra_by_word);
    all->count = COTRA_KEYS_BLOCK;
    prepare(all, kept < n ? kept : n);
    for (uint32_t i = 0; i < n; i++) {
        const uint32_t node = (uint32_t)all->words[i], slot = i < kept ? all->count++ : COTRA_BIN;
        cotra_candidates_find(all->seen, all->seen_mask, all->epoch, node)->slot = slot;
        if (slot == COTRA_BIN)
            continue;
        float *floor = &all->floors[slot / COTRA_KEYS_BLOCK];
        all->keys[slot] = cotra_unkey((uint32_t)(all->words[i] >> 32));
        all->nodes[slot] = node;
        *floor = all->keys[slot] < *floor ? all->keys[slot] : *floor;
    }
    return COTRA_OK;
}

int cotra_candidates_make_room(cotra_candidates *all, uint32_t kept, float limit, cotra_error *err)
{
    if (all->count + COTRA_BLOCK > all->capacity) {
        int status = sort_out(all, kept, limit, err);
        if (status)
            return status;
    }
    prepare(all, COTRA_BLOCK);
    return (all->seen_count + COTRA_BLOCK) * 2 > all->seen_mask ? grow_seen(all, err) : COTRA_OK;
}
