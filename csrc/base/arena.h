/* What the rest of the shim may do with an arena beyond the public header. */
#ifndef COTRA_BASE_ARENA_H
#define COTRA_BASE_ARENA_H

#include "cotra.h"

/* Grows an arena of its own memfd, not yet locked or sealed; its bytes stay, its address may change. */
int cotra_arena_grow(cotra_arena *arena, uint64_t length_bytes, cotra_error *err);
uint8_t *cotra_arena_data(const cotra_arena *arena);

#endif
