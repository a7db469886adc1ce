#include "kernels/kernels.h"

#include "base/checksum.h"
#include "base/status.h"
#include "format/image.h"

const cotra_kernels *cotra_kernels_get(int simd)
{
    if (simd == COTRA_SIMD_PORTABLE)
        return &cotra_kernels_portable;
#if defined(__x86_64__)
    if (simd == COTRA_SIMD_AVX512 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && cotra_kernels_get(COTRA_SIMD_AVX2))
        return &cotra_kernels_avx512;
    if (simd == COTRA_SIMD_AVX2 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
        __builtin_cpu_supports("f16c"))
        return &cotra_kernels_avx2;
#endif
    return NULL;
}

int cotra_simd_best(void)
{
    for (int simd = COTRA_SIMD_AVX512; simd > COTRA_SIMD_PORTABLE; simd--)
        if (cotra_kernels_get(simd))
            return simd;
    return COTRA_SIMD_PORTABLE;
}

const char *cotra_simd_name(int simd)
{
    static const char *const names[] = {"portable", "avx2", "avx512"};
    return simd >= 0 && simd <= COTRA_SIMD_AVX512 ? names[simd] : "unknown";
}

static const cotra_kernels *get_or_fail(int simd, cotra_error *err)
{
    const cotra_kernels *kernels = cotra_kernels_get(simd);
    if (!kernels)
        cotra_fail(err, COTRA_ERR_ARGUMENT, "this CPU or build has no %s kernels", cotra_simd_name(simd));
    return kernels;
}

int cotra_kernel_distance(int simd, uint32_t metric, uint32_t vector_type, const float *query, const void *vector,
                          uint32_t dim, float *out, cotra_error *err)
{
    const cotra_kernels *kernels = get_or_fail(simd, err);
    if (!kernels)
        return COTRA_ERR_ARGUMENT;
    if (dim < COTRA_MIN_DIM || dim > COTRA_MAX_DIM || metric > COTRA_METRIC_COSINE || vector_type > COTRA_VECTOR_U8)
        return cotra_fail(err, COTRA_ERR_ARGUMENT, "dim %u, metric %u, vector type %u", dim, metric, vector_type);
    *out = cotra_metric_distance(kernels, metric, vector_type, query, vector, dim);
    return COTRA_OK;
}

int cotra_kernel_scan(int simd, const uint8_t *lut, const uint8_t *codes, uint32_t code_dim, uint32_t *sums,
                      cotra_error *err)
{
    const cotra_kernels *kernels = get_or_fail(simd, err);
    if (!kernels)
        return COTRA_ERR_ARGUMENT;
    if (code_dim == 0 || code_dim % 64 || code_dim > COTRA_MAX_DIM)
        return cotra_fail(err, COTRA_ERR_ARGUMENT, "code_dim must be a multiple of 64, not %u", code_dim);
    kernels->scan(lut, codes, code_dim, sums);
    return COTRA_OK;
}

int cotra_kernel_estimate(int simd, const uint32_t *sums, const float *f0, const float *f1, float distance, float t,
                          float offset, float scale, float bound, float *out, uint32_t *below, cotra_error *err)
{
    const cotra_kernels *kernels = get_or_fail(simd, err);
    if (!kernels)
        return COTRA_ERR_ARGUMENT;
    *below = kernels->estimate(sums, f0, f1, distance, t, offset, scale, bound, out);
    return COTRA_OK;
}

int cotra_kernel_weigh(int simd, const float *f0, const float *f1, float spread, float rounding, float *out,
                       cotra_error *err)
{
    const cotra_kernels *kernels = get_or_fail(simd, err);
    if (!kernels)
        return COTRA_ERR_ARGUMENT;
    kernels->weigh(f0, f1, spread, rounding, out);
    return COTRA_OK;
}

int cotra_kernel_dot_i8(int simd, const int16_t *query, const int8_t *vector, uint32_t n, int32_t *out,
                        cotra_error *err)
{
    const cotra_kernels *kernels = get_or_fail(simd, err);
    if (!kernels)
        return COTRA_ERR_ARGUMENT;
    if (n == 0 || n % 64 || n > COTRA_MAX_DIM)
        return cotra_fail(err, COTRA_ERR_ARGUMENT, "n must be a multiple of 64, at most %d, not %u", COTRA_MAX_DIM, n);
    *out = kernels->dot_i8(query, vector, n);
    return COTRA_OK;
}

int cotra_kernel_least(int simd, const float *keys, uint32_t n, uint32_t *place, cotra_error *err)
{
    const cotra_kernels *kernels = get_or_fail(simd, err);
    if (!kernels)
        return COTRA_ERR_ARGUMENT;
    if (n == 0 || n % COTRA_LEAST_STEP)
        return cotra_fail(err, COTRA_ERR_ARGUMENT, "keys must be a multiple of %d, not %u", COTRA_LEAST_STEP, n);
    *place = kernels->least(keys, n);
    return COTRA_OK;
}

int cotra_kernel_checksum(int simd, const void *data, uint64_t length, uint32_t seed, uint32_t *out, cotra_error *err)
{
    if (!get_or_fail(simd, err))
        return COTRA_ERR_ARGUMENT;
    if (length % 8)
        return cotra_fail(err, COTRA_ERR_ARGUMENT, "length must be a multiple of 8, not %llu",
                          (unsigned long long)length);
    *out =
        simd == COTRA_SIMD_PORTABLE ? cotra_checksum_portable(data, length, seed) : cotra_checksum(data, length, seed);
    return COTRA_OK;
}
