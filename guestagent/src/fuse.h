/* FUSE for one file at a time, whose content this process makes: no folder, no name, nothing to write. Reads
 * are not cached; what splices is, from an open to the next (kernels since 6.5 splice by the page cache only,
 * and no more than the file's size). Its mount is made here and attached by whoever has the place for it.
 *
 * The process that answers must never use such a file itself: it would wait for its own answer. Requests are
 * linux/fuse.h's; what every file answers alike is answered here, the rest is the caller's.
 */
#ifndef SANDLOOM_FUSE_H
#define SANDLOOM_FUSE_H

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

enum fuse_wish {
    WISH_NONE,  /* nothing waits */
    WISH_OTHER, /* one was answered, or needs no answer */
    WISH_STAT,  /* how large it is now */
    WISH_OPEN,
    WISH_READ,
    WISH_CLOSE, /* was answered */
    WISH_GONE,  /* the mount is no more */
};

struct fuse_asked {
    uint64_t unique;
    uint64_t handle, offset; /* READ; handle of CLOSE, too */
    uint32_t size;           /* READ: at most so many bytes */
    pid_t pid;               /* who asks, as this process sees it */
};

/* A mount of one regular file, readable by all, attached nowhere yet. 0, or an errno; the descriptors are the
 * caller's. `device` does not block. */
int fuse_make(int *device, int *mount);

/* The next request. */
enum fuse_wish fuse_next(int device, struct fuse_asked *asked);

void fuse_stated(int device, const struct fuse_asked *asked, size_t size);
void fuse_refuse(int device, const struct fuse_asked *asked, int error);
void fuse_opened(int device, const struct fuse_asked *asked, uint64_t handle);
void fuse_give(int device, const struct fuse_asked *asked, const void *data, size_t size);

#endif
