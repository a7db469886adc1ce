/* Arenas: memory with one owner that a NIC may pin, a same-host peer may map and a file may hold byte for byte. */
#include "base/arena.h"
#include "base/int_math.h"

#include "base/status.h"

#include <errno.h>
#include <fcntl.h>
#include <malloc.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#ifndef F_SEAL_FUTURE_WRITE
#define F_SEAL_FUTURE_WRITE 0x0010 /* Linux 5.1; memfd_create(2), fcntl(2) */
#endif

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25 /* Linux 6.1; madvise(2) */
#endif

enum { HUGE_PAGE = 2 * 1024 * 1024 };

struct cotra_arena {
    uint8_t *data;
    uint64_t length;
    uint64_t mapped; /* length rounded up to pages; 0 for wrapped memory */
    uint64_t page;   /* what lengths are rounded up to */
    int fd;
    bool locked, sealed, writable;
    int wants_huge, huge; /* huge pages, as far as whole ones go */
};

static cotra_arena *arena_new(uint64_t length, cotra_error *err)
{
    cotra_arena *arena = calloc(1, sizeof *arena);
    if (!arena) {
        cotra_fail(err, COTRA_ERR_NO_MEMORY, "arena: no memory");
        return NULL;
    }
    arena->fd = -1;
    arena->length = length;
    arena->page = (uint64_t)sysconf(_SC_PAGESIZE);
    return arena;
}

int cotra_arena_lock(cotra_arena *arena, cotra_error *err)
{
    if (arena->locked)
        return COTRA_OK;
    if (mlock(arena->data, arena->length) == 0) {
        arena->locked = true;
        return COTRA_OK;
    }
    int error = errno;
    struct rlimit limit = {0, 0};
    getrlimit(RLIMIT_MEMLOCK, &limit);
    char soft[32] = "unlimited";
    if (limit.rlim_cur != RLIM_INFINITY)
        snprintf(soft, sizeof soft, "%llu", (unsigned long long)limit.rlim_cur);
    return cotra_fail_errno(err, COTRA_ERR_MEMLOCK, error,
                            "mlock of %llu bytes: RLIMIT_MEMLOCK is %s; raise it with 'ulimit -l %llu' or a line "
                            "'* - memlock unlimited' in /etc/security/limits.conf (systemd: LimitMEMLOCK=infinity; "
                            "containers: --ulimit memlock=-1)",
                            (unsigned long long)arena->length, soft,
                            (unsigned long long)cotra_round_up(arena->length, 1024) / 1024);
}

/* Maps a memfd where huge pages could be: an address that is a multiple of theirs, as the file's offset 0 is. */
static void *map_aligned(int fd, uint64_t length, int protection)
{
    uint64_t room = length + HUGE_PAGE;
    uint8_t *reserved = mmap(NULL, room, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (reserved == MAP_FAILED)
        return MAP_FAILED;
    uint8_t *start = (uint8_t *)cotra_round_up((uintptr_t)reserved, HUGE_PAGE), *end = start + length;
    void *data = mmap(start, length, protection, MAP_SHARED | MAP_FIXED, fd, 0);
    if (data == MAP_FAILED) {
        int error = errno;
        munmap(reserved, room);
        errno = error;
        return MAP_FAILED;
    }
    if (start > reserved)
        munmap(reserved, (size_t)(start - reserved));
    if (end < reserved + room)
        munmap(end, (size_t)(reserved + room - end));
    return data;
}

/* Takes huge pages for a memfd, whatever is in it: MADV_COLLAPSE needs neither a pool of them nor a setting of the
 * system's (madvise(2)), only a page in each. Before the rest is written they cost nothing: somebody has to zero it. */
static void collapse(cotra_arena *arena)
{
    const uint64_t whole = arena->mapped / HUGE_PAGE * HUGE_PAGE;
    for (uint64_t i = 0; i < whole && arena->wants_huge; i += HUGE_PAGE)
        (void)*(volatile const uint8_t *)(arena->data + i);
    arena->huge = arena->wants_huge && whole && madvise(arena->data, whole, MADV_COLLAPSE) == 0;
}

static int map_memfd(cotra_arena *arena, int huge)
{
    unsigned flags = MFD_CLOEXEC | MFD_ALLOW_SEALING | (huge ? MFD_HUGETLB : 0);
    uint64_t page = huge ? HUGE_PAGE : (uint64_t)sysconf(_SC_PAGESIZE);
    uint64_t mapped = cotra_round_up(arena->length, page);
    int fd = memfd_create("cotra-arena", flags);
    if (fd < 0)
        return errno;
    int error;
    if (ftruncate(fd, (off_t)mapped) != 0) {
        error = errno;
        goto close_fd;
    }
    void *data = map_aligned(fd, mapped, PROT_READ | PROT_WRITE);
    if (data == MAP_FAILED) {
        error = errno;
        goto close_fd;
    }
    arena->data = data;
    arena->fd = fd;
    arena->page = page;
    arena->mapped = mapped;
    arena->writable = true;
    return 0;
close_fd:
    close(fd);
    return error;
}

int cotra_arena_create(uint64_t length_bytes, uint32_t flags, cotra_arena **out, cotra_error *err)
{
    *out = NULL;
    if (length_bytes == 0 || length_bytes > (uint64_t)1 << 46)
        return cotra_fail(err, COTRA_ERR_ARGUMENT, "arena: length must be in [1, 2^46] bytes, not %llu",
                          (unsigned long long)length_bytes);
    cotra_arena *arena = arena_new(length_bytes, err);
    if (!arena)
        return COTRA_ERR_NO_MEMORY;
    int error = (flags & COTRA_ARENA_HUGE) ? map_memfd(arena, 1) : ENOMEM;
    if (error) /* no huge pages: ordinary ones, and page_bytes says so */
        error = map_memfd(arena, 0);
    if (error) {
        free(arena);
        return cotra_fail_errno(err, error == ENOMEM ? COTRA_ERR_NO_MEMORY : COTRA_ERR_SYSTEM, error,
                                "arena: a memfd of %llu bytes", (unsigned long long)length_bytes);
    }
    arena->wants_huge = (flags & COTRA_ARENA_HUGE) && arena->page != HUGE_PAGE;
    collapse(arena);
    if (flags & COTRA_ARENA_LOCK) {
        int status = cotra_arena_lock(arena, err);
        if (status) {
            cotra_arena_destroy(arena);
            return status;
        }
    }
    *out = arena;
    return COTRA_OK;
}

int cotra_arena_wrap(void *address, uint64_t length_bytes, uint32_t flags, cotra_arena **out, cotra_error *err)
{
    *out = NULL;
    if (!address || length_bytes == 0)
        return cotra_fail(err, COTRA_ERR_ARGUMENT, "arena: nothing to wrap (%llu bytes)",
                          (unsigned long long)length_bytes);
    cotra_arena *arena = arena_new(length_bytes, err);
    if (!arena)
        return COTRA_ERR_NO_MEMORY;
    arena->data = address;
    if (flags & COTRA_ARENA_LOCK) {
        int status = cotra_arena_lock(arena, err);
        if (status) {
            free(arena);
            return status;
        }
    }
    *out = arena;
    return COTRA_OK;
}

static int map_read_only(cotra_arena *arena, void *data, const char *what, cotra_error *err)
{
    if (data == MAP_FAILED)
        return cotra_fail_errno(err, COTRA_ERR_SYSTEM, errno, "mmap of %llu bytes of %s",
                                (unsigned long long)arena->length, what);
    arena->data = data;
    arena->mapped = cotra_round_up(arena->length, arena->page);
    return COTRA_OK;
}

int cotra_arena_map_fd(int fd, uint64_t length_bytes, uint32_t flags, cotra_arena **out, cotra_error *err)
{
    *out = NULL;
    struct stat st;
    if (fstat(fd, &st) != 0)
        return cotra_fail_errno(err, COTRA_ERR_SYSTEM, errno, "fstat of the peer's memfd");
    if (length_bytes == 0 || (uint64_t)st.st_size < length_bytes)
        return cotra_fail(err, COTRA_ERR_FORMAT, "the peer's memfd has %lld bytes where %llu were announced",
                          (long long)st.st_size, (unsigned long long)length_bytes);
    int seals = fcntl(fd, F_GET_SEALS);
    const bool sealed = seals >= 0 && (seals & F_SEAL_SHRINK);
    if ((flags & COTRA_ARENA_SEALED) && !sealed)
        return cotra_fail(err, COTRA_ERR_FORMAT,
                          "the peer's memory is not a memfd sealed against shrinking: its owner could make this "
                          "process fault by truncating it");
    cotra_arena *arena = arena_new(length_bytes, err);
    if (!arena)
        return COTRA_ERR_NO_MEMORY;
    arena->fd = fcntl(fd, F_DUPFD_CLOEXEC, 0);
    int status;
    if (arena->fd < 0) {
        status = cotra_fail_errno(err, COTRA_ERR_SYSTEM, errno, "dup of the peer's memfd");
        goto free_arena;
    }
    if (st.st_blksize == HUGE_PAGE) {
        arena->page = HUGE_PAGE;
        arena->length = cotra_round_up(length_bytes, HUGE_PAGE); /* mmap of huge pages takes whole pages */
    }
    void *data = map_aligned(arena->fd, cotra_round_up(arena->length, arena->page), PROT_READ);
    status = map_read_only(arena, data, "the peer's memfd", err);
    arena->length = length_bytes;
    arena->sealed = sealed;
    if (status)
        goto close_fd;
    *out = arena;
    return COTRA_OK;
close_fd:
    close(arena->fd);
free_arena:
    free(arena);
    return status;
}

int cotra_arena_map_file(const char *path, cotra_arena **out, cotra_error *err)
{
    *out = NULL;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return cotra_fail_errno(err, COTRA_ERR_SYSTEM, errno, "open %s", path);
    int status;
    struct stat st;
    cotra_arena *arena = NULL;
    if (fstat(fd, &st) != 0) {
        status = cotra_fail_errno(err, COTRA_ERR_SYSTEM, errno, "fstat %s", path);
        goto close_fd;
    }
    if (!S_ISREG(st.st_mode) || st.st_size == 0) {
        status = cotra_fail(err, COTRA_ERR_FORMAT, "%s is %s", path, S_ISREG(st.st_mode) ? "empty" : "not a file");
        goto close_fd;
    }
    arena = arena_new((uint64_t)st.st_size, err);
    if (!arena) {
        status = COTRA_ERR_NO_MEMORY;
        goto close_fd;
    }
    void *data = mmap(NULL, arena->length, PROT_READ, MAP_PRIVATE, fd, 0);
    status = map_read_only(arena, data, path, err);
    if (status)
        goto free_arena;
    close(fd);
    *out = arena;
    return COTRA_OK;
free_arena:
    free(arena);
close_fd:
    close(fd);
    return status;
}

int cotra_arena_seal(cotra_arena *arena, cotra_error *err)
{
    if (arena->sealed)
        return COTRA_OK;
    if (arena->fd < 0)
        return cotra_fail(err, COTRA_ERR_ARGUMENT, "only an arena of its own memfd can be sealed");
    if (fcntl(arena->fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_FUTURE_WRITE | F_SEAL_SEAL) != 0)
        return cotra_fail_errno(err, COTRA_ERR_SYSTEM, errno, "sealing a memfd of %llu bytes",
                                (unsigned long long)arena->length);
    arena->sealed = true;
    return COTRA_OK;
}

int cotra_arena_grow(cotra_arena *arena, uint64_t length_bytes, cotra_error *err)
{
    uint64_t mapped = cotra_round_up(length_bytes, arena->page);
    if (mapped != arena->mapped) {
        if (ftruncate(arena->fd, (off_t)mapped) != 0)
            return cotra_fail_errno(err, COTRA_ERR_SYSTEM, errno, "arena: growing to %llu bytes",
                                    (unsigned long long)mapped);
        void *data = map_aligned(arena->fd, mapped, PROT_READ | PROT_WRITE);
        if (data == MAP_FAILED)
            return cotra_fail_errno(err, COTRA_ERR_NO_MEMORY, errno, "arena: mapping %llu bytes",
                                    (unsigned long long)mapped);
        munmap(arena->data, arena->mapped);
        arena->data = data;
        arena->mapped = mapped;
        collapse(arena);
    }
    arena->length = length_bytes;
    return COTRA_OK;
}

uint8_t *cotra_arena_data(const cotra_arena *arena)
{
    return arena->data;
}

void cotra_arena_get_info(const cotra_arena *arena, cotra_arena_info *out)
{
    memset(out, 0, sizeof *out);
    out->address = (uint64_t)(uintptr_t)arena->data;
    out->length_bytes = arena->length;
    out->page_bytes = arena->huge ? HUGE_PAGE : arena->page;
    out->fd = arena->fd;
    out->locked = (uint8_t)arena->locked;
    out->sealed = (uint8_t)arena->sealed;
    out->writable = (uint8_t)arena->writable;
    out->borrowed = arena->mapped == 0;
}

void cotra_arena_destroy(cotra_arena *arena)
{
    if (!arena)
        return;
    if (arena->mapped)
        munmap(arena->data, arena->mapped);
    else if (arena->locked)
        munlock(arena->data, arena->length);
    if (arena->fd >= 0)
        close(arena->fd);
    free(arena);
}

void cotra_memory_trim(void)
{
#ifdef __GLIBC__
    malloc_trim(0);
#endif
}
