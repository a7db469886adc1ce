/* hnswlib's saved state (hnswlib 0.8, HierarchicalNSW::saveIndex) as a stream: a file or a pipe, read once, front to
 * back. */
#ifndef COTRA_BUILD_HNSWLIB_READER_H
#define COTRA_BUILD_HNSWLIB_READER_H

#include "cotra.h"

typedef struct cotra_hnswlib_stream {
    int fd;
    uint64_t timeout_ns; /* the longest wait for more bytes */
    uint8_t *buffer;
    size_t begin, end; /* unread bytes in the buffer */
    /* from the header */
    uint64_t count, M, degree, ef_construction, element_bytes;
    uint32_t max_level, entry_node, dim;
} cotra_hnswlib_stream;

/* Reads and checks the header for vectors float32[dim]. */
int cotra_hnswlib_open(cotra_hnswlib_stream *stream, int fd, uint32_t dim, uint64_t timeout_ns, cotra_error *err);
/* The next n bytes, valid until the next call; n is at most the size of an element. */
int cotra_hnswlib_take(cotra_hnswlib_stream *stream, size_t n, const uint8_t **bytes, cotra_error *err);
void cotra_hnswlib_close(cotra_hnswlib_stream *stream);

#endif
