/* Status codes into words, and the one way of reporting an error. */
#ifndef COTRA_BASE_STATUS_H
#define COTRA_BASE_STATUS_H

#include "cotra.h"

/* Fills err (which may be NULL) and returns status. The message says: the call, the object, the numbers, the cause, the
 * remedy. Only the code that detects an error calls it; callers pass err through. */
int cotra_fail(cotra_error *err, int status, const char *format, ...) __attribute__((format(printf, 3, 4)));
/* The same, with an errno: its text is appended. */
int cotra_fail_errno(cotra_error *err, int status, int errnum, const char *format, ...)
    __attribute__((format(printf, 4, 5)));

#endif
