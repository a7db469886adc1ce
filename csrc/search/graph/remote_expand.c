/* An owner's side of pushed expansions: what a walk would make of a record, made where the record is. */
#include "base/arena.h"
#include "base/status.h"
#include "kernels/own_distance.h"
#include "search/query.h"

#include <math.h>

typedef struct expander {
    const cotra_view *view;
    const uint8_t *records;
    const cotra_kernels *kernels;
    cotra_query query;
    uint32_t *numbers;
    float *estimates, *weights;
    uint64_t n_neighbours;
} expander;

static int expand(expander *self, const cotra_push *push, cotra_expansion *out, cotra_error *err)
{
    const cotra_image_info *info = &self->view->info;
    const uint8_t *record = self->records + (size_t)push->row * info->record_bytes;
    int status = cotra_record_validate(record, info, push->row, err);
    if (status)
        return status;
    const cotra_record_head *head = (const cotra_record_head *)record;
    const uint8_t *vector = record + COTRA_RECORD_HEAD_BYTES;
    const uint32_t *numbers = (const uint32_t *)(record + self->view->record.numbers);
    *out = (cotra_expansion){.label = head->label, .flags = head->flags};
    out->distance = cotra_own_distance(self->kernels, info, self->query.vector, vector, head->norm2);
    if (push->limit == -INFINITY) /* the walk sweeps: it wants no neighbours */
        return COTRA_OK;
    cotra_hop hop;
    cotra_query_hop(&self->query, self->view, head, vector, out->distance, &hop);
    if (info->metric == COTRA_METRIC_IP)
        out->scale = cotra_query_scale(self->view, record, head->count, &hop);
    for (uint32_t begin = 0; begin < head->count; begin += COTRA_BLOCK) {
        float estimates[COTRA_BLOCK], weights[COTRA_BLOCK];
        uint32_t below = cotra_query_estimate(&hop, self->kernels, self->view, record, begin, head->count, push->limit,
                                              estimates, weights);
        for (; below; below &= below - 1) {
            const uint32_t j = (uint32_t)__builtin_ctz(below);
            self->numbers[self->n_neighbours] = numbers[begin + j];
            self->weights[self->n_neighbours] = weights[j];
            self->estimates[self->n_neighbours++] = estimates[j];
            out->count++;
        }
    }
    return COTRA_OK;
}

int cotra_view_expand(const cotra_view *view, const cotra_arena *arena, const float *queries, uint64_t n_queries,
                      const cotra_push *pushes, uint64_t n, cotra_expansion *out, uint32_t *numbers, float *estimates,
                      float *weights, uint64_t *n_neighbours, cotra_error *err)
{
    const cotra_image_info *info = &view->info;
    cotra_arena_info memory;
    cotra_arena_get_info(arena, &memory);
    if (memory.length_bytes < info->image_bytes)
        return cotra_fail(err, COTRA_ERR_ARGUMENT, "expand: an image of %llu bytes in an arena of %llu",
                          (unsigned long long)info->image_bytes, (unsigned long long)memory.length_bytes);
    expander self = {.view = view,
                     .records = cotra_arena_data(arena) + info->records_offset,
                     .kernels = cotra_kernels_get(cotra_simd_best()),
                     .numbers = numbers,
                     .estimates = estimates,
                     .weights = weights};
    uint64_t query = UINT64_MAX;
    int status = cotra_query_create(&self.query, info->dim, err);
    for (uint64_t i = 0; i < n && !status; i++) {
        if (pushes[i].query >= n_queries || pushes[i].row >= info->count) {
            status = cotra_fail(err, COTRA_ERR_ARGUMENT, "expand: row %u of %llu, for query %u of %llu", pushes[i].row,
                                (unsigned long long)info->count, pushes[i].query, (unsigned long long)n_queries);
            break;
        }
        if (pushes[i].query != query) {
            query = pushes[i].query;
            cotra_query_copy(view, queries + query * info->dim, self.query.vector);
            cotra_query_encode(&self.query, self.kernels, view);
        }
        status = expand(&self, &pushes[i], &out[i], err);
    }
    cotra_query_destroy(&self.query);
    *n_neighbours = self.n_neighbours;
    return status;
}
