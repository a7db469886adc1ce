#include "search/view.h"

#include "base/status.h"
#include "base/int_math.h"
#include "format/vector_types.h"
#include "channel/channel.h"

#include <stdlib.h>
#include <string.h>

static int make_room(cotra_view *view, cotra_error *err)
{
    view->nav = aligned_alloc(64, view->info.nav_bytes);
    return view->nav ? COTRA_OK
                     : cotra_fail(err, COTRA_ERR_NO_MEMORY, "view: no memory for %llu bytes of upper layers",
                                  (unsigned long long)view->info.nav_bytes);
}

static int read_all(cotra_view *view, cotra_channel *channel, uint64_t timeout_ns, cotra_error *err)
{
    cotra_image_header header;
    if (channel->region_bytes < COTRA_HEADER_BYTES)
        return cotra_fail(err, COTRA_ERR_FORMAT, "not a graph image: a region of %llu bytes",
                          (unsigned long long)channel->region_bytes);
    int status = cotra_channel_read(channel, 0, sizeof header, &header, timeout_ns, err);
    if (status)
        return status;
    status = cotra_header_validate(&header, channel->region_bytes, &view->info, err);
    if (status)
        return status;
    status = make_room(view, err);
    if (status)
        return status;
    return cotra_channel_read(channel, view->info.nav_offset, view->info.nav_bytes, view->nav, timeout_ns, err);
}

static int copy_all(cotra_view *view, const uint8_t *data, uint64_t length_bytes, cotra_error *err)
{
    cotra_image_header header;
    if (length_bytes < COTRA_HEADER_BYTES)
        return cotra_fail(err, COTRA_ERR_FORMAT, "not the beginning of a graph image: %llu bytes",
                          (unsigned long long)length_bytes);
    memcpy(&header, data, sizeof header);
    int status = cotra_header_validate(&header, UINT64_MAX, &view->info, err);
    if (status)
        return status;
    if (length_bytes - COTRA_HEADER_BYTES != view->info.nav_bytes)
        return cotra_fail(err, COTRA_ERR_FORMAT, "a header tells of %llu bytes of upper layers, %llu follow it",
                          (unsigned long long)view->info.nav_bytes,
                          (unsigned long long)(length_bytes - COTRA_HEADER_BYTES));
    status = make_room(view, err);
    if (status)
        return status;
    memcpy(view->nav, data + COTRA_HEADER_BYTES, view->info.nav_bytes);
    return COTRA_OK;
}

static int measure_vectors(cotra_view *view, cotra_error *err)
{
    float x[COTRA_MAX_DIM];
    view->norms2 = malloc(view->info.upper_count * sizeof *view->norms2);
    if (!view->norms2)
        return cotra_fail(err, COTRA_ERR_NO_MEMORY, "view: no memory for %llu lengths",
                          (unsigned long long)view->info.upper_count);
    for (uint32_t u = 0; u < view->info.upper_count; u++) {
        double norm2 = 0;
        cotra_vector_load(view->info.vector_type, cotra_view_vector(view, u), view->info.dim, x);
        for (uint32_t i = 0; i < view->info.dim; i++)
            norm2 += (double)x[i] * x[i];
        view->norms2[u] = (float)norm2;
    }
    return COTRA_OK;
}

/* Checks what was taken in, and finds its way about it. */
static int settle(cotra_view *view, cotra_error *err)
{
    int status = cotra_nav_validate(view->nav, &view->info, err);
    if (status)
        return status;
    status = cotra_rotation_create(view->info.seed, view->info.dim, &view->rotation, err);
    if (status)
        return status;
    cotra_record_layout_make(&view->info, &view->record);
    const uint32_t n = (uint32_t)view->info.upper_count;
    cotra_nav_layout layout;
    cotra_nav_layout_make(&view->info, 0, &layout);
    view->mean = (const float *)view->nav;
    view->nodes = (const uint32_t *)(view->nav + layout.nodes);
    view->first_row = (const uint32_t *)(view->nav + layout.first_row);
    cotra_nav_layout_make(&view->info, view->first_row[n], &layout);
    view->rows = (const uint32_t *)(view->nav + layout.rows);
    view->vectors = view->nav + layout.vectors;
    view->vector_stride = (uint32_t)cotra_round_up(view->record.vector_bytes, 32);
    while (view->entry < n && view->nodes[view->entry] != view->info.entry_node)
        view->entry++;
    if (n && cotra_is_scaled(&view->info))
        status = measure_vectors(view, err);
    if (status || n == 0 || !cotra_sketch_pays(view->info.vector_type, view->info.dim))
        return status;
    return cotra_sketch_create(&view->sketch, &view->info, view->vectors, view->vector_stride,
                               view->info.metric == COTRA_METRIC_L2 ? view->mean : NULL, err);
}

/* Over a channel, or of bytes where there is none. */
static int make(cotra_channel *channel, uint64_t timeout_ns, const uint8_t *data, uint64_t length_bytes,
                cotra_view **out, cotra_error *err)
{
    *out = NULL;
    cotra_view *view = calloc(1, sizeof *view);
    if (!view)
        return cotra_fail(err, COTRA_ERR_NO_MEMORY, "view: no memory");
    int status = channel ? read_all(view, channel, timeout_ns, err) : copy_all(view, data, length_bytes, err);
    if (status)
        goto failed;
    status = settle(view, err);
    if (status)
        goto failed;
    *out = view;
    return COTRA_OK;
failed:
    cotra_view_close(view);
    return status;
}

int cotra_view_open(cotra_channel *channel, uint64_t timeout_ns, cotra_view **out, cotra_error *err)
{
    return make(channel, timeout_ns, NULL, 0, out, err);
}

int cotra_view_load(const void *data, uint64_t length_bytes, cotra_view **out, cotra_error *err)
{
    return make(NULL, 0, data, length_bytes, out, err);
}

void cotra_view_get_info(const cotra_view *view, cotra_image_info *image, uint64_t *view_bytes)
{
    *image = view->info;
    *view_bytes = sizeof *view + view->info.nav_bytes + (view->norms2 ? 4 * view->info.upper_count : 0) +
                  cotra_sketch_bytes(&view->sketch, view->info.upper_count) +
                  (uint64_t)4 * view->info.code_dim * sizeof(float);
}

void cotra_view_close(cotra_view *view)
{
    if (!view)
        return;
    cotra_rotation_destroy(&view->rotation);
    cotra_sketch_destroy(&view->sketch);
    free(view->norms2);
    free(view->nav);
    free(view);
}
