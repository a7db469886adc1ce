/* What a reader keeps of one shard's inverted lists: a private, validated copy of the section's header and table. */
#ifndef COTRA_SEARCH_LISTS_LIST_TABLE_H
#define COTRA_SEARCH_LISTS_LIST_TABLE_H

#include "format/lists.h"
#include "search/view.h"

struct cotra_ivf_table {
    cotra_ivf_info info;
    cotra_ivf_layout layout;
    uint32_t dim, ivf_checksum; /* of the image that it belongs to */
    uint8_t *data;              /* nobody else can write it, so it is checked once */
    const uint8_t *centroids;   /* [n_lists][layout.stride] */
    const uint32_t *sizes;
    const float *radii, *errors;
    const uint32_t *checksums;
    uint64_t *offsets; /* [n_lists]: in the region */
    float *norms2;     /* [n_lists]: of the centroids */
};

#endif
