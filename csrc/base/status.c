#include "base/status.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

const char *cotra_status_name(int status)
{
    switch (status) {
    case COTRA_OK:
        return "ok";
    case COTRA_AGAIN:
        return "again";
    case COTRA_PAUSED:
        return "paused";
    case COTRA_ERR_ARGUMENT:
        return "invalid argument";
    case COTRA_ERR_NO_MEMORY:
        return "out of memory";
    case COTRA_ERR_SYSTEM:
        return "system call failed";
    case COTRA_ERR_UNAVAILABLE:
        return "verbs unavailable";
    case COTRA_ERR_NO_DEVICE:
        return "no such device";
    case COTRA_ERR_MEMLOCK:
        return "memlock limit too small";
    case COTRA_ERR_FORMAT:
        return "malformed graph image";
    case COTRA_ERR_CHECKSUM:
        return "checksum mismatch";
    case COTRA_ERR_BOUNDS:
        return "outside the region";
    case COTRA_ERR_COMPLETION:
        return "work request completed in error";
    case COTRA_ERR_DEADLINE:
        return "deadline passed";
    case COTRA_ERR_CLOSED:
        return "closed";
    case COTRA_ERR_LOSSY:
        return "vector type cannot hold the vectors exactly";
    case COTRA_ERR_STALE:
        return "the shard was rebuilt";
    case COTRA_ERR_TRANSPORT:
        return "path to the peer broke";
    case COTRA_ERR_CANCELLED:
        return "given up";
    default:
        return "unknown status";
    }
}

static void fill(cotra_error *err, int status, int errnum, const char *format, va_list arguments)
{
    err->status = status;
    err->sys_errno = errnum;
    err->wc_status = 0;
    err->vendor_error = 0;
    err->shard = -1;
    vsnprintf(err->message, sizeof err->message, format, arguments);
}

int cotra_fail(cotra_error *err, int status, const char *format, ...)
{
    if (err) {
        va_list arguments;
        va_start(arguments, format);
        fill(err, status, 0, format, arguments);
        va_end(arguments);
    }
    return status;
}

int cotra_fail_errno(cotra_error *err, int status, int errnum, const char *format, ...)
{
    if (err) {
        va_list arguments;
        va_start(arguments, format);
        fill(err, status, errnum, format, arguments);
        va_end(arguments);
        size_t used = strlen(err->message);
        char text[128];
        /* GNU strerror_r: the text may not be in the buffer it was given */
        snprintf(err->message + used, sizeof err->message - used, ": %s", strerror_r(errnum, text, sizeof text));
    }
    return status;
}

uint64_t cotra_clock_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}
