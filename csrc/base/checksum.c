#include "base/checksum.h"

#include <string.h>

static uint64_t load_word(const uint8_t *bytes)
{
    uint64_t word;
    memcpy(&word, bytes, sizeof word);
    return word;
}

/* crc of a byte, for the reflected Castagnoli polynomial 0x82F63B78 (RFC 3720, appendix B.4) */
static uint32_t crc_byte(uint32_t crc, uint8_t byte)
{
    /* a 16-entry table: half a byte at a time */
    static const uint32_t nibble[16] = {0x00000000, 0x105EC76F, 0x20BD8EDE, 0x30E349B1, 0x417B1DBC, 0x5125DAD3,
                                        0x61C69362, 0x7198540D, 0x82F63B78, 0x92A8FC17, 0xA24BB5A6, 0xB21572C9,
                                        0xC38D26C4, 0xD3D3E1AB, 0xE330A81A, 0xF36E6F75};
    crc ^= byte;
    crc = (crc >> 4) ^ nibble[crc & 15];
    return (crc >> 4) ^ nibble[crc & 15];
}

static uint32_t crc_word_portable(uint32_t crc, uint64_t word)
{
    for (int i = 0; i < 8; i++)
        crc = crc_byte(crc, (uint8_t)(word >> (8 * i)));
    return crc;
}

#define CHECKSUM_BODY(CRC)                                                                                             \
    uint32_t a = seed, b = seed ^ 0x9E3779B9u, c = seed ^ 0x7F4A7C15u, d = seed ^ 0xF39CC060u;                         \
    size_t i = 0;                                                                                                      \
    for (; i + 32 <= length; i += 32) {                                                                                \
        a = CRC(a, load_word(bytes + i));                                                                              \
        b = CRC(b, load_word(bytes + i + 8));                                                                          \
        c = CRC(c, load_word(bytes + i + 16));                                                                         \
        d = CRC(d, load_word(bytes + i + 24));                                                                         \
    }                                                                                                                  \
    for (; i + 8 <= length; i += 8)                                                                                    \
        a = CRC(a, load_word(bytes + i));                                                                              \
    a = CRC(a, (uint64_t)b << 32 | c);                                                                                 \
    return CRC(a, (uint64_t)length << 32 | d);

static uint32_t checksum_portable(const uint8_t *bytes, size_t length, uint32_t seed)
{
    CHECKSUM_BODY(crc_word_portable);
}

#if defined(__x86_64__)
#include <nmmintrin.h>

__attribute__((target("sse4.2"))) static inline uint32_t crc_word_sse42(uint32_t crc, uint64_t word)
{
    return (uint32_t)_mm_crc32_u64(crc, word);
}

__attribute__((target("sse4.2"))) static uint32_t checksum_sse42(const uint8_t *bytes, size_t length, uint32_t seed)
{
    CHECKSUM_BODY(crc_word_sse42);
}

uint32_t cotra_checksum(const void *data, size_t length, uint32_t seed)
{
    return __builtin_cpu_supports("sse4.2") ? checksum_sse42(data, length, seed)
                                            : checksum_portable(data, length, seed);
}
#else
uint32_t cotra_checksum(const void *data, size_t length, uint32_t seed)
{
    return checksum_portable(data, length, seed);
}
#endif
