#include "search/lists/list_table.h"

#include "base/status.h"
#include "base/int_math.h"
#include "format/vector_types.h"
#include "channel/channel.h"

#include <stdlib.h>
#include <string.h>

static int table_new(const cotra_view *view, uint64_t bytes, cotra_ivf_table **out, cotra_error *err)
{
    *out = NULL;
    if (view->info.ivf_bytes == 0)
        return cotra_fail(err, COTRA_ERR_ARGUMENT, "the shard has no inverted lists: build it with some");
    if (bytes < COTRA_IVF_HEADER_BYTES || bytes > view->info.ivf_bytes)
        return cotra_fail(err, COTRA_ERR_FORMAT, "inverted lists: a table of %llu bytes in a section of %llu",
                          (unsigned long long)bytes, (unsigned long long)view->info.ivf_bytes);
    cotra_ivf_table *table = calloc(1, sizeof *table);
    if (!table)
        return cotra_fail(err, COTRA_ERR_NO_MEMORY, "inverted lists: no memory");
    table->data = aligned_alloc(64, cotra_round_up(bytes, 64));
    if (!table->data) {
        free(table);
        return cotra_fail(err, COTRA_ERR_NO_MEMORY, "inverted lists: no memory for %llu bytes of table",
                          (unsigned long long)bytes);
    }
    *out = table;
    return COTRA_OK;
}

/* Checks the bytes in table->data and makes what follows from them. */
static int table_finish(cotra_ivf_table *table, const cotra_view *view, cotra_error *err)
{
    const cotra_image_info *image = &view->info;
    int status = cotra_ivf_table_validate(table->data, image, &table->info, err);
    if (status)
        return status;
    const uint32_t n = table->info.n_lists;
    cotra_ivf_layout_make(image, n, table->info.bits, table->info.centroid_type, &table->layout);
    table->dim = image->dim;
    table->ivf_checksum = image->ivf_checksum;
    table->centroids = table->data + table->layout.centroids;
    table->sizes = (const uint32_t *)(table->data + table->layout.sizes);
    table->radii = (const float *)(table->data + table->layout.radii);
    table->errors = (const float *)(table->data + table->layout.errors);
    table->checksums = (const uint32_t *)(table->data + table->layout.checksums);
    table->offsets = malloc(n * sizeof *table->offsets);
    table->norms2 = malloc(n * sizeof *table->norms2);
    if (!table->offsets || !table->norms2)
        return cotra_fail(err, COTRA_ERR_NO_MEMORY, "inverted lists: no memory for %u lists", n);
    uint64_t offset = image->ivf_offset + table->info.table_bytes;
    for (uint32_t i = 0; i < n; i++) {
        float centroid[COTRA_MAX_DIM], norm2 = 0;
        cotra_vector_load(table->info.centroid_type, table->centroids + (size_t)i * table->layout.stride, table->dim,
                          centroid);
        for (uint32_t j = 0; j < table->dim; j++)
            norm2 += centroid[j] * centroid[j];
        table->norms2[i] = norm2;
        table->offsets[i] = offset;
        offset += cotra_ivf_blocks(table->sizes[i]) * table->layout.block_bytes;
    }
    return COTRA_OK;
}

int cotra_ivf_table_open(cotra_channel *channel, const cotra_view *view, uint64_t timeout_ns, cotra_ivf_table **out,
                         cotra_error *err)
{
    *out = NULL;
    cotra_ivf_header header;
    const cotra_image_info *image = &view->info;
    int status = COTRA_OK;
    if (image->ivf_bytes) { /* else table_new says so */
        status = cotra_channel_read(channel, image->ivf_offset, sizeof header, &header, timeout_ns, err);
        if (status)
            return status;
        status = cotra_ivf_header_validate(&header, image, err);
        if (status)
            return status;
    }
    cotra_ivf_table *table = NULL;
    status = table_new(view, header.table_bytes, &table, err);
    if (status)
        return status;
    memcpy(table->data, &header, sizeof header);
    status = cotra_channel_read(channel, image->ivf_offset + sizeof header, header.table_bytes - sizeof header,
                                table->data + sizeof header, timeout_ns, err);
    if (status)
        goto failed;
    status = table_finish(table, view, err);
    if (status)
        goto failed;
    *out = table;
    return COTRA_OK;
failed:
    cotra_ivf_table_close(table);
    return status;
}

void cotra_ivf_table_get_info(const cotra_ivf_table *table, cotra_ivf_info *out)
{
    *out = table->info;
}

uint32_t cotra_ivf_table_get_dim(const cotra_ivf_table *table)
{
    return table->dim;
}

void cotra_ivf_table_get_lists(const cotra_ivf_table *table, float *centroids, uint32_t *sizes, float *radii,
                               float *errors, uint64_t *offsets)
{
    const size_t n = table->info.n_lists;
    for (size_t i = 0; centroids && i < n; i++)
        cotra_vector_load(table->info.centroid_type, table->centroids + i * table->layout.stride, table->dim,
                          centroids + i * table->dim);
    if (sizes)
        memcpy(sizes, table->sizes, n * sizeof *sizes);
    if (radii)
        memcpy(radii, table->radii, n * sizeof *radii);
    if (errors)
        memcpy(errors, table->errors, n * sizeof *errors);
    if (offsets)
        memcpy(offsets, table->offsets, n * sizeof *offsets);
}

void cotra_ivf_table_close(cotra_ivf_table *table)
{
    if (!table)
        return;
    free(table->data);
    free(table->offsets);
    free(table->norms2);
    free(table);
}
