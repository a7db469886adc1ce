/* A reader's cache of records: those that its queries read most often, as many as fit a budget of bytes.
 *
 * It is set-associative: node i belongs to bucket i mod n_buckets, whose WAYS places hold any of its nodes. A bucket
 * also counts how often its nodes were asked for, in a count-min sketch (Cormode, Muthukrishnan 2005) that is halved
 * from time to time. A record that was read takes a free place, else that of the bucket's least wanted record, and only
 * where it is wanted more itself: TinyLFU (Einziger, Friedman, Manes, ACM ToS 2017), one for each bucket. So records
 * that are read once, however many, do not displace those that are read again and again.
 *
 * Threads may share a cache, and none waits for another: who finds a bucket busy goes on without it, as if the record
 * was not there. Everything of a bucket, its records included, is touched only by the thread that made it busy.
 *
 * A record is checked after it was copied in. From then on nobody else can write it: it needs no second check.
 */
#ifndef COTRA_SEARCH_RECORD_CACHE_H
#define COTRA_SEARCH_RECORD_CACHE_H

#include "format/image.h"

#include <stdbool.h>

/* Whether the cache holds records of this very image. */
bool cotra_cache_is_of(const cotra_cache *cache, const cotra_image_info *info);
/* Counts that the node is wanted. Copies its record out and returns 1 where it is there. */
int cotra_cache_take(cotra_cache *cache, uint32_t node, uint8_t *record);
/* Offers a record that was read. The bytes may be anybody's and may change meanwhile. */
void cotra_cache_offer(cotra_cache *cache, uint32_t node, const uint8_t *record);
/* The image is known to be stale: nothing is taken or kept from now on. */
void cotra_cache_retire(cotra_cache *cache);

#endif
