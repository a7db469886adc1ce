/* The checks of a graph image: what a reader may believe of bytes that somebody else wrote. */
#include "base/checksum.h"
#include "base/status.h"
#include "format/image.h"
#include "format/lists.h"
#include "format/vector_types.h"

#include <math.h>

int cotra_header_validate(const cotra_image_header *header, uint64_t region_bytes, cotra_image_info *out,
                          cotra_error *err)
{
    if (header->magic != COTRA_IMAGE_MAGIC)
        return cotra_fail(err, COTRA_ERR_FORMAT, "not a graph image: the magic number is %016llx",
                          (unsigned long long)header->magic);
    if (header->format_version != COTRA_FORMAT_VERSION)
        return cotra_fail(err, COTRA_ERR_FORMAT, "graph image of format version %u: this build reads version %d",
                          header->format_version, COTRA_FORMAT_VERSION);
    if (header->header_checksum != cotra_header_checksum(header))
        return cotra_fail(err, COTRA_ERR_CHECKSUM, "graph image: the header's checksum does not match");
    const cotra_image_info *info = &header->info;
#define REQUIRE(condition, what)                                                                                       \
    if (!(condition))                                                                                                  \
    return cotra_fail(err, COTRA_ERR_FORMAT, "graph image: malformed header: %s", what)
    REQUIRE(info->dim >= COTRA_MIN_DIM && info->dim <= COTRA_MAX_DIM, "dim");
    REQUIRE(info->code_dim == cotra_code_dim(info->dim), "code_dim");
    REQUIRE(info->metric <= COTRA_METRIC_COSINE, "metric");
    REQUIRE(info->vector_type <= COTRA_VECTOR_U8, "vector type");
    REQUIRE(info->M >= 1 && info->M <= COTRA_MAX_M && info->degree >= 1 && info->degree <= 2 * COTRA_MAX_M, "degree");
    REQUIRE(info->count >= 1 && info->count <= COTRA_MAX_COUNT, "count");
    REQUIRE(info->graph_count >= info->count && info->graph_count <= COTRA_MAX_COUNT &&
                info->graph_base <= info->graph_count - info->count,
            "place in the graph over all shards");
    REQUIRE(info->graph_id || info->graph_count == info->count, "graph over all shards");
    REQUIRE(info->deleted_count <= info->count && info->upper_count <= info->count, "counts");
    REQUIRE(info->entry_node < info->count && info->max_level < COTRA_MAX_LEVELS, "entry point");
    REQUIRE((info->upper_count == 0) == (info->max_level == 0), "levels");
    cotra_record_layout record;
    cotra_record_layout_make(info, &record);
    REQUIRE(info->record_bytes == record.record_bytes, "record size");
    REQUIRE(info->records_offset == COTRA_HEADER_BYTES, "records' offset");
    REQUIRE(info->nav_offset == info->records_offset + info->count * info->record_bytes, "navigation section's offset");
    REQUIRE(info->nav_bytes % 64 == 0, "navigation section");
    cotra_nav_layout least, most;
    cotra_nav_layout_make(info, info->upper_count, &least);
    cotra_nav_layout_make(info, info->upper_count * (uint64_t)info->max_level, &most);
    REQUIRE(info->nav_bytes >= least.total && info->nav_bytes <= most.total, "navigation section's size");
    if (info->ivf_bytes) {
        REQUIRE(info->ivf_offset == info->nav_offset + info->nav_bytes, "inverted lists' offset");
        REQUIRE(info->ivf_bytes % 64 == 0 && info->ivf_bytes >= COTRA_IVF_HEADER_BYTES &&
                    info->ivf_bytes <= (uint64_t)1 << 56,
                "inverted lists");
    } else {
        REQUIRE(info->ivf_offset == 0 && info->ivf_checksum == 0, "inverted lists' offset");
    }
    REQUIRE(info->image_bytes == info->nav_offset + info->nav_bytes + info->ivf_bytes, "image size");
#undef REQUIRE
    if (info->image_bytes > region_bytes)
        return cotra_fail(err, COTRA_ERR_FORMAT, "graph image of %llu bytes is truncated to %llu",
                          (unsigned long long)info->image_bytes, (unsigned long long)region_bytes);
    *out = *info;
    out->format_version = header->format_version;
    return COTRA_OK;
}

int cotra_nav_validate(const uint8_t *nav, const cotra_image_info *info, cotra_error *err)
{
    if (cotra_checksum(nav, info->nav_bytes, 1) != info->nav_checksum)
        return cotra_fail(err, COTRA_ERR_CHECKSUM, "graph image: the navigation section's checksum does not match");
    cotra_nav_layout layout;
    cotra_nav_layout_make(info, 0, &layout);
    const uint32_t *nodes = (const uint32_t *)(nav + layout.nodes);
    const uint32_t *first_row = (const uint32_t *)(nav + layout.first_row);
    const uint32_t n = (uint32_t)info->upper_count, width = 1 + info->M;
    const float *mean = (const float *)nav;
    for (uint32_t i = 0; i < info->dim; i++)
        if (!isfinite(mean[i]))
            return cotra_fail(err, COTRA_ERR_FORMAT, "graph image: the mean vector is not finite");
    if (first_row[0] != 0)
        return cotra_fail(err, COTRA_ERR_FORMAT, "graph image: upper layers do not begin at row 0");
    for (uint32_t u = 0; u < n; u++) {
        if (nodes[u] >= info->count || (u && nodes[u] <= nodes[u - 1]))
            return cotra_fail(err, COTRA_ERR_FORMAT, "graph image: upper node %u has number %u", u, nodes[u]);
        if (first_row[u + 1] <= first_row[u] || first_row[u + 1] - first_row[u] > info->max_level)
            return cotra_fail(err, COTRA_ERR_FORMAT, "graph image: upper node %u has rows %u to %u", u, first_row[u],
                              first_row[u + 1]);
    }
    cotra_nav_layout_make(info, n ? first_row[n] : 0, &layout);
    if (layout.total != info->nav_bytes)
        return cotra_fail(err, COTRA_ERR_FORMAT, "graph image: a navigation section of %llu bytes, not %llu",
                          (unsigned long long)info->nav_bytes, (unsigned long long)layout.total);
    const uint32_t *rows = (const uint32_t *)(nav + layout.rows);
    int entry_found = n == 0;
    for (uint32_t u = 0; u < n; u++) {
        uint32_t levels = first_row[u + 1] - first_row[u];
        entry_found |= nodes[u] == info->entry_node && levels == info->max_level;
        for (uint32_t level = 0; level < levels; level++) {
            const uint32_t *row = rows + (size_t)(first_row[u] + level) * width;
            if (row[0] > info->M)
                return cotra_fail(err, COTRA_ERR_FORMAT, "graph image: upper node %u has %u links on level %u", u,
                                  row[0], level + 1);
            for (uint32_t j = 1; j <= row[0]; j++)
                if (row[j] >= n || first_row[row[j] + 1] - first_row[row[j]] <= level)
                    return cotra_fail(err, COTRA_ERR_FORMAT,
                                      "graph image: upper node %u links to %u, which is not on level %u", u, row[j],
                                      level + 1);
        }
    }
    if (!entry_found)
        return cotra_fail(err, COTRA_ERR_FORMAT, "graph image: the entry point is not on the top level");
    return COTRA_OK;
}

int cotra_record_validate(const uint8_t *record, const cotra_image_info *info, uint32_t node, cotra_error *err)
{
    const cotra_record_head *head = (const cotra_record_head *)record;
    if (head->checksum != cotra_record_checksum(record, info->record_bytes, node) || head->node != node)
        return cotra_fail(err, COTRA_ERR_CHECKSUM, "record %u (it says %u): torn or corrupt bytes", node, head->node);
    if (head->generation != (uint32_t)info->generation)
        return cotra_fail(err, COTRA_ERR_STALE,
                          "record %u is of generation %u, the header that was read of %llu: connect again", node,
                          head->generation, (unsigned long long)info->generation);
    if (head->count > info->degree)
        return cotra_fail(err, COTRA_ERR_FORMAT, "record %u has %u neighbours where %u is the most", node, head->count,
                          info->degree);
    if (head->label < 0)
        return cotra_fail(err, COTRA_ERR_FORMAT, "record %u has the label %lld", node, (long long)head->label);
    return COTRA_OK;
}

static int validate_records(const uint8_t *image, const cotra_image_info *info, cotra_error *err)
{
    cotra_record_layout layout;
    cotra_record_layout_make(info, &layout);
    uint64_t deleted = 0;
    uint32_t chain = 0;
    for (uint64_t i = 0; i < info->count; i++) {
        const uint8_t *record = image + info->records_offset + i * info->record_bytes;
        const cotra_record_head *head = (const cotra_record_head *)record;
        int status = cotra_record_validate(record, info, (uint32_t)i, err);
        if (status)
            return status;
        const uint32_t *numbers = (const uint32_t *)(record + layout.numbers);
        for (uint32_t j = 0; j < head->count; j++)
            if (numbers[j] >= info->graph_count)
                return cotra_fail(err, COTRA_ERR_FORMAT, "record %llu links to node %u of %llu", (unsigned long long)i,
                                  numbers[j], (unsigned long long)info->graph_count);
        deleted += (head->flags & COTRA_NODE_DELETED) != 0;
        chain = cotra_image_chain(chain, head->checksum);
    }
    if (deleted != info->deleted_count)
        return cotra_fail(err, COTRA_ERR_FORMAT, "graph image: %llu deleted nodes where the header has %llu",
                          (unsigned long long)deleted, (unsigned long long)info->deleted_count);
    if (info->image_checksum != ((uint64_t)info->nav_checksum << 32 | chain))
        return cotra_fail(err, COTRA_ERR_CHECKSUM, "graph image: the image's checksum does not match");
    return COTRA_OK;
}

int cotra_image_validate(const void *data, uint64_t length_bytes, int full, cotra_image_info *out, cotra_error *err)
{
    const uint8_t *image = data;
    if (length_bytes < COTRA_HEADER_BYTES)
        return cotra_fail(err, COTRA_ERR_FORMAT, "not a graph image: %llu bytes are less than a header",
                          (unsigned long long)length_bytes);
    if ((uintptr_t)image % 8)
        return cotra_fail(err, COTRA_ERR_ARGUMENT, "a graph image must be 8-byte aligned in memory");
    cotra_image_info info;
    int status = cotra_header_validate((const cotra_image_header *)image, length_bytes, &info, err);
    if (status)
        return status;
    status = cotra_nav_validate(image + info.nav_offset, &info, err);
    if (status)
        return status;
    if (full) {
        status = validate_records(image, &info, err);
        if (status)
            return status;
    }
    if (info.ivf_bytes) {
        status = cotra_ivf_validate(image, &info, full, err);
        if (status)
            return status;
    }
    *out = info;
    return COTRA_OK;
}

int cotra_image_get_node(const void *data, uint64_t length_bytes, uint64_t node, float *vector, int64_t *label,
                         uint32_t *flags, cotra_error *err)
{
    const uint8_t *image = data;
    cotra_image_info info;
    int status = length_bytes < COTRA_HEADER_BYTES
                     ? cotra_fail(err, COTRA_ERR_FORMAT, "not a graph image")
                     : cotra_header_validate((const cotra_image_header *)image, length_bytes, &info, err);
    if (status)
        return status;
    if (node >= info.count)
        return cotra_fail(err, COTRA_ERR_BOUNDS, "node %llu of %llu", (unsigned long long)node,
                          (unsigned long long)info.count);
    const uint8_t *record = image + info.records_offset + node * info.record_bytes;
    status = cotra_record_validate(record, &info, (uint32_t)node, err);
    if (status)
        return status;
    const cotra_record_head *head = (const cotra_record_head *)record;
    cotra_own_load(&info, record + COTRA_RECORD_HEAD_BYTES, vector);
    *label = head->label;
    *flags = head->flags;
    return COTRA_OK;
}
