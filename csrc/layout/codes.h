/* Neighbours' codes: RaBitQ with one bit a dimension (Gao and Long, SIGMOD 2024), relative to the node that links to
 * them, as in SymphonyQG (SIGMOD 2025), arranged so that a query prepares its look-up table once and not once for each
 * node.
 *
 * P is a random rotation into code_dim dimensions, m the mean vector of the shard. For a neighbour x of node c let
 * r = P(x - c), b the signs of r (+1, -1), S1 = sum |r_i|, g = |r|^2 / S1 (= |r| / (alpha sqrt(D)) in RaBitQ's terms).
 * Then g <b, P(q - c)> estimates <r, P(q - c)> without bias, and <b, P(q - c)> = <b, P(q - m)> - <b, P(c - m)>, whose
 * second term is known when the image is packed. So with d(q, c) exact from the record:
 *
 *   l2:         d(q, x) = d(q, c) + |r|^2 - 2 <q - c, x - c>   ~  d(q, c) + f0 - f1 <b, P(q - m)>,
 *               f1 = 2 g,   f0 = |r|^2 + f1 <b, P(c - m)>
 *   ip, cosine: d(q, x) = 1 - <q, x> = d(q, c) - <c, x - c> - <q - c, x - c>   ~  the same form,
 *               f1 = g,     f0 = -<c, x - c> + f1 <b, P(c - m)>
 */
#ifndef COTRA_LAYOUT_CODES_H
#define COTRA_LAYOUT_CODES_H

#include "layout/image.h"

/* The rotation: rounds of random sign flips and fast Hadamard transforms, made from the seed alone. */
typedef struct cotra_rotation {
    uint32_t dim, code_dim;
    uint32_t window; /* the largest power of two <= code_dim */
    float *signs;    /* [ROUNDS][code_dim], +1 or -1 */
} cotra_rotation;

int cotra_rotation_create(uint64_t seed, uint32_t dim, cotra_rotation *out, cotra_error *err);
void cotra_rotation_destroy(cotra_rotation *rotation);
/* in float32[dim] -> out float32[code_dim], the same length */
void cotra_rotation_apply(const cotra_rotation *rotation, const float *in, float *out);

/* What a query carries to every node: <b, P(q - m)> ~ offset + scale * (sum of table entries). */
typedef struct cotra_query_codes {
    float offset, scale;
    uint8_t *table; /* [code_dim / 4][16], 32-byte aligned */
} cotra_query_codes;

/* scratch: float32[2 * code_dim]. query and mean: float32[dim]. */
void cotra_query_codes_make(const cotra_rotation *rotation, const float *query, const float *mean, float *scratch,
                            cotra_query_codes *codes);

/* Writes neighbour `slot` of a record: its code and factors. own, own_rotated = P(c - m) and neighbour are float32;
 * scratch: float32[2 * code_dim]. */
void cotra_code_write(const cotra_rotation *rotation, uint32_t metric, const float *own, const float *own_rotated,
                      const float *neighbour, float *scratch, const cotra_record_layout *layout, uint8_t *record,
                      uint32_t slot);

#endif
