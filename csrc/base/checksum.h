/* One checksum for everything that a reader checks: four interleaved CRC-32C (Castagnoli) streams over little-endian
 * 64-bit words, folded into one. Word i goes to stream i mod 4, so the CPU's crc32 instruction runs at its throughput,
 * not its latency; without the instruction a table gives the same value. */
#ifndef COTRA_BASE_CHECKSUM_H
#define COTRA_BASE_CHECKSUM_H

#include <stddef.h>
#include <stdint.h>

/* length must be a multiple of 8. seed chains calls and separates uses. */
uint32_t cotra_checksum(const void *data, size_t length, uint32_t seed);

#endif
