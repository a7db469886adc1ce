#include "search/graph/candidates.h"

#include "base/status.h"

#include <stdlib.h>
#include <string.h>

enum { ROOM = 1024, SEEN = 1024 }; /* both grow, and are kept for the next walk */

static uint32_t padded_floors(uint32_t slots)
{
    return (slots / COTRA_KEYS_BLOCK + COTRA_LEAST_STEP - 1u) / COTRA_LEAST_STEP * COTRA_LEAST_STEP;
}

static void *grow(void *old, size_t kept_bytes, size_t bytes)
{
    void *bigger = aligned_alloc(64, bytes);
    if (bigger && kept_bytes)
        memcpy(bigger, old, kept_bytes);
    if (bigger)
        free(old);
    return bigger;
}

/* Each array by itself: one that grew although the next could not is no harm. */
static int grow_slots(cotra_candidates *all, uint32_t slots, cotra_error *err)
{
    const size_t kept = all->capacity * sizeof(float), bytes = slots * sizeof(float);
    float *keys = grow(all->keys, kept, bytes);
    all->keys = keys ? keys : all->keys;
    float *weights = keys ? grow(all->weights, kept, bytes) : NULL;
    all->weights = weights ? weights : all->weights;
    uint32_t *nodes = weights ? grow(all->nodes, kept, bytes) : NULL;
    all->nodes = nodes ? nodes : all->nodes;
    float *floors =
        nodes ? grow(all->floors, padded_floors(all->capacity) * sizeof(float), padded_floors(slots) * sizeof(float))
              : NULL;
    all->floors = floors ? floors : all->floors;
    if (!floors)
        return cotra_fail(err, COTRA_ERR_NO_MEMORY, "search: no memory for a walk of %u candidates", slots);
    all->capacity = slots;
    return COTRA_OK;
}

static int grow_seen(cotra_candidates *all, uint32_t places, cotra_error *err)
{
    cotra_seen *table = calloc(places, sizeof *table);
    if (!table)
        return cotra_fail(err, COTRA_ERR_NO_MEMORY, "search: no memory for the nodes seen");
    for (uint32_t i = 0; i < places; i++)
        table[i].slot = UINT32_MAX;
    free(all->seen);
    all->seen = table;
    all->seen_mask = places - 1;
    for (uint32_t slot = 0; slot < all->count; slot++)
        *cotra_candidates_find(all, all->nodes[slot]) = (cotra_seen){.number = all->nodes[slot], .slot = slot};
    return COTRA_OK;
}

int cotra_candidates_create(cotra_candidates *all, cotra_error *err)
{
    memset(all, 0, sizeof *all);
    int status = grow_slots(all, ROOM, err);
    if (status)
        goto failed;
    status = grow_seen(all, SEEN, err);
    if (status)
        goto failed;
    return COTRA_OK;
failed:
    cotra_candidates_destroy(all);
    return status;
}

void cotra_candidates_destroy(cotra_candidates *all)
{
    free(all->seen);
    free(all->keys);
    free(all->weights);
    free(all->nodes);
    free(all->floors);
    memset(all, 0, sizeof *all);
}

/* What comes behind the last node: nothing, yet. */
static void prepare(cotra_candidates *all)
{
    const uint32_t end = (all->count + COTRA_BLOCK + COTRA_KEYS_BLOCK - 1) / COTRA_KEYS_BLOCK;
    for (uint32_t block = (all->count + COTRA_KEYS_BLOCK - 1) / COTRA_KEYS_BLOCK; block < end; block++) {
        all->floors[block] = INFINITY;
        for (uint32_t i = 0; i < COTRA_KEYS_BLOCK; i++)
            all->keys[block * COTRA_KEYS_BLOCK + i] = INFINITY;
    }
}

int cotra_candidates_make_room(cotra_candidates *all, cotra_error *err)
{
    const uint32_t wanted = all->count + COTRA_BLOCK;
    if (wanted > (uint32_t)1 << 30)
        return cotra_fail(err, COTRA_ERR_NO_MEMORY, "search: a walk of more than 2^30 candidates");
    if (wanted > all->capacity) {
        int status = grow_slots(all, 2 * all->capacity, err);
        if (status)
            return status;
    }
    if (wanted > all->seen_mask / 2) {
        int status = grow_seen(all, 2 * (all->seen_mask + 1), err);
        if (status)
            return status;
    }
    prepare(all);
    return COTRA_OK;
}
