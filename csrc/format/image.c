/* The image's arithmetic: where its parts lie, and their checksums. */
#include "format/image.h"

#include "base/checksum.h"
#include "base/int_math.h"

uint32_t cotra_vector_bytes(uint32_t vector_type, uint32_t dim)
{
    return vector_type == COTRA_VECTOR_F32 ? 4 * dim : vector_type == COTRA_VECTOR_F16 ? 2 * dim : dim;
}

uint32_t cotra_code_dim(uint32_t dim)
{
    return (uint32_t)cotra_round_up(dim, 64);
}

void cotra_record_layout_make(const cotra_image_info *info, cotra_record_layout *out)
{
    out->vector_bytes = cotra_vector_bytes(info->vector_type, info->dim);
    out->slots = (uint32_t)cotra_round_up(info->degree, COTRA_BLOCK);
    out->numbers = COTRA_RECORD_HEAD_BYTES + (uint32_t)cotra_round_up(out->vector_bytes, 32);
    out->f0 = out->numbers + 4 * out->slots;
    out->f1 = out->f0 + 2 * out->slots;
    out->codes = out->f1 + 2 * out->slots;
    out->block_bytes = info->code_dim / 4 * 16;
    out->record_bytes =
        (uint32_t)cotra_round_up(out->codes + out->slots / COTRA_BLOCK * (uint64_t)out->block_bytes, 64);
}

void cotra_nav_layout_make(const cotra_image_info *info, uint64_t n_rows, cotra_nav_layout *out)
{
    uint64_t n = info->upper_count;
    out->nodes = cotra_round_up(4 * (uint64_t)info->dim, 8);
    out->first_row = out->nodes + cotra_round_up(4 * n, 8);
    out->rows = out->first_row + cotra_round_up(4 * (n + 1), 8);
    out->vectors = cotra_round_up(out->rows + n_rows * 4 * (1 + (uint64_t)info->M), 64);
    out->total =
        cotra_round_up(out->vectors + n * cotra_round_up(cotra_vector_bytes(info->vector_type, info->dim), 32), 64);
}

uint32_t cotra_record_checksum(const uint8_t *record, uint32_t record_bytes, uint32_t node)
{
    const uint32_t skipped = offsetof(cotra_record_head, label);
    return cotra_checksum(record + skipped, record_bytes - skipped, node);
}

uint32_t cotra_image_chain(uint32_t chain, uint32_t record_checksum)
{
    uint64_t link = (uint64_t)chain << 32 | record_checksum;
    return cotra_checksum(&link, sizeof link, 2);
}

uint32_t cotra_header_checksum(const cotra_image_header *header)
{
    cotra_image_header copy = *header;
    copy.header_checksum = 0;
    return cotra_checksum(&copy, sizeof copy, 0);
}

void cotra_image_seal(cotra_image_header *header, const cotra_image_info *info)
{
    header->magic = COTRA_IMAGE_MAGIC;
    header->format_version = COTRA_FORMAT_VERSION;
    header->info = *info;
    header->header_checksum = cotra_header_checksum(header);
}
