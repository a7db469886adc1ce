/* file: the region is a file, or a same-host peer's memfd, read with pread(2) into landing memory of the channel's own.
 *
 * Slower than shm, which maps: but pages of a mapping that were touched count as the reader's memory, and those that
 * the kernel maps around them too. A builder reads a little of every other shard, and has to stay within its own.
 */
#include "channel/channel.h"

#include "base/status.h"
#include "base/int_math.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

typedef struct file_channel {
    cotra_channel base;
    uint8_t *landing; /* [slots][slot_bytes] */
    int fd;
    uint32_t n_ready;
    cotra_completion ready[]; /* [slots], in the order of posting */
} file_channel;

static int read_whole(const file_channel *self, const cotra_read *read, uint8_t *to)
{
    for (uint32_t done = 0; done < read->length;) {
        ssize_t got = pread(self->fd, to + done, read->length - done, (off_t)(read->offset + done));
        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0)
            return got < 0 ? errno : EIO; /* it became shorter */
        done += (uint32_t)got;
    }
    return 0;
}

static int file_post(cotra_channel *channel, const cotra_read *reads, uint32_t n, uint32_t *posted, cotra_error *err)
{
    file_channel *self = (file_channel *)channel;
    (void)err;
    if (n > channel->slots - self->n_ready)
        n = channel->slots - self->n_ready;
    for (uint32_t i = 0; i < n; i++) {
        uint8_t *to = self->landing + (size_t)reads[i].slot * channel->slot_bytes;
        int error = read_whole(self, &reads[i], to), status = COTRA_OK;
        if (error) {
            cotra_error failed = {0};
            status = cotra_fail_errno(&failed, COTRA_ERR_TRANSPORT, error, "pread of %u bytes", reads[i].length);
            if (!channel->error.status)
                channel->error = failed;
        } else {
            channel->reads++;
            channel->read_bytes += reads[i].length;
        }
        self->ready[self->n_ready++] = (cotra_completion){.data = to, .slot = reads[i].slot, .status = status};
    }
    channel->doorbells++;
    *posted = n;
    return COTRA_OK;
}

static int file_poll(cotra_channel *channel, cotra_completion *out, uint32_t capacity, uint32_t *n, cotra_error *err)
{
    file_channel *self = (file_channel *)channel;
    (void)err;
    uint32_t count = self->n_ready < capacity ? self->n_ready : capacity;
    for (uint32_t i = 0; i < count; i++)
        out[i] = self->ready[i];
    for (uint32_t i = count; i < self->n_ready; i++)
        self->ready[i - count] = self->ready[i];
    self->n_ready -= count;
    *n = count;
    return COTRA_OK;
}

static void file_close(cotra_channel *channel)
{
    file_channel *self = (file_channel *)channel;
    close(self->fd);
    free(self->landing);
    free(self);
}

static const cotra_channel_ops file_ops = {.name = "file", .post = file_post, .poll = file_poll, .close = file_close};

int cotra_channel_open_file(int fd, uint64_t length_bytes, uint32_t slots, uint32_t slot_bytes, cotra_channel **out,
                            cotra_error *err)
{
    *out = NULL;
    int status = cotra_channel_limits(&slots, &slot_bytes, err);
    if (status)
        return status;
    struct stat st;
    if (fstat(fd, &st) != 0)
        return cotra_fail_errno(err, COTRA_ERR_SYSTEM, errno, "file channel: fstat");
    if (length_bytes == 0 || (uint64_t)st.st_size < length_bytes)
        return cotra_fail(err, COTRA_ERR_FORMAT, "file channel: a file of %lld bytes where %llu are to be read",
                          (long long)st.st_size, (unsigned long long)length_bytes);
    file_channel *self = calloc(1, sizeof *self + slots * sizeof self->ready[0]);
    if (!self)
        return cotra_fail(err, COTRA_ERR_NO_MEMORY, "file channel: no memory for %u slots", slots);
    slot_bytes = (uint32_t)cotra_round_up(slot_bytes, 64);
    self->landing = aligned_alloc(64, (size_t)slots * slot_bytes);
    if (!self->landing) {
        status = cotra_fail(err, COTRA_ERR_NO_MEMORY, "file channel: no memory for %u slots", slots);
        goto free_channel;
    }
    self->fd = fcntl(fd, F_DUPFD_CLOEXEC, 0);
    if (self->fd < 0) {
        status = cotra_fail_errno(err, COTRA_ERR_SYSTEM, errno, "file channel: dup");
        goto free_landing;
    }
    self->base.ops = &file_ops;
    self->base.region_bytes = length_bytes;
    self->base.slots = slots;
    self->base.slot_bytes = slot_bytes;
    self->base.post_batch = 1;
    self->base.in_flight = 8; /* as for shm */
    *out = &self->base;
    return COTRA_OK;
free_landing:
    free(self->landing);
free_channel:
    free(self);
    return status;
}
