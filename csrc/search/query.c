#include "search/query.h"

#include "base/status.h"
#include "layout/vectors.h"

#include <math.h>
#include <stdlib.h>

static size_t padded_dim(uint32_t dim)
{
    return (dim + 31u) / 32 * 32;
}

static size_t round_up64(size_t bytes)
{
    return (bytes + 63) / 64 * 64;
}

int cotra_query_create(cotra_query *query, uint32_t max_dim, cotra_error *err)
{
    const size_t code_dim = cotra_code_dim(max_dim);
    memset(query, 0, sizeof *query);
    query->codes.table = aligned_alloc(64, round_up64(code_dim * 4));
    query->vector = aligned_alloc(64, round_up64(padded_dim(max_dim) * sizeof(float)));
    query->scratch = aligned_alloc(64, round_up64(2 * code_dim * sizeof(float)));
    if (query->codes.table && query->vector && query->scratch)
        return COTRA_OK;
    cotra_query_destroy(query);
    return cotra_fail(err, COTRA_ERR_NO_MEMORY, "search: no memory for a query");
}

void cotra_query_destroy(cotra_query *query)
{
    free(query->codes.table);
    free(query->vector);
    free(query->scratch);
    memset(query, 0, sizeof *query);
}

void cotra_query_copy(const cotra_view *view, const float *vector, float *to)
{
    const uint32_t dim = view->info.dim;
    memcpy(to, vector, dim * sizeof *vector);
    memset(to + dim, 0, (padded_dim(dim) - dim) * sizeof *vector);
    if (view->info.metric == COTRA_METRIC_COSINE) { /* as hnswlib normalises */
        float norm = 0;
        for (uint32_t i = 0; i < dim; i++)
            norm += vector[i] * vector[i];
        norm = 1.0f / (sqrtf(norm) + 1e-30f);
        for (uint32_t i = 0; i < dim; i++)
            to[i] *= norm;
    }
}

void cotra_query_encode(cotra_query *query, const cotra_view *view)
{
    cotra_query_codes_make(&view->rotation, query->vector, view->mean, query->scratch, &query->codes);
}

float cotra_query_norm2(cotra_query *query, const cotra_kernels *kernels, const cotra_image_info *info,
                        const uint8_t *vector)
{
    const uint32_t dim = info->dim;
    cotra_vector_load(info->vector_type, vector, dim, query->scratch);
    memset(query->scratch + dim, 0, (padded_dim(dim) - dim) * sizeof *query->scratch);
    return kernels->dot[COTRA_VECTOR_F32](query->scratch, query->scratch, dim);
}
