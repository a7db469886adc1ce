#include "search/graph/space.h"

#include "base/status.h"
#include "base/int_math.h"
#include "format/vector_types.h"

#include <stdlib.h>
#include <string.h>

bool cotra_space_is_one(cotra_view *const *views, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++)
        if (views[i]->info.graph_id == 0 || views[i]->info.graph_id != views[0]->info.graph_id)
            return 0;
    return n > 1;
}

/* What one query code and one record layout for all of them take. */
static int check_alike(const cotra_view *a, const cotra_view *b, uint32_t first, uint32_t second, cotra_error *err)
{
    const cotra_image_info *x = &a->info, *y = &b->info;
    const char *what = NULL;
    if (x->graph_count != y->graph_count)
        what = "size of the graph";
    else if (x->seed != y->seed || x->code_dim != y->code_dim)
        what = "rotation";
    else if (x->vector_type != y->vector_type || x->record_bytes != y->record_bytes || x->degree != y->degree)
        what = "records' layout";
    else if (memcmp(a->mean, b->mean, x->dim * sizeof *a->mean) != 0)
        what = "mean vector";
    if (!what)
        return COTRA_OK;
    return cotra_fail(err, COTRA_ERR_FORMAT, "shards %u and %u say that they are of one graph, but differ in their %s",
                      first, second, what);
}

/* Upper nodes are a random sample of a shard's. */
static void find_centroid(const cotra_view *view, float *scratch, float *centroid)
{
    const uint32_t dim = view->info.dim, n = (uint32_t)view->info.upper_count;
    if (n == 0)
        memcpy(centroid, view->mean, dim * sizeof *centroid);
    for (uint32_t u = 0; u < n; u++) {
        cotra_own_load(&view->info, cotra_view_vector(view, u), scratch);
        for (uint32_t i = 0; i < dim; i++)
            centroid[i] += scratch[i] / (float)n;
    }
}

int cotra_space_create(cotra_space *space, cotra_view *const *views, uint32_t first, uint32_t n, cotra_error *err)
{
    const cotra_image_info *info = &views[first]->info;
    *space = (cotra_space){.n = n, .padded_dim = cotra_padded_dim(info->dim), .count = info->graph_count};
    space->views = malloc(n * sizeof *space->views);
    space->shards = malloc(n * sizeof *space->shards);
    space->bases = malloc(n * sizeof *space->bases);
    space->centroids = aligned_alloc(64, ((size_t)n + 1) * space->padded_dim * sizeof *space->centroids);
    space->lost = calloc(n, sizeof *space->lost);
    if (!space->views || !space->shards || !space->bases || !space->centroids || !space->lost) {
        cotra_space_destroy(space);
        return cotra_fail(err, COTRA_ERR_NO_MEMORY, "engine: no memory for %u shards", n);
    }
    for (uint32_t i = 0; i < n; i++) {
        const cotra_view *view = views[first + i];
        uint32_t place = i;
        for (; place > 0 && space->bases[place - 1] > view->info.graph_base; place--) {
            space->views[place] = space->views[place - 1];
            space->shards[place] = space->shards[place - 1];
            space->bases[place] = space->bases[place - 1];
        }
        space->views[place] = view;
        space->shards[place] = first + i;
        space->bases[place] = (uint32_t)view->info.graph_base;
    }
    uint64_t nodes = 0;
    int status = COTRA_OK;
    memset(space->centroids, 0, ((size_t)n + 1) * space->padded_dim * sizeof *space->centroids);
    for (uint32_t i = 0; i < n; i++) {
        nodes += space->views[i]->info.count;
        if (i == 0)
            continue;
        status = check_alike(space->views[0], space->views[i], space->shards[0], space->shards[i], err);
        if (status)
            goto failed;
        if (space->bases[i] - space->bases[i - 1] < space->views[i - 1]->info.count) {
            status = cotra_fail(err, COTRA_ERR_FORMAT, "shards %u and %u hold the same nodes of one graph",
                                space->shards[i - 1], space->shards[i]);
            goto failed;
        }
    }
    float *scratch = space->centroids + (size_t)n * space->padded_dim;
    for (uint32_t i = 0; i < n && n > 1; i++)
        find_centroid(space->views[i], scratch, space->centroids + (size_t)i * space->padded_dim);
    space->whole = nodes == space->count;
    return COTRA_OK;
failed:
    cotra_space_destroy(space);
    return status;
}

void cotra_space_lose(cotra_space *space, uint32_t place)
{
    space->n_lost += !space->lost[place];
    space->lost[place] = 1;
}

void cotra_space_destroy(cotra_space *space)
{
    free(space->views);
    free(space->shards);
    free(space->bases);
    free(space->centroids);
    free(space->lost);
    memset(space, 0, sizeof *space);
}
