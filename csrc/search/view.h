/* What a reader keeps of one shard: the header, and a private, validated copy of the navigation section. */
#ifndef COTRA_SEARCH_VIEW_H
#define COTRA_SEARCH_VIEW_H

#include "format/codes.h"
#include "search/sketch.h"

struct cotra_view {
    cotra_image_info info;
    cotra_record_layout record;
    cotra_rotation rotation;
    uint8_t *nav; /* nobody else can write it, so it is checked once */
    const float *mean;
    const uint32_t *nodes;     /* [upper_count]: the node number of each upper node */
    const uint32_t *first_row; /* [upper_count + 1] */
    const uint32_t *rows;      /* [..][1 + M] */
    const uint8_t *vectors;    /* [upper_count][vector_stride] */
    float *norms2;             /* [upper_count]: of the vectors, where they are scaled; else NULL */
    uint32_t vector_stride;
    cotra_sketch sketch; /* of the vectors, where it pays; else its values are NULL */
    uint32_t entry;      /* the entry point among the upper nodes; 0 when there are none */
};

static inline const uint32_t *cotra_view_row(const cotra_view *view, uint32_t upper, uint32_t level)
{
    return view->rows + (size_t)(view->first_row[upper] + level - 1) * (1 + view->info.M);
}

static inline const uint8_t *cotra_view_vector(const cotra_view *view, uint32_t upper)
{
    return view->vectors + (size_t)upper * view->vector_stride;
}

#endif
