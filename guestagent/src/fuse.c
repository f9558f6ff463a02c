#include "fuse.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/fuse.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#include "text.h"

enum { MINOR = 31, ROOM_BYTES = FUSE_MIN_READ_BUFFER, WRITE_BYTES = 4096, MODE = 0444 };

static _Alignas(8) uint8_t room[ROOM_BYTES]; /* a request; it is looked at before the next one is read */

int fuse_make(int *device, int *mount) {
    char buffer[24];
    struct text number;
    *mount = -1;
    *device = open("/dev/fuse", O_RDWR | O_CLOEXEC | O_NONBLOCK);
    if (*device < 0) {
        return errno;
    }
    text_init(&number, buffer, sizeof(buffer));
    text_add_u64(&number, (uint64_t)*device);
    int context = fsopen("fuse", FSOPEN_CLOEXEC), error = 0;
    if (context < 0 || fsconfig(context, FSCONFIG_SET_STRING, "source", "sandloom", 0) < 0 ||
        fsconfig(context, FSCONFIG_SET_STRING, "fd", number.data, 0) < 0 ||
        fsconfig(context, FSCONFIG_SET_STRING, "rootmode", "100444", 0) < 0 ||
        fsconfig(context, FSCONFIG_SET_STRING, "user_id", "0", 0) < 0 ||
        fsconfig(context, FSCONFIG_SET_STRING, "group_id", "0", 0) < 0 ||
        fsconfig(context, FSCONFIG_SET_FLAG, "allow_other", NULL, 0) < 0 ||
        fsconfig(context, FSCONFIG_SET_FLAG, "default_permissions", NULL, 0) < 0 ||
        fsconfig(context, FSCONFIG_CMD_CREATE, NULL, NULL, 0) < 0 ||
        (*mount = fsmount(context, FSMOUNT_CLOEXEC,
                          MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC)) <
            0) {
        error = errno;
        close(*device);
        *device = -1;
    }
    if (context >= 0) {
        close(context);
    }
    return error;
}

static void answer(int device, uint64_t unique, int error, const void *head, size_t head_size,
                   const void *data, size_t size) {
    struct fuse_out_header out = {
        .len = (uint32_t)(sizeof(out) + head_size + size), .error = -error, .unique = unique};
    struct iovec parts[] = {
        {&out, sizeof(out)}, {(void *)(uintptr_t)head, head_size}, {(void *)(uintptr_t)data, size}};
    ssize_t ignored = writev(device, parts, 3); /* ENOENT: its caller was killed */
    (void)ignored;
}

void fuse_refuse(int device, const struct fuse_asked *asked, int error) {
    answer(device, asked->unique, error, NULL, 0, NULL, 0);
}

void fuse_opened(int device, const struct fuse_asked *asked, uint64_t handle) {
    struct fuse_open_out out = {.fh = handle, .open_flags = FOPEN_DIRECT_IO};
    answer(device, asked->unique, 0, &out, sizeof(out), NULL, 0);
}

void fuse_give(int device, const struct fuse_asked *asked, const void *data, size_t size) {
    answer(device, asked->unique, 0, NULL, 0, data, size < asked->size ? size : asked->size);
}

static void greet(int device, uint64_t unique, const uint8_t *body, size_t size) {
    struct fuse_init_out out = {.major = FUSE_KERNEL_VERSION, .minor = MINOR, .max_write = WRITE_BYTES};
    struct fuse_init_in in;
    if (size < 4 * sizeof(uint32_t)) {
        answer(device, unique, EPROTO, NULL, 0, NULL, 0);
        return;
    }
    memset(&in, 0, sizeof(in));
    memcpy(&in, body, size < sizeof(in) ? size : sizeof(in));
    out.max_readahead = in.max_readahead;
    out.minor = in.minor < MINOR ? in.minor : MINOR; /* 23 and later have this answer's size */
    answer(device, unique, 0, &out, sizeof(out), NULL, 0);
}

void fuse_stated(int device, const struct fuse_asked *asked, size_t size) {
    struct fuse_attr_out out = {
        .attr = {.ino = FUSE_ROOT_ID, .size = size, .mode = S_IFREG | MODE, .nlink = 1}};
    answer(device, asked->unique, 0, &out, sizeof(out), NULL, 0);
}

static enum fuse_wish read_wish(int device, const uint8_t *body, size_t size, struct fuse_asked *asked) {
    struct fuse_read_in in;
    if (size < sizeof(in)) {
        fuse_refuse(device, asked, EPROTO);
        return WISH_OTHER;
    }
    memcpy(&in, body, sizeof(in));
    asked->handle = in.fh;
    asked->offset = in.offset;
    asked->size = in.size;
    return WISH_READ;
}

static enum fuse_wish close_wish(int device, const uint8_t *body, size_t size, struct fuse_asked *asked) {
    struct fuse_release_in in;
    fuse_refuse(device, asked, 0);
    if (size < sizeof(in)) {
        return WISH_OTHER;
    }
    memcpy(&in, body, sizeof(in));
    asked->handle = in.fh;
    return WISH_CLOSE;
}

enum fuse_wish fuse_next(int device, struct fuse_asked *asked) {
    struct fuse_in_header head;
    ssize_t size = read(device, room, sizeof(room));
    if (size < 0 && (errno == EAGAIN || errno == EINTR || errno == ENOENT)) { /* ENOENT: it was taken back */
        return errno == EAGAIN ? WISH_NONE : WISH_OTHER;
    }
    if (size < (ssize_t)sizeof(head)) {
        return WISH_GONE;
    }
    memcpy(&head, room, sizeof(head));
    const uint8_t *body = room + sizeof(head);
    size_t body_size = (size_t)size - sizeof(head);
    *asked = (struct fuse_asked){.unique = head.unique, .pid = (pid_t)head.pid};
    switch (head.opcode) {
    case FUSE_INIT:
        greet(device, head.unique, body, body_size);
        break;
    case FUSE_GETATTR:
        return WISH_STAT;
    case FUSE_OPEN:
        return WISH_OPEN;
    case FUSE_READ:
        return read_wish(device, body, body_size, asked);
    case FUSE_RELEASE:
        return close_wish(device, body, body_size, asked);
    case FUSE_FORGET:
    case FUSE_BATCH_FORGET:
    case FUSE_INTERRUPT: /* whatever it is about is answered at once */
        break;
    default:
        fuse_refuse(device, asked, ENOSYS); /* and the kernel goes without, mostly for ever */
    }
    return WISH_OTHER;
}
