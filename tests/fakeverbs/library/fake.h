/* A small libibverbs for tests: the symbols that csrc/verbs/verbs.h loads, and RC queue pairs whose READs are served in
 * this process. It is as strict as a NIC and its kernel are, and stricter where they would be silent: a call with an
 * object that is not live, and a completion queue that overflows, abort with a message.
 *
 * Nothing happens by itself: a queue pair makes progress when its completion queue is polled, so every run is the same.
 * The landing memory of a READ is overwritten when it is posted and filled when it completes: who looks too early is
 * found out.
 *
 * Read from the environment, at each use (NAME_fake1, say, for one device only):
 *
 *   FAKE_VERBS_DEVICES    names, by commas; default "fake0"
 *   FAKE_VERBS_GIDS       addresses, by commas, in the order of the table; "::" is an empty entry
 *   FAKE_VERBS_SYSFS      the directory to take for /sys/class/infiniband
 *   FAKE_VERBS_{PORT_STATE, LINK_LAYER, MTU (enum ibv_mtu), LID, MAX_QP_WR, MAX_CQE, MAX_RD_ATOMIC, MAX_INIT_RD_ATOMIC,
 *               MAX_MR_BYTES}
 *   FAKE_VERBS_COMPAT     1: a provider without extended verbs
 *   FAKE_VERBS_FAIL       CALL=ERRNO, or CALL@N=ERRNO for the N-th only, by commas: "reg_mr=12,modify_qp.RTR@2=22"
 *   FAKE_VERBS_READ       N=STATUS: the N-th READ completes with that enum ibv_wc_status; N=never: not at all
 *   FAKE_VERBS_LATE       N: READs are served one at a time, each after N to 3 N polls, by the queue pair's number:
 *                         so late, and out of order between queue pairs
 *
 * N counts from fake_reset(). */
#ifndef FAKE_H
#define FAKE_H

#include <infiniband/verbs.h>

#include <errno.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#undef ibv_query_port
#undef ibv_reg_mr

#define EXPORT                    __attribute__((visibility("default")))
#define OF(type, member, pointer) ((type *)(void *)((char *)(pointer)-offsetof(type, member)))

enum { N_DEVICES = 8, N_CALLS = 64, N_PORTS = 1, MAX_MESSAGE_BYTES = 1 << 30, UNSET = 0xA5 };

/* ---- objects: all that is live is in one list ---- */

typedef enum object_kind { CONTEXT, PD, MR, CQ, QP, N_KINDS } object_kind;

typedef struct object {
    struct object *next;
    object_kind kind;
    int users;
} object;

typedef struct fake_context {
    object object;
    struct verbs_context verbs;
} fake_context;

typedef struct fake_pd {
    object object;
    struct ibv_pd pd;
} fake_pd;

typedef struct fake_mr {
    object object;
    struct ibv_mr mr;
    int access;
} fake_mr;

typedef struct fake_cq {
    object object;
    struct ibv_cq cq;
    struct ibv_wc *wcs; /* [cq.cqe], oldest first */
    uint64_t *frees;    /* [cq.cqe]: so much of the send queue is free again when the completion is polled */
    int n;
} fake_cq;

typedef struct fake_wr {
    uint64_t id, remote_address;
    uint32_t rkey;
    int signalled;
    enum ibv_wr_opcode opcode;
    struct ibv_sge piece;
} fake_wr;

typedef struct fake_qp {
    object object;
    struct ibv_qp qp;
    struct ibv_qp_attr attr;
    uint32_t depth;
    fake_wr *work;                /* [depth] */
    uint64_t freed, done, posted; /* work requests, counted up for ever: freed <= done <= posted <= freed + depth */
    long patience;                /* polls until the next completion */
    int stuck;
} fake_qp;

/* ---- objects.c: what is live, settings, faults; all of it, and all below, under this lock ---- */

extern pthread_mutex_t fake_lock;
extern object *fake_live; /* every object, newest first */
extern int fake_live_lists;

void violated(const char *call, const char *what);
void *object_create(size_t size, object_kind kind);
void object_destroy(object *self);

/* A public handle's own struct: LIVE(fake_qp, qp) aborts where it is not a live one. */
#define LIVE(type, pointer) checked_##type(pointer, __func__)
fake_context *checked_fake_context(struct ibv_context *pointer, const char *call);
fake_pd *checked_fake_pd(struct ibv_pd *pointer, const char *call);
fake_mr *checked_fake_mr(struct ibv_mr *pointer, const char *call);
fake_cq *checked_fake_cq(struct ibv_cq *pointer, const char *call);
fake_qp *checked_fake_qp(struct ibv_qp *pointer, const char *call);

const char *setting_text(const struct ibv_device *device, const char *name, const char *otherwise);
long setting(const struct ibv_device *device, const char *name, long otherwise);
/* Copies entry i of a list by commas; 0 where it has fewer. */
int list_entry(const char *list, int i, char *out, size_t capacity);
/* Counts the call; 1, with its errno, when it is to fail. */
int fails(const char *call, int *error);
/* The status that this READ is to complete with: -1 as it comes, -2 never. */
int ordered_status(void);

/* ---- devices.c ---- */

int gid_at(const struct ibv_device *device, int index, union ibv_gid *out);
int gid_is_known(const union ibv_gid *wanted);

/* ---- memory.c: protection domains, memory regions, completion queues ---- */

fake_mr *mr_find(uint32_t lkey, uint32_t rkey);
int mr_allows(const fake_mr *self, const struct ibv_pd *pd, int access, uint64_t address, uint64_t length);
void cq_push(fake_cq *self, const fake_qp *qp, const fake_wr *work, enum ibv_wc_status status);

/* ---- queue_pairs.c ---- */

fake_qp *qp_find(uint32_t number);
void qp_break(fake_qp *self);

/* ---- work.c ---- */

int fake_poll_cq(struct ibv_cq *raw, int capacity, struct ibv_wc *out);
int fake_post_send(struct ibv_qp *raw, struct ibv_send_wr *wr, struct ibv_send_wr **bad);

/* ---- for tests ---- */

EXPORT void fake_reset(void);
EXPORT long fake_calls(const char *name);
EXPORT int fake_live_objects(char *text, int text_bytes);
EXPORT void fake_forget(void);
EXPORT int fake_mr_access(uint32_t rkey);
EXPORT long fake_qp_attribute(uint32_t number, const char *name);

#endif
