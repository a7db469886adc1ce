/* A probe: one query on the inverted lists of all shards, as a state machine that never touches a channel.
 *
 *            begin          next: pieces of lists          next: vectors               next: nothing
 *   (free) ---------> ... ----------------------> ... ---------------------> ... --------------------> answer
 *                          ^                  |   ^                     |
 *                          +------------------+   +---------------------+
 *
 * next() names what is to be read, once all that it named before is there: first pieces of the lists whose centroids
 * are nearest, over all shards, then vectors. The engine READs them, in any order, and hands each over when it comes.
 * take_piece() estimates its entries' distances and keeps the best; take_vector() makes exact distances. All that is
 * kept is kept in a total order, so the answer depends on the images and the parameters alone.
 *
 * How many lists: n_probe; then more, at least twice as many each time, until k entries that may be returned were
 * estimated. Under a filter there are to be as many of them as n_probe lists hold on average. Where to read all rows
 * that a filter lets through costs less than that, they are read, and no list.
 *
 * How many vectors: n_rerank, or as many as an estimate's error asks for. Then an entry with estimate e and margin w
 * stands for a distance in [e - w, e + w]; tau is the k-th smallest e + w, and every entry with e - w <= tau is read,
 * the least e - w first; after `batch` of them the k-th exact distance is a limit too.
 *
 * Where that leaves fewer than k answers, because a label lives in several shards, the query is begun anew: with more
 * lists, and with every entry of theirs.
 */
#ifndef COTRA_SEARCH_PROBE_H
#define COTRA_SEARCH_PROBE_H

#include "distance/kernels.h"
#include "layout/codes.h"
#include "base/ranked.h"
#include "search/table.h"

/* One shard, as all probes of an engine see it. */
typedef struct cotra_probe_shard {
    const cotra_view *view;
    const cotra_ivf_table *table;
    const uint8_t *filter; /* NULL, or a bit for each row */
    uint64_t rows;         /* that may be returned, or a few more */
    uint64_t pieces;       /* READs that all lists are */
    uint32_t prefix_bytes; /* of a record: head and own vector */
    uint32_t piece_blocks; /* of a list in one READ, at most */
} cotra_probe_shard;

/* A list that is probed. */
typedef struct cotra_probe_list {
    uint32_t shard, number;
    float distance;    /* to the centroid */
    float t, gap2;     /* |u|^2: see layout/ivf.h */
    float margin;      /* of its estimates; 0 where n_rerank is given */
    uint32_t checksum; /* of the blocks so far */
    uint32_t missing;  /* pieces */
} cotra_probe_list;

typedef struct cotra_probe_piece {
    uint32_t list; /* place in `lists` */
    uint32_t n_blocks;
    uint64_t first_block;
} cotra_probe_piece;

typedef struct cotra_probe_limits {
    uint32_t k, n_probe;
    uint32_t n_rerank; /* 0: by the margin */
    uint32_t batch;    /* vectors read at once, at most */
} cotra_probe_limits;

typedef struct cotra_probe {
    cotra_probe_limits limits;
    const cotra_probe_shard *shards;
    uint32_t n_shards;
    const cotra_kernels *kernels;
    const uint8_t *mask;      /* NULL, or by shard */
    float *query;             /* [dim padded to 32 floats] */
    float *scratch;           /* [2 * code_dim] */
    float *centroid;          /* [dim], times t: of a centred list */
    float norm2;              /* |q|^2 */
    cotra_query_codes *codes; /* [n_shards]; one that is not used has scale 0 */
    cotra_query_codes near;   /* of u for the centred list `near_list` */
    uint8_t *tables;          /* of codes and near */
    uint32_t near_list;       /* UINT32_MAX: none */
    /* lists */
    cotra_heap nearest; /* the next ones */
    cotra_ranked last;  /* of those before */
    int has_last;
    cotra_probe_list *lists; /* all of the query */
    uint32_t n_lists, max_lists;
    cotra_probe_piece *pieces; /* to be read */
    uint32_t n_pieces, max_pieces;
    uint64_t n_rows;            /* that may be returned, of the query's shards */
    uint64_t n_wanted, n_found; /* of those, estimated */
    int thorough;               /* every entry of the lists is a candidate */
    int left_out;               /* some entries were none */
    int is_ranked;              /* no more lists: candidates are sorted */
    /* vectors */
    cotra_heap candidates; /* by estimate - margin, shard, row; extra: its vector's checksum. A heap for n_rerank */
    cotra_heap tau;        /* [k]: by estimate + margin; only where n_rerank is 0 */
    uint32_t first_vector, n_vectors; /* to be read, in candidates */
    int direct;                       /* candidates are rows, of which whole records are read */
    uint64_t next_row;
    uint32_t next_shard;
    cotra_heap hits; /* [k]: by distance, shard, label; each label once */
    cotra_spire_stats stats;
} cotra_probe;

int cotra_probe_create(cotra_probe *probe, const cotra_probe_shard *shards, uint32_t n_shards,
                       const cotra_kernels *kernels, const cotra_probe_limits *limits, cotra_error *err);
void cotra_probe_destroy(cotra_probe *probe);

/* Starts a query (float32[dim]) on the shards of mask (NULL: all). */
void cotra_probe_begin(cotra_probe *probe, const float *query, const uint8_t *mask);
/* Names what is to be read next: `pieces` or `n_vectors` candidates from `first_vector` on; neither: it is done. */
int cotra_probe_next(cotra_probe *probe, cotra_error *err);
/* The bytes of a candidate's record that are read, from its beginning on. */
uint32_t cotra_probe_vector_bytes(const cotra_probe *probe, uint32_t shard);
/* Takes the blocks of a piece. The bytes may be anybody's and may change meanwhile. */
int cotra_probe_take_piece(cotra_probe *probe, uint32_t piece, const uint8_t *blocks, cotra_error *err);
/* Takes the record of a candidate, as many bytes of it as are read. */
int cotra_probe_take_vector(cotra_probe *probe, uint32_t candidate, const uint8_t *record, cotra_error *err);
/* When it is done: the answer, k long. */
void cotra_probe_answer(cotra_probe *probe, int64_t *labels, float *distances, int32_t *shards);

#endif
