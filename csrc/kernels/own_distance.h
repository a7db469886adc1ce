/* The exact distance of a query and a record's own vector. */
#ifndef COTRA_KERNELS_OWN_DISTANCE_H
#define COTRA_KERNELS_OWN_DISTANCE_H

#include "kernels/kernels.h"
#include "format/image.h"
#include "format/vector_types.h"

#include <math.h>

/* Of a vector that is stored with this squared length. */
static inline float cotra_own_distance(const cotra_kernels *kernels, const cotra_image_info *info, const float *query,
                                       const uint8_t *vector, float norm2)
{
    if (cotra_is_scaled(info))
        return 1.0f - kernels->dot[info->vector_type](query, vector, info->dim) * (norm2 > 0 ? 1 / sqrtf(norm2) : 0);
    return cotra_metric_distance(kernels, info->metric, info->vector_type, query, vector, info->dim);
}

static inline float cotra_record_distance(const cotra_kernels *kernels, const cotra_image_info *info,
                                          const float *query, const uint8_t *record)
{
    return cotra_own_distance(kernels, info, query, record + COTRA_RECORD_HEAD_BYTES,
                              ((const volatile cotra_record_head *)record)->norm2);
}

#endif
