#include "kernels/kernels.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include <immintrin.h>
#include <stddef.h>

static inline float sum8(__m256 v)
{
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

static inline __m256 load_f32(const void *x, uint32_t i)
{
    return _mm256_loadu_ps((const float *)x + i);
}

static inline __m256 load_f16(const void *x, uint32_t i)
{
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)((const uint16_t *)x + i)));
}

static inline __m256 load_u8(const void *x, uint32_t i)
{
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)((const uint8_t *)x + i))));
}

static inline __m256 square(__m256 a, __m256 b, __m256 sum)
{
    __m256 d = _mm256_sub_ps(a, b);
    return _mm256_fmadd_ps(d, d, sum);
}

static inline __m256 product(__m256 a, __m256 b, __m256 sum)
{
    return _mm256_fmadd_ps(a, b, sum);
}

/* Four running sums hide the latency of the multiply-add. */
#define PAIR_KERNEL(name, load, term)                                                                                  \
    static float name(const float *query, const void *vector, uint32_t dim)                                            \
    {                                                                                                                  \
        __m256 a = _mm256_setzero_ps(), b = a, c = a, d = a;                                                           \
        uint32_t i = 0;                                                                                                \
        for (; i + 32 <= dim; i += 32) {                                                                               \
            a = term(_mm256_loadu_ps(query + i), load(vector, i), a);                                                  \
            b = term(_mm256_loadu_ps(query + i + 8), load(vector, i + 8), b);                                          \
            c = term(_mm256_loadu_ps(query + i + 16), load(vector, i + 16), c);                                        \
            d = term(_mm256_loadu_ps(query + i + 24), load(vector, i + 24), d);                                        \
        }                                                                                                              \
        for (; i < dim; i += 8)                                                                                        \
            a = term(_mm256_loadu_ps(query + i), load(vector, i), a);                                                  \
        return sum8(_mm256_add_ps(_mm256_add_ps(a, b), _mm256_add_ps(c, d)));                                          \
    }

PAIR_KERNEL(l2_f32, load_f32, square)
PAIR_KERNEL(l2_f16, load_f16, square)
PAIR_KERNEL(l2_u8, load_u8, square)
PAIR_KERNEL(dot_f32, load_f32, product)
PAIR_KERNEL(dot_f16, load_f16, product)
PAIR_KERNEL(dot_u8, load_u8, product)

/* The two lanes of `low` added, then those of `high`. */
static inline __m256i fold(__m256i low, __m256i high)
{
    return _mm256_add_epi16(_mm256_permute2x128_si256(low, high, 0x20), _mm256_permute2x128_si256(low, high, 0x31));
}

/* Two groups a step: their 16 table entries sit in the two lanes, as do their codes. Even and odd neighbours' bytes are
 * summed as 16-bit words: `all` holds even + 256 x odd (mod 2^16), `odd` the odd ones, so even = all - 256 x odd. A
 * word overflows after 257 groups; 256 (1,024 dimensions) are summed before they go into 32 bits. */
static void scan(const uint8_t *table, const uint8_t *codes, uint32_t code_dim, uint32_t *sums)
{
    const __m256i low_nibbles = _mm256_set1_epi8(15), zero = _mm256_setzero_si256();
    __m256i a = zero, b = zero, c = zero, e = zero; /* low lanes: neighbours from 0, 4, 8, 12; high lanes: 16 more */
    for (uint32_t begin = 0; begin < code_dim; begin += 1024) {
        uint32_t end = begin + 1024 < code_dim ? begin + 1024 : code_dim;
        __m256i all_low = zero, odd_low = zero, all_high = zero, odd_high = zero;
        for (uint32_t d = begin; d < end; d += 8) {
            __m256i entries = _mm256_loadu_si256((const __m256i *)(table + (size_t)d * 4));
            __m256i code = _mm256_loadu_si256((const __m256i *)(codes + (size_t)d * 4));
            __m256i low = _mm256_shuffle_epi8(entries, _mm256_and_si256(code, low_nibbles));
            __m256i high = _mm256_shuffle_epi8(entries, _mm256_and_si256(_mm256_srli_epi16(code, 4), low_nibbles));
            all_low = _mm256_add_epi16(all_low, low);
            odd_low = _mm256_add_epi16(odd_low, _mm256_srli_epi16(low, 8));
            all_high = _mm256_add_epi16(all_high, high);
            odd_high = _mm256_add_epi16(odd_high, _mm256_srli_epi16(high, 8));
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
    const __m256 d = _mm256_set1_ps(distance), m = _mm256_set1_ps(t), o = _mm256_set1_ps(offset),
                 s = _mm256_set1_ps(scale);
    for (int j = 0; j < 32; j += 8) {
        __m256 sum = _mm256_cvtepi32_ps(_mm256_loadu_si256((const __m256i *)(sums + j)));
        __m256 dot = _mm256_add_ps(o, _mm256_mul_ps(s, sum));
        __m256 base = _mm256_add_ps(d, _mm256_mul_ps(m, _mm256_loadu_ps(f0 + j)));
        __m256 value = _mm256_sub_ps(base, _mm256_mul_ps(_mm256_loadu_ps(f1 + j), dot));
        _mm256_storeu_ps(out + j, value);
        below |= (uint32_t)_mm256_movemask_ps(_mm256_cmp_ps(value, _mm256_set1_ps(bound), _CMP_LT_OQ)) << j;
    }
    return below;
}

static void weigh(const float *f0, const float *f1, float spread, float rounding, float *out)
{
    const __m256 one = _mm256_set1_ps(1), s = _mm256_set1_ps(spread), r = _mm256_set1_ps(rounding);
    const __m256 sign = _mm256_set1_ps(-0.0f);
    const __m256 least = _mm256_set1_ps(COTRA_LEAST_WEIGHT), most = _mm256_set1_ps(COTRA_MOST_WEIGHT);
    for (int j = 0; j < 32; j += 8) {
        __m256 error = _mm256_mul_ps(_mm256_andnot_ps(sign, _mm256_loadu_ps(f0 + j)), r);
        __m256 weight = _mm256_div_ps(one, _mm256_add_ps(_mm256_mul_ps(_mm256_loadu_ps(f1 + j), s), error));
        _mm256_storeu_ps(out + j, _mm256_max_ps(_mm256_min_ps(weight, most), least));
    }
}

static int32_t dot_i8(const int16_t *query, const int8_t *vector, uint32_t n)
{
    __m256i a = _mm256_setzero_si256(), b = a;
    for (uint32_t i = 0; i < n; i += 32) {
        const __m256i x = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(vector + i)));
        const __m256i y = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(vector + i + 16)));
        a = _mm256_add_epi32(a, _mm256_madd_epi16(_mm256_loadu_si256((const __m256i *)(query + i)), x));
        b = _mm256_add_epi32(b, _mm256_madd_epi16(_mm256_loadu_si256((const __m256i *)(query + i + 16)), y));
    }
    a = _mm256_add_epi32(a, b);
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4E));
    return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xB1)));
}

static uint32_t least(const float *keys, uint32_t n)
{
    __m256 a = _mm256_load_ps(keys), b = _mm256_load_ps(keys + 8);
    for (uint32_t i = 16; i < n; i += 16) {
        a = _mm256_min_ps(a, _mm256_load_ps(keys + i));
        b = _mm256_min_ps(b, _mm256_load_ps(keys + i + 8));
    }
    a = _mm256_min_ps(a, b);
    a = _mm256_min_ps(a, _mm256_permute2f128_ps(a, a, 1));
    a = _mm256_min_ps(a, _mm256_permute_ps(a, 0x4E));
    a = _mm256_min_ps(a, _mm256_permute_ps(a, 0xB1));
    for (uint32_t i = 0; i < n; i += 8) {
        int equal = _mm256_movemask_ps(_mm256_cmp_ps(a, _mm256_load_ps(keys + i), _CMP_EQ_OQ));
        if (equal)
            return i + (uint32_t)__builtin_ctz((unsigned)equal);
    }
    return 0;
}

const cotra_kernels cotra_kernels_avx2 = {.l2 = {l2_f32, l2_f16, l2_u8},
                                          .dot = {dot_f32, dot_f16, dot_u8},
                                          .scan = scan,
                                          .estimate = estimate,
                                          .weigh = weigh,
                                          .dot_i8 = dot_i8,
                                          .least = least};

#else
typedef int cotra_no_avx2_here; /* ISO C has no empty translation units */
#endif
