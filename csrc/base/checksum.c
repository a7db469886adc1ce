#include "base/checksum.h"

#include <string.h>

enum { STRIPE = 8, CHUNK = 128 }; /* words */

/* Word i is output i of SplitMix64 from 0, as base/random.h makes it. */
#define MIX_1(z) (((z) ^ (z) >> 30) * 0xBF58476D1CE4E5B9u)
#define MIX_2(z) (((z) ^ (z) >> 27) * 0x94D049BB133111EBu)
#define MIX_3(z) ((z) ^ (z) >> 31)
#define KEY(i)   MIX_3(MIX_2(MIX_1(((i) + 1) * 0x9E3779B97F4A7C15u)))
#define KEY8(i)  KEY(i), KEY(i + 1), KEY(i + 2), KEY(i + 3), KEY(i + 4), KEY(i + 5), KEY(i + 6), KEY(i + 7)
#define KEY32(i) KEY8(i), KEY8(i + 8), KEY8(i + 16), KEY8(i + 24)

static const uint64_t keys[CHUNK] __attribute__((aligned(64))) = {KEY32(0), KEY32(32), KEY32(64), KEY32(96)};

/* NH of words [first, end) of a chunk. first < STRIPE, and end is a multiple of it: only the first stripe may be
 * partial. */
typedef uint64_t (*nh_kernel)(const uint8_t *bytes, size_t first, size_t end);

static uint64_t nh_portable(const uint8_t *bytes, size_t first, size_t end)
{
    uint64_t sum = 0;
    for (size_t i = first; i < end; i++) {
        uint64_t word;
        memcpy(&word, bytes + 8 * (i - first), sizeof word);
        const uint32_t low = (uint32_t)word + (uint32_t)keys[i];
        const uint32_t high = (uint32_t)(word >> 32) + (uint32_t)(keys[i] >> 32);
        sum += (uint64_t)low * high;
    }
    return sum;
}

#if defined(__x86_64__)
#include <immintrin.h>

#define AVX2 __attribute__((target("avx2")))

AVX2 static inline __m256i product(__m256i words, __m256i key)
{
    const __m256i sum = _mm256_add_epi32(words, key);
    return _mm256_mul_epu32(sum, _mm256_srli_epi64(sum, 32));
}

AVX2 static uint64_t nh_avx2(const uint8_t *bytes, size_t first, size_t end)
{
    __m256i a = _mm256_setzero_si256(), b = a;
    size_t i = 0;
    if (first) { /* what is masked out is not read */
        const long long *at = (const long long *)(bytes - 8 * first), *key = (const long long *)keys;
        const __m256i before = _mm256_set1_epi64x((long long)first - 1);
        const __m256i low = _mm256_cmpgt_epi64(_mm256_setr_epi64x(0, 1, 2, 3), before);
        const __m256i high = _mm256_cmpgt_epi64(_mm256_setr_epi64x(4, 5, 6, 7), before);
        a = product(_mm256_maskload_epi64(at, low), _mm256_maskload_epi64(key, low));
        b = product(_mm256_maskload_epi64(at + 4, high), _mm256_maskload_epi64(key + 4, high));
        i = STRIPE;
    }
    for (; i < end; i += STRIPE) {
        const __m256i *at = (const __m256i *)(bytes + 8 * (i - first)), *key = (const __m256i *)(keys + i);
        a = _mm256_add_epi64(a, product(_mm256_loadu_si256(at), _mm256_load_si256(key)));
        b = _mm256_add_epi64(b, product(_mm256_loadu_si256(at + 1), _mm256_load_si256(key + 1)));
    }
    a = _mm256_add_epi64(a, b);
    const __m128i pair = _mm_add_epi64(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    return (uint64_t)_mm_cvtsi128_si64(pair) + (uint64_t)_mm_extract_epi64(pair, 1);
}

#define AVX512 __attribute__((target("avx512f")))

AVX512 static uint64_t nh_avx512(const uint8_t *bytes, size_t first, size_t end)
{
    __m512i sum = _mm512_setzero_si512();
    for (size_t i = 0; i < end; i += STRIPE) { /* what is masked out is not read */
        const __mmask8 some = i < first ? (__mmask8)(0xFF << first) : 0xFF;
        const __m512i words = _mm512_maskz_loadu_epi64(some, bytes - 8 * first + 8 * i);
        const __m512i both = _mm512_add_epi32(words, _mm512_maskz_load_epi64(some, keys + i));
        sum = _mm512_add_epi64(sum, _mm512_mul_epu32(both, _mm512_srli_epi64(both, 32)));
    }
    uint64_t sums[8];
    _mm512_storeu_si512(sums, sum);
    return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

static nh_kernel nh(void)
{
    if (__builtin_cpu_supports("avx512f"))
        return nh_avx512;
    return __builtin_cpu_supports("avx2") ? nh_avx2 : nh_portable;
}
#else
static nh_kernel nh(void)
{
    return nh_portable;
}
#endif

static uint32_t checksum(nh_kernel kernel, const uint8_t *bytes, size_t length, uint32_t seed)
{
    uint64_t state = (uint64_t)length << 32 | seed;
    size_t left = length / 8, first = (0 - left) % STRIPE;
    while (left) {
        const size_t n = left < CHUNK - first ? left : CHUNK - first;
        state = (state + kernel(bytes, first, first + n)) * 0xFF51AFD7ED558CCDu;
        state ^= state >> 32;
        bytes += 8 * n;
        left -= n;
        first = 0;
    }
    return (uint32_t)(state * 0xC4CEB9FE1A85EC53u >> 32);
}

uint32_t cotra_checksum(const void *data, size_t length, uint32_t seed)
{
    return checksum(nh(), data, length, seed);
}

uint32_t cotra_checksum_portable(const void *data, size_t length, uint32_t seed)
{
    return checksum(nh_portable, data, length, seed);
}
