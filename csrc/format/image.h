/* The graph image: one position-independent piece of memory, the same bytes in a file, a memfd and a memory region.
 *
 *   [0, 4096)            header, zero-padded
 *   [records_offset, ..) one record of record_bytes for each node; a hop is one READ of one record
 *   [nav_offset, ...)    navigation section: mean vector, upper layers; a reader takes it whole, once. It comes
 *                        after the records, for the packer learns its size last
 *   [ivf_offset, ...)    optional: inverted lists, format/lists.h
 *
 * A record holds everything that expanding its node needs: the node's own vector (exact distance), and for each
 * neighbour its number, its code and two factors (estimated distance). All integers are little-endian.
 *
 *   head (32 bytes) | own vector | numbers u32[slots] | f0 bf16[slots] | f1 bf16[slots] | codes
 *
 * slots is the degree rounded up to blocks of 32; the codes of a block are laid out for 4-bit look-ups ("FastScan",
 * Andre, Kermarrec, Le Scouarnec, VLDB 2015): for each group of 4 dimensions 16 bytes, byte j holding neighbour j's
 * nibble low and neighbour j + 16's nibble high. Which bits they are, and what the factors mean: format/codes.h.
 */
#ifndef COTRA_FORMAT_IMAGE_H
#define COTRA_FORMAT_IMAGE_H

#include "cotra.h"

#include <assert.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the image is little-endian and mapped as it is"
#endif

#define COTRA_IMAGE_MAGIC 0x3147484152544F43u /* "COTRAHG1" read as a little-endian word */

enum {
    COTRA_FORMAT_VERSION = 4,
    COTRA_HEADER_BYTES = 4096,
    COTRA_IVF_HEADER_BYTES = 64,
    COTRA_BLOCK = 32, /* neighbours whose codes are scanned together */
    COTRA_MIN_DIM = 1,
    COTRA_MAX_DIM = 4096,
    COTRA_MAX_M = 512,
    COTRA_MAX_LEVELS = 64,
    COTRA_RECORD_HEAD_BYTES = 32,
    COTRA_NODE_DELETED = 1, /* a flag of a node: walked through, never returned */
    COTRA_NODE_CENTRED = 2  /* its factors are for a table that is made for it: format/codes.h */
};

#define COTRA_NO_NODE   UINT32_MAX
#define COTRA_MAX_COUNT INT32_MAX /* node numbers leave one bit for the search's own use */

typedef struct cotra_image_header {
    uint64_t magic;
    uint32_t format_version;
    uint32_t header_checksum; /* over the header with this field 0 */
    cotra_image_info info;
} cotra_image_header;

static_assert(sizeof(cotra_image_info) == 176, "image info is part of the format");
static_assert(offsetof(cotra_image_info, image_checksum) == 72, "image info is part of the format");
static_assert(offsetof(cotra_image_info, record_bytes) == 80, "image info is part of the format");
static_assert(offsetof(cotra_image_info, entry_node) == 116, "image info is part of the format");
static_assert(offsetof(cotra_image_info, nav_checksum) == 124, "image info is part of the format");
static_assert(offsetof(cotra_image_info, ivf_offset) == 128, "image info is part of the format");
static_assert(offsetof(cotra_image_info, ivf_checksum) == 144, "image info is part of the format");
static_assert(offsetof(cotra_image_info, graph_id) == 152, "image info is part of the format");
static_assert(offsetof(cotra_image_header, info) == 16, "the header is part of the format");

typedef struct cotra_record_head {
    uint32_t checksum; /* over the record from `label` on, seeded with the node's number */
    uint32_t node;
    int64_t label;
    uint32_t flags;
    uint16_t count; /* neighbours */
    uint16_t reserved;
    uint32_t generation; /* low half of the image's */
    float norm2;         /* ip, cosine: of the own vector as it is stored, its squared length; l2: 0 */
} cotra_record_head;

static_assert(sizeof(cotra_record_head) == COTRA_RECORD_HEAD_BYTES, "the record is part of the format");
static_assert(offsetof(cotra_record_head, label) == 8, "the record is part of the format");
static_assert(offsetof(cotra_record_head, count) == 20, "the record is part of the format");
static_assert(offsetof(cotra_record_head, norm2) == 28, "the record is part of the format");

/* Where things are in a record; derived, never stored. */
typedef struct cotra_record_layout {
    uint32_t vector_bytes; /* without padding */
    uint32_t slots;        /* neighbours, rounded up to blocks */
    uint32_t numbers, f0, f1, codes;
    uint32_t block_bytes; /* of one block's codes */
    uint32_t record_bytes;
} cotra_record_layout;

/* Where things are in the navigation section, from its first byte; derived, never stored.
 *   mean f32[dim] | nodes u32[n] ascending | first_row u32[n + 1] | rows u32[n_rows][1 + M] | vectors[n]
 * Upper node u has first_row[u + 1] - first_row[u] rows, one for each of its levels 1, 2, ...: a count, then positions
 * of upper nodes. */
typedef struct cotra_nav_layout {
    uint64_t nodes, first_row, rows, vectors, total;
} cotra_nav_layout;

uint32_t cotra_vector_bytes(uint32_t vector_type, uint32_t dim);
uint32_t cotra_code_dim(uint32_t dim);
void cotra_record_layout_make(const cotra_image_info *info, cotra_record_layout *out);
void cotra_nav_layout_make(const cotra_image_info *info, uint64_t n_rows, cotra_nav_layout *out);

uint32_t cotra_record_checksum(const uint8_t *record, uint32_t record_bytes, uint32_t node);
/* The image's checksum is the chain of its records' checksums, and the navigation section's. */
uint32_t cotra_image_chain(uint32_t chain, uint32_t record_checksum);
uint32_t cotra_header_checksum(const cotra_image_header *header);
/* Writes a header's end: magic number, version, what the image is, and the checksum over all of it. */
void cotra_image_seal(cotra_image_header *header, const cotra_image_info *info);

/* Checks a header that came from region_bytes of anybody's memory, and copies its info out. */
int cotra_header_validate(const cotra_image_header *header, uint64_t region_bytes, cotra_image_info *out,
                          cotra_error *err);
/* Checks a navigation section in private memory (nobody can change it any more). */
int cotra_nav_validate(const uint8_t *nav, const cotra_image_info *info, cotra_error *err);
/* Checks a record that is about to be used: checksum, own number, degree. Its neighbours' numbers are checked where
 * they are loaded. */
int cotra_record_validate(const uint8_t *record, const cotra_image_info *info, uint32_t node, cotra_error *err);

#endif
