/* The arithmetic of the inverted lists' section and its validator. */
#include "format/lists.h"

#include "base/checksum.h"
#include "base/int_math.h"
#include "base/status.h"
#include "format/vector_types.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { SEED_HEADER = 3, SEED_TABLE = 4 };

void cotra_ivf_layout_make(const cotra_image_info *info, uint32_t n_lists, uint32_t bits, uint32_t centroid_type,
                           cotra_ivf_layout *out)
{
    const uint64_t column = cotra_round_up(4 * (uint64_t)n_lists, 64);
    out->stride = (uint32_t)cotra_round_up(cotra_vector_bytes(centroid_type, info->dim), 32);
    out->centroids = COTRA_IVF_HEADER_BYTES;
    out->sizes = out->centroids + cotra_round_up((uint64_t)n_lists * out->stride, 64);
    out->radii = out->sizes + column;
    out->errors = out->radii + column;
    out->checksums = out->errors + column;
    out->table_bytes = out->checksums + column;
    out->plane_bytes = info->code_dim * 4;
    out->f0 = bits * out->plane_bytes;
    out->f1 = out->f0 + 4 * COTRA_BLOCK;
    out->rows = out->f1 + 4 * COTRA_BLOCK;
    out->sums = out->rows + 4 * COTRA_BLOCK;
    out->block_bytes = out->sums + 4 * COTRA_BLOCK;
}

uint32_t cotra_prefix_bytes(const cotra_image_info *info)
{
    return COTRA_RECORD_HEAD_BYTES + (uint32_t)cotra_round_up(cotra_vector_bytes(info->vector_type, info->dim), 32);
}

uint32_t cotra_prefix_checksum(const uint8_t *record, uint32_t prefix_bytes, uint32_t node)
{
    return cotra_record_checksum(record, prefix_bytes, node);
}

uint32_t cotra_ivf_block_checksum(const uint8_t *block, uint32_t block_bytes, uint64_t number)
{
    return cotra_checksum(block, block_bytes, (uint32_t)number);
}

uint32_t cotra_ivf_header_checksum(const cotra_ivf_header *header)
{
    return cotra_checksum(header, sizeof *header, SEED_HEADER);
}

uint32_t cotra_ivf_table_checksum(const uint8_t *section, uint64_t table_bytes)
{
    return cotra_checksum(section + COTRA_IVF_HEADER_BYTES, table_bytes - COTRA_IVF_HEADER_BYTES, SEED_TABLE);
}

int cotra_ivf_header_validate(const cotra_ivf_header *header, const cotra_image_info *info, cotra_error *err)
{
    if (header->magic != COTRA_IVF_MAGIC || header->version != COTRA_IVF_VERSION)
        return cotra_fail(err, COTRA_ERR_FORMAT,
                          "inverted lists: magic number %016llx, version %u: this build reads version %d",
                          (unsigned long long)header->magic, header->version, COTRA_IVF_VERSION);
    if (cotra_ivf_header_checksum(header) != info->ivf_checksum)
        return cotra_fail(err, COTRA_ERR_CHECKSUM, "inverted lists: the header's checksum does not match the image's");
#define REQUIRE(condition, what)                                                                                       \
    if (!(condition))                                                                                                  \
    return cotra_fail(err, COTRA_ERR_FORMAT, "inverted lists: malformed header: %s", what)
    REQUIRE(header->n_lists >= 1 && header->n_lists <= COTRA_IVF_MAX_LISTS, "number of lists");
    REQUIRE(header->bits >= 1 && header->bits <= COTRA_IVF_MAX_BITS, "bits");
    REQUIRE(header->code_dim == info->code_dim, "code_dim");
    REQUIRE(header->centroid_type <= COTRA_VECTOR_F16, "centroids' type");
    REQUIRE(header->entries == info->count - info->deleted_count, "entries");
    cotra_ivf_layout layout;
    cotra_ivf_layout_make(info, header->n_lists, header->bits, header->centroid_type, &layout);
    REQUIRE(header->table_bytes == layout.table_bytes && layout.table_bytes <= info->ivf_bytes, "table's size");
    REQUIRE(header->list_bytes == info->ivf_bytes - layout.table_bytes, "lists' size");
#undef REQUIRE
    return COTRA_OK;
}

int cotra_ivf_table_validate(const uint8_t *section, const cotra_image_info *info, cotra_ivf_info *out,
                             cotra_error *err)
{
    const cotra_ivf_header header = *(const cotra_ivf_header *)section;
    int status = cotra_ivf_header_validate(&header, info, err);
    if (status)
        return status;
    if (cotra_ivf_table_checksum(section, header.table_bytes) != header.table_checksum)
        return cotra_fail(err, COTRA_ERR_CHECKSUM, "inverted lists: the table's checksum does not match");
    cotra_ivf_layout layout;
    cotra_ivf_layout_make(info, header.n_lists, header.bits, header.centroid_type, &layout);
    const uint32_t *sizes = (const uint32_t *)(section + layout.sizes);
    const float *radii = (const float *)(section + layout.radii), *errors = (const float *)(section + layout.errors);
    uint64_t entries = 0, blocks = 0;
    uint32_t longest = 0;
    for (uint32_t i = 0; i < header.n_lists; i++) {
        float centroid[COTRA_MAX_DIM];
        cotra_vector_load(header.centroid_type, section + layout.centroids + (size_t)i * layout.stride, info->dim,
                          centroid);
        int finite = isfinite(radii[i]) && radii[i] >= 0 && isfinite(errors[i]) && errors[i] >= 0;
        for (uint32_t j = 0; j < info->dim; j++)
            finite &= isfinite(centroid[j]) != 0;
        if (!finite)
            return cotra_fail(err, COTRA_ERR_FORMAT, "inverted lists: list %u: numbers that are not finite", i);
        entries += sizes[i];
        blocks += cotra_ivf_blocks(sizes[i]);
        longest = sizes[i] > longest ? sizes[i] : longest;
    }
    if (entries != header.entries || blocks * layout.block_bytes != header.list_bytes)
        return cotra_fail(err, COTRA_ERR_FORMAT, "inverted lists: %llu entries in %llu bytes where %llu are in %llu",
                          (unsigned long long)header.entries, (unsigned long long)header.list_bytes,
                          (unsigned long long)entries, (unsigned long long)(blocks * layout.block_bytes));
    *out = (cotra_ivf_info){.entries = entries,
                            .table_bytes = header.table_bytes,
                            .list_bytes = header.list_bytes,
                            .n_lists = header.n_lists,
                            .bits = header.bits,
                            .code_dim = header.code_dim,
                            .block_bytes = layout.block_bytes,
                            .centroid_type = header.centroid_type,
                            .longest = longest};
    return COTRA_OK;
}

static int list_validate(const uint8_t *image, const cotra_image_info *info, const cotra_ivf_layout *layout,
                         uint32_t list, uint32_t size, const uint8_t *data, uint8_t *seen, cotra_error *err)
{
    const uint32_t prefix_bytes = cotra_prefix_bytes(info);
    for (uint32_t i = 0; i < size; i++) {
        const uint8_t *block = data + (uint64_t)(i / COTRA_BLOCK) * layout->block_bytes;
        const uint32_t row = ((const uint32_t *)(block + layout->rows))[i % COTRA_BLOCK];
        if (row >= info->count || seen[row])
            return cotra_fail(err, COTRA_ERR_FORMAT, "inverted lists: list %u has row %u of %llu%s", list, row,
                              (unsigned long long)info->count, row < info->count ? ", again" : "");
        seen[row] = 1;
        const uint8_t *record = image + info->records_offset + (uint64_t)row * info->record_bytes;
        if (((const cotra_record_head *)record)->flags & COTRA_NODE_DELETED)
            return cotra_fail(err, COTRA_ERR_FORMAT, "inverted lists: list %u has row %u, which is deleted", list, row);
        if (((const uint32_t *)(block + layout->sums))[i % COTRA_BLOCK] !=
            cotra_prefix_checksum(record, prefix_bytes, row))
            return cotra_fail(err, COTRA_ERR_CHECKSUM,
                              "inverted lists: list %u has another checksum of the vector of row %u", list, row);
    }
    return COTRA_OK;
}

int cotra_ivf_validate(const uint8_t *image, const cotra_image_info *info, int full, cotra_error *err)
{
    const uint8_t *section = image + info->ivf_offset;
    cotra_ivf_info ivf;
    int status = cotra_ivf_table_validate(section, info, &ivf, err);
    if (status || !full)
        return status;
    cotra_ivf_layout layout;
    cotra_ivf_layout_make(info, ivf.n_lists, ivf.bits, ivf.centroid_type, &layout);
    const uint32_t *sizes = (const uint32_t *)(section + layout.sizes);
    const uint32_t *checksums = (const uint32_t *)(section + layout.checksums);
    uint8_t *seen = calloc(info->count, 1);
    if (!seen)
        return cotra_fail(err, COTRA_ERR_NO_MEMORY, "inverted lists: no memory to check %llu rows",
                          (unsigned long long)info->count);
    const uint8_t *data = section + layout.table_bytes;
    for (uint32_t i = 0; i < ivf.n_lists && !status; i++) {
        const uint64_t blocks = cotra_ivf_blocks(sizes[i]);
        uint32_t sum = 0;
        for (uint64_t b = 0; b < blocks; b++)
            sum += cotra_ivf_block_checksum(data + b * layout.block_bytes, layout.block_bytes, b);
        status = sum == checksums[i]
                     ? list_validate(image, info, &layout, i, sizes[i], data, seen, err)
                     : cotra_fail(err, COTRA_ERR_CHECKSUM, "inverted lists: list %u: the checksum does not match", i);
        data += blocks * layout.block_bytes;
    }
    free(seen);
    return status;
}

int cotra_ivf_get_info(const void *data, uint64_t length_bytes, cotra_ivf_info *out, cotra_error *err)
{
    cotra_image_info info;
    memset(out, 0, sizeof *out);
    int status = cotra_image_validate(data, length_bytes, 0, &info, err);
    if (!status && info.ivf_bytes)
        status = cotra_ivf_table_validate((const uint8_t *)data + info.ivf_offset, &info, out, err);
    return status;
}
