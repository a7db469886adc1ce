/* Arithmetic of sizes. */
#ifndef COTRA_BASE_INT_MATH_H
#define COTRA_BASE_INT_MATH_H

#include <stdint.h>

/* The least multiple of `unit` that is not below `value`. */
static inline uint64_t cotra_round_up(uint64_t value, uint64_t unit)
{
    return (value + unit - 1) / unit * unit;
}

static inline uint32_t cotra_min_u32(uint32_t a, uint32_t b)
{
    return a < b ? a : b;
}

/* Vectors in this process's memory are padded with zeros to so many floats: a whole number of SIMD steps. */
static inline uint32_t cotra_padded_dim(uint32_t dim)
{
    return (uint32_t)cotra_round_up(dim, 32);
}

#endif
