/* Own vectors in the types that an image can hold them in. */
#ifndef COTRA_LAYOUT_VECTORS_H
#define COTRA_LAYOUT_VECTORS_H

#include <stdint.h>

#define COTRA_MAX_COMPONENT 1e15f /* squared distances of larger ones do not fit a float */

float cotra_f16_to_f32(uint16_t half);
uint16_t cotra_f32_to_f16(float value); /* round to nearest even */

/* vector in vector_type -> float32[dim] */
void cotra_vector_load(uint32_t vector_type, const void *vector, uint32_t dim, float *out);
/* float32[dim] -> vector in vector_type; returns 0 where a component cannot be held exactly (f32 always can). */
int cotra_vector_store(uint32_t vector_type, const float *values, uint32_t dim, void *out);

#endif
