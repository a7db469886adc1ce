/* cotra.h: the one public header of the C shim.
 *
 * Everything between the two cdef markers is given to cffi verbatim by tools/generate_ffi.py, so that part holds plain
 * C declarations only: no preprocessor lines, no inline functions.
 *
 * Conventions
 *  - A function that can fail returns a cotra_status: 0 is done, > 0 is progress or back-pressure, < 0 is an error, and
 *    then *err (may be NULL) says which call failed, on what object, with what numbers, and the remedy where one is
 * known.
 *  - Objects are opaque and come in create/destroy (or open/close) pairs; destroying NULL is allowed. Children first.
 *  - Lengths are bytes and times nanoseconds unless a name says otherwise. Nothing here prints, exits or starts a
 * thread.
 *  - Handles are not locked. A channel and an engine belong to one thread at a time; an arena, a view, a cache, a
 * table, a device and a packer (its encode step, on disjoint ranges) may be shared.
 */
#ifndef COTRA_H
#define COTRA_H

#include <stddef.h>
#include <stdint.h>

/* [cdef-begin] */

/* ---- status and errors (csrc/base/status.c) ---- */

typedef enum cotra_status {
    COTRA_OK = 0,
    COTRA_AGAIN = 1,            /* back-pressure: nothing is wrong, poll and call again */
    COTRA_PAUSED = 2,           /* a search stopped half-way, as it was asked to: it can be resumed */
    COTRA_ERR_ARGUMENT = -1,    /* the caller's value is out of its range */
    COTRA_ERR_NO_MEMORY = -2,   /* malloc or mmap refused */
    COTRA_ERR_SYSTEM = -3,      /* a system call failed: see sys_errno */
    COTRA_ERR_UNAVAILABLE = -4, /* no libibverbs here, or built without it, or a symbol is missing */
    COTRA_ERR_NO_DEVICE = -5,   /* libibverbs is there, the device, port or GID is not */
    COTRA_ERR_MEMLOCK = -6,     /* RLIMIT_MEMLOCK is too small to pin the memory */
    COTRA_ERR_FORMAT = -7,      /* bytes that are not a graph image, or a malformed one */
    COTRA_ERR_CHECKSUM = -8,    /* a checksum does not match: torn or corrupt bytes */
    COTRA_ERR_BOUNDS = -9,      /* an offset and length outside the region */
    COTRA_ERR_COMPLETION = -10, /* a work request completed in error: see wc_status, vendor_error */
    COTRA_ERR_DEADLINE = -11,   /* time ran out */
    COTRA_ERR_CLOSED = -12,     /* the channel or queue pair is gone */
    COTRA_ERR_LOSSY = -13,      /* a vector cannot be held exactly by the vector type asked for */
    COTRA_ERR_TRANSPORT = -14,  /* the path to a peer broke, without a completion that says how */
    COTRA_ERR_STALE = -15,      /* the shard was rebuilt since its header was read */
    COTRA_ERR_CANCELLED = -16   /* a search was given up: see cotra_watch */
} cotra_status;

typedef struct cotra_error {
    int32_t status;        /* a cotra_status */
    int32_t sys_errno;     /* errno, or 0 */
    int32_t wc_status;     /* enum ibv_wc_status, or 0 */
    uint32_t vendor_error; /* the provider's code beside wc_status */
    int32_t shard;         /* the position of the shard in the engine it concerns, or -1 */
    int32_t reserved;
    char message[488];
} cotra_error;

const char *cotra_status_name(int status);
uint64_t cotra_clock_ns(void); /* CLOCK_MONOTONIC */

/* ---- arena: memory that can be pinned, registered, shared and dumped (csrc/base/arena.c) ---- */

typedef struct cotra_arena cotra_arena;

enum {
    COTRA_ARENA_HUGE = 1,  /* try huge pages first, fall back to ordinary ones and say so in the info */
    COTRA_ARENA_LOCK = 2,  /* mlock; COTRA_ERR_MEMLOCK with the remedy when it cannot be had */
    COTRA_ARENA_SEALED = 4 /* cotra_arena_map_fd: refuse a memfd that is not sealed against shrinking */
};

typedef struct cotra_arena_info {
    uint64_t address;
    uint64_t length_bytes; /* what was asked for; the mapping is rounded up to page_bytes */
    uint64_t page_bytes;   /* the page size that backs it */
    int32_t fd;            /* the memfd, or -1: wrapped memory has none */
    uint8_t locked;
    uint8_t sealed;
    uint8_t writable;
    uint8_t borrowed; /* wraps memory that the caller owns */
} cotra_arena_info;

/* A memfd of length_bytes, mapped read-write, zeroed. */
int cotra_arena_create(uint64_t length_bytes, uint32_t flags, cotra_arena **out, cotra_error *err);
/* Wraps memory that the caller owns and keeps alive; it is never freed here. */
int cotra_arena_wrap(void *address, uint64_t length_bytes, uint32_t flags, cotra_arena **out, cotra_error *err);
/* Maps a peer's memfd (its descriptor is duplicated) read-only. */
int cotra_arena_map_fd(int fd, uint64_t length_bytes, uint32_t flags, cotra_arena **out, cotra_error *err);
/* Maps a whole file read-only. */
int cotra_arena_map_file(const char *path, cotra_arena **out, cotra_error *err);
/* Seals the memfd: nobody can resize it or map it writable again; the mapping that exists stays. */
int cotra_arena_seal(cotra_arena *arena, cotra_error *err);
int cotra_arena_lock(cotra_arena *arena, cotra_error *err);
void cotra_arena_get_info(const cotra_arena *arena, cotra_arena_info *out);
void cotra_arena_destroy(cotra_arena *arena);
/* Gives what malloc keeps of freed memory back to the system, where the C library can: a large index that was freed
 * would else stay with the process, or not, by the sizes of what came after it (mallopt(3), M_MMAP_THRESHOLD). */
void cotra_memory_trim(void);

/* ---- graph image: layout, validator, packer (csrc/format/) ---- */

enum { COTRA_METRIC_L2 = 0, COTRA_METRIC_IP = 1, COTRA_METRIC_COSINE = 2 };
enum { COTRA_VECTOR_F32 = 0, COTRA_VECTOR_F16 = 1, COTRA_VECTOR_U8 = 2 };

typedef struct cotra_image_info {
    uint64_t image_bytes;
    uint64_t count;          /* nodes, deleted ones included */
    uint64_t deleted_count;  /* nodes that are walked through and never returned */
    uint64_t upper_count;    /* nodes on level 1 or above */
    uint64_t generation;     /* counts up with every rebuild of the same shard */
    uint64_t seed;           /* of the rotation */
    uint64_t records_offset; /* the level-0 records */
    uint64_t nav_offset;     /* the navigation section: mean vector and upper layers */
    uint64_t nav_bytes;
    uint64_t image_checksum; /* over records and navigation section */
    uint32_t record_bytes;
    uint32_t dim;
    uint32_t code_dim; /* dim rounded up to a multiple of 64: bits of a neighbour's code */
    uint32_t metric;
    uint32_t vector_type;
    uint32_t M;      /* links of a node on an upper layer */
    uint32_t degree; /* links of a node on level 0 */
    uint32_t ef_construction;
    uint32_t max_level;
    uint32_t entry_node;
    uint32_t format_version;
    uint32_t nav_checksum;
    uint64_t ivf_offset; /* the section of inverted lists; all three are 0 where there is none */
    uint64_t ivf_bytes;
    uint32_t ivf_checksum;
    uint32_t reserved;
    uint64_t graph_id; /* of the graph over all shards that the level-0 links are part of; 0: the shard's own graph */
    uint64_t graph_count; /* nodes of it; count for a shard's own graph */
    uint64_t graph_base;  /* the number of this image's node 0 in it: numbers of neighbours count from there */
} cotra_image_info;

/* Checks a graph image in memory: the header and the navigation section always, every record when full is not 0. */
int cotra_image_validate(const void *data, uint64_t length_bytes, int full, cotra_image_info *out, cotra_error *err);
/* The bytes of one record's vector as float32[dim], and its label. For tests and tools. */
int cotra_image_get_node(const void *data, uint64_t length_bytes, uint64_t node, float *vector, int64_t *label,
                         uint32_t *flags, cotra_error *err);

typedef struct cotra_packer cotra_packer;

typedef struct cotra_packer_params {
    uint32_t dim;
    uint32_t metric;
    uint32_t vector_type;
    uint32_t arena_flags;
    uint64_t seed;
    uint64_t generation;
    const int64_t
        *ids; /* NULL, or [n_ids], used until the state is read: the index's labels are then row numbers, nodes are */
    uint64_t n_ids;    /* numbered by them, and a row's label becomes its id */
    const float *mean; /* NULL: of these vectors; or float32[dim], of all shards' that are to be one graph */
    uint32_t
        round_vectors; /* 0: COTRA_ERR_LOSSY for a vector that its type cannot hold exactly; 1: float16 may round */
    uint32_t reserved;
} cotra_packer_params;

int cotra_packer_create(const cotra_packer_params *params, cotra_packer **out, cotra_error *err);
/* Reads hnswlib's saved state (what Index.save_index writes) from a file or pipe until its end, and lays the image out.
 */
int cotra_packer_read(cotra_packer *packer, int fd, uint64_t timeout_ns, cotra_error *err);
uint64_t cotra_packer_count(const cotra_packer *packer);
/* Fills the lists of neighbours of records [begin, end): ranges may be linked by several threads at once. */
int cotra_packer_link(cotra_packer *packer, uint64_t begin, uint64_t end, cotra_error *err);
/* After all are linked, makes the codes, factors and checksums of records [begin, end): ranges may be encoded by
 * several threads at once. */
int cotra_packer_encode(cotra_packer *packer, uint64_t begin, uint64_t end, cotra_error *err);
/* Writes the checksums of the whole and hands the arena over. The packer can only be destroyed after it. */
int cotra_packer_finish(cotra_packer *packer, cotra_arena **out, cotra_error *err);
void cotra_packer_destroy(cotra_packer *packer);

/* ---- one graph over all shards (csrc/build/cross_links.c) ---- */

typedef struct cotra_relinker cotra_relinker;

typedef struct cotra_relink_params {
    uint64_t graph_id;    /* not 0 */
    uint64_t graph_count; /* nodes of all shards, below 2^31 */
    uint64_t graph_base;  /* the number of this shard's node 0 */
} cotra_relink_params;

/* Nodes of other shards that nodes [begin, end) may link to. */
typedef struct cotra_relink_far {
    const uint32_t *numbers;    /* [count], in the graph over all shards */
    const uint8_t *vectors;     /* [count][stride_bytes], each in the image's vector type */
    const uint32_t *candidates; /* [end - begin][width]: positions in `numbers`; UINT32_MAX: none */
    uint64_t count;
    uint32_t stride_bytes;
    uint32_t width;
} cotra_relink_far;

/* Begins to make a copy of a valid image of a shard's own graph, without inverted lists, as a part of the graph over
 * all shards. The image must outlive the relinker. */
int cotra_relinker_create(const void *data, uint64_t length_bytes, const cotra_relink_params *params,
                          cotra_relinker **out, cotra_error *err);
/* Chooses the neighbours of nodes [begin, end) anew, among those that they have and the far candidates, and writes
 * their records to `records` ([end - begin] of record_bytes): ranges may be relinked by several threads at once. */
int cotra_relinker_link(const cotra_relinker *relinker, uint64_t begin, uint64_t end, const cotra_relink_far *far,
                        void *records, cotra_error *err);
/* Takes what link() made of nodes [begin, end) into the checksum of the whole: in the order of the nodes, one thread.
 */
int cotra_relinker_append(cotra_relinker *relinker, uint64_t begin, uint64_t end, const void *records,
                          cotra_error *err);
/* Writes the copy's header, of records_offset bytes. Records follow it, then the navigation section as it was. */
int cotra_relinker_finish(cotra_relinker *relinker, void *header_bytes, cotra_error *err);
void cotra_relinker_destroy(cotra_relinker *relinker);

/* ---- inverted lists beside the graph (csrc/format/lists.c, ivf_pack.c) ---- */

typedef struct cotra_ivf_info {
    uint64_t entries;     /* rows in all lists: nodes that are not deleted */
    uint64_t table_bytes; /* what a reader takes once, from the section's first byte: header and table */
    uint64_t list_bytes;  /* all lists */
    uint32_t n_lists;
    uint32_t bits;          /* a dimension */
    uint32_t code_dim;      /* as the image's */
    uint32_t block_bytes;   /* of 32 entries */
    uint32_t centroid_type; /* COTRA_VECTOR_F16, or COTRA_VECTOR_F32 where float16 is too coarse */
    uint32_t longest;       /* entries of the longest list */
} cotra_ivf_info;

/* What a valid image's section says of itself; all zero where there is none. */
int cotra_ivf_get_info(const void *data, uint64_t length_bytes, cotra_ivf_info *out, cotra_error *err);

typedef struct cotra_ivf_packer cotra_ivf_packer;

typedef struct cotra_ivf_params {
    const float *centroids;     /* [n_lists, dim] */
    const uint32_t *assignment; /* [count]: the list of each row; those of deleted rows are not looked at */
    uint32_t n_lists;
    uint32_t bits; /* 1 to 8 */
} cotra_ivf_params;

/* Begins to append a section to a valid image without one, in a writable arena of its own memfd that is not locked,
 * sealed or read by anybody yet: it grows, so its address may change. */
int cotra_ivf_packer_create(cotra_arena *arena, const cotra_ivf_params *params, cotra_ivf_packer **out,
                            cotra_error *err);
/* Encodes lists [begin, end): ranges may be encoded by several threads at once. */
int cotra_ivf_packer_encode(cotra_ivf_packer *packer, uint32_t begin, uint32_t end, cotra_error *err);
/* Writes table and header. Until then the arena holds the image as it was, without a section. */
int cotra_ivf_packer_finish(cotra_ivf_packer *packer, cotra_error *err);
void cotra_ivf_packer_destroy(cotra_ivf_packer *packer);

/* ---- kernels (csrc/kernels/) ---- */

enum { COTRA_SIMD_PORTABLE = 0, COTRA_SIMD_AVX2 = 1, COTRA_SIMD_AVX512 = 2 };

int cotra_simd_best(void); /* the best level that this CPU has */
const char *cotra_simd_name(int simd);
/* Kernels for tests, on memory as searches have it: a query padded with zeros to a multiple of 32 floats, a vector in
 * vector_type to one of 32 bytes. */
int cotra_kernel_distance(int simd, uint32_t metric, uint32_t vector_type, const float *query, const void *vector,
                          uint32_t dim, float *out, cotra_error *err);
/* Sums of a 4-bit look-up table over 32 packed codes: lut u8[code_dim / 4][16], codes u8[code_dim / 4][16]. */
int cotra_kernel_scan(int simd, const uint8_t *lut, const uint8_t *codes, uint32_t code_dim, uint32_t *sums,
                      cotra_error *err);
/* out[32] = distance + t f0 - f1 (offset + scale x sums); below: the bits of those below bound. */
int cotra_kernel_estimate(int simd, const uint32_t *sums, const float *f0, const float *f1, float distance, float t,
                          float offset, float scale, float bound, float *out, uint32_t *below, cotra_error *err);
/* out[32] = 1 / (f1 x spread + |f0| x rounding), within [1e-30, 1e30]. */
int cotra_kernel_weigh(int simd, const float *f0, const float *f1, float spread, float rounding, float *out,
                       cotra_error *err);
/* The inner product of integers; n: a multiple of 64, at most 4096; |query| <= 4095, |vector| <= 127. */
int cotra_kernel_dot_i8(int simd, const int16_t *query, const int8_t *vector, uint32_t n, int32_t *out,
                        cotra_error *err);
/* The place of the first least of n keys, a multiple of 16; keys are 64-byte aligned. */
int cotra_kernel_least(int simd, const float *keys, uint32_t n, uint32_t *place, cotra_error *err);
/* length: a multiple of 8. */
int cotra_kernel_checksum(int simd, const void *data, uint64_t length, uint32_t seed, uint32_t *out, cotra_error *err);

/* ---- verbs: the only part that knows libibverbs (csrc/verbs/) ---- */

typedef struct cotra_device cotra_device;
typedef struct cotra_mr cotra_mr;
typedef struct cotra_qp cotra_qp;

typedef struct cotra_device_info {
    char name[64];
    char firmware[64];
    uint64_t node_guid;
    uint64_t max_mr_bytes;
    uint32_t vendor_id;
    uint32_t vendor_part_id;
    int32_t max_qp_wr;
    int32_t max_cqe;
    int32_t max_rd_atomic;      /* READs that a queue pair may be the target of (max_qp_rd_atom) */
    int32_t max_init_rd_atomic; /* READs that a queue pair may have started (max_qp_init_rd_atom) */
    uint32_t n_ports;
    uint32_t reserved;
} cotra_device_info;

typedef struct cotra_port_info {
    uint32_t port;
    uint32_t state;      /* enum ibv_port_state: 4 is active */
    uint32_t link_layer; /* 1 InfiniBand, 2 Ethernet */
    uint32_t active_mtu_bytes;
    uint32_t lid;
    uint32_t gid_count;
} cotra_port_info;

enum { COTRA_GID_IB = 0, COTRA_GID_ROCE_V1 = 1, COTRA_GID_ROCE_V2 = 2 };

typedef struct cotra_gid_info {
    uint8_t gid[16];
    uint32_t index;
    uint32_t type; /* COTRA_GID_* */
    int32_t score; /* the ranking: highest is chosen */
    char why[64];  /* the ranking in words: "RoCEv2, IPv4, same subnet as the peer" */
} cotra_gid_info;

typedef struct cotra_mr_info {
    uint64_t address;
    uint64_t length_bytes;
    uint32_t rkey;
} cotra_mr_info;

/* What the two sides of a connection tell each other. Fixed width; it travels as numbers, not as these bytes. */
typedef struct cotra_qp_attributes {
    uint8_t gid[16];
    uint32_t qp_number;
    uint32_t packet_sequence;
    uint32_t lid;
    uint32_t mtu_bytes;
    uint32_t max_rd_atomic;      /* READs that this side can serve at once */
    uint32_t max_init_rd_atomic; /* READs that this side can start at once */
} cotra_qp_attributes;

typedef struct cotra_qp_options {
    uint8_t peer_address[16];  /* IPv6, or IPv4 mapped into it; all zero: not known */
    int32_t gid_index;         /* -1: ranked choice */
    uint32_t port;             /* 0: the first active one */
    uint32_t send_depth;       /* work requests in the send queue; 0: 128 */
    uint32_t max_rd_atomic;    /* a cap on READs in progress; 0: what the devices allow */
    uint32_t timeout_exponent; /* ACK time-out 4.096 us x 2^n; 0: 14 (67 ms) */
    uint32_t retry_count; /* 0: 6. A dead peer surfaces after about (retry_count + 1) time-outs; 7 is for ever on rxe */
    uint32_t traffic_class;
    uint32_t service_level;
    uint32_t hop_limit; /* 0: 64 */
} cotra_qp_options;

/* Loads libibverbs if it is not loaded yet and writes which library was found, and where, into text. */
int cotra_verbs_probe(char *text, uint32_t text_bytes, cotra_error *err);
int cotra_verbs_compiled(void); /* 1 when built with <infiniband/verbs.h> */
int cotra_verbs_devices(cotra_device_info *out, uint32_t capacity, uint32_t *count, cotra_error *err);
/* name NULL: the first device with an active port. */
int cotra_device_open(const char *name, cotra_device **out, cotra_error *err);
void cotra_device_get_info(const cotra_device *device, cotra_device_info *out);
int cotra_device_port(const cotra_device *device, uint32_t port, cotra_port_info *out, cotra_error *err);
/* The GID table of a port, ranked for a peer (16 bytes as in cotra_qp_options, or NULL), best first. */
int cotra_device_gids(const cotra_device *device, uint32_t port, const uint8_t *peer_address, cotra_gid_info *out,
                      uint32_t capacity, uint32_t *count, cotra_error *err);
void cotra_device_close(cotra_device *device);

/* REMOTE_READ only: a peer can never write. The memory belongs to the caller and must outlive the mr. */
int cotra_mr_create(cotra_device *device, const void *address, uint64_t length_bytes, cotra_mr **out, cotra_error *err);
void cotra_mr_get_info(const cotra_mr *mr, cotra_mr_info *out);
int cotra_mr_destroy(cotra_mr *mr, cotra_error *err);

/* A reliable-connected queue pair with its own completion queue, in INIT. */
int cotra_qp_create(cotra_device *device, const cotra_qp_options *options, cotra_qp **out, cotra_error *err);
void cotra_qp_get_local(const cotra_qp *qp, cotra_qp_attributes *out, cotra_gid_info *gid);
/* INIT -> RTR -> RTS towards the peer: the smaller MTU, READs in progress negotiated from both sides. */
int cotra_qp_connect(cotra_qp *qp, const cotra_qp_attributes *remote, cotra_error *err);
void cotra_qp_destroy(cotra_qp *qp);

/* ---- channels: one-sided READs of one region, from one thread (csrc/transport/) ---- */

typedef struct cotra_channel cotra_channel;

typedef struct cotra_remote_region {
    uint64_t address;
    uint64_t length_bytes;
    uint32_t rkey;
    uint32_t reserved;
} cotra_remote_region;

typedef struct cotra_channel_info {
    char transport[16]; /* "shm", "verbs", "model+shm"... */
    uint64_t region_bytes;
    uint32_t slots;      /* READs that may be in progress at once */
    uint32_t slot_bytes; /* the longest single READ */
    uint64_t reads;      /* completed since open */
    uint64_t read_bytes;
    uint64_t doorbells; /* chained posts */
} cotra_channel_info;

typedef struct cotra_model_params {
    uint64_t round_trip_ns;    /* added to every READ */
    uint64_t bytes_per_second; /* of the link; 0: no limit */
    uint64_t reads_per_second; /* message rate; 0: no limit */
    uint64_t fail_after_reads; /* the READ after so many fails with fail_status; 0: never */
    int32_t fail_status;       /* a cotra_status */
    int32_t fail_wc_status;
    uint64_t drop_after_reads; /* READs after so many never complete; 0: never */
    uint64_t corrupt_every;    /* one bit of every n-th READ is flipped; 0: never */
} cotra_model_params;

/* Reads the first length_bytes of an open file (a memfd too) with pread(2), so that nothing is mapped: for who must not
 * have the memory of others count as its own. The file descriptor stays the caller's. */
int cotra_channel_open_file(int fd, uint64_t length_bytes, uint32_t slots, uint32_t slot_bytes, cotra_channel **out,
                            cotra_error *err);
/* shm: a region that is mapped here. The arena must outlive the channel. slots 0: 1,024; slot_bytes 0: 64 KiB */
int cotra_channel_open_shm(const cotra_arena *arena, uint32_t slots, uint32_t slot_bytes, cotra_channel **out,
                           cotra_error *err);
/* verbs: the queue pair must be connected and outlive the channel; the landing buffers are the channel's own. */
int cotra_channel_open_verbs(cotra_qp *qp, const cotra_remote_region *region, uint32_t slots, uint32_t slot_bytes,
                             cotra_channel **out, cotra_error *err);
/* model: wraps another channel, which must outlive it. */
int cotra_channel_open_model(cotra_channel *inner, const cotra_model_params *params, cotra_channel **out,
                             cotra_error *err);
void cotra_channel_get_info(const cotra_channel *channel, cotra_channel_info *out);
void cotra_channel_close(cotra_channel *channel);
/* Copies [offset, offset + length) of the region by as many READs as it takes. timeout_ns bounds the wait for each. */
int cotra_channel_read(cotra_channel *channel, uint64_t offset, uint64_t length_bytes, void *destination,
                       uint64_t timeout_ns, cotra_error *err);
/* Copies n pieces of length_bytes, at offsets[i] of the region, one READ each, to destination[n][length_bytes]. */
int cotra_channel_gather(cotra_channel *channel, const uint64_t *offsets, uint64_t n, uint32_t length_bytes,
                         void *destination, uint64_t timeout_ns, cotra_error *err);
/* For benchmarks: n READs of length_bytes at offsets[i], depth in progress; latencies_ns[n] may be NULL. */
int cotra_channel_read_loop(cotra_channel *channel, const uint64_t *offsets, uint64_t n, uint32_t length_bytes,
                            uint32_t depth, uint64_t timeout_ns, uint64_t *latencies_ns, uint64_t *elapsed_ns,
                            cotra_error *err);

/* ---- search (csrc/search/) ---- */

typedef struct cotra_view cotra_view;
typedef struct cotra_engine cotra_engine;

/* What a running search looks at, and tells: memory of its caller's. Several searches may share it. */
typedef struct cotra_watch {
    uint64_t stop; /* not 0: the search ends with COTRA_ERR_CANCELLED. Any thread may set it at any time */
    uint64_t done; /* queries answered; searches only add to it */
} cotra_watch;

typedef struct cotra_search_params {
    uint32_t k;
    uint32_t ef;         /* k <= ef */
    uint32_t beam;       /* expansions a round */
    uint32_t inflight;   /* queries at once; 0: chosen from the channels */
    uint64_t timeout_ns; /* the longest wait for any one READ; 0: 5 s */
    uint32_t numbers;    /* not 0: answers are node numbers in place of labels */
    uint32_t most;       /* records that a walk expands at most; 0: as many as it takes */
    uint64_t
        deadline_ns;    /* on cotra_clock_ns: a search that is not over by then ends with COTRA_ERR_DEADLINE; 0: none */
    uint64_t pause_ns;  /* it stops half-way with COTRA_PAUSED once it ran for so long; 0: never */
    cotra_watch *watch; /* or NULL */
} cotra_search_params;

typedef struct cotra_query_stats {
    uint32_t reads;
    uint32_t rounds; /* of the shard that needed most */
    uint32_t expansions;
    uint32_t cache_hits; /* nodes of the upper layers that were looked at, in the view */
    uint64_t read_bytes;
    uint64_t latency_ns;     /* from its start to its last shard's answer, by the engine's clock */
    uint32_t cached_records; /* records that a cotra_cache had, in place of as many READs */
    uint32_t own;            /* records that were used in place, in this process's own memory */
    uint32_t pushed;         /* nodes that their owners expanded */
    uint32_t incomplete;     /* shards, or graphs, whose walk `most` ended: rows that may be returned can be missing */
} cotra_query_stats;

/* Reads and validates header and navigation section over the channel; the bytes it then holds are view_bytes. */
int cotra_view_open(cotra_channel *channel, uint64_t timeout_ns, cotra_view **out, cotra_error *err);
/* The same of header and navigation section, one after the other, that came another way. They are copied. */
int cotra_view_load(const void *data, uint64_t length_bytes, cotra_view **out, cotra_error *err);
void cotra_view_get_info(const cotra_view *view, cotra_image_info *image, uint64_t *view_bytes);
void cotra_view_close(cotra_view *view);

/* A node that the owner of its shard is asked to expand, for a walk that is somebody else's. */
typedef struct cotra_push {
    uint32_t query; /* row of the queries */
    uint32_t row;   /* of the node, in its shard */
    float limit;    /* estimates that are not below it are of no use to the walk */
    uint32_t reserved;
} cotra_push;

/* What the owner tells of it. */
typedef struct cotra_expansion {
    float distance; /* exact */
    float scale;    /* of what estimates near it are wrong by, for inner products; else 0 */
    int64_t label;
    uint32_t flags; /* as in the record */
    uint32_t
        count; /* of its neighbours that are below the limit: their numbers, estimates, weights follow the others' */
} cotra_expansion;

/* An owner's side of it: expands nodes of the image in its arena, that of the view, for queries float32[n_queries,
 * dim]. Pushes of one query follow each other. numbers, estimates and weights (what each estimate counts for in a
 * mean) have room for the degree of n nodes; n_neighbours says how many there are. Any thread may call it.
 * COTRA_ERR_ARGUMENT for a query or row that is not there. */
int cotra_view_expand(const cotra_view *view, const cotra_arena *arena, const float *queries, uint64_t n_queries,
                      const cotra_push *pushes, uint64_t n, cotra_expansion *out, uint32_t *numbers, float *estimates,
                      float *weights, uint64_t *n_neighbours, cotra_error *err);

/* A reader's cache of one shard's records (csrc/search/record_cache.c): those that walks read most often. Engines of
 * several threads may share it; none of them ever waits for another. It does not need the view that it was made for any
 * more.
 */
typedef struct cotra_cache cotra_cache;

typedef struct cotra_cache_info {
    uint64_t bytes;   /* of memory, all in all: never more than the budget */
    uint64_t places;  /* records that it may hold */
    uint64_t records; /* that it holds now */
} cotra_cache_info;

/* COTRA_ERR_ARGUMENT where the budget holds no record. Takes no more than the shard's records need. */
int cotra_cache_create(const cotra_view *view, uint64_t budget_bytes, cotra_cache **out, cotra_error *err);
void cotra_cache_get_info(cotra_cache *cache, cotra_cache_info *out);
/* Forgets all records, and what was counted. */
void cotra_cache_clear(cotra_cache *cache);
/* Keeps a record of record_bytes that was read another way, as one that is read often; a broken one is not kept. */
void cotra_cache_put(cotra_cache *cache, uint32_t row, const void *record);
void cotra_cache_destroy(cotra_cache *cache);

/* A shard, as an engine reaches it. All members must outlive the engine. */
typedef struct cotra_engine_shard {
    cotra_view *view;
    cotra_channel *channel; /* it is READ through this one; NULL: in `own` memory, or else by its owner */
    const cotra_arena *own; /* where there is no channel: the image itself, which this process holds, or NULL */
    cotra_cache *cache;     /* of what the channel READs, of the same image as the view; or NULL */
} cotra_engine_shard;

/* Queries in progress, times READs a round of each, at most: more slots of a channel are of no use to an engine. */
enum { COTRA_MOST_SLOTS = 8192 };

/* One thread's engine over n shards. Shards of one graph are walked together, one walk a query; others each by itself.
 * COTRA_ERR_FORMAT where some say that they are of one graph, but do not fit together. */
int cotra_engine_create(const cotra_engine_shard *shards, uint32_t n_shards, int simd, cotra_engine **out,
                        cotra_error *err);
/* What of the shards a search is about; a NULL member: all of it. */
typedef struct cotra_search_scope {
    const uint8_t *const *filters; /* [n_shards]: NULL, or a bitmap: bit i % 8 of byte i / 8: row i may be returned */
    const uint64_t *filter_bytes;  /* [n_shards]: at least a bit for each row */
    const uint8_t *mask;           /* [n_queries, n_shards]: 0: the query leaves the shard out */
} cotra_search_scope;

/* queries float32[n_queries, dim] -> labels int64[n_shards, n_queries, k], distances float32[n_shards, n_queries, k],
 * each row by distance, then label; empty places hold -1 and infinity. stats[n_queries] are summed over the shards.
 * k rows are found whenever so many may be returned, unless params->most ends a walk before. Where a walk would READ
 * more records than filters let through, those are read instead, and the answer is exact. scope may be NULL. */
int cotra_engine_search(cotra_engine *engine, const float *queries, uint64_t n_queries,
                        const cotra_search_params *params, const cotra_search_scope *scope, int64_t *labels,
                        float *distances, cotra_query_stats *stats, cotra_error *err);
/* A search stops half-way, and cotra_engine_resume goes on with it,
 *  - with COTRA_PAUSED, after pause_ns: nothing has to be done before it goes on, with another pause_ns.
 *  - with COTRA_AGAIN where all that is left waits for owners: for each shard with pushes, the nodes that
 *    cotra_engine_get_pushes tells, and cotra_engine_take_expansions takes the answers of;
 *  - with an error whose `shard` is one of the engine's: that one failed. cotra_engine_replace puts another way to the
 *    same image in its place, or none: then the search goes on without its nodes. What was posted or pushed to the old
 *    one is asked for again; the old one must outlive the search. Without it, the search cannot go on.
 * All that was given to cotra_engine_search must stay as it was until the search is over. An engine with a shard that
 * failed can finish its search, and begins no other. One whose search was cancelled, ran out of time or was left
 * half-way is only destroyed: READs may still land in the slots of its channels. */
int cotra_engine_resume(cotra_engine *engine, uint64_t pause_ns, cotra_error *err);
/* The nodes that wait for the shard's owner, those of one query one after the other; valid until the next call. */
void cotra_engine_get_pushes(const cotra_engine *engine, uint32_t shard, const cotra_push **out, uint64_t *n);
/* The owner's answers to all of them, in the same order. COTRA_ERR_FORMAT where they do not fit; nothing is taken then.
 */
int cotra_engine_take_expansions(cotra_engine *engine, uint32_t shard, const cotra_expansion *found, uint64_t n,
                                 const uint32_t *numbers, const float *estimates, const float *weights,
                                 uint64_t n_neighbours, cotra_error *err);
/* The slots that a channel needs which comes in the middle of the search: COTRA_MOST_SLOTS at most. */
uint32_t cotra_engine_get_slots(const cotra_engine *engine);
/* with NULL: the shard is lost. Its view must be of the same image as the old one's, which stays in use:
 * COTRA_ERR_FORMAT for another. */
int cotra_engine_replace(cotra_engine *engine, uint32_t shard, const cotra_engine_shard *with, cotra_error *err);
void cotra_engine_destroy(cotra_engine *engine);

/* A reader's private, validated copy of a section's header and table. Read-only: engines may share it. */
typedef struct cotra_ivf_table cotra_ivf_table;

/* Reads header and table over the channel, by the header that the view was opened with. */
int cotra_ivf_table_open(cotra_channel *channel, const cotra_view *view, uint64_t timeout_ns, cotra_ivf_table **out,
                         cotra_error *err);
void cotra_ivf_table_get_info(const cotra_ivf_table *table, cotra_ivf_info *out);
uint32_t cotra_ivf_table_get_dim(const cotra_ivf_table *table);
/* Copies out, for each list: centroid float32[n_lists, dim], entries, root mean square distance of its rows to the
 * centroid, standard deviation of an estimate of <x - c, u> for a unit vector u, offset in the region. NULL: not
 * wanted. */
void cotra_ivf_table_get_lists(const cotra_ivf_table *table, float *centroids, uint32_t *sizes, float *radii,
                               float *errors, uint64_t *offsets);
void cotra_ivf_table_close(cotra_ivf_table *table);

typedef struct cotra_spire cotra_spire;

typedef struct cotra_spire_params {
    uint32_t k;
    uint32_t n_probe;    /* lists of a query, over all shards; more than there are: all */
    uint32_t n_rerank;   /* vectors that are read in round 2, k at least; 0: as many as the estimates' error asks for */
    uint32_t inflight;   /* queries at once; 0: chosen from the channels */
    uint64_t timeout_ns; /* the longest wait for any one READ; 0: 5 s */
    uint64_t deadline_ns; /* these three as in cotra_search_params */
    uint64_t pause_ns;
    cotra_watch *watch;
} cotra_spire_params;

typedef struct cotra_spire_stats {
    uint32_t reads;
    uint32_t rounds; /* 2; fewer where there was nothing to read */
    uint32_t lists;  /* probed */
    uint32_t reranked;
    uint64_t estimated;  /* entries of the lists */
    uint64_t allowed;    /* those of them that may be returned */
    uint64_t list_bytes; /* read in round 1 */
    uint64_t read_bytes; /* in both */
    uint64_t latency_ns;
} cotra_spire_stats;

/* One thread's engine over n shards with inverted lists: tables[i] and views[i] belong to the region of channels[i].
 * All must outlive it. */
int cotra_spire_create(cotra_view *const *views, cotra_ivf_table *const *tables, cotra_channel *const *channels,
                       uint32_t n_shards, int simd, cotra_spire **out, cotra_error *err);
/* queries float32[n_queries, dim] -> labels int64[n_queries, k], distances float32[n_queries, k] (exact), the shard of
 * each int32[n_queries, k], by distance, then shard, then label; a label that came from several shards is kept once;
 * empty places hold -1, infinity, -1. scope may be NULL. */
int cotra_spire_search(cotra_spire *engine, const float *queries, uint64_t n_queries, const cotra_spire_params *params,
                       const cotra_search_scope *scope, int64_t *labels, float *distances, int32_t *shards,
                       cotra_spire_stats *stats, cotra_error *err);
/* Goes on after COTRA_PAUSED. */
int cotra_spire_resume(cotra_spire *engine, uint64_t pause_ns, cotra_error *err);
void cotra_spire_destroy(cotra_spire *engine);

/* Merges sorted answers of n_shards (laid out as above) by distance, then shard, then label; a label that came from
 * several shards is kept once. labels int64[n_queries, k], distances float32[n_queries, k], shards int32 likewise. */
int cotra_merge(const int64_t *shard_labels, const float *shard_distances, uint32_t n_shards, uint64_t n_queries,
                uint32_t k, int64_t *labels, float *distances, int32_t *shards, cotra_error *err);

/* [cdef-end] */

#endif
