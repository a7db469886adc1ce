/* The inside of the verbs layer: libibverbs' functions as loaded, and the objects. Only csrc/verbs and
 * csrc/channel/verbs.c include it. Verbs calls differ in how they fail (some set errno, some return it): they are
 * made alike here. */
#ifndef COTRA_VERBS_VERBS_H
#define COTRA_VERBS_VERBS_H

#include "base/status.h"

#include <infiniband/verbs.h>
#include <stdbool.h>

/* The functions that the library exports; post_send, poll_cq and the like are inline calls through a context. */
#define COTRA_VERBS_SYMBOLS(X)                                                                                         \
    X(struct ibv_device **, get_device_list, (int *))                                                                  \
    X(void, free_device_list, (struct ibv_device **))                                                                  \
    X(const char *, get_device_name, (struct ibv_device *))                                                            \
    X(struct ibv_context *, open_device, (struct ibv_device *))                                                        \
    X(int, close_device, (struct ibv_context *))                                                                       \
    X(int, query_device, (struct ibv_context *, struct ibv_device_attr *))                                             \
    X(int, query_port, (struct ibv_context *, uint8_t, struct _compat_ibv_port_attr *))                                \
    X(int, query_gid, (struct ibv_context *, uint8_t, int, union ibv_gid *))                                           \
    X(struct ibv_pd *, alloc_pd, (struct ibv_context *))                                                               \
    X(int, dealloc_pd, (struct ibv_pd *))                                                                              \
    X(struct ibv_mr *, reg_mr, (struct ibv_pd *, void *, size_t, int))                                                 \
    X(int, dereg_mr, (struct ibv_mr *))                                                                                \
    X(struct ibv_cq *, create_cq, (struct ibv_context *, int, void *, struct ibv_comp_channel *, int))                 \
    X(int, destroy_cq, (struct ibv_cq *))                                                                              \
    X(struct ibv_qp *, create_qp, (struct ibv_pd *, struct ibv_qp_init_attr *))                                        \
    X(int, modify_qp, (struct ibv_qp *, struct ibv_qp_attr *, int))                                                    \
    X(int, destroy_qp, (struct ibv_qp *))                                                                              \
    X(const char *, wc_status_str, (enum ibv_wc_status))

typedef struct cotra_verbs_library {
#define MEMBER(type, name, arguments) type(*name) arguments;
    COTRA_VERBS_SYMBOLS(MEMBER)
#undef MEMBER
} cotra_verbs_library;

/* Loads the library once for the process; NULL, with err filled, when it cannot be had. */
const cotra_verbs_library *cotra_verbs_load(cotra_error *err);

struct cotra_device {
    const cotra_verbs_library *verbs;
    struct ibv_context *context;
    struct ibv_pd *pd;
    cotra_device_info info;
};

struct cotra_qp {
    cotra_device *device;
    struct ibv_cq *cq;
    struct ibv_qp *qp;
    cotra_qp_options options; /* with every default filled in */
    cotra_qp_attributes local;
    cotra_gid_info gid;
    uint32_t link_layer;
    bool connected;
};

/* reg_mr with its failures told apart. */
int cotra_mr_register(cotra_device *device, const void *address, uint64_t length_bytes, int access, struct ibv_mr **out,
                      cotra_error *err);
/* Moves the queue pair to the error state: what is outstanding is flushed. */
void cotra_qp_abort(cotra_qp *qp);

#endif
