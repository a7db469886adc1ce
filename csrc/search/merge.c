#include "cotra.h"

#include "base/status.h"

#include <math.h>
#include <stdlib.h>

int cotra_merge(const int64_t *shard_labels, const float *shard_distances, uint32_t n_shards, uint64_t n_queries,
                uint32_t k, int64_t *labels, float *distances, int32_t *shards, cotra_error *err)
{
    uint32_t *next = malloc((n_shards ? n_shards : 1) * sizeof *next); /* the first unused answer of each shard */
    if (!next)
        return cotra_fail(err, COTRA_ERR_NO_MEMORY, "merge: no memory for %u shards", n_shards);
    for (uint64_t q = 0; q < n_queries; q++) {
        int64_t *row_labels = labels + q * k;
        float *row_distances = distances + q * k;
        int32_t *row_shards = shards + q * k;
        uint32_t n = 0;
        for (uint32_t s = 0; s < n_shards; s++)
            next[s] = 0;
        while (n < k) {
            /* Shards are tried in order and only a smaller distance wins, so a tie goes to the lower shard; within a
             * shard the order is already by distance, then label. */
            uint32_t best = n_shards;
            size_t best_at = 0;
            for (uint32_t s = 0; s < n_shards; s++) {
                size_t at = ((size_t)s * n_queries + q) * k + next[s];
                if (next[s] == k || shard_labels[at] < 0)
                    continue;
                if (best == n_shards || shard_distances[at] < shard_distances[best_at]) {
                    best = s;
                    best_at = at;
                }
            }
            if (best == n_shards)
                break;
            next[best]++;
            uint32_t i = n_shards > 1 ? 0 : n; /* one shard has no label twice */
            while (i < n && row_labels[i] != shard_labels[best_at])
                i++;
            if (i < n)
                continue;
            row_labels[n] = shard_labels[best_at];
            row_distances[n] = shard_distances[best_at];
            row_shards[n] = (int32_t)best;
            n++;
        }
        for (; n < k; n++) {
            row_labels[n] = -1;
            row_distances[n] = INFINITY;
            row_shards[n] = -1;
        }
    }
    free(next);
    return COTRA_OK;
}
