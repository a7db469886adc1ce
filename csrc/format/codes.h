/* Neighbours' codes: RaBitQ with one bit a dimension (Gao and Long, SIGMOD 2024), relative to the node that links to
 * them, as in SymphonyQG (SIGMOD 2025), arranged so that a query prepares its look-up table once and not once for each
 * node.
 *
 * P is a random rotation into D = code_dim dimensions. For a neighbour x of node c let r = P(x - c), b the signs of r
 * (+1, -1), S1 = sum |r_i|, g = |r|^2 / S1. Then g <b, P(u)> estimates <x - c, u> for any u. Its standard deviation is
 * g |u| sqrt(1 - a^2), where a = S1 / (|r| sqrt(D)) is near sqrt(2 / pi): 0.6 g |u|. So u is chosen short:
 *
 *   l2:         d(q, x) = d(q, c) + |r|^2 - 2 <x - c, u>                   u = q - c
 *   ip, cosine: d(q, x) = d(q, c) - t <x - c, c> - <x - c, u>              u = q - t c,  t = <q, c> / |c|^2
 *
 * For ip, u is the part of q that is orthogonal to c. No other multiple of c leaves less, and it grows with q: the
 * ranking of a query does not depend on its length.
 *
 * <b, P(u)> is the difference of <b, P(q - m)>, from the query's table, and a sum that is known when the image is
 * packed. m is the mean vector for l2, and 0 for ip and cosine. Both kinds have one form, with t = 1 for l2:
 *
 *   d(q, x) ~ d(q, c) + t f0 - f1 <b, P(q - m)>
 *   l2:         f1 = 2 g,   f0 = |r|^2       + f1 <b, P(c - m)>
 *   ip, cosine: f1 = g,     f0 = -<c, x - c> + f1 <b, P(c)>
 *
 * The two parts of the difference are rounded, each by its own length. Where c - m is longer than COTRA_CENTRED times
 * the difference to the nearest neighbour, that would be seen. Such a record is centred: f0 lacks its second term, and
 * who reads it makes a table of P(u) for it.
 */
#ifndef COTRA_FORMAT_CODES_H
#define COTRA_FORMAT_CODES_H

#include "format/image.h"

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

/* A record is centred where |c - m| is more than so many times |x - c|, x being its nearest neighbour. */
#define COTRA_CENTRED 32.0f

/* A look-up table of a vector v: <b, P(v)> ~ offset + scale * (sum of table entries). */
typedef struct cotra_query_codes {
    float offset, scale;
    float rounding2; /* the variance of what rounding the entries adds to <b, P(v)> */
    uint8_t *table;  /* [code_dim / 4][16], 32-byte aligned */
} cotra_query_codes;

/* Of v = vector - centre. scratch: float32[2 * code_dim]. vector and centre: float32[dim]; centre NULL: 0. */
void cotra_query_codes_make(const cotra_rotation *rotation, const float *vector, const float *centre, float *scratch,
                            cotra_query_codes *codes);

/* Writes the codes of one record after the other. own and neighbours are float32[dim]. */
typedef struct cotra_code_writer {
    const cotra_rotation *rotation;
    const cotra_record_layout *layout;
    const float *mean; /* float32[dim]; NULL where it is 0 */
    uint32_t metric;
    float *memory;            /* all that follows */
    float *own;               /* [code_dim]: c, where callers put it */
    float *neighbour;         /* [code_dim]: x, likewise */
    float *rotated, *scratch; /* [code_dim], [2 * code_dim] */
    float *rest, *shift;      /* [slots]: the terms of f0 */
    float gap2, nearest2;     /* |c - m|^2; the least |x - c|^2 that is not 0 */
    uint32_t count;
} cotra_code_writer;

int cotra_code_writer_create(cotra_code_writer *writer, const cotra_rotation *rotation, const cotra_image_info *info,
                             const cotra_record_layout *layout, const float *mean, cotra_error *err);
void cotra_code_writer_destroy(cotra_code_writer *writer);
/* Begins with the node that is in `own`. The record's codes and factors must be zero. */
void cotra_code_writer_begin(cotra_code_writer *writer);
/* Writes the neighbour that is in `neighbour` to the next place. */
void cotra_code_writer_add(cotra_code_writer *writer, uint8_t *record);
/* Writes what depends on all neighbours, in the record's head too. */
void cotra_code_writer_end(cotra_code_writer *writer, uint8_t *record);

#endif
