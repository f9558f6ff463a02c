#include "dax.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef SYS_cachestat
#define SYS_cachestat 451 /* the same number on every architecture */
#endif
#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#endif

#define WINDOW_BYTES (1ull << 30)    /* of a mapping for mincore: 256 KiB of answers */
#define POPULATE_BYTES (64ull << 20) /* a madvise: what a failure may leave uncounted */
#define PREFETCH_BYTES (128u << 10)  /* more than the read-ahead window a call would be cut off silently */

/* Rounds [offset, offset + length) out to pages and cuts it off at the file's end; *start == *end: nothing
 * there. */
static int clip(int fd, uint64_t offset, uint64_t length, uint64_t *start, uint64_t *end) {
    struct stat status;
    if (fstat(fd, &status) < 0)
        return -errno;
    uint64_t size = (uint64_t)status.st_size;
    *start = *end = size;
    if (offset >= size)
        return 0;
    *start = offset - offset % (uint64_t)sysconf(_SC_PAGESIZE);
    if (length != 0 && length < size - offset)
        *end = offset + length;
    return 0;
}

int dax_cachestat(int fd, uint64_t offset, uint64_t length, struct dax_cache *cache) {
    struct {
        uint64_t offset, length;
    } range = {offset, length};
    uint64_t answer[5] = {0};
    if (syscall(SYS_cachestat, fd, &range, answer, 0) < 0)
        return -errno;
    *cache = (struct dax_cache){answer[0], answer[1], answer[2], answer[3], answer[4]};
    return 0;
}

/* Counts the cached pages of one mapped window. */
static int count_window(int fd, uint64_t start, uint64_t length, unsigned char *answers, uint64_t *cached) {
    size_t page = (size_t)sysconf(_SC_PAGESIZE), pages = (size_t)((length + page - 1) / page);
    void *window = mmap(NULL, (size_t)length, PROT_READ, MAP_SHARED, fd, (off_t)start);
    if (window == MAP_FAILED)
        return -errno;
    int error = mincore(window, (size_t)length, answers) < 0 ? -errno : 0;
    for (size_t i = 0; error == 0 && i < pages; i++)
        *cached += answers[i] & 1;
    munmap(window, (size_t)length);
    return error;
}

int dax_mincore(int fd, uint64_t offset, uint64_t length, uint64_t *cached) {
    uint64_t start, end;
    int error = clip(fd, offset, length, &start, &end);
    if (error)
        return error;
    unsigned char *answers = malloc(WINDOW_BYTES / (uint64_t)sysconf(_SC_PAGESIZE));
    if (answers == NULL)
        return -ENOMEM;
    *cached = 0;
    for (; start < end && error == 0; start += WINDOW_BYTES)
        error =
            count_window(fd, start, end - start < WINDOW_BYTES ? end - start : WINDOW_BYTES, answers, cached);
    free(answers);
    return error;
}

int dax_prefetch(int fd, uint64_t offset, uint64_t length) {
    uint64_t start, end;
    int error = clip(fd, offset, length, &start, &end);
    for (; error == 0 && start < end; start += PREFETCH_BYTES)
        error = -posix_fadvise(fd, (off_t)start, PREFETCH_BYTES, POSIX_FADV_WILLNEED);
    return error;
}

/* Reads a window by read(2): for kernels before 5.14 and for files that cannot be mapped. */
static int read_window(int fd, uint64_t start, uint64_t length) {
    char scratch[64 << 10];
    for (uint64_t end = start + length; start < end;) {
        size_t want = end - start < sizeof scratch ? (size_t)(end - start) : sizeof scratch;
        ssize_t got = pread(fd, scratch, want, (off_t)start);
        if (got == 0)
            return 0;
        if (got > 0)
            start += (uint64_t)got;
        else if (errno != EINTR)
            return -errno;
    }
    return 0;
}

static int populate_window(int fd, uint64_t start, uint64_t length) {
    void *window = mmap(NULL, (size_t)length, PROT_READ, MAP_SHARED, fd, (off_t)start);
    if (window == MAP_FAILED)
        return errno == ENODEV ? read_window(fd, start, length) : -errno;
    int error;
    do
        error = madvise(window, (size_t)length, MADV_POPULATE_READ) < 0 ? -errno : 0;
    while (error == -EINTR);
    munmap(window, (size_t)length);
    /* EINVAL: an older kernel. EFAULT hides what went wrong, a read error or a file cut short: read(2) tells.
     */
    return error == -EINVAL || error == -EFAULT ? read_window(fd, start, length) : error;
}

int dax_populate(int fd, uint64_t offset, uint64_t length, uint64_t *bytes) {
    uint64_t start, end;
    int error = clip(fd, offset, length, &start, &end);
    *bytes = 0;
    while (error == 0 && start < end) {
        uint64_t step = end - start < POPULATE_BYTES ? end - start : POPULATE_BYTES;
        error = populate_window(fd, start, step);
        if (error == 0)
            *bytes += step;
        start += step;
    }
    return error;
}
