/* A probe: one query on the inverted lists of all shards, as a state machine that never touches a channel.
 *
 *            begin                pieces of the lists             rerank               vectors
 *   (free) ---------> listing --------------------------> ranked ----------> reading --------------> answer
 *
 * begin() ranks the lists of all shards by their centroids' distance and cuts the nearest into pieces; the engine READs
 * them, in any order, and hands each over when it comes. take_piece() estimates its entries' distances and keeps the
 * best. When the last piece is there, rerank() names the vectors to READ; take_vector() makes exact distances of them,
 * again in any order. All that is kept is kept in heaps of a total order, so the answer depends on the images and the
 * parameters alone.
 *
 * How many vectors are read: n_rerank, or as many as an estimate's error asks for. Then an entry with estimate e and
 * margin w stands for a distance in [e - w, e + w]; tau is the k-th smallest e + w, and every entry with e - w <= tau
 * is read, at most `capacity` of them.
 */
#ifndef COTRA_SEARCH_LISTS_PROBE_H
#define COTRA_SEARCH_LISTS_PROBE_H

#include "kernels/kernels.h"
#include "format/codes.h"
#include "base/ranked.h"
#include "search/lists/list_table.h"

#include <stdbool.h>

/* One shard, as all probes of an engine see it. */
typedef struct cotra_probe_shard {
    const cotra_view *view;
    const cotra_ivf_table *table;
    const uint8_t *filter; /* NULL, or a bit for each row */
    uint32_t prefix_bytes; /* of a record: head and own vector */
    uint32_t piece_blocks; /* of a list in one READ, at most */
} cotra_probe_shard;

/* A list that is probed. */
typedef struct cotra_probe_list {
    uint32_t shard, number;
    float distance;    /* to the centroid */
    uint32_t checksum; /* of the blocks so far */
    uint32_t missing;  /* pieces */
} cotra_probe_list;

typedef struct cotra_probe_piece {
    uint32_t list; /* place in `lists` */
    uint32_t n_blocks;
    uint64_t first_block;
} cotra_probe_piece;

typedef struct cotra_probe_limits {
    uint32_t k, n_probe, n_pieces;
    uint32_t capacity; /* vectors read at most */
    bool automatic;    /* by the margin */
} cotra_probe_limits;

typedef struct cotra_probe {
    cotra_probe_limits limits;
    const cotra_probe_shard *shards;
    uint32_t n_shards;
    const cotra_kernels *kernels;
    float *query;            /* [dim padded to 32 floats] */
    float *scratch;          /* [2 * code_dim] */
    float *centre;           /* [code_dim] */
    cotra_query_codes codes; /* for the piece at hand */
    cotra_heap nearest;      /* [n_probe]: lists */
    cotra_probe_list *lists; /* [n_probe] */
    uint32_t n_lists;
    cotra_probe_piece *pieces; /* [n_pieces] */
    uint32_t n_pieces;
    cotra_heap candidates; /* [capacity]: by estimate - margin, shard, row; extra: its vector's checksum */
    cotra_heap tau;        /* [k]: by estimate + margin; only where `automatic` */
    cotra_heap hits;       /* [capacity]: by distance, shard, label */
    cotra_spire_stats stats;
} cotra_probe;

int cotra_probe_create(cotra_probe *probe, const cotra_probe_shard *shards, uint32_t n_shards,
                       const cotra_kernels *kernels, const cotra_probe_limits *limits, cotra_error *err);
void cotra_probe_destroy(cotra_probe *probe);

/* Starts a query (float32[dim]) on the shards of mask (NULL: all); `pieces` are then to be read. */
void cotra_probe_begin(cotra_probe *probe, const float *query, const uint8_t *mask);
/* Takes the blocks of a piece. The bytes may be anybody's and may change meanwhile. */
int cotra_probe_take_piece(cotra_probe *probe, uint32_t piece, const uint8_t *blocks, cotra_error *err);
/* After the last piece: cuts `candidates` down to what is to be read; returns how many. */
uint32_t cotra_probe_rerank(cotra_probe *probe);
/* Takes the head and own vector of a candidate. */
int cotra_probe_take_vector(cotra_probe *probe, uint32_t candidate, const uint8_t *record, cotra_error *err);
/* After the last vector: the answer, k long. */
void cotra_probe_answer(cotra_probe *probe, int64_t *labels, float *distances, int32_t *shards);

#endif
