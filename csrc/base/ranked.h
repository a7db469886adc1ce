/* Floats as integers that sort alike, and the n smallest of many items: a heap whose order is total, so that what it
 * holds in the end does not depend on the order in which items came. */
#ifndef COTRA_BASE_RANKED_H
#define COTRA_BASE_RANKED_H

#include <stdbool.h>
#include <stdint.h>
#include <string.h>

typedef struct cotra_ranked {
    uint64_t major; /* distance as a key << 32 | shard */
    uint64_t minor; /* list, row or label */
    uint32_t extra; /* not part of the order */
} cotra_ranked;

typedef struct cotra_heap {
    cotra_ranked *items; /* [capacity]; the largest first */
    uint32_t count, capacity;
} cotra_heap;

/* value must not be NaN. */
static inline uint32_t cotra_key(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

static inline float cotra_unkey(uint32_t key)
{
    uint32_t bits = key & 0x80000000u ? key & 0x7FFFFFFFu : ~key;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline uint64_t cotra_major(float value, uint32_t shard)
{
    return (uint64_t)cotra_key(value) << 32 | shard;
}

/* For qsort of such words. */
static inline int cotra_by_word(const void *a, const void *b)
{
    const uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return x < y ? -1 : x > y;
}

/* Keeps the least words, sorted; returns the new one's place, or capacity where it is none of them. */
static inline uint32_t cotra_insert_word(uint64_t *words, uint32_t *n, uint32_t capacity, uint64_t word)
{
    if (*n == capacity && word > words[capacity - 1])
        return capacity;
    uint32_t place = *n < capacity ? (*n)++ : capacity - 1;
    for (; place > 0 && words[place - 1] > word; place--)
        words[place] = words[place - 1];
    words[place] = word;
    return place;
}

static inline bool cotra_ranked_less(const cotra_ranked *a, const cotra_ranked *b)
{
    return a->major < b->major || (a->major == b->major && a->minor < b->minor);
}

static inline void cotra_heap_sift(cotra_ranked *items, uint32_t count, uint32_t place, cotra_ranked item)
{
    for (;;) {
        uint32_t child = 2 * place + 1;
        if (child >= count)
            break;
        if (child + 1 < count && cotra_ranked_less(&items[child], &items[child + 1]))
            child++;
        if (!cotra_ranked_less(&item, &items[child]))
            break;
        items[place] = items[child];
        place = child;
    }
    items[place] = item;
}

/* Keeps the item where it is one of the smallest so far. */
static inline void cotra_heap_offer(cotra_heap *heap, cotra_ranked item)
{
    if (heap->count == heap->capacity) {
        if (heap->capacity && cotra_ranked_less(&item, &heap->items[0]))
            cotra_heap_sift(heap->items, heap->count, 0, item);
        return;
    }
    uint32_t place = heap->count++;
    while (place && cotra_ranked_less(&heap->items[(place - 1) / 2], &item)) {
        heap->items[place] = heap->items[(place - 1) / 2];
        place = (place - 1) / 2;
    }
    heap->items[place] = item;
}

/* Sorts the items, smallest first; it is no heap any more. */
static inline void cotra_heap_sort(cotra_heap *heap)
{
    for (uint32_t n = heap->count; n > 1; n--) {
        cotra_ranked last = heap->items[n - 1];
        heap->items[n - 1] = heap->items[0];
        cotra_heap_sift(heap->items, n - 1, 0, last);
    }
}

#endif
