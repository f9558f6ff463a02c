#include "dax.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#define TEXT_MOST ((size_t)256 << 20) /* 65,530 mappings of 4 KiB of text each would fill it */

static int open_for_reading(const char *path) {
    int fd;
    do
        fd = open(path, O_RDONLY | O_CLOEXEC | O_NOCTTY);
    while (fd < 0 && errno == EINTR);
    return fd < 0 ? -errno : fd;
}

static int open_of(pid_t pid, const char *name) {
    char path[64];
    int length = snprintf(path, sizeof path, "/proc/%d/%s", (int)pid, name);
    return length < 0 || (size_t)length >= sizeof path ? -EINVAL : open_for_reading(path);
}

static ssize_t read_words(int fd, uint64_t first, uint64_t *into, size_t count) {
    ssize_t got;
    do
        got = pread(fd, into, count * sizeof *into, (off_t)(first * sizeof *into));
    while (got < 0 && errno == EINTR);
    return got < 0 ? -errno : got;
}

static int open_pagemap(void *context, pid_t pid) {
    (void)context;
    return open_of(pid, "pagemap");
}

static void close_pagemap(void *context, int handle) {
    (void)context;
    close(handle);
}

static ssize_t read_pagemap(void *context, int handle, uint64_t page, uint64_t *into, size_t count) {
    (void)context;
    return read_words(handle, page, into, count);
}

static ssize_t read_kpageflags(void *context, uint64_t frame, uint64_t *into, size_t count) {
    return read_words((int)(intptr_t)context, frame, into, count);
}

int dax_proc_open(struct dax_source *source) {
    int fd = open_for_reading("/proc/kpageflags");
    if (fd < 0)
        return fd;
    *source =
        (struct dax_source){(void *)(intptr_t)fd, open_pagemap, close_pagemap, read_pagemap, read_kpageflags};
    return 0;
}

void dax_proc_close(struct dax_source *source) {
    close((int)(intptr_t)source->context);
}

int dax_proc_read(pid_t pid, const char *name, char **text, size_t *length) {
    int fd = open_of(pid, name), error = 0;
    if (fd < 0)
        return fd;
    size_t room = 256 << 10, used = 0;
    char *buffer = malloc(room);
    for (error = buffer == NULL ? -ENOMEM : 0; error == 0;) {
        if (used == room) {
            char *larger = room >= TEXT_MOST ? NULL : realloc(buffer, room * 2);
            if (larger == NULL) {
                error = room >= TEXT_MOST ? -EFBIG : -ENOMEM;
                break;
            }
            buffer = larger;
            room *= 2;
        }
        ssize_t got = read(fd, buffer + used, room - used);
        if (got == 0)
            break;
        if (got > 0)
            used += (size_t)got;
        else if (errno != EINTR)
            error = -errno;
    }
    close(fd);
    if (error) {
        free(buffer);
        return error;
    }
    *text = buffer;
    *length = used;
    return 0;
}
