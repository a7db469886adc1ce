/* A small libibverbs for tests: the symbols that csrc/verbs/verbs.h loads, and RC queue pairs whose READs are served in this
 * process. It is as strict as a NIC and its kernel are, and stricter where they would be silent: a call with an object that is
 * not live, and a completion queue that overflows, abort with a message.
 *
 * Nothing happens by itself: a queue pair makes progress when its completion queue is polled, so every run is the same. The
 * landing memory of a READ is overwritten when it is posted and filled when it completes: who looks too early is found out.
 *
 * Read from the environment, at each use (NAME_fake1, say, for one device only):
 *
 *   FAKE_VERBS_DEVICES    names, by commas; default "fake0"
 *   FAKE_VERBS_GIDS       addresses, by commas, in the order of the table; "::" is an empty entry
 *   FAKE_VERBS_SYSFS      the directory to take for /sys/class/infiniband
 *   FAKE_VERBS_{PORT_STATE, LINK_LAYER, MTU (enum ibv_mtu), LID, MAX_QP_WR, MAX_CQE, MAX_RD_ATOMIC, MAX_INIT_RD_ATOMIC,
 *               MAX_MR_BYTES}
 *   FAKE_VERBS_COMPAT     1: a provider without extended verbs
 *   FAKE_VERBS_FAIL       CALL=ERRNO or CALL@N=ERRNO (the N-th only), by commas: "reg_mr=12,modify_qp.RTR=22,post_send@3=12"
 *   FAKE_VERBS_READ       N=STATUS: the N-th READ completes with that enum ibv_wc_status; N=never: not at all
 *   FAKE_VERBS_LATE       N: completions come one signalled READ at a time, each after N to 3 N polls, as the queue pair's
 *                         number has it: so late, and out of order between queue pairs
 *
 * N counts from fake_reset(). */
#define _GNU_SOURCE
#include <infiniband/verbs.h>

#include <arpa/inet.h>
#include <errno.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#undef ibv_query_port
#undef ibv_reg_mr

#define EXPORT __attribute__((visibility("default")))
#define OF(type, member, pointer) ((type *)(void *)((char *)(pointer)-offsetof(type, member)))

enum { N_DEVICES = 8, N_CALLS = 64, N_PORTS = 1, MAX_MESSAGE_BYTES = 1 << 30, UNSET = 0xA5 };

/* ---- objects: all that is live is in one list ---- */

typedef enum object_kind { CONTEXT, PD, MR, CQ, QP, N_KINDS } object_kind;
static const char *const kind_names[N_KINDS] = {"context", "protection domain", "memory region", "completion queue",
                                                "queue pair"};

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

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static object *live;
static int live_lists;
static uint32_t last_qp_number = 0x10, last_key;
static long last_read;
static struct {
    char name[32];
    long n;
} calls[N_CALLS];

static void violated(const char *call, const char *what)
{
    fprintf(stderr, "fake libibverbs: %s: %s\n", call, what);
    abort();
}

static void *object_create(size_t size, object_kind kind)
{
    object *self = calloc(1, size);
    if (!self)
        abort();
    self->kind = kind;
    self->next = live;
    live = self;
    return self;
}

static void object_check(const void *pointer, object_kind kind, const char *call)
{
    for (const object *at = live; at; at = at->next)
        if (at == pointer && at->kind == kind)
            return;
    fprintf(stderr, "fake libibverbs: %s: not a live %s\n", call, kind_names[kind]);
    abort();
}

static void object_destroy(object *self)
{
    object **at = &live;
    while (*at != self)
        at = &(*at)->next;
    *at = self->next;
    free(self);
}

#define CHECKED_CAST(type, member, kind, public_type)                                                                  \
    static type *checked_##type(public_type *pointer, const char *call)                                                \
    {                                                                                                                  \
        object_check(OF(type, member, pointer), kind, call);                                                           \
        return OF(type, member, pointer);                                                                              \
    }
CHECKED_CAST(fake_context, verbs.context, CONTEXT, struct ibv_context)
CHECKED_CAST(fake_pd, pd, PD, struct ibv_pd)
CHECKED_CAST(fake_mr, mr, MR, struct ibv_mr)
CHECKED_CAST(fake_cq, cq, CQ, struct ibv_cq)
CHECKED_CAST(fake_qp, qp, QP, struct ibv_qp)
#define LIVE(type, pointer) checked_##type(pointer, __func__)

/* ---- settings and faults ---- */

static const char *setting_text(const struct ibv_device *device, const char *name, const char *otherwise)
{
    char key[128];
    const char *text = NULL;
    if (device) {
        snprintf(key, sizeof key, "FAKE_VERBS_%s_%s", name, device->name);
        text = getenv(key);
    }
    if (!text) {
        snprintf(key, sizeof key, "FAKE_VERBS_%s", name);
        text = getenv(key);
    }
    return text ? text : otherwise;
}

static long setting(const struct ibv_device *device, const char *name, long otherwise)
{
    const char *text = setting_text(device, name, NULL);
    return text ? strtol(text, NULL, 0) : otherwise;
}

/* Copies entry i of a list by commas; 0 where it has fewer. */
static int list_entry(const char *list, int i, char *out, size_t capacity)
{
    while (i-- > 0) {
        list = strchr(list, ',');
        if (!list++)
            return 0;
    }
    snprintf(out, capacity, "%.*s", (int)strcspn(list, ","), list);
    return out[0] != 0;
}

/* Counts the call; 1, with its errno, when it is to fail. */
static int fails(const char *call, int *error)
{
    int slot = 0;
    while (slot < N_CALLS - 1 && calls[slot].name[0] && strcmp(calls[slot].name, call) != 0)
        slot++;
    snprintf(calls[slot].name, sizeof calls[slot].name, "%s", call);
    calls[slot].n++;
    char entry[64];
    for (int i = 0; list_entry(setting_text(NULL, "FAIL", ""), i, entry, sizeof entry); i++) {
        char *number = strchr(entry, '='), *at = strchr(entry, '@');
        if (!number)
            violated("FAKE_VERBS_FAIL", entry);
        *number++ = 0;
        if (at)
            *at++ = 0;
        if (strcmp(entry, call) == 0 && (!at || strtol(at, NULL, 0) == calls[slot].n)) {
            *error = (int)strtol(number, NULL, 0);
            return 1;
        }
    }
    return 0;
}

/* The status that this READ is to complete with: -1 as it comes, -2 never. */
static int ordered_status(void)
{
    const char *order = setting_text(NULL, "READ", NULL), *equals = order ? strchr(order, '=') : NULL;
    if (++last_read != (equals ? strtol(order, NULL, 0) : 0))
        return -1;
    return strcmp(equals + 1, "never") == 0 ? -2 : (int)strtol(equals + 1, NULL, 0);
}

EXPORT void fake_reset(void);
EXPORT void fake_reset(void)
{
    pthread_mutex_lock(&lock);
    memset(calls, 0, sizeof calls);
    last_read = 0;
    pthread_mutex_unlock(&lock);
}

/* How often a call was made since fake_reset. */
EXPORT long fake_calls(const char *name);
EXPORT long fake_calls(const char *name)
{
    long n = 0;
    pthread_mutex_lock(&lock);
    for (int i = 0; i < N_CALLS; i++)
        if (strcmp(calls[i].name, name) == 0)
            n = calls[i].n;
    pthread_mutex_unlock(&lock);
    return n;
}

/* How many objects are live, and which, in words. */
EXPORT int fake_live_objects(char *text, int text_bytes);
EXPORT int fake_live_objects(char *text, int text_bytes)
{
    int n = 0, of_kind[N_KINDS] = {0}, used = 0;
    pthread_mutex_lock(&lock);
    for (const object *at = live; at; at = at->next, n++)
        of_kind[at->kind]++;
    n += live_lists;
    text[0] = 0;
    for (int k = 0; k < N_KINDS; k++)
        if (of_kind[k] && used < text_bytes)
            used += snprintf(text + used, (size_t)(text_bytes - used), "%d x %s, ", of_kind[k], kind_names[k]);
    if (live_lists && used < text_bytes)
        snprintf(text + used, (size_t)(text_bytes - used), "%d x device list", live_lists);
    pthread_mutex_unlock(&lock);
    return n;
}

/* Frees all that is live, for tests in which a call to destroy it failed. */
EXPORT void fake_forget(void);
EXPORT void fake_forget(void)
{
    pthread_mutex_lock(&lock);
    while (live) {
        object *next = live->next;
        if (live->kind == CQ) {
            free(((fake_cq *)(void *)live)->wcs);
            free(((fake_cq *)(void *)live)->frees);
        } else if (live->kind == QP) {
            free(((fake_qp *)(void *)live)->work);
        }
        free(live);
        live = next;
    }
    pthread_mutex_unlock(&lock);
}

/* ---- devices ---- */

static struct ibv_device devices[N_DEVICES];

static int gid_at(const struct ibv_device *device, int index, union ibv_gid *out)
{
    char text[64];
    memset(out, 0, sizeof *out);
    if (!list_entry(setting_text(device, "GIDS", "fe80::1,::ffff:127.0.0.1"), index, text, sizeof text))
        return 0;
    if (inet_pton(AF_INET6, text, out->raw) != 1)
        violated("FAKE_VERBS_GIDS", text);
    return 1;
}

static int gid_count(const struct ibv_device *device)
{
    union ibv_gid gid;
    int n = 0;
    while (gid_at(device, n, &gid))
        n++;
    return n;
}

static int gid_is_known(const union ibv_gid *wanted)
{
    union ibv_gid gid;
    for (int d = 0; d < N_DEVICES && devices[d].name[0]; d++)
        for (int i = 0; gid_at(&devices[d], i, &gid); i++)
            if (memcmp(&gid, wanted, sizeof gid) == 0)
                return 1;
    return 0;
}

EXPORT struct ibv_device **ibv_get_device_list(int *n)
{
    int error, count = 0;
    pthread_mutex_lock(&lock);
    if (fails("get_device_list", &error)) {
        pthread_mutex_unlock(&lock);
        errno = error;
        return NULL;
    }
    struct ibv_device **list = calloc(N_DEVICES + 1, sizeof *list);
    const char *names = setting_text(NULL, "DEVICES", "fake0");
    while (list && count < N_DEVICES && list_entry(names, count, devices[count].name, sizeof devices[count].name)) {
        struct ibv_device *device = &devices[count];
        snprintf(device->ibdev_path, sizeof device->ibdev_path, "%.180s/%s",
                 setting_text(NULL, "SYSFS", "/sys/class/infiniband"), device->name);
        device->node_type = IBV_NODE_CA;
        device->transport_type = IBV_TRANSPORT_IB;
        list[count++] = device;
    }
    live_lists++;
    pthread_mutex_unlock(&lock);
    if (n)
        *n = count;
    return list;
}

EXPORT void ibv_free_device_list(struct ibv_device **list)
{
    pthread_mutex_lock(&lock);
    live_lists--;
    pthread_mutex_unlock(&lock);
    free(list);
}

EXPORT const char *ibv_get_device_name(struct ibv_device *device)
{
    return device->name;
}

static int port_attributes(struct ibv_context *context, uint8_t port, struct ibv_port_attr *out, size_t size)
{
    const struct ibv_device *device = context->device;
    struct ibv_port_attr attr;
    int error;
    if (fails("query_port", &error))
        return error;
    if (port < 1 || port > N_PORTS)
        return EINVAL;
    memset(&attr, 0, sizeof attr);
    attr.state = (enum ibv_port_state)setting(device, "PORT_STATE", IBV_PORT_ACTIVE);
    attr.max_mtu = IBV_MTU_4096;
    attr.active_mtu = (enum ibv_mtu)setting(device, "MTU", IBV_MTU_4096);
    attr.gid_tbl_len = gid_count(device);
    attr.max_msg_sz = MAX_MESSAGE_BYTES;
    attr.pkey_tbl_len = 1;
    attr.link_layer = (uint8_t)setting(device, "LINK_LAYER", IBV_LINK_LAYER_ETHERNET);
    attr.lid = (uint16_t)setting(device, "LID", attr.link_layer == IBV_LINK_LAYER_ETHERNET ? 0 : 7);
    memcpy(out, &attr, size < sizeof attr ? size : sizeof attr);
    return 0;
}

static int query_port_extended(struct ibv_context *context, uint8_t port, struct ibv_port_attr *out, size_t size)
{
    pthread_mutex_lock(&lock);
    LIVE(fake_context, context);
    int error = port_attributes(context, port, out, size);
    pthread_mutex_unlock(&lock);
    return error;
}

EXPORT int ibv_query_port(struct ibv_context *context, uint8_t port, struct _compat_ibv_port_attr *out)
{
    return query_port_extended(context, port, (struct ibv_port_attr *)out,
                               offsetof(struct ibv_port_attr, port_cap_flags2));
}

EXPORT int ibv_query_gid(struct ibv_context *context, uint8_t port, int index, union ibv_gid *gid)
{
    int error = 0;
    pthread_mutex_lock(&lock);
    LIVE(fake_context, context);
    if (!fails("query_gid", &error) && (port < 1 || port > N_PORTS || !gid_at(context->device, index, gid)))
        error = EINVAL;
    pthread_mutex_unlock(&lock);
    errno = error;
    return error ? -1 : 0;
}

static int poll_cq(struct ibv_cq *raw, int capacity, struct ibv_wc *out);
static int post_send(struct ibv_qp *raw, struct ibv_send_wr *wr, struct ibv_send_wr **bad);

EXPORT struct ibv_context *ibv_open_device(struct ibv_device *device)
{
    int error;
    pthread_mutex_lock(&lock);
    if (fails("open_device", &error)) {
        pthread_mutex_unlock(&lock);
        errno = error;
        return NULL;
    }
    fake_context *self = object_create(sizeof *self, CONTEXT);
    pthread_mutex_unlock(&lock);
    struct ibv_context *context = &self->verbs.context;
    context->device = device;
    context->ops.poll_cq = poll_cq;
    context->ops.post_send = post_send;
    if (!setting(device, "COMPAT", 0)) {
        self->verbs.sz = sizeof self->verbs;
        self->verbs.query_port = query_port_extended;
        context->abi_compat = __VERBS_ABI_IS_EXTENDED;
    }
    return context;
}

EXPORT int ibv_close_device(struct ibv_context *context)
{
    int error = 0;
    pthread_mutex_lock(&lock);
    fake_context *self = LIVE(fake_context, context);
    if (!fails("close_device", &error) && self->object.users)
        error = EBUSY;
    if (!error)
        object_destroy(&self->object);
    pthread_mutex_unlock(&lock);
    return error;
}

EXPORT int ibv_query_device(struct ibv_context *context, struct ibv_device_attr *out)
{
    int error = 0;
    const struct ibv_device *device = context->device;
    pthread_mutex_lock(&lock);
    LIVE(fake_context, context);
    memset(out, 0, sizeof *out);
    if (!fails("query_device", &error)) {
        snprintf(out->fw_ver, sizeof out->fw_ver, "1.2.3");
        out->node_guid = htobe64(0x0102030405060708);
        out->max_mr_size = (uint64_t)setting(device, "MAX_MR_BYTES", INT64_MAX);
        out->vendor_id = 0xFACE;
        out->vendor_part_id = 1;
        out->max_qp_wr = (int)setting(device, "MAX_QP_WR", 16384);
        out->max_cqe = (int)setting(device, "MAX_CQE", 65535);
        out->max_qp_rd_atom = (int)setting(device, "MAX_RD_ATOMIC", 16);
        out->max_qp_init_rd_atom = (int)setting(device, "MAX_INIT_RD_ATOMIC", 16);
        out->phys_port_cnt = N_PORTS;
    }
    pthread_mutex_unlock(&lock);
    return error;
}

/* ---- protection domains, memory regions, completion queues ---- */

EXPORT struct ibv_pd *ibv_alloc_pd(struct ibv_context *context)
{
    int error = 0;
    fake_pd *self = NULL;
    pthread_mutex_lock(&lock);
    fake_context *parent = LIVE(fake_context, context);
    if (!fails("alloc_pd", &error)) {
        self = object_create(sizeof *self, PD);
        self->pd.context = context;
        parent->object.users++;
    }
    pthread_mutex_unlock(&lock);
    errno = error;
    return self ? &self->pd : NULL;
}

EXPORT int ibv_dealloc_pd(struct ibv_pd *pd)
{
    int error = 0;
    pthread_mutex_lock(&lock);
    fake_pd *self = LIVE(fake_pd, pd);
    if (!fails("dealloc_pd", &error) && self->object.users)
        error = EBUSY;
    if (!error) {
        LIVE(fake_context, pd->context)->object.users--;
        object_destroy(&self->object);
    }
    pthread_mutex_unlock(&lock);
    return error;
}

EXPORT struct ibv_mr *ibv_reg_mr(struct ibv_pd *pd, void *address, size_t length, int access)
{
    const int writes = IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_ATOMIC;
    int error = 0;
    fake_mr *self = NULL;
    pthread_mutex_lock(&lock);
    fake_pd *parent = LIVE(fake_pd, pd);
    if (!fails("reg_mr", &error) && (length == 0 || ((access & writes) && !(access & IBV_ACCESS_LOCAL_WRITE))))
        error = EINVAL;
    else if (!error) {
        self = object_create(sizeof *self, MR);
        self->access = access;
        self->mr.context = pd->context;
        self->mr.pd = pd;
        self->mr.addr = address;
        self->mr.length = length;
        self->mr.lkey = 0x1000 + ++last_key;
        self->mr.rkey = 0x800000 + (last_key << 8);
        parent->object.users++;
    }
    pthread_mutex_unlock(&lock);
    errno = error;
    return self ? &self->mr : NULL;
}

EXPORT int ibv_dereg_mr(struct ibv_mr *mr)
{
    int error = 0;
    pthread_mutex_lock(&lock);
    fake_mr *self = LIVE(fake_mr, mr);
    if (!fails("dereg_mr", &error)) {
        LIVE(fake_pd, mr->pd)->object.users--;
        object_destroy(&self->object);
    }
    pthread_mutex_unlock(&lock);
    return error;
}

static fake_mr *mr_find(uint32_t lkey, uint32_t rkey)
{
    for (object *at = live; at; at = at->next) {
        fake_mr *self = (fake_mr *)(void *)at;
        if (at->kind == MR && (self->mr.lkey == lkey || self->mr.rkey == rkey))
            return self;
    }
    return NULL;
}

static int mr_allows(const fake_mr *self, const struct ibv_pd *pd, int access, uint64_t address, uint64_t length)
{
    if (!self || self->mr.pd != pd || (self->access & access) != access)
        return 0;
    uint64_t begin = (uint64_t)(uintptr_t)self->mr.addr;
    return address >= begin && length <= self->mr.length && address - begin <= self->mr.length - length;
}

/* The access flags of the region with that rkey, -1 where there is none. */
EXPORT int fake_mr_access(uint32_t rkey);
EXPORT int fake_mr_access(uint32_t rkey)
{
    pthread_mutex_lock(&lock);
    const fake_mr *mr = mr_find(0, rkey);
    int access = mr ? mr->access : -1;
    pthread_mutex_unlock(&lock);
    return access;
}

EXPORT struct ibv_cq *ibv_create_cq(struct ibv_context *context, int cqe, void *cq_context,
                                    struct ibv_comp_channel *channel, int vector)
{
    int error = 0;
    fake_cq *self = NULL;
    (void)vector;
    pthread_mutex_lock(&lock);
    fake_context *parent = LIVE(fake_context, context);
    if (!fails("create_cq", &error) && (cqe < 1 || cqe > setting(context->device, "MAX_CQE", 65535)))
        error = EINVAL;
    else if (!error) {
        self = object_create(sizeof *self, CQ);
        self->cq.context = context;
        self->cq.channel = channel;
        self->cq.cq_context = cq_context;
        self->cq.cqe = cqe;
        self->wcs = calloc((size_t)cqe, sizeof *self->wcs);
        self->frees = calloc((size_t)cqe, sizeof *self->frees);
        parent->object.users++;
    }
    pthread_mutex_unlock(&lock);
    errno = error;
    return self ? &self->cq : NULL;
}

EXPORT int ibv_destroy_cq(struct ibv_cq *cq)
{
    int error = 0;
    pthread_mutex_lock(&lock);
    fake_cq *self = LIVE(fake_cq, cq);
    if (!fails("destroy_cq", &error) && self->object.users)
        error = EBUSY;
    if (!error) {
        LIVE(fake_context, cq->context)->object.users--;
        free(self->wcs);
        free(self->frees);
        object_destroy(&self->object);
    }
    pthread_mutex_unlock(&lock);
    return error;
}

static void cq_push(fake_cq *self, const fake_qp *qp, const fake_wr *work, enum ibv_wc_status status)
{
    if (self->n == self->cq.cqe)
        violated("completion queue", "overrun");
    struct ibv_wc *wc = &self->wcs[self->n];
    memset(wc, status == IBV_WC_SUCCESS ? 0 : UNSET, sizeof *wc);
    wc->wr_id = work->id;
    wc->status = status;
    wc->qp_num = qp->qp.qp_num;
    wc->vendor_err = status == IBV_WC_SUCCESS ? 0 : 0x80u + (uint32_t)status;
    if (status == IBV_WC_SUCCESS) {
        wc->opcode = IBV_WC_RDMA_READ;
        wc->byte_len = work->piece.length;
    }
    self->frees[self->n++] = qp->done;
}

/* ---- queue pairs ---- */

EXPORT struct ibv_qp *ibv_create_qp(struct ibv_pd *pd, struct ibv_qp_init_attr *init)
{
    int error = 0;
    fake_qp *self = NULL;
    pthread_mutex_lock(&lock);
    fake_pd *parent = LIVE(fake_pd, pd);
    fake_cq *cq = LIVE(fake_cq, init->send_cq);
    if (!fails("create_qp", &error) &&
        (init->qp_type != IBV_QPT_RC || init->recv_cq != init->send_cq || init->cap.max_send_wr == 0 ||
         init->cap.max_send_sge != 1 || init->cap.max_send_wr > setting(pd->context->device, "MAX_QP_WR", 16384)))
        error = EINVAL;
    else if (!error) {
        self = object_create(sizeof *self, QP);
        self->qp.context = pd->context;
        self->qp.pd = pd;
        self->qp.send_cq = self->qp.recv_cq = init->send_cq;
        self->qp.qp_type = init->qp_type;
        self->qp.qp_num = ++last_qp_number;
        self->qp.state = IBV_QPS_RESET;
        self->depth = init->cap.max_send_wr;
        self->work = calloc(self->depth, sizeof *self->work);
        parent->object.users++;
        cq->object.users++;
    }
    pthread_mutex_unlock(&lock);
    errno = error;
    return self ? &self->qp : NULL;
}

EXPORT int ibv_destroy_qp(struct ibv_qp *qp)
{
    int error = 0, kept = 0;
    pthread_mutex_lock(&lock);
    fake_qp *self = LIVE(fake_qp, qp);
    if (!fails("destroy_qp", &error)) {
        fake_cq *cq = LIVE(fake_cq, qp->send_cq);
        for (int i = 0; i < cq->n; i++)
            if (cq->wcs[i].qp_num != qp->qp_num) {
                cq->frees[kept] = cq->frees[i];
                cq->wcs[kept++] = cq->wcs[i];
            }
        cq->n = kept;
        cq->object.users--;
        LIVE(fake_pd, qp->pd)->object.users--;
        free(self->work);
        object_destroy(&self->object);
    }
    pthread_mutex_unlock(&lock);
    return error;
}

static void qp_break(fake_qp *self)
{
    fake_cq *cq = LIVE(fake_cq, self->qp.send_cq);
    self->qp.state = IBV_QPS_ERR;
    while (self->done < self->posted) {
        const fake_wr *work = &self->work[self->done++ % self->depth];
        cq_push(cq, self, work, IBV_WC_WR_FLUSH_ERR);
    }
}

/* ibv_modify_qp(3): the attributes that each step of an RC queue pair requires, and those that it may have besides (InfiniBand
 * Architecture Specification 1.2.1, table 91). */
static const struct step {
    enum ibv_qp_state from, to;
    const char *name;
    int required, optional;
} steps[] = {
    {IBV_QPS_RESET, IBV_QPS_INIT, "modify_qp.INIT", IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS, 0},
    {IBV_QPS_INIT, IBV_QPS_RTR, "modify_qp.RTR",
     IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN | IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER,
     IBV_QP_ACCESS_FLAGS | IBV_QP_PKEY_INDEX | IBV_QP_ALT_PATH},
    {IBV_QPS_RTR, IBV_QPS_RTS, "modify_qp.RTS",
     IBV_QP_SQ_PSN | IBV_QP_MAX_QP_RD_ATOMIC | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY | IBV_QP_TIMEOUT,
     IBV_QP_CUR_STATE | IBV_QP_ACCESS_FLAGS | IBV_QP_MIN_RNR_TIMER | IBV_QP_ALT_PATH | IBV_QP_PATH_MIG_STATE},
};

static int rtr_is_possible(const fake_qp *self, const struct ibv_qp_attr *attr)
{
    const struct ibv_device *device = self->qp.context->device;
    const struct ibv_ah_attr *path = &attr->ah_attr;
    union ibv_gid gid, none = {.raw = {0}};
    if (attr->path_mtu < IBV_MTU_256 || attr->path_mtu > (enum ibv_mtu)setting(device, "MTU", IBV_MTU_4096) ||
        attr->max_dest_rd_atomic > setting(device, "MAX_RD_ATOMIC", 16) || attr->dest_qp_num >> 24 ||
        attr->rq_psn >> 24 || attr->min_rnr_timer > 31 || path->port_num != self->attr.port_num)
        return EINVAL;
    if (setting(device, "LINK_LAYER", IBV_LINK_LAYER_ETHERNET) != IBV_LINK_LAYER_ETHERNET && !path->is_global)
        return path->dlid ? 0 : EINVAL;
    if (!path->is_global || !gid_at(device, path->grh.sgid_index, &gid) || memcmp(&gid, &none, sizeof gid) == 0)
        return EINVAL;
    return gid_is_known(&path->grh.dgid) ? 0 : ENETUNREACH;
}

static int rts_is_possible(const fake_qp *self, const struct ibv_qp_attr *attr)
{
    long most = setting(self->qp.context->device, "MAX_INIT_RD_ATOMIC", 16);
    return attr->max_rd_atomic > most || attr->sq_psn >> 24 || attr->timeout > 31 || attr->retry_cnt > 7 ||
                   attr->rnr_retry > 7
               ? EINVAL
               : 0;
}

static int qp_step(fake_qp *self, const struct ibv_qp_attr *attr, int mask)
{
    int error = 0;
    if (!(mask & IBV_QP_STATE))
        return EINVAL;
    if (attr->qp_state == IBV_QPS_ERR) {
        if (fails("modify_qp.ERR", &error))
            return error;
        if (mask != IBV_QP_STATE)
            return EINVAL;
        qp_break(self);
        return 0;
    }
    for (size_t i = 0; i < sizeof steps / sizeof *steps; i++) {
        const struct step *step = &steps[i];
        if (step->to != attr->qp_state)
            continue;
        if (fails(step->name, &error))
            return error;
        const int required = step->required | IBV_QP_STATE;
        if (self->qp.state != step->from || (mask & required) != required || (mask & ~(required | step->optional)))
            return EINVAL;
        if (step->to == IBV_QPS_INIT) {
            if (attr->port_num < 1 || attr->port_num > N_PORTS || attr->pkey_index != 0)
                return EINVAL;
            self->attr.port_num = attr->port_num;
            self->attr.qp_access_flags = attr->qp_access_flags;
        } else if (step->to == IBV_QPS_RTR) {
            error = rtr_is_possible(self, attr);
            if (error)
                return error;
            const struct ibv_qp_attr before = self->attr;
            self->attr = *attr;
            self->attr.port_num = before.port_num;
            self->attr.qp_access_flags = before.qp_access_flags;
        } else {
            error = rts_is_possible(self, attr);
            if (error)
                return error;
            self->attr.sq_psn = attr->sq_psn;
            self->attr.max_rd_atomic = attr->max_rd_atomic;
            self->attr.timeout = attr->timeout;
            self->attr.retry_cnt = attr->retry_cnt;
            self->attr.rnr_retry = attr->rnr_retry;
        }
        self->qp.state = step->to;
        return 0;
    }
    return EINVAL;
}

EXPORT int ibv_modify_qp(struct ibv_qp *qp, struct ibv_qp_attr *attr, int mask)
{
    pthread_mutex_lock(&lock);
    int error = qp_step(LIVE(fake_qp, qp), attr, mask);
    pthread_mutex_unlock(&lock);
    return error;
}

static fake_qp *qp_find(uint32_t number)
{
    for (object *at = live; at; at = at->next)
        if (at->kind == QP && ((fake_qp *)(void *)at)->qp.qp_num == number)
            return (fake_qp *)(void *)at;
    return NULL;
}

/* An attribute of a queue pair as it was set; -1 where there is no such queue pair or attribute. */
EXPORT long fake_qp_attribute(uint32_t number, const char *name);
EXPORT long fake_qp_attribute(uint32_t number, const char *name)
{
    long value = -1;
    pthread_mutex_lock(&lock);
    const fake_qp *qp = qp_find(number);
#define ATTRIBUTE(text, expression)                                                                                    \
    if (qp && strcmp(name, text) == 0)                                                                                 \
        value = (long)(expression);
    ATTRIBUTE("state", qp->qp.state)
    ATTRIBUTE("access", qp->attr.qp_access_flags)
    ATTRIBUTE("path_mtu", qp->attr.path_mtu)
    ATTRIBUTE("dest_qp_num", qp->attr.dest_qp_num)
    ATTRIBUTE("max_rd_atomic", qp->attr.max_rd_atomic)
    ATTRIBUTE("max_dest_rd_atomic", qp->attr.max_dest_rd_atomic)
    ATTRIBUTE("timeout", qp->attr.timeout)
    ATTRIBUTE("retry_cnt", qp->attr.retry_cnt)
    ATTRIBUTE("is_global", qp->attr.ah_attr.is_global)
    ATTRIBUTE("dlid", qp->attr.ah_attr.dlid)
    ATTRIBUTE("sl", qp->attr.ah_attr.sl)
    ATTRIBUTE("sgid_index", qp->attr.ah_attr.grh.sgid_index)
    ATTRIBUTE("hop_limit", qp->attr.ah_attr.grh.hop_limit)
    ATTRIBUTE("traffic_class", qp->attr.ah_attr.grh.traffic_class)
#undef ATTRIBUTE
    pthread_mutex_unlock(&lock);
    return value;
}

/* ---- work ---- */

static int post_one(fake_qp *self, const struct ibv_send_wr *wr)
{
    int error;
    if (fails("post_send", &error))
        return error;
    if (self->qp.state != IBV_QPS_RTS && self->qp.state != IBV_QPS_ERR)
        return EINVAL;
    if (wr->num_sge != 1 || wr->opcode != IBV_WR_RDMA_READ)
        return EINVAL;
    if (self->posted - self->freed == self->depth)
        return ENOMEM;
    const struct ibv_sge *piece = &wr->sg_list[0];
    self->work[self->posted++ % self->depth] = (fake_wr){.id = wr->wr_id,
                                                         .remote_address = wr->wr.rdma.remote_addr,
                                                         .rkey = wr->wr.rdma.rkey,
                                                         .signalled = (wr->send_flags & IBV_SEND_SIGNALED) != 0,
                                                         .opcode = wr->opcode,
                                                         .piece = *piece};
    if (mr_allows(mr_find(piece->lkey, 0), self->qp.pd, IBV_ACCESS_LOCAL_WRITE, piece->addr, piece->length))
        memset((void *)(uintptr_t)piece->addr, UNSET, piece->length);
    return 0;
}

static int post_send(struct ibv_qp *raw, struct ibv_send_wr *wr, struct ibv_send_wr **bad)
{
    int error = 0;
    pthread_mutex_lock(&lock);
    fake_qp *self = LIVE(fake_qp, raw);
    for (; wr && !error; wr = error ? wr : wr->next)
        error = post_one(self, wr);
    if (error)
        *bad = wr;
    else if (self->qp.state == IBV_QPS_ERR)
        qp_break(self);
    pthread_mutex_unlock(&lock);
    return error;
}

/* Serves one READ as both ends would. A status that the responder gives breaks its queue pair too. */
static enum ibv_wc_status serve(const fake_qp *self, const fake_wr *work)
{
    const struct ibv_sge *piece = &work->piece;
    if (piece->length > MAX_MESSAGE_BYTES)
        return IBV_WC_LOC_LEN_ERR;
    if (!mr_allows(mr_find(piece->lkey, 0), self->qp.pd, IBV_ACCESS_LOCAL_WRITE, piece->addr, piece->length))
        return IBV_WC_LOC_PROT_ERR;
    fake_qp *peer = qp_find(self->attr.dest_qp_num);
    if (!peer || (peer->qp.state != IBV_QPS_RTR && peer->qp.state != IBV_QPS_RTS) ||
        peer->attr.dest_qp_num != self->qp.qp_num || peer->attr.rq_psn != self->attr.sq_psn ||
        peer->attr.path_mtu != self->attr.path_mtu || self->attr.max_rd_atomic == 0)
        return IBV_WC_RETRY_EXC_ERR;
    uint64_t in_flight = self->posted - self->done;
    in_flight = in_flight < self->attr.max_rd_atomic ? in_flight : self->attr.max_rd_atomic;
    enum ibv_wc_status status = IBV_WC_SUCCESS;
    if (in_flight > peer->attr.max_dest_rd_atomic || !(peer->attr.qp_access_flags & IBV_ACCESS_REMOTE_READ))
        status = IBV_WC_REM_INV_REQ_ERR;
    else if (!mr_allows(mr_find(0, work->rkey), peer->qp.pd, IBV_ACCESS_REMOTE_READ, work->remote_address,
                        piece->length))
        status = IBV_WC_REM_ACCESS_ERR;
    if (status != IBV_WC_SUCCESS)
        qp_break(peer);
    else
        memcpy((void *)(uintptr_t)piece->addr, (const void *)(uintptr_t)work->remote_address, piece->length);
    return status;
}

static void make_progress(fake_qp *self, fake_cq *cq)
{
    const long late = setting(NULL, "LATE", 0);
    while (self->done < self->posted && !self->stuck) {
        const fake_wr *work = &self->work[self->done % self->depth];
        if (late) {
            if (self->patience == 0)
                self->patience = late * (1 + self->qp.qp_num % 3);
            if (--self->patience > 0)
                return;
        }
        int order = ordered_status();
        self->stuck = order == -2;
        if (self->stuck)
            return;
        enum ibv_wc_status status = order < 0 ? serve(self, work) : (enum ibv_wc_status)order;
        self->done++;
        if (status != IBV_WC_SUCCESS) {
            cq_push(cq, self, work, status);
            qp_break(self);
        } else if (work->signalled) {
            cq_push(cq, self, work, status);
        }
    }
}

static int poll_cq(struct ibv_cq *raw, int capacity, struct ibv_wc *out)
{
    int error, n = 0;
    pthread_mutex_lock(&lock);
    fake_cq *self = LIVE(fake_cq, raw);
    if (fails("poll_cq", &error)) {
        pthread_mutex_unlock(&lock);
        return -error;
    }
    for (object *at = live; at; at = at->next) {
        fake_qp *qp = (fake_qp *)(void *)at;
        if (at->kind == QP && qp->qp.send_cq == raw && qp->qp.state == IBV_QPS_RTS)
            make_progress(qp, self);
    }
    for (; n < self->n && n < capacity; n++) {
        fake_qp *qp = qp_find(self->wcs[n].qp_num);
        if (qp)
            qp->freed = self->frees[n];
        out[n] = self->wcs[n];
    }
    self->n -= n;
    memmove(self->wcs, self->wcs + n, (size_t)self->n * sizeof *self->wcs);
    memmove(self->frees, self->frees + n, (size_t)self->n * sizeof *self->frees);
    pthread_mutex_unlock(&lock);
    return n;
}

EXPORT const char *ibv_wc_status_str(enum ibv_wc_status status)
{
    static const char *const names[] = {
        "success", "local length error", "local QP operation error", "local EE context operation error",
        "local protection error", "Work Request Flushed Error", "memory management operation error", "bad response error",
        "local access error", "remote invalid request error", "remote access error", "remote operation error",
        "transport retry counter exceeded", "RNR retry counter exceeded", "local RDD violation error",
        "remote invalid RD request", "aborted error", "invalid EE context number", "invalid EE context state",
        "fatal error", "response timeout error", "general error", "TM error", "TM software rendezvous"};
    return (size_t)status < sizeof names / sizeof *names ? names[status] : "unknown";
}
