/* libibverbs by dlopen, so that one build runs with it and without it (as NCCL does). Loaded once, never unloaded:
 * providers keep threads and state of their own. */
#ifdef COTRA_HAVE_VERBS
#include "verbs/verbs.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>

static pthread_once_t once = PTHREAD_ONCE_INIT;
static cotra_verbs_library library;
static int loaded;
static char outcome[256]; /* where the library was found, or why it was not */

static void load(void)
{
    void *handle = dlopen("libibverbs.so.1", RTLD_NOW);
    if (!handle) {
        snprintf(
            outcome, sizeof outcome,
            "libibverbs cannot be loaded (%s); install it: libibverbs1 and ibverbs-providers on Debian and Ubuntu, "
            "libibverbs on Fedora and RHEL",
            dlerror());
        return;
    }
#define LOAD(type, name, arguments)                                                                                    \
    {                                                                                                                  \
        void *symbol = dlvsym(handle, "ibv_" #name, "IBVERBS_1.1");                                                    \
        if (!symbol) {                                                                                                 \
            snprintf(outcome, sizeof outcome,                                                                          \
                     "libibverbs has no ibv_" #name " of version IBVERBS_1.1: it is too old");                         \
            dlclose(handle);                                                                                           \
            return;                                                                                                    \
        }                                                                                                              \
        memcpy(&library.name, &symbol, sizeof symbol);                                                                 \
    }
    COTRA_VERBS_SYMBOLS(LOAD)
#undef LOAD
    Dl_info where;
    void *entry;
    memcpy(&entry, &library.open_device, sizeof entry);
    snprintf(outcome, sizeof outcome, "%s",
             dladdr(entry, &where) && where.dli_fname ? where.dli_fname : "libibverbs.so.1");
    loaded = 1;
}

const cotra_verbs_library *cotra_verbs_load(cotra_error *err)
{
    pthread_once(&once, load);
    if (loaded)
        return &library;
    cotra_fail(err, COTRA_ERR_UNAVAILABLE, "%s", outcome);
    return NULL;
}

int cotra_verbs_compiled(void)
{
    return 1;
}

int cotra_verbs_probe(char *text, uint32_t text_bytes, cotra_error *err)
{
    if (!cotra_verbs_load(err))
        return COTRA_ERR_UNAVAILABLE;
    snprintf(text, text_bytes, "%s", outcome);
    return COTRA_OK;
}
#else
typedef int cotra_no_verbs_here;
#endif
