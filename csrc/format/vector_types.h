/* Own vectors in the types that an image can hold them in. */
#ifndef COTRA_FORMAT_VECTOR_TYPES_H
#define COTRA_FORMAT_VECTOR_TYPES_H

#include <stdbool.h>
#include <stdint.h>

struct cotra_image_info;

#define COTRA_MAX_COMPONENT 1e15f /* squared distances of larger ones do not fit a float */

float cotra_f16_to_f32(uint16_t half);
uint16_t cotra_f32_to_f16(float value); /* round to nearest even */

/* vector in vector_type -> float32[dim] */
void cotra_vector_load(uint32_t vector_type, const void *vector, uint32_t dim, float *out);
/* Of an image's own vectors: for cosine, normalised as they are loaded (see cotra_is_scaled). */
void cotra_own_load(const struct cotra_image_info *info, const void *vector, float *out);
/* Whether own vectors are held as the caller had them and not normalised: for cosine, in a type that cannot hold
 * normalised ones. Their distance is then 1 - <q, x> / |x|. */
bool cotra_is_scaled(const struct cotra_image_info *info);
/* Stores a normalised vector of a scaled type as the shortest one that it may have come from, exactly; returns 0 where
 * there is none. */
int cotra_scaled_store(const struct cotra_image_info *info, const float *normalised, void *out);
/* float32[dim] -> vector in vector_type; returns 0 where a component cannot be held exactly (f32 always can). */
int cotra_vector_store(uint32_t vector_type, const float *values, uint32_t dim, void *out);

#endif
