/* Fills the places that hnswlib leaves empty in a node's list of neighbours: they are in every record, read or not.
 *
 * Candidates are the neighbours of a node's neighbours; build/select_neighbours.h chooses among them.
 */
#ifndef COTRA_BUILD_FILL_LINKS_H
#define COTRA_BUILD_FILL_LINKS_H

#include "kernels/kernels.h"
#include "format/image.h"

typedef struct cotra_linker {
    const cotra_image_info *info;
    const cotra_record_layout *layout;
    uint8_t *records;
    const cotra_kernels *kernels;
    uint32_t *seen; /* open addressing: node + 1, 0 for nothing */
    uint32_t seen_mask;
    uint32_t *far;        /* neighbours' neighbours */
    uint64_t *candidates; /* distance << 32 | node */
    float *vectors;       /* [2 + degree][padded]: the node's, then its neighbours' */
    uint32_t padded;      /* dim, to a multiple of 32 */
} cotra_linker;

int cotra_linker_create(cotra_linker *linker, const cotra_image_info *info, const cotra_record_layout *layout,
                        uint8_t *records, cotra_error *err);
void cotra_linker_destroy(cotra_linker *linker);
/* Writes numbers behind the record's own `count`, which stays as it is: other nodes may be filled at the same time. */
void cotra_linker_fill(cotra_linker *linker, uint64_t node);

#endif
