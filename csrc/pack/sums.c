/* Sums whose bits depend on neither the CPU nor a library: what a build keeps is made of these.
 *
 * A sum is taken from its first term to its last, and each step is a fused multiply-add, which is rounded once
 * everywhere (by hardware, or by libm). Vectors hold sums of different elements, never parts of one, so neither a
 * vector's width nor a tile's size changes a bit. A BLAS promises nothing of the kind: it splits a sum by the CPU's
 * model and by threads. exp, log and the solver are made of single operations, each of them rounded by IEEE 754. */
#include "base/status.h"
#include "distance/kernels.h"

#include <math.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

/* Element by element the same operations at every vector width, so the same result on every machine. */
#if defined(__x86_64__) && !defined(__SANITIZE_ADDRESS__)
#define WIDE __attribute__((target_clones("avx2", "default")))
#else
#define WIDE
#endif

/* A tile of sums, and how many terms of each are added at once. */
enum { ROWS = 12, FLOATS = 32, DOUBLES = 16, DEPTH = 256 };

/* out[i][j] += the sum of rows[i][d step] panel[d][j] over d, for the ROWS of a tile that are `width` numbers apart. */
typedef void add_floats(const float *const *rows, size_t step, const float *panel, size_t depth, float *out,
                        size_t width);
typedef void add_doubles(const double *const *rows, size_t step, const double *panel, size_t depth, double *out,
                         size_t width);

#define PORTABLE(NAME, TYPE, FMA, WIDTH)                                                                               \
    static void NAME(const TYPE *const *rows, size_t step, const TYPE *panel, size_t depth, TYPE *out, size_t width)   \
    {                                                                                                                  \
        for (size_t d = 0; d < depth; d++)                                                                             \
            for (size_t i = 0; i < ROWS; i++)                                                                          \
                for (size_t j = 0; j < WIDTH; j++)                                                                     \
                    out[i * width + j] = FMA(rows[i][d * step], panel[d * WIDTH + j], out[i * width + j]);             \
    }

PORTABLE(add_floats_portable, float, fmaf, FLOATS)
PORTABLE(add_doubles_portable, double, fma, DOUBLES)

#if defined(__x86_64__)
/* HEIGHT rows of COUNT vectors at a time: as many sums as there are registers for. */
#define VECTORS(NAME, TARGET, TYPE, VECTOR, OF, LANES, COUNT, HEIGHT)                                                  \
    __attribute__((target(TARGET))) static void NAME(const TYPE *const *rows, size_t step, const TYPE *panel,          \
                                                     size_t depth, TYPE *out, size_t width)                            \
    {                                                                                                                  \
        for (size_t row = 0; row < ROWS; row += HEIGHT, out += HEIGHT * width) {                                       \
            VECTOR sums[HEIGHT][COUNT], terms[COUNT];                                                                  \
            for (size_t i = 0; i < HEIGHT; i++)                                                                        \
                for (size_t j = 0; j < COUNT; j++)                                                                     \
                    sums[i][j] = OF(loadu)(out + i * width + j * LANES);                                               \
            for (size_t d = 0; d < depth; d++) {                                                                       \
                for (size_t j = 0; j < COUNT; j++)                                                                     \
                    terms[j] = OF(loadu)(panel + (d * COUNT + j) * LANES);                                             \
                for (size_t i = 0; i < HEIGHT; i++)                                                                    \
                    for (size_t j = 0; j < COUNT; j++)                                                                 \
                        sums[i][j] = OF(fmadd)(OF(set1)(rows[row + i][d * step]), terms[j], sums[i][j]);               \
            }                                                                                                          \
            for (size_t i = 0; i < HEIGHT; i++)                                                                        \
                for (size_t j = 0; j < COUNT; j++)                                                                     \
                    OF(storeu)(out + i * width + j * LANES, sums[i][j]);                                               \
        }                                                                                                              \
    }
#define FLOATS_256(OPERATION)  _mm256_##OPERATION##_ps
#define FLOATS_512(OPERATION)  _mm512_##OPERATION##_ps
#define DOUBLES_256(OPERATION) _mm256_##OPERATION##_pd
#define DOUBLES_512(OPERATION) _mm512_##OPERATION##_pd

VECTORS(add_floats_avx2, "avx2,fma", float, __m256, FLOATS_256, 8, 4, 3)
VECTORS(add_floats_avx512, "avx512f", float, __m512, FLOATS_512, 16, 2, 12)
VECTORS(add_doubles_avx2, "avx2,fma", double, __m256d, DOUBLES_256, 4, 4, 3)
VECTORS(add_doubles_avx512, "avx512f", double, __m512d, DOUBLES_512, 8, 2, 12)

static add_floats *const floats_at[] = {add_floats_portable, add_floats_avx2, add_floats_avx512};
static add_doubles *const doubles_at[] = {add_doubles_portable, add_doubles_avx2, add_doubles_avx512};
#else
static add_floats *const floats_at[] = {add_floats_portable};
static add_doubles *const doubles_at[] = {add_doubles_portable};
#endif

/* The distance in memory from one row to the next, and from one term to the next. */
typedef struct {
    size_t row, term;
} strides;

/* out[n][m] += the products of n rows and m rows, of `terms` terms each. */
#define PRODUCTS(NAME, TYPE, KERNEL, WIDTH)                                                                            \
    static void NAME(KERNEL *add, const TYPE *a, strides of_a, size_t n, const TYPE *b, strides of_b, size_t m,        \
                     size_t terms, TYPE *out)                                                                          \
    {                                                                                                                  \
        TYPE panel[DEPTH * WIDTH], tile[ROWS * WIDTH];                                                                 \
        for (size_t column = 0; column < m; column += WIDTH) {                                                         \
            const size_t columns = m - column < WIDTH ? m - column : WIDTH;                                            \
            for (size_t begin = 0; begin < terms; begin += DEPTH) {                                                    \
                const size_t depth = terms - begin < DEPTH ? terms - begin : DEPTH;                                    \
                for (size_t d = 0; d < depth; d++)                                                                     \
                    for (size_t j = 0; j < WIDTH; j++)                                                                 \
                        panel[d * WIDTH + j] = j < columns ? b[(column + j) * of_b.row + (begin + d) * of_b.term] : 0; \
                for (size_t row = 0; row < n; row += ROWS) {                                                           \
                    const size_t height = n - row < ROWS ? n - row : ROWS;                                             \
                    const TYPE *rows[ROWS];                                                                            \
                    for (size_t i = 0; i < ROWS; i++)                                                                  \
                        rows[i] = a + (row + (i < height ? i : 0)) * of_a.row + begin * of_a.term;                     \
                    if (height == ROWS && columns == WIDTH) {                                                          \
                        add(rows, of_a.term, panel, depth, out + row * m + column, m);                                 \
                        continue;                                                                                      \
                    }                                                                                                  \
                    memset(tile, 0, sizeof tile);                                                                      \
                    for (size_t i = 0; i < height; i++)                                                                \
                        memcpy(tile + i * WIDTH, out + (row + i) * m + column, columns * sizeof *out);                 \
                    add(rows, of_a.term, panel, depth, tile, WIDTH);                                                   \
                    for (size_t i = 0; i < height; i++)                                                                \
                        memcpy(out + (row + i) * m + column, tile + i * WIDTH, columns * sizeof *out);                 \
                }                                                                                                      \
            }                                                                                                          \
        }                                                                                                              \
    }

PRODUCTS(products_of_floats, float, add_floats, FLOATS)
PRODUCTS(products_of_doubles, double, add_doubles, DOUBLES)

static int check_level(int simd, cotra_error *err)
{
    if (!cotra_kernels_get(simd) || (size_t)simd >= sizeof floats_at / sizeof *floats_at)
        return cotra_fail(err, COTRA_ERR_ARGUMENT, "this CPU or build has no %s kernels", cotra_simd_name(simd));
    return COTRA_OK;
}

int cotra_sums_products(int simd, const float *a, uint64_t n, const float *b, uint64_t m, uint32_t dim, float *out,
                        cotra_error *err)
{
    if (check_level(simd, err))
        return COTRA_ERR_ARGUMENT;
    memset(out, 0, n * m * sizeof *out);
    products_of_floats(floats_at[simd], a, (strides){dim, 1}, n, b, (strides){dim, 1}, m, dim, out);
    return COTRA_OK;
}

int cotra_sums_add(int simd, const double *a, uint32_t f, const double *b, uint32_t g, uint64_t n, double *out,
                   cotra_error *err)
{
    if (check_level(simd, err))
        return COTRA_ERR_ARGUMENT;
    products_of_doubles(doubles_at[simd], a, (strides){1, f}, f, b, (strides){1, g}, g, n, out);
    return COTRA_OK;
}

WIDE static void subtract(double *restrict row, const double *restrict pivot_row, double factor, size_t n)
{
    for (size_t j = 0; j < n; j++)
        row[j] -= factor * pivot_row[j];
}

/* Gaussian elimination without a search for pivots, which a positive definite matrix does not need. */
void cotra_sums_solve(double *matrix, double *vector, uint32_t n)
{
    for (size_t k = 0; k < n; k++) {
        const double *pivot_row = matrix + k * n;
        for (size_t i = k + 1; i < n; i++) {
            const double factor = pivot_row[i] / pivot_row[k]; /* the upper triangle is enough */
            subtract(matrix + i * n + i, pivot_row + i, factor, n - i);
            vector[i] -= factor * vector[k];
        }
    }
    for (size_t k = n; k-- > 0;) {
        for (size_t j = k + 1; j < n; j++)
            vector[k] -= matrix[k * n + j] * vector[j];
        vector[k] /= matrix[k * n + k];
    }
}

/* 2^m times a Taylor series of e^r, |r| <= ln 2 / 2; ln 2 is taken off in two parts, of which the first times m is
 * exact. */
WIDE void cotra_sums_exp(double *values, uint64_t n)
{
    for (size_t i = 0; i < n; i++) {
        const double x = values[i];
        const double rounded = x * 0x1.71547652b82fep+0 + 0x1.8p52; /* its lowest bits are m */
        const double m = rounded - 0x1.8p52;
        const double r = x - m * 0x1.62e42feep-1 - m * 0x1.a39ef35793c76p-33;
        double sum = 1.0 / 6227020800;
        sum = sum * r + 1.0 / 479001600;
        sum = sum * r + 1.0 / 39916800;
        sum = sum * r + 1.0 / 3628800;
        sum = sum * r + 1.0 / 362880;
        sum = sum * r + 1.0 / 40320;
        sum = sum * r + 1.0 / 5040;
        sum = sum * r + 1.0 / 720;
        sum = sum * r + 1.0 / 120;
        sum = sum * r + 1.0 / 24;
        sum = sum * r + 1.0 / 6;
        sum = sum * r + 0.5;
        sum = sum * r + 1;
        sum = sum * r + 1;
        uint64_t bits;
        memcpy(&bits, &rounded, sizeof bits);
        bits = (bits + 1023) << 52;
        double power;
        memcpy(&power, &bits, sizeof power);
        values[i] = sum * power;
    }
}

/* ln(2^e t) for t in [sqrt(1/2), sqrt(2)): ln t = 2 artanh((t - 1) / (t + 1)). */
WIDE void cotra_sums_log(double *values, uint64_t n)
{
    for (size_t i = 0; i < n; i++) {
        uint64_t bits;
        memcpy(&bits, values + i, sizeof bits);
        const uint64_t moved = bits - 0x3FE6A09E667F3BCDull; /* sqrt(1/2) */
        const uint64_t exponent = (uint64_t)((int64_t)moved >> 52);
        bits -= exponent << 52;
        double t;
        memcpy(&t, &bits, sizeof t);
        const double e = (double)(int32_t)exponent;
        const double s = (t - 1) / (t + 1), s2 = s * s;
        double sum = 1.0 / 21;
        sum = sum * s2 + 1.0 / 19;
        sum = sum * s2 + 1.0 / 17;
        sum = sum * s2 + 1.0 / 15;
        sum = sum * s2 + 1.0 / 13;
        sum = sum * s2 + 1.0 / 11;
        sum = sum * s2 + 1.0 / 9;
        sum = sum * s2 + 1.0 / 7;
        sum = sum * s2 + 1.0 / 5;
        sum = sum * s2 + 1.0 / 3;
        values[i] = e * 0x1.62e42fefa39efp-1 + 2 * (s + s * (s2 * sum));
    }
}
