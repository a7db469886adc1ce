#include "build/hnswlib_reader.h"

#include "base/status.h"
#include "format/image.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { BUFFER_BYTES = 1 << 20 };

/* The order and types of the header on 64-bit Linux; it is packed, with no padding between the fields. */
typedef struct __attribute__((packed)) saved_header {
    uint64_t level0_offset, max_elements, count, element_bytes, label_offset, data_offset;
    int32_t max_level;
    uint32_t entry_node;
    uint64_t max_M, degree, M;
    double level_multiplier;
    uint64_t ef_construction;
} saved_header;

static_assert(sizeof(saved_header) == 96, "as hnswlib writes it");

static int refill(cotra_hnswlib_stream *stream, size_t wanted, cotra_error *err)
{
    memmove(stream->buffer, stream->buffer + stream->begin, stream->end - stream->begin);
    stream->end -= stream->begin;
    stream->begin = 0;
    while (stream->end < wanted) {
        struct pollfd wait = {.fd = stream->fd, .events = POLLIN};
        int ready = poll(&wait, 1, (int)(stream->timeout_ns / 1000000u));
        if (ready < 0 && errno == EINTR)
            continue;
        if (ready <= 0)
            return cotra_fail(err, COTRA_ERR_DEADLINE, "hnswlib state: no bytes came for %llu ms",
                              (unsigned long long)(stream->timeout_ns / 1000000u));
        ssize_t got = read(stream->fd, stream->buffer + stream->end, BUFFER_BYTES - stream->end);
        if (got < 0 && (errno == EINTR || errno == EAGAIN))
            continue;
        if (got < 0)
            return cotra_fail_errno(err, COTRA_ERR_SYSTEM, errno, "hnswlib state: read");
        if (got == 0)
            return cotra_fail(err, COTRA_ERR_FORMAT, "hnswlib state: it ends %zu bytes too early",
                              wanted - stream->end);
        stream->end += (size_t)got;
    }
    return COTRA_OK;
}

int cotra_hnswlib_take(cotra_hnswlib_stream *stream, size_t n, const uint8_t **bytes, cotra_error *err)
{
    if (n > BUFFER_BYTES)
        return cotra_fail(err, COTRA_ERR_FORMAT, "hnswlib state: a piece of %zu bytes", n);
    if (stream->end - stream->begin < n) {
        int status = refill(stream, n, err);
        if (status)
            return status;
    }
    *bytes = stream->buffer + stream->begin;
    stream->begin += n;
    return COTRA_OK;
}

int cotra_hnswlib_open(cotra_hnswlib_stream *stream, int fd, uint32_t dim, uint64_t timeout_ns, cotra_error *err)
{
    memset(stream, 0, sizeof *stream);
    stream->fd = fd;
    stream->timeout_ns = timeout_ns;
    stream->buffer = malloc(BUFFER_BYTES);
    if (!stream->buffer)
        return cotra_fail(err, COTRA_ERR_NO_MEMORY, "hnswlib state: no memory for a buffer");
    const uint8_t *bytes;
    int status = cotra_hnswlib_take(stream, sizeof(saved_header), &bytes, err);
    if (status)
        goto free_buffer;
    saved_header header;
    memcpy(&header, bytes, sizeof header);
    uint64_t links_bytes = 4 * header.degree + 4;
    if (header.level0_offset != 0 || header.M < 1 || header.M > COTRA_MAX_M || header.max_M != header.M ||
        header.degree != 2 * header.M || header.data_offset != links_bytes ||
        header.label_offset != links_bytes + 4 * (uint64_t)dim || header.element_bytes != header.label_offset + 8 ||
        header.count > header.max_elements) {
        status =
            cotra_fail(err, COTRA_ERR_FORMAT,
                       "not hnswlib 0.8's state of float32[%u] vectors with M <= %d: M %llu, degree %llu, %llu bytes "
                       "an element",
                       dim, COTRA_MAX_M, (unsigned long long)header.M, (unsigned long long)header.degree,
                       (unsigned long long)header.element_bytes);
        goto free_buffer;
    }
    if (header.count == 0 || header.count > COTRA_MAX_COUNT) {
        status = cotra_fail(err, COTRA_ERR_ARGUMENT, "a shard holds 1 to 2^31 - 1 vectors, not %llu",
                            (unsigned long long)header.count);
        goto free_buffer;
    }
    if (header.max_level < 0 || header.max_level >= COTRA_MAX_LEVELS || header.entry_node >= header.count) {
        status = cotra_fail(err, COTRA_ERR_FORMAT, "hnswlib state: entry point %u on level %d", header.entry_node,
                            header.max_level);
        goto free_buffer;
    }
    stream->count = header.count;
    stream->M = header.M;
    stream->degree = header.degree;
    stream->ef_construction = header.ef_construction;
    stream->element_bytes = header.element_bytes;
    stream->max_level = (uint32_t)header.max_level;
    stream->entry_node = header.entry_node;
    stream->dim = dim;
    return COTRA_OK;
free_buffer:
    cotra_hnswlib_close(stream);
    return status;
}

void cotra_hnswlib_close(cotra_hnswlib_stream *stream)
{
    free(stream->buffer);
    stream->buffer = NULL;
}
