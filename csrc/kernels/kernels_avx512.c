#include "kernels/kernels.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#include <immintrin.h>
#include <stddef.h>

static inline __m512 load_f32(const void *x, uint32_t i)
{
    return _mm512_loadu_ps((const float *)x + i);
}

static inline __m512 load_f16(const void *x, uint32_t i)
{
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)((const uint16_t *)x + i)));
}

static inline __m512 load_u8(const void *x, uint32_t i)
{
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)((const uint8_t *)x + i))));
}

static inline __m512 square(__m512 a, __m512 b, __m512 sum)
{
    __m512 d = _mm512_sub_ps(a, b);
    return _mm512_fmadd_ps(d, d, sum);
}

static inline __m512 product(__m512 a, __m512 b, __m512 sum)
{
    return _mm512_fmadd_ps(a, b, sum);
}

/* A float32 vector is padded to 8 components, the others to 16: its last 8 may be half a register. */
#define PAIR_KERNEL(name, load, term, half)                                                                            \
    static float name(const float *query, const void *vector, uint32_t dim)                                            \
    {                                                                                                                  \
        __m512 a = _mm512_setzero_ps(), b = a, c = a, d = a;                                                           \
        uint32_t i = 0;                                                                                                \
        for (; i + 64 <= dim; i += 64) {                                                                               \
            a = term(_mm512_loadu_ps(query + i), load(vector, i), a);                                                  \
            b = term(_mm512_loadu_ps(query + i + 16), load(vector, i + 16), b);                                        \
            c = term(_mm512_loadu_ps(query + i + 32), load(vector, i + 32), c);                                        \
            d = term(_mm512_loadu_ps(query + i + 48), load(vector, i + 48), d);                                        \
        }                                                                                                              \
        for (; half ? i + 8 < dim : i < dim; i += 16)                                                                  \
            a = term(_mm512_loadu_ps(query + i), load(vector, i), a);                                                  \
        if (half && i < dim)                                                                                           \
            b = term(_mm512_maskz_loadu_ps(0xFF, query + i), _mm512_maskz_loadu_ps(0xFF, (const float *)vector + i),   \
                     b);                                                                                               \
        return _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(a, b), _mm512_add_ps(c, d)));                          \
    }

PAIR_KERNEL(l2_f32, load_f32, square, 1)
PAIR_KERNEL(l2_f16, load_f16, square, 0)
PAIR_KERNEL(l2_u8, load_u8, square, 0)
PAIR_KERNEL(dot_f32, load_f32, product, 1)
PAIR_KERNEL(dot_f16, load_f16, product, 0)
PAIR_KERNEL(dot_u8, load_u8, product, 0)

/* The four lanes of a sum, added in pairs. */
static inline __m256i halve(__m512i x)
{
    return _mm256_add_epi16(_mm512_castsi512_si256(x), _mm512_extracti64x4_epi64(x, 1));
}

/* The two lanes of `low` added, then those of `high`. */
static inline __m256i fold(__m512i low, __m512i high)
{
    const __m256i a = halve(low), b = halve(high);
    return _mm256_add_epi16(_mm256_permute2x128_si256(a, b, 0x20), _mm256_permute2x128_si256(a, b, 0x31));
}

/* As the AVX2 kernel, with four groups a step. */
static void scan(const uint8_t *table, const uint8_t *codes, uint32_t code_dim, uint32_t *sums)
{
    const __m512i low_nibbles = _mm512_set1_epi8(15);
    const __m256i zero = _mm256_setzero_si256();
    __m256i a = zero, b = zero, c = zero, e = zero;
    for (uint32_t begin = 0; begin < code_dim; begin += 1024) {
        uint32_t end = begin + 1024 < code_dim ? begin + 1024 : code_dim;
        __m512i all_low = _mm512_setzero_si512(), odd_low = all_low, all_high = all_low, odd_high = all_low;
        for (uint32_t d = begin; d < end; d += 16) {
            __m512i entries = _mm512_loadu_si512(table + (size_t)d * 4);
            __m512i code = _mm512_loadu_si512(codes + (size_t)d * 4);
            __m512i low = _mm512_shuffle_epi8(entries, _mm512_and_si512(code, low_nibbles));
            __m512i high = _mm512_shuffle_epi8(entries, _mm512_and_si512(_mm512_srli_epi16(code, 4), low_nibbles));
            all_low = _mm512_add_epi16(all_low, low);
            odd_low = _mm512_add_epi16(odd_low, _mm512_srli_epi16(low, 8));
            all_high = _mm512_add_epi16(all_high, high);
            odd_high = _mm512_add_epi16(odd_high, _mm512_srli_epi16(high, 8));
        }
        __m256i odd = fold(odd_low, odd_high);
        __m256i even = _mm256_sub_epi16(fold(all_low, all_high), _mm256_slli_epi16(odd, 8));
        __m256i first = _mm256_unpacklo_epi16(even, odd), second = _mm256_unpackhi_epi16(even, odd);
        a = _mm256_add_epi32(a, _mm256_unpacklo_epi16(first, zero));
        b = _mm256_add_epi32(b, _mm256_unpackhi_epi16(first, zero));
        c = _mm256_add_epi32(c, _mm256_unpacklo_epi16(second, zero));
        e = _mm256_add_epi32(e, _mm256_unpackhi_epi16(second, zero));
    }
    __m256i *out = (__m256i *)sums;
    _mm256_storeu_si256(out, _mm256_permute2x128_si256(a, b, 0x20));
    _mm256_storeu_si256(out + 1, _mm256_permute2x128_si256(c, e, 0x20));
    _mm256_storeu_si256(out + 2, _mm256_permute2x128_si256(a, b, 0x31));
    _mm256_storeu_si256(out + 3, _mm256_permute2x128_si256(c, e, 0x31));
}

static uint32_t estimate(const uint32_t *sums, const float *f0, const float *f1, float distance, float t, float offset,
                         float scale, float bound, float *out)
{
    uint32_t below = 0;
    const __m512 d = _mm512_set1_ps(distance), m = _mm512_set1_ps(t), o = _mm512_set1_ps(offset);
    const __m512 s = _mm512_set1_ps(scale), least = _mm512_set1_ps(bound);
    for (int j = 0; j < 32; j += 16) {
        __m512 sum = _mm512_cvtepi32_ps(_mm512_loadu_si512(sums + j));
        __m512 dot = _mm512_add_ps(o, _mm512_mul_ps(s, sum));
        __m512 base = _mm512_add_ps(d, _mm512_mul_ps(m, _mm512_loadu_ps(f0 + j)));
        __m512 value = _mm512_sub_ps(base, _mm512_mul_ps(_mm512_loadu_ps(f1 + j), dot));
        _mm512_storeu_ps(out + j, value);
        below |= (uint32_t)_mm512_cmp_ps_mask(value, least, _CMP_LT_OQ) << j;
    }
    return below;
}

static void weigh(const float *f0, const float *f1, float spread, float rounding, float *out)
{
    const __m512 one = _mm512_set1_ps(1), s = _mm512_set1_ps(spread), r = _mm512_set1_ps(rounding);
    const __m512 least = _mm512_set1_ps(COTRA_LEAST_WEIGHT), most = _mm512_set1_ps(COTRA_MOST_WEIGHT);
    for (int j = 0; j < 32; j += 16) {
        __m512 error = _mm512_mul_ps(_mm512_abs_ps(_mm512_loadu_ps(f0 + j)), r);
        __m512 weight = _mm512_div_ps(one, _mm512_add_ps(_mm512_mul_ps(_mm512_loadu_ps(f1 + j), s), error));
        _mm512_storeu_ps(out + j, _mm512_max_ps(_mm512_min_ps(weight, most), least));
    }
}

static int32_t dot_i8(const int16_t *query, const int8_t *vector, uint32_t n)
{
    __m512i a = _mm512_setzero_si512(), b = a;
    for (uint32_t i = 0; i < n; i += 64) {
        const __m512i x = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)(vector + i)));
        const __m512i y = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)(vector + i + 32)));
        a = _mm512_add_epi32(a, _mm512_madd_epi16(_mm512_loadu_si512(query + i), x));
        b = _mm512_add_epi32(b, _mm512_madd_epi16(_mm512_loadu_si512(query + i + 32), y));
    }
    return _mm512_reduce_add_epi32(_mm512_add_epi32(a, b));
}

static uint32_t least(const float *keys, uint32_t n)
{
    __m512 a = _mm512_load_ps(keys);
    for (uint32_t i = 16; i < n; i += 16)
        a = _mm512_min_ps(a, _mm512_load_ps(keys + i));
    const __m512 all = _mm512_set1_ps(_mm512_reduce_min_ps(a));
    for (uint32_t i = 0; i < n; i += 16) {
        const __mmask16 equal = _mm512_cmp_ps_mask(all, _mm512_load_ps(keys + i), _CMP_EQ_OQ);
        if (equal)
            return i + (uint32_t)__builtin_ctz((unsigned)equal);
    }
    return 0;
}

const cotra_kernels cotra_kernels_avx512 = {.l2 = {l2_f32, l2_f16, l2_u8},
                                            .dot = {dot_f32, dot_f16, dot_u8},
                                            .scan = scan,
                                            .estimate = estimate,
                                            .weigh = weigh,
                                            .dot_i8 = dot_i8,
                                            .least = least};

#else
typedef int cotra_no_avx512_here; /* ISO C has no empty translation units */
#endif
