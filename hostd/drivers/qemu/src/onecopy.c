/* sandloom-onecopy.so, preloaded into QEMU: a guest maps an image's files where the host's own mount of the
 * image caches them, so that guests and OCI sandboxes of one host hold an image's pages once.
 *
 * A layer is one file to QEMU, the blob, and many to the host, which mounts it: each has a page cache of its
 * own. But a mapping may be made of pieces. hostd (hostd/drivers/pieces.py) writes a table of which bytes of
 * the blob are which file of the mount, and has QEMU map that table as it maps a layer (object-add
 * memory-backend-file). This library sees the mapping, knows the table by its magic, and puts each file over
 * its part of the blob's mapping (MAP_FIXED, which is atomic to whoever reads there). The bytes are the same
 * by construction; what is not in the table, and whatever cannot be opened, stays the blob's.
 *
 * Promise: without a table QEMU's mappings are what they were. A table counts only when root wrote it and
 * nobody else can. Everything stays read-only.
 *
 * Table, all little-endian, each part padded to 8 bytes:
 *     magic "SLPIECE1", u64 device and u64 inode of the blob, u32 count, u32 bytes of the mount's path, the
 * path, NUL count times: u64 offset in the blob, u64 length (whole pages), u32 bytes of the path, u32 0, the
 * path, NUL
 */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#define MOST_LAYERS 512
#define MOST_PIECES 16384 /* of all mappings that a process may have (vm.max_map_count), a quarter */
#define PAGE 4096u
#define MAGIC "SLPIECE1"

struct layer {
    char *base;
    size_t length;
    dev_t device;
    ino_t inode;
    int fd; /* QEMU's own: open as long as the mapping is there */
};

struct header {
    char magic[8];
    uint64_t device, inode;
    uint32_t count, path_bytes;
};

struct record {
    uint64_t offset, length;
    uint32_t path_bytes, zero;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct layer layers[MOST_LAYERS];
static unsigned pieces;

static void *map(void *at, size_t length, int prot, int flags, int fd, off_t offset) {
    return (void *)syscall(SYS_mmap, at, length, prot, flags, fd, offset);
}

/* The path behind `*at`, which then stands behind that; NULL when the table ends before. */
static const char *path_at(const char **at, const char *end, uint32_t bytes) {
    size_t padded = ((size_t)bytes + 1 + 7) & ~(size_t)7;
    const char *path = *at;
    if (bytes == 0 || bytes >= PAGE || padded > (size_t)(end - *at) || path[bytes] != '\0')
        return NULL;
    *at += padded;
    return path;
}

/* Puts one file over its part of the layer. What it cannot put stays as it is. */
static void put(const struct layer *layer, const struct record *record, int root, dev_t device,
                const char *path) {
    struct stat info;
    char *at = layer->base + record->offset;
    int fd = openat(root, path, O_RDONLY | O_NOFOLLOW | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0)
        return;
    if (fstat(fd, &info) == 0 && S_ISREG(info.st_mode) && info.st_dev == device && info.st_size > 0 &&
        (uint64_t)info.st_size <= record->length && record->length - (uint64_t)info.st_size < PAGE) {
        if (map(at, record->length, PROT_READ, MAP_SHARED | MAP_FIXED, fd, 0) != MAP_FAILED)
            pieces++;
        else if (map(at, record->length, PROT_READ, MAP_SHARED | MAP_FIXED, layer->fd,
                     (off_t)record->offset) == MAP_FAILED)
            abort(); /* there may be a hole in the guest's layer now */
    }
    close(fd);
}

static void apply(const char *table, size_t bytes) {
    const struct header *header = (const struct header *)table;
    const char *at = table + sizeof(*header), *end = table + bytes;
    const struct layer *layer = NULL;
    struct stat info;
    for (unsigned i = 0; i < MOST_LAYERS && layer == NULL; i++)
        if (layers[i].base != NULL && layers[i].device == header->device && layers[i].inode == header->inode)
            layer = &layers[i];
    const char *path = path_at(&at, end, header->path_bytes);
    if (layer == NULL || path == NULL)
        return;
    int root = open(path, O_PATH | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    if (root < 0)
        return;
    if (fstat(root, &info) == 0 && info.st_dev != layer->device) {
        for (uint32_t i = 0; i < header->count && pieces < MOST_PIECES; i++) {
            const struct record *record = (const struct record *)at;
            if ((size_t)(end - at) < sizeof(*record))
                break;
            at += sizeof(*record);
            path = path_at(&at, end, record->path_bytes);
            if (path == NULL || record->length == 0 || record->offset % PAGE || record->length % PAGE ||
                record->offset > layer->length || record->length > layer->length - record->offset)
                break;
            put(layer, record, root, info.st_dev, path);
        }
    }
    close(root);
}

static void seen(char *base, size_t length, int fd) {
    struct stat info;
    if (fstat(fd, &info) != 0 || !S_ISREG(info.st_mode))
        return;
    pthread_mutex_lock(&lock);
    if (length >= PAGE && (size_t)info.st_size >= PAGE && memcmp(base, MAGIC, sizeof(MAGIC) - 1) == 0) {
        if (info.st_uid == 0 && (info.st_mode & (S_IWGRP | S_IWOTH)) == 0)
            apply(base, length < (size_t)info.st_size ? length : (size_t)info.st_size);
    } else {
        for (unsigned i = 0; i < MOST_LAYERS; i++)
            if (layers[i].base == NULL) {
                layers[i] = (struct layer){base, length, info.st_dev, info.st_ino, fd};
                break;
            }
    }
    pthread_mutex_unlock(&lock);
}

void *mmap(void *at, size_t length, int prot, int flags, int fd, off_t offset) {
    char *made = map(at, length, prot, flags, fd, offset);
    if (made != MAP_FAILED && fd >= 0 && prot == PROT_READ && (flags & MAP_SHARED) && offset == 0) {
        int error = errno;
        seen(made, length, fd);
        errno = error;
    }
    return made;
}

void *mmap64(void *at, size_t length, int prot, int flags, int fd, off_t offset) {
    return mmap(at, length, prot, flags, fd, offset);
}

int munmap(void *at, size_t length) {
    pthread_mutex_lock(&lock);
    for (unsigned i = 0; i < MOST_LAYERS; i++)
        if (layers[i].base != NULL && layers[i].base >= (char *)at && layers[i].base < (char *)at + length)
            layers[i].base = NULL;
    pthread_mutex_unlock(&lock);
    return (int)syscall(SYS_munmap, at, length);
}
