#include "search/record_cache.h"

#include "base/status.h"
#include "base/int_math.h"
#include "search/view.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

enum { WAYS = 16, ROWS = 4, COLUMNS = 128 };
enum { SAMPLE = 32 * WAYS }; /* requests of a bucket after which its counts are halved */

typedef struct bucket {
    _Alignas(64) uint32_t nodes[WAYS]; /* of the places; COTRA_NO_NODE: free */
    uint8_t counts[ROWS][COLUMNS];
    uint32_t requests; /* since the counts were halved */
    atomic_flag busy;
} bucket;

struct cotra_cache {
    cotra_image_info image;
    uint64_t bytes; /* of everything */
    uint32_t n_buckets;
    uint32_t ways; /* places of a bucket in use: fewer where the budget holds less than one bucket */
    atomic_int retired;
    bucket *buckets;
    uint8_t *records; /* [n_buckets][ways][record_bytes] */
};

int cotra_cache_create(const cotra_view *view, uint64_t budget_bytes, cotra_cache **out, cotra_error *err)
{
    *out = NULL;
    const cotra_image_info *info = &view->info;
    const uint64_t least = sizeof **out + sizeof(bucket) + info->record_bytes;
    if (budget_bytes < least)
        return cotra_fail(err, COTRA_ERR_ARGUMENT,
                          "a cache of %llu bytes holds no record: it takes %llu at least, of this shard",
                          (unsigned long long)budget_bytes, (unsigned long long)least);
    const uint64_t bucket_bytes = sizeof(bucket) + (uint64_t)WAYS * info->record_bytes;
    uint64_t n_buckets = (budget_bytes - sizeof **out) / bucket_bytes, ways = WAYS;
    if (n_buckets > (info->count + WAYS - 1) / WAYS)
        n_buckets = (info->count + WAYS - 1) / WAYS;
    if (n_buckets == 0) {
        n_buckets = 1;
        ways = (budget_bytes - sizeof **out - sizeof(bucket)) / info->record_bytes;
    }
    cotra_cache *cache = calloc(1, sizeof *cache);
    if (!cache)
        return cotra_fail(err, COTRA_ERR_NO_MEMORY, "cache: no memory");
    cache->image = *info;
    cache->n_buckets = (uint32_t)n_buckets;
    cache->ways = (uint32_t)ways;
    cache->bytes = sizeof *cache + n_buckets * (sizeof(bucket) + ways * info->record_bytes);
    cache->buckets = aligned_alloc(64, n_buckets * sizeof *cache->buckets);
    cache->records = aligned_alloc(64, cotra_round_up((uint64_t)n_buckets * ways * info->record_bytes, 64));
    if (!cache->buckets || !cache->records) {
        cotra_cache_destroy(cache);
        return cotra_fail(err, COTRA_ERR_NO_MEMORY, "cache: no memory for %llu bytes of records",
                          (unsigned long long)(n_buckets * ways * info->record_bytes));
    }
    for (uint64_t i = 0; i < n_buckets; i++)
        atomic_flag_clear(&cache->buckets[i].busy);
    cotra_cache_clear(cache);
    *out = cache;
    return COTRA_OK;
}

bool cotra_cache_is_of(const cotra_cache *cache, const cotra_image_info *info)
{
    return memcmp(&cache->image, info, sizeof *info) == 0;
}

static int enter(bucket *at)
{
    return !atomic_flag_test_and_set_explicit(&at->busy, memory_order_acquire);
}

static void leave(bucket *at)
{
    atomic_flag_clear_explicit(&at->busy, memory_order_release);
}

static uint32_t find(const cotra_cache *cache, const bucket *at, uint32_t node)
{
    uint32_t way = 0;
    while (way < cache->ways && at->nodes[way] != node)
        way++;
    return way;
}

static uint8_t *place(const cotra_cache *cache, const bucket *at, uint32_t way)
{
    return cache->records + ((uint64_t)(at - cache->buckets) * cache->ways + way) * cache->image.record_bytes;
}

/* The node's column in each row, 7 bits each. */
static uint32_t columns_of(uint32_t node)
{
    return (uint32_t)(node * UINT64_C(0x9E3779B97F4A7C15) >> 36);
}

static uint32_t count_of(const bucket *at, uint32_t node)
{
    uint32_t columns = columns_of(node), least = UINT8_MAX;
    for (int row = 0; row < ROWS; row++, columns >>= 7)
        if (at->counts[row][columns % COLUMNS] < least)
            least = at->counts[row][columns % COLUMNS];
    return least;
}

static void count_up(bucket *at, uint32_t node)
{
    uint32_t columns = columns_of(node);
    for (int row = 0; row < ROWS; row++, columns >>= 7)
        at->counts[row][columns % COLUMNS] += at->counts[row][columns % COLUMNS] < UINT8_MAX;
    if (++at->requests < SAMPLE)
        return;
    at->requests = 0;
    for (int row = 0; row < ROWS; row++)
        for (int column = 0; column < COLUMNS; column++)
            at->counts[row][column] >>= 1;
}

int cotra_cache_take(cotra_cache *cache, uint32_t node, uint8_t *record)
{
    bucket *at = &cache->buckets[node % cache->n_buckets];
    if (atomic_load_explicit(&cache->retired, memory_order_relaxed) || !enter(at))
        return 0;
    count_up(at, node);
    const uint32_t way = find(cache, at, node);
    if (way < cache->ways)
        memcpy(record, place(cache, at, way), cache->image.record_bytes);
    leave(at);
    return way < cache->ways;
}

/* The place for a new node: a free one, else that of the least wanted, where the node is wanted more; else `ways`. */
static uint32_t admit(const cotra_cache *cache, const bucket *at, uint32_t node)
{
    uint32_t way = find(cache, at, COTRA_NO_NODE);
    if (way < cache->ways)
        return way;
    uint32_t least = count_of(at, node), victim = cache->ways;
    for (way = 0; way < cache->ways; way++) {
        const uint32_t count = count_of(at, at->nodes[way]);
        if (count < least) {
            least = count;
            victim = way;
        }
    }
    return victim;
}

void cotra_cache_offer(cotra_cache *cache, uint32_t node, const uint8_t *record)
{
    bucket *at = &cache->buckets[node % cache->n_buckets];
    if (atomic_load_explicit(&cache->retired, memory_order_relaxed) || !enter(at))
        return;
    if (find(cache, at, node) == cache->ways) { /* another walk may have been quicker */
        const uint32_t way = admit(cache, at, node);
        if (way < cache->ways) {
            uint8_t *copy = place(cache, at, way);
            memcpy(copy, record, cache->image.record_bytes);
            at->nodes[way] = cotra_record_validate(copy, &cache->image, node, NULL) ? COTRA_NO_NODE : node;
        }
    }
    leave(at);
}

void cotra_cache_put(cotra_cache *cache, uint32_t row, const void *record)
{
    bucket *at = &cache->buckets[row % cache->n_buckets];
    if (row >= cache->image.count || !enter(at))
        return;
    count_up(at, row);
    leave(at);
    cotra_cache_offer(cache, row, record);
}

void cotra_cache_retire(cotra_cache *cache)
{
    atomic_store_explicit(&cache->retired, 1, memory_order_relaxed);
}

void cotra_cache_clear(cotra_cache *cache)
{
    for (uint32_t i = 0; i < cache->n_buckets; i++) {
        bucket *at = &cache->buckets[i];
        while (!enter(at))
            ;
        memset(at->nodes, 0xff, sizeof at->nodes); /* COTRA_NO_NODE */
        memset(at->counts, 0, sizeof at->counts);
        at->requests = 0;
        leave(at);
    }
}

void cotra_cache_get_info(cotra_cache *cache, cotra_cache_info *out)
{
    *out = (cotra_cache_info){.bytes = cache->bytes, .places = (uint64_t)cache->n_buckets * cache->ways};
    for (uint32_t i = 0; i < cache->n_buckets; i++) {
        bucket *at = &cache->buckets[i];
        while (!enter(at))
            ;
        for (uint32_t way = 0; way < cache->ways; way++)
            out->records += at->nodes[way] != COTRA_NO_NODE;
        leave(at);
    }
}

void cotra_cache_destroy(cotra_cache *cache)
{
    if (!cache)
        return;
    free(cache->buckets);
    free(cache->records);
    free(cache);
}
