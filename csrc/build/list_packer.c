/* The packer of inverted lists: an image, centroids and an assignment in; the image with a section out.
 *
 *   create -> encode (any threads, disjoint ranges that cover all lists) -> finish
 *
 * create() lays the section out behind the image and leaves the image's header alone, so that the image stays valid,
 * and without a section, until finish().
 */
#include "base/arena.h"
#include "base/status.h"
#include "format/codes.h"
#include "format/lists.h"
#include "format/vector_types.h"

#include <math.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

/* Element by element the same operations at every vector width, so the same result on every machine. */
#if defined(__x86_64__) && !defined(__SANITIZE_ADDRESS__)
#define WIDE __attribute__((target_clones("avx2", "default")))
#else
#define WIDE
#endif

struct cotra_ivf_packer {
    cotra_arena *arena;
    cotra_image_info info;
    cotra_ivf_header header;
    cotra_ivf_layout layout;
    cotra_rotation rotation;
    uint32_t *rows;   /* [entries], by list */
    uint64_t *starts; /* [n_lists + 1]: in rows */
    uint64_t *blocks; /* [n_lists]: blocks before the list's */
    atomic_uint_fast64_t encoded;
};

/* One entry's code while it is made. */
typedef struct code {
    float *residual;  /* [code_dim]: r */
    float *absolute;  /* [code_dim]: |r_i| */
    uint8_t *levels;  /* [code_dim]: (v_i + 2^bits - 1) / 2 */
    double length2;   /* <r, r> */
    double product;   /* <r, v> */
    double v_length2; /* <v, v> */
} code;

static uint8_t *section_of(const cotra_ivf_packer *packer)
{
    return cotra_arena_data(packer->arena) + packer->info.nav_offset + packer->info.nav_bytes;
}

static const uint8_t *record_of(const cotra_ivf_packer *packer, uint64_t row)
{
    return cotra_arena_data(packer->arena) + packer->info.records_offset + row * packer->info.record_bytes;
}

/* float16 where it moves no centroid by more than a thousandth of its length. */
static uint32_t choose_type(const cotra_ivf_params *params, uint32_t dim)
{
    for (uint32_t i = 0; i < params->n_lists; i++) {
        const float *centroid = params->centroids + (size_t)i * dim;
        double moved = 0, length2 = 0;
        for (uint32_t j = 0; j < dim; j++) {
            double difference = (double)cotra_f16_to_f32(cotra_f32_to_f16(centroid[j])) - centroid[j];
            moved += difference * difference;
            length2 += (double)centroid[j] * centroid[j];
        }
        if (!(moved <= 1e-6 * length2))
            return COTRA_VECTOR_F32;
    }
    return COTRA_VECTOR_F16;
}

static int check_params(const cotra_image_info *info, const cotra_ivf_params *params, cotra_error *err)
{
    if (info->ivf_bytes)
        return cotra_fail(err, COTRA_ERR_ARGUMENT, "inverted lists: the image has some already");
    if (params->n_lists < 1 || params->n_lists > COTRA_IVF_MAX_LISTS || params->bits < 1 ||
        params->bits > COTRA_IVF_MAX_BITS)
        return cotra_fail(err, COTRA_ERR_ARGUMENT,
                          "inverted lists: %u lists and %u bits where [1, %d] and [1, %d] can be", params->n_lists,
                          params->bits, COTRA_IVF_MAX_LISTS, COTRA_IVF_MAX_BITS);
    for (size_t i = 0; i < (size_t)params->n_lists * info->dim; i++)
        if (!isfinite(params->centroids[i]))
            return cotra_fail(err, COTRA_ERR_ARGUMENT, "inverted lists: centroid %zu is not finite", i / info->dim);
    return COTRA_OK;
}

/* Sorts the rows by list, and counts the blocks. */
static int sort_rows(cotra_ivf_packer *packer, const uint32_t *assignment, cotra_error *err)
{
    const uint32_t n_lists = packer->header.n_lists;
    for (uint64_t row = 0; row < packer->info.count; row++) {
        if (((const cotra_record_head *)record_of(packer, row))->flags & COTRA_NODE_DELETED)
            continue;
        if (assignment[row] >= n_lists)
            return cotra_fail(err, COTRA_ERR_ARGUMENT, "inverted lists: row %llu is assigned to list %u of %u",
                              (unsigned long long)row, assignment[row], n_lists);
        packer->starts[assignment[row] + 1]++;
        packer->header.entries++;
    }
    uint64_t blocks = 0;
    for (uint32_t i = 0; i < n_lists; i++) {
        packer->blocks[i] = blocks;
        blocks += cotra_ivf_blocks((uint32_t)packer->starts[i + 1]);
        packer->starts[i + 1] += packer->starts[i];
    }
    packer->header.list_bytes = blocks * packer->layout.block_bytes;
    for (uint64_t row = 0; row < packer->info.count; row++) /* moves each start to its list's end... */
        if (!(((const cotra_record_head *)record_of(packer, row))->flags & COTRA_NODE_DELETED))
            packer->rows[packer->starts[assignment[row]]++] = (uint32_t)row;
    for (uint32_t i = n_lists; i > 0; i--) /* ... and back */
        packer->starts[i] = packer->starts[i - 1];
    packer->starts[0] = 0;
    return COTRA_OK;
}

static int packer_fill(cotra_ivf_packer *packer, const cotra_ivf_params *params, cotra_error *err)
{
    const cotra_image_info *info = &packer->info;
    const uint32_t n_lists = params->n_lists;
    packer->header = (cotra_ivf_header){.magic = COTRA_IVF_MAGIC,
                                        .version = COTRA_IVF_VERSION,
                                        .n_lists = n_lists,
                                        .bits = params->bits,
                                        .code_dim = info->code_dim,
                                        .centroid_type = choose_type(params, info->dim)};
    cotra_ivf_layout_make(info, n_lists, params->bits, packer->header.centroid_type, &packer->layout);
    packer->header.table_bytes = packer->layout.table_bytes;
    packer->rows = malloc(info->count * sizeof *packer->rows);
    packer->starts = calloc((size_t)n_lists + 1, sizeof *packer->starts);
    packer->blocks = calloc(n_lists, sizeof *packer->blocks);
    if (!packer->rows || !packer->starts || !packer->blocks)
        return cotra_fail(err, COTRA_ERR_NO_MEMORY, "inverted lists: no memory for %llu rows",
                          (unsigned long long)info->count);
    int status = cotra_rotation_create(info->seed, info->dim, &packer->rotation, err);
    if (status)
        return status;
    status = sort_rows(packer, params->assignment, err);
    if (status)
        return status;
    status = cotra_arena_grow(packer->arena, info->image_bytes + packer->header.table_bytes + packer->header.list_bytes,
                              err);
    if (status)
        return status;
    uint8_t *section = section_of(packer);
    for (uint32_t i = 0; i < n_lists; i++) {
        cotra_vector_store(packer->header.centroid_type, params->centroids + (size_t)i * info->dim, info->dim,
                           section + packer->layout.centroids + (size_t)i * packer->layout.stride);
        ((uint32_t *)(section + packer->layout.sizes))[i] = (uint32_t)(packer->starts[i + 1] - packer->starts[i]);
    }
    return COTRA_OK;
}

int cotra_ivf_packer_create(cotra_arena *arena, const cotra_ivf_params *params, cotra_ivf_packer **out,
                            cotra_error *err)
{
    *out = NULL;
    cotra_arena_info memory;
    cotra_arena_get_info(arena, &memory);
    if (memory.fd < 0 || !memory.writable || memory.locked || memory.sealed)
        return cotra_fail(err, COTRA_ERR_ARGUMENT,
                          "inverted lists: the arena must be an own memfd, neither locked nor sealed yet");
    cotra_image_info info;
    int status = cotra_image_validate(cotra_arena_data(arena), memory.length_bytes, 0, &info, err);
    if (status)
        return status;
    status = check_params(&info, params, err);
    if (status)
        return status;
    cotra_ivf_packer *packer = calloc(1, sizeof *packer);
    if (!packer)
        return cotra_fail(err, COTRA_ERR_NO_MEMORY, "inverted lists: no memory");
    packer->arena = arena;
    packer->info = info;
    status = packer_fill(packer, params, err);
    if (status) {
        cotra_ivf_packer_destroy(packer);
        return status;
    }
    *out = packer;
    return COTRA_OK;
}

void cotra_ivf_packer_destroy(cotra_ivf_packer *packer)
{
    if (!packer)
        return;
    cotra_rotation_destroy(&packer->rotation);
    free(packer->rows);
    free(packer->starts);
    free(packer->blocks);
    free(packer);
}

/* The cosine, but for |r|, of the angle between r and the grid's point at this scale. absolute: [n], n a multiple of 8.
 */
WIDE static float try_scale(const float *restrict absolute, uint32_t n, float inverse, int32_t cells)
{
    float products[8] = {0}, squares[8] = {0};
    for (uint32_t i = 0; i < n; i += 8)
        for (uint32_t j = 0; j < 8; j++) {
            int32_t cell = (int32_t)(absolute[i + j] * inverse);
            float v = (float)(2 * (cell < cells ? cell : cells - 1) + 1);
            products[j] += absolute[i + j] * v;
            squares[j] += v * v;
        }
    float product = 0, square = 0;
    for (uint32_t j = 0; j < 8; j++) {
        product += products[j];
        square += squares[j];
    }
    return product / sqrtf(square);
}

/* Chooses v for code->residual: the scales tried reach from the one that clips nothing to one that clips what is beyond
 * 0.4 of the largest component. */
static void quantise(code *made, uint32_t n, uint32_t bits)
{
    enum { SCALES = 27 };
    const int32_t cells = 1 << (bits - 1); /* of each sign */
    float largest = 0;
    made->length2 = made->product = made->v_length2 = 0;
    for (uint32_t i = 0; i < n; i++) {
        made->absolute[i] = fabsf(made->residual[i]);
        made->length2 += (double)made->residual[i] * made->residual[i];
        largest = made->absolute[i] > largest ? made->absolute[i] : largest;
    }
    float best_inverse = 0, best = 0;
    if (largest > 1e-30f && largest < 1e30f) /* else all components are in the lowest cell: signs alone */
        for (int s = 0; s < SCALES && bits > 1; s++) {
            float inverse = (float)cells / (largest * (1.02f - 0.0245f * (float)s));
            float cosine = try_scale(made->absolute, n, inverse, cells);
            if (cosine > best) {
                best = cosine;
                best_inverse = inverse;
            }
        }
    for (uint32_t i = 0; i < n; i++) {
        int32_t cell = best_inverse > 0 ? (int32_t)(made->absolute[i] * best_inverse) : 0;
        cell = cell < cells ? cell : cells - 1;
        made->levels[i] = (uint8_t)(made->residual[i] >= 0 ? cells + cell : cells - 1 - cell);
        made->product += (double)made->absolute[i] * (2 * cell + 1);
        made->v_length2 += (double)(2 * cell + 1) * (2 * cell + 1);
    }
}

/* Writes an entry's code and factors. rest is |r|^2 for l2, else -<c, x - c>. */
static void write_entry(const cotra_ivf_packer *packer, const code *made, double rest, uint8_t *block, uint32_t slot)
{
    const uint32_t n = packer->info.code_dim, bits = packer->header.bits;
    const int shift = slot < 16 ? 0 : 4;
    for (uint32_t g = 0; g < n; g += 4) {
        const uint8_t *levels = made->levels + g;
        for (uint32_t b = 0; b < bits; b++) {
            unsigned nibble = (levels[0] >> b & 1u) | (levels[1] >> b & 1u) << 1 | (levels[2] >> b & 1u) << 2 |
                              (levels[3] >> b & 1u) << 3;
            uint8_t *place = block + (size_t)b * packer->layout.plane_bytes + (size_t)g * 4 + slot % 16;
            *place = (uint8_t)((*place & (0xF0u >> shift)) | nibble << shift);
        }
    }
    double f1 = made->product > 0 ? made->length2 / made->product : 0;
    if (packer->info.metric == COTRA_METRIC_L2)
        f1 *= 2;
    ((float *)(block + packer->layout.f0))[slot] = (float)rest;
    ((float *)(block + packer->layout.f1))[slot] = (float)f1;
}

/* memory: float32[5 * code_dim], levels: [code_dim] */
static void encode_list(cotra_ivf_packer *packer, uint32_t list, float *memory, uint8_t *levels)
{
    const cotra_image_info *info = &packer->info;
    const cotra_ivf_layout *layout = &packer->layout;
    const uint32_t n = info->code_dim, dim = info->dim, prefix_bytes = cotra_prefix_bytes(info);
    float *centroid = memory, *vector = memory + n, *difference = memory + 2 * n;
    code made = {.residual = memory + 3 * n, .absolute = memory + 4 * n, .levels = levels};
    uint8_t *section = section_of(packer);
    uint8_t *blocks = section + layout->table_bytes + packer->blocks[list] * layout->block_bytes;
    const uint32_t *rows = packer->rows + packer->starts[list];
    const uint32_t size = (uint32_t)(packer->starts[list + 1] - packer->starts[list]);
    const uint64_t n_blocks = cotra_ivf_blocks(size);

    cotra_vector_load(packer->header.centroid_type, section + layout->centroids + (size_t)list * layout->stride, dim,
                      centroid);
    for (uint64_t b = 0; b < n_blocks; b++)
        memset(blocks + b * layout->block_bytes + layout->rows, 0xFF, 4 * COTRA_BLOCK);
    double squares = 0, errors = 0;
    for (uint32_t i = 0; i < size; i++) {
        uint8_t *block = blocks + (uint64_t)(i / COTRA_BLOCK) * layout->block_bytes;
        const uint8_t *record = record_of(packer, rows[i]);
        double own_product = 0; /* <c, x - c> */
        cotra_own_load(info, record + COTRA_RECORD_HEAD_BYTES, vector);
        for (uint32_t j = 0; j < dim; j++) {
            difference[j] = vector[j] - centroid[j];
            own_product += (double)centroid[j] * difference[j];
        }
        cotra_rotation_apply(&packer->rotation, difference, made.residual);
        quantise(&made, n, packer->header.bits);
        write_entry(packer, &made, info->metric == COTRA_METRIC_L2 ? made.length2 : -own_product, block,
                    i % COTRA_BLOCK);
        ((uint32_t *)(block + layout->rows))[i % COTRA_BLOCK] = rows[i];
        ((uint32_t *)(block + layout->sums))[i % COTRA_BLOCK] = cotra_prefix_checksum(record, prefix_bytes, rows[i]);
        squares += made.length2;
        /* g v = r + e, e orthogonal to r; <e, u> for u in any direction but r's has the variance |e|^2 / (D - 1) */
        if (made.product > 0)
            errors += made.length2 * (made.length2 / made.product * (made.v_length2 / made.product) - 1) / (n - 1);
    }
    uint32_t sum = 0;
    for (uint64_t b = 0; b < n_blocks; b++)
        sum += cotra_ivf_block_checksum(blocks + b * layout->block_bytes, layout->block_bytes, b);
    ((uint32_t *)(section + layout->checksums))[list] = sum;
    ((float *)(section + layout->radii))[list] = size ? (float)sqrt(squares / size) : 0;
    ((float *)(section + layout->errors))[list] = size && errors > 0 ? (float)sqrt(errors / size) : 0;
}

int cotra_ivf_packer_encode(cotra_ivf_packer *packer, uint32_t begin, uint32_t end, cotra_error *err)
{
    if (begin > end || end > packer->header.n_lists)
        return cotra_fail(err, COTRA_ERR_ARGUMENT, "inverted lists: lists [%u, %u) of %u", begin, end,
                          packer->header.n_lists);
    const size_t n = packer->info.code_dim;
    float *memory = malloc(5 * n * sizeof *memory);
    uint8_t *levels = malloc(n);
    int status = COTRA_OK;
    if (!memory || !levels) {
        status = cotra_fail(err, COTRA_ERR_NO_MEMORY, "inverted lists: no memory");
        goto done;
    }
    for (uint32_t list = begin; list < end; list++)
        encode_list(packer, list, memory, levels);
    atomic_fetch_add(&packer->encoded, end - begin);
done:
    free(memory);
    free(levels);
    return status;
}

int cotra_ivf_packer_finish(cotra_ivf_packer *packer, cotra_error *err)
{
    if (atomic_load(&packer->encoded) != packer->header.n_lists)
        return cotra_fail(err, COTRA_ERR_ARGUMENT, "inverted lists: %llu of %u lists were encoded",
                          (unsigned long long)atomic_load(&packer->encoded), packer->header.n_lists);
    uint8_t *section = section_of(packer);
    packer->header.table_checksum = cotra_ivf_table_checksum(section, packer->header.table_bytes);
    memcpy(section, &packer->header, sizeof packer->header);
    cotra_image_header *image = (cotra_image_header *)cotra_arena_data(packer->arena);
    cotra_image_info info = image->info;
    info.ivf_offset = info.image_bytes;
    info.ivf_bytes = packer->header.table_bytes + packer->header.list_bytes;
    info.ivf_checksum = cotra_ivf_header_checksum(&packer->header);
    info.image_bytes += info.ivf_bytes;
    cotra_image_seal(image, &info);
    return cotra_image_validate(image, info.image_bytes, 0, &info, err);
}
