/* How a search is ended before its time: it looks up now and then, whether it may go on.
 *
 * The search itself says when: after so much work, and while it waits. A look reads the clock, which is a system call
 * on some machines, so it costs some 20 ns to 1 us.
 */
#ifndef COTRA_SEARCH_LOOKOUT_H
#define COTRA_SEARCH_LOOKOUT_H

#include "base/status.h"

typedef struct cotra_lookout {
    cotra_watch *watch; /* or NULL */
    uint64_t deadline_ns;
    uint64_t pause_at_ns; /* on cotra_clock_ns */
} cotra_lookout;

static inline void cotra_lookout_pause_in(cotra_lookout *lookout, uint64_t pause_ns)
{
    lookout->pause_at_ns = pause_ns ? cotra_clock_ns() + pause_ns : UINT64_MAX;
}

/* COTRA_OK: the search goes on. COTRA_PAUSED: its caller wants to be asked first. */
static inline int cotra_look(const cotra_lookout *lookout, cotra_error *err)
{
    if (lookout->watch && __atomic_load_n(&lookout->watch->stop, __ATOMIC_RELAXED))
        return cotra_fail(err, COTRA_ERR_CANCELLED, "the search was given up");
    const uint64_t now = cotra_clock_ns();
    if (lookout->deadline_ns && now >= lookout->deadline_ns)
        return cotra_fail(err, COTRA_ERR_DEADLINE, "the search did not end by its deadline");
    return now >= lookout->pause_at_ns ? COTRA_PAUSED : COTRA_OK;
}

/* Tells that a query was answered. */
static inline void cotra_lookout_note(const cotra_lookout *lookout)
{
    if (lookout->watch)
        __atomic_fetch_add(&lookout->watch->done, 1, __ATOMIC_RELAXED);
}

#endif
