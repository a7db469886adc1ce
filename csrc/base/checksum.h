/* One checksum for everything that a reader checks: NH (Black, Halevi, Krawczyk, Krovetz, Rogaway, "UMAC: Fast and
 * Secure Message Authentication", CRYPTO 1999), whose sums of two different messages are equal with a probability of
 * 2^-32 over the choice of its keys. The keys are fixed: it finds torn and corrupt bytes, not forged ones. It is
 * additions and 32-bit multiplications of independent words, for it is computed at every hop. docs/reference/format.md
 * writes it down. */
#ifndef COTRA_BASE_CHECKSUM_H
#define COTRA_BASE_CHECKSUM_H

#include <stddef.h>
#include <stdint.h>

/* length must be a multiple of 8. seed chains calls and separates uses. */
uint32_t cotra_checksum(const void *data, size_t length, uint32_t seed);
/* The same without vector instructions, for tests. */
uint32_t cotra_checksum_portable(const void *data, size_t length, uint32_t seed);

#endif
