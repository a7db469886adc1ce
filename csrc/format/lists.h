/* Inverted lists beside the graph: an optional section at the image's end, for readers that would rather take two
 * rounds of many READs than many rounds of few.
 *
 *   header (64 bytes) | table: centroids, sizes, radii, errors, checksums | lists, each contiguous
 *
 * A reader takes header and table whole, once, and so knows where each list is: a list is blocks of 32 entries, and
 * they follow from the sizes. Every row that is not deleted is in exactly one list. A block is laid out as the codes of
 * 32 neighbours in a record are, once for each bit ("plane"), so that the same kernel scans them:
 *
 *   planes u8[bits][code_dim / 4][16] | f0 f32[32] | f1 f32[32] | rows u32[32] | checksums u32[32]
 *
 * Codes: RaBitQ with `bits` bits a dimension (Gao, Gou, Xu, Yang, Long, Wong, SIGMOD 2025; with one bit it is format/
 * codes.h's), of r = P(x - c) for a row x of the list with centroid c. v is the vector of odd numbers |v_i| < 2^bits
 * whose direction is nearest to r's, of those on a grid of scales; v = sum of 2^b s_b, s_b the signs of plane b (a set
 * bit is +1). With g = |r|^2 / <r, v>, g <v, P(u)> estimates <r, P(u)>: one query table serves all planes, for its
 * sums add up as 2^b do. A list is long, so each has a table of its own, and u is as short as can be:
 *
 *   d(q, x)  ~  d(q, c) + t f0 - f1 <v, P(u)>,  u = q - t c
 *   l2:         t = 1,              f1 = 2 g,   f0 = |r|^2
 *   ip, cosine: t = <q, c> / |c|^2, f1 = g,     f0 = -<c, x - c>
 *
 * Checksums form a tree: the image's header holds that of this header, which holds the table's, which holds those of
 * the lists, whose entries hold those of the vectors. A list's is the sum of its blocks' (each seeded with its number),
 * so that a reader may check the pieces of a long list in any order. An entry's is over the part of the row's record
 * that a reader takes for an exact distance: head (from the label on) and own vector.
 */
#ifndef COTRA_FORMAT_LISTS_H
#define COTRA_FORMAT_LISTS_H

#include "format/image.h"

#define COTRA_IVF_MAGIC 0x3156494152544F43u /* "COTRAIV1" read as a little-endian word */

enum { COTRA_IVF_VERSION = 2, COTRA_IVF_MAX_LISTS = 1 << 20, COTRA_IVF_MAX_BITS = 8 };

typedef struct cotra_ivf_header {
    uint64_t magic;
    uint32_t version;
    uint32_t n_lists;
    uint32_t bits;
    uint32_t code_dim;
    uint32_t centroid_type; /* COTRA_VECTOR_F32 or COTRA_VECTOR_F16 */
    uint32_t table_checksum;
    uint64_t entries;
    uint64_t table_bytes; /* this header and the table */
    uint64_t list_bytes;
    uint64_t reserved;
} cotra_ivf_header;

static_assert(sizeof(cotra_ivf_header) == COTRA_IVF_HEADER_BYTES, "the header is part of the format");
static_assert(offsetof(cotra_ivf_header, bits) == 16, "the header is part of the format");
static_assert(offsetof(cotra_ivf_header, table_checksum) == 28, "the header is part of the format");
static_assert(offsetof(cotra_ivf_header, list_bytes) == 48, "the header is part of the format");

/* Where things are, from the section's first byte and in a block; derived, never stored. */
typedef struct cotra_ivf_layout {
    uint64_t centroids, sizes, radii, errors, checksums, table_bytes;
    uint32_t stride;      /* of a centroid */
    uint32_t plane_bytes; /* of a block: f0 comes after `bits` of them */
    uint32_t f0, f1, rows, sums;
    uint32_t block_bytes;
} cotra_ivf_layout;

void cotra_ivf_layout_make(const cotra_image_info *info, uint32_t n_lists, uint32_t bits, uint32_t centroid_type,
                           cotra_ivf_layout *out);
/* The bytes of a record that hold head and own vector. */
uint32_t cotra_prefix_bytes(const cotra_image_info *info);
uint32_t cotra_prefix_checksum(const uint8_t *record, uint32_t prefix_bytes, uint32_t node);
/* A block's part of its list's checksum. */
uint32_t cotra_ivf_block_checksum(const uint8_t *block, uint32_t block_bytes, uint64_t number);
uint32_t cotra_ivf_header_checksum(const cotra_ivf_header *header);
uint32_t cotra_ivf_table_checksum(const uint8_t *section, uint64_t table_bytes);
static inline uint64_t cotra_ivf_blocks(uint32_t size)
{
    return ((uint64_t)size + COTRA_BLOCK - 1) / COTRA_BLOCK;
}

/* Checks the section's header against a valid image's. */
int cotra_ivf_header_validate(const cotra_ivf_header *header, const cotra_image_info *info, cotra_error *err);
/* Checks header and table, table_bytes of memory that nobody changes any more. */
int cotra_ivf_table_validate(const uint8_t *section, const cotra_image_info *info, cotra_ivf_info *out,
                             cotra_error *err);
/* Checks the section of an image whose header is valid (and, for full, its records): all of it when full is not 0. */
int cotra_ivf_validate(const uint8_t *image, const cotra_image_info *info, int full, cotra_error *err);

#endif
