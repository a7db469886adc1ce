/* What is live, and what the environment asks for. */
#include "fake.h"

pthread_mutex_t fake_lock = PTHREAD_MUTEX_INITIALIZER;
object *fake_live;
int fake_live_lists;

static const char *const kind_names[N_KINDS] = {"context", "protection domain", "memory region", "completion queue",
                                                "queue pair"};
static long last_read;
static struct {
    char name[32];
    long n;
} calls[N_CALLS];

void violated(const char *call, const char *what)
{
    fprintf(stderr, "fake libibverbs: %s: %s\n", call, what);
    abort();
}

void *object_create(size_t size, object_kind kind)
{
    object *self = calloc(1, size);
    if (!self)
        abort();
    self->kind = kind;
    self->next = fake_live;
    fake_live = self;
    return self;
}

static void object_check(const void *pointer, object_kind kind, const char *call)
{
    for (const object *at = fake_live; at; at = at->next)
        if (at == pointer && at->kind == kind)
            return;
    fprintf(stderr, "fake libibverbs: %s: not a live %s\n", call, kind_names[kind]);
    abort();
}

void object_destroy(object *self)
{
    object **at = &fake_live;
    while (*at != self)
        at = &(*at)->next;
    *at = self->next;
    free(self);
}

#define CHECKED_CAST(type, member, kind, public_type)                                                                  \
    type *checked_##type(public_type *pointer, const char *call)                                                       \
    {                                                                                                                  \
        object_check(OF(type, member, pointer), kind, call);                                                           \
        return OF(type, member, pointer);                                                                              \
    }
CHECKED_CAST(fake_context, verbs.context, CONTEXT, struct ibv_context)
CHECKED_CAST(fake_pd, pd, PD, struct ibv_pd)
CHECKED_CAST(fake_mr, mr, MR, struct ibv_mr)
CHECKED_CAST(fake_cq, cq, CQ, struct ibv_cq)
CHECKED_CAST(fake_qp, qp, QP, struct ibv_qp)

/* ---- settings and faults ---- */

const char *setting_text(const struct ibv_device *device, const char *name, const char *otherwise)
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

long setting(const struct ibv_device *device, const char *name, long otherwise)
{
    const char *text = setting_text(device, name, NULL);
    return text ? strtol(text, NULL, 0) : otherwise;
}

int list_entry(const char *list, int i, char *out, size_t capacity)
{
    while (i-- > 0) {
        list = strchr(list, ',');
        if (!list++)
            return 0;
    }
    snprintf(out, capacity, "%.*s", (int)strcspn(list, ","), list);
    return out[0] != 0;
}

int fails(const char *call, int *error)
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

int ordered_status(void)
{
    const char *order = setting_text(NULL, "READ", NULL), *equals = order ? strchr(order, '=') : NULL;
    if (++last_read != (equals ? strtol(order, NULL, 0) : 0))
        return -1;
    return strcmp(equals + 1, "never") == 0 ? -2 : (int)strtol(equals + 1, NULL, 0);
}

EXPORT void fake_reset(void)
{
    pthread_mutex_lock(&fake_lock);
    memset(calls, 0, sizeof calls);
    last_read = 0;
    pthread_mutex_unlock(&fake_lock);
}

/* How often a call was made since fake_reset. */
EXPORT long fake_calls(const char *name)
{
    long n = 0;
    pthread_mutex_lock(&fake_lock);
    for (int i = 0; i < N_CALLS; i++)
        if (strcmp(calls[i].name, name) == 0)
            n = calls[i].n;
    pthread_mutex_unlock(&fake_lock);
    return n;
}

/* How many objects are live, and which, in words. */
EXPORT int fake_live_objects(char *text, int text_bytes)
{
    int n = 0, of_kind[N_KINDS] = {0}, used = 0;
    pthread_mutex_lock(&fake_lock);
    for (const object *at = fake_live; at; at = at->next, n++)
        of_kind[at->kind]++;
    n += fake_live_lists;
    text[0] = 0;
    for (int k = 0; k < N_KINDS; k++)
        if (of_kind[k] && used < text_bytes)
            used += snprintf(text + used, (size_t)(text_bytes - used), "%d x %s, ", of_kind[k], kind_names[k]);
    if (fake_live_lists && used < text_bytes)
        snprintf(text + used, (size_t)(text_bytes - used), "%d x device list", fake_live_lists);
    pthread_mutex_unlock(&fake_lock);
    return n;
}

/* Frees all that is live, for tests in which a call to destroy it failed. */
EXPORT void fake_forget(void)
{
    pthread_mutex_lock(&fake_lock);
    while (fake_live) {
        object *next = fake_live->next;
        if (fake_live->kind == CQ) {
            free(((fake_cq *)(void *)fake_live)->wcs);
            free(((fake_cq *)(void *)fake_live)->frees);
        } else if (fake_live->kind == QP) {
            free(((fake_qp *)(void *)fake_live)->work);
        }
        free(fake_live);
        fake_live = next;
    }
    pthread_mutex_unlock(&fake_lock);
}
