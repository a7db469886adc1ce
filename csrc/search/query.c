#include "search/query.h"

#include "base/status.h"
#include "base/int_math.h"
#include "format/vector_types.h"

#include <math.h>
#include <stdbool.h>
#include <stdlib.h>

#define CODE_COSINE   0.8f  /* of a residual and its code: sqrt(2 / pi) */
#define CODE_VARIANCE 0.36f /* 1 - CODE_COSINE^2 */
#define FACTOR_ERROR  1e-3f /* of a bfloat16, relative: up to 2^-9, evenly */

int cotra_query_create(cotra_query *query, uint32_t max_dim, cotra_error *err)
{
    const size_t code_dim = cotra_code_dim(max_dim);
    memset(query, 0, sizeof *query);
    query->codes.table = aligned_alloc(64, cotra_round_up(code_dim * 4, 64));
    query->near.table = aligned_alloc(64, cotra_round_up(code_dim * 4, 64));
    query->sketch.values = aligned_alloc(64, cotra_sketch_stride(max_dim) * sizeof *query->sketch.values);
    query->own = aligned_alloc(64, cotra_round_up(cotra_padded_dim(max_dim) * sizeof(float), 64));
    query->vector = aligned_alloc(64, cotra_round_up(cotra_padded_dim(max_dim) * sizeof(float), 64));
    query->scratch = aligned_alloc(64, cotra_round_up(2 * code_dim * sizeof(float), 64));
    if (query->codes.table && query->near.table && query->sketch.values && query->vector && query->own &&
        query->scratch)
        return COTRA_OK;
    cotra_query_destroy(query);
    return cotra_fail(err, COTRA_ERR_NO_MEMORY, "search: no memory for a query");
}

void cotra_query_destroy(cotra_query *query)
{
    free(query->codes.table);
    free(query->near.table);
    free(query->sketch.values);
    free(query->own);
    free(query->vector);
    free(query->scratch);
    memset(query, 0, sizeof *query);
}

void cotra_query_copy(const cotra_view *view, const float *vector, float *to)
{
    const uint32_t dim = view->info.dim;
    memcpy(to, vector, dim * sizeof *vector);
    memset(to + dim, 0, (cotra_padded_dim(dim) - dim) * sizeof *vector);
    if (view->info.metric == COTRA_METRIC_COSINE) { /* as hnswlib normalises */
        float norm = 0;
        for (uint32_t i = 0; i < dim; i++)
            norm += vector[i] * vector[i];
        norm = 1.0f / (sqrtf(norm) + 1e-30f);
        for (uint32_t i = 0; i < dim; i++)
            to[i] *= norm;
    }
}

void cotra_query_encode(cotra_query *query, const cotra_kernels *kernels, const cotra_view *view)
{
    const int l2 = view->info.metric == COTRA_METRIC_L2;
    query->norm2 = l2 ? 0 : kernels->dot[COTRA_VECTOR_F32](query->vector, query->vector, view->info.dim);
    cotra_query_codes_make(&view->rotation, query->vector, l2 ? view->mean : NULL, query->scratch, &query->codes);
    if (view->sketch.values)
        cotra_query_sketch_make(query->vector, l2 ? view->mean : NULL, view->info.dim, &query->sketch);
}

/* Makes the table of u = q - t c, and returns |u|^2. */
static float encode_near(cotra_query *query, const cotra_view *view, const uint8_t *own, float t)
{
    const uint32_t dim = view->info.dim;
    float gap2 = 0;
    cotra_own_load(&view->info, own, query->own);
    for (uint32_t i = 0; i < dim; i++) {
        query->own[i] *= t;
        gap2 += (query->vector[i] - query->own[i]) * (query->vector[i] - query->own[i]);
    }
    cotra_query_codes_make(&view->rotation, query->vector, query->own, query->scratch, &query->near);
    return gap2;
}

void cotra_query_hop(cotra_query *query, const cotra_view *view, const cotra_record_head *head, const uint8_t *own,
                     float distance, cotra_hop *hop)
{
    float t = 1, gap2 = distance;
    if (view->info.metric != COTRA_METRIC_L2) {
        const float product = 1 - distance;
        const float norm2 = view->info.metric == COTRA_METRIC_COSINE ? 1 : head->norm2;
        t = norm2 > 0 ? product / norm2 : 0;
        gap2 = query->norm2 - t * product;
    }
    const bool centred = (head->flags & COTRA_NODE_CENTRED) != 0;
    if (centred)
        gap2 = encode_near(query, view, own, t);
    gap2 = gap2 > 0 ? gap2 : 0;
    const cotra_query_codes *codes = centred ? &query->near : &query->codes;
    *hop = (cotra_hop){.codes = codes,
                       .distance = distance,
                       .t = t,
                       .gap2 = gap2,
                       .spread = sqrtf(CODE_VARIANCE * gap2 + codes->rounding2),
                       .rounding = fabsf(t) * FACTOR_ERROR};
}

float cotra_query_scale(const cotra_view *view, const uint8_t *record, uint32_t count, const cotra_hop *hop)
{
    float sum = 0, f1[COTRA_BLOCK];
    for (uint32_t begin = 0; begin < count; begin += COTRA_BLOCK) {
        const uint32_t n = count - begin < COTRA_BLOCK ? count - begin : COTRA_BLOCK;
        cotra_load_factors(record + view->record.f1 + 2 * begin, f1);
        for (uint32_t j = 0; j < n; j++)
            sum += f1[j];
    }
    /* f1 = |x - c| / (a sqrt(D)) */
    const float length = count ? CODE_COSINE * sqrtf((float)view->info.code_dim) * sum / (float)count : 0;
    const float scale = sqrtf(hop->gap2) * length / 2;
    return scale < INFINITY ? scale : 0; /* nor is NaN */
}
