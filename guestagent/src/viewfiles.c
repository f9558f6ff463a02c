/* The process that answers for the files: see viewing.h for why it is one of its own. */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <unistd.h>

#include "fuse.h"
#include "services.h"
#include "sysview.h"

enum { SHOTS = 32, SHOTS_MOST_BYTES = 262144, KEPT_FD = 512, NOTE_FD = KEPT_FD + VIEW_FILES };

/* What a reader that is not at its end yet goes on with. */
struct shot {
    uint64_t handle; /* 0: free */
    uint64_t used;   /* the larger, the later */
    char *data;
    size_t size;
};

struct server {
    const struct view_shared *shared;
    int devices[VIEW_FILES]; /* -1: its mount is gone */
    int note_fd;
    uint64_t last_handle, last_use;
    struct shot shots[SHOTS];
};

static struct server server;

typedef void maker(const struct view *view, const char *kernel, size_t size, struct text *out);

static void make_online(const struct view *view, const char *kernel, size_t size, struct text *out) {
    (void)kernel;
    (void)size;
    view_online(view, out);
}

static maker *const MAKERS[VIEW_FILES] = {view_meminfo, view_cpuinfo, view_stat, make_online};

static char *made(uint32_t file, size_t *size) {
    size_t meminfo_size = 0, kernel_size = 0;
    char *meminfo = view_slurp(VIEW_PATHS[VIEW_MEMINFO], &meminfo_size);
    char *kernel = file == 0 || meminfo == NULL ? meminfo : view_slurp(VIEW_PATHS[file], &kernel_size);
    size_t room = (file == 0 ? meminfo_size : kernel_size) + VIEW_CPUS * 4 + VIEW_GROWS;
    char *data = kernel == NULL ? NULL : malloc(room);
    if (data != NULL) {
        struct view view = view_now(server.shared, meminfo, meminfo_size);
        struct text out;
        text_init(&out, data, room);
        MAKERS[file](&view, kernel, file == 0 ? meminfo_size : kernel_size, &out);
        *size = out.length;
    }
    if (kernel != meminfo) {
        free(kernel);
    }
    free(meminfo);
    return data;
}

static void drop(struct shot *shot) {
    free(shot->data);
    *shot = (struct shot){0};
}

static struct shot *find(uint64_t handle) {
    for (unsigned i = 0; i < SHOTS; i++) {
        if (server.shots[i].handle == handle) {
            return &server.shots[i];
        }
    }
    return NULL;
}

/* Room for one more of `size` bytes, at the cost of those not used for longest. */
static struct shot *slot_for(size_t size) {
    for (;;) {
        struct shot *idle = NULL, *oldest = NULL;
        size_t held = 0;
        for (unsigned i = 0; i < SHOTS; i++) {
            struct shot *shot = &server.shots[i];
            held += shot->size;
            idle = shot->handle == 0 ? shot : idle;
            oldest = shot->handle != 0 && (oldest == NULL || shot->used < oldest->used) ? shot : oldest;
        }
        if (idle != NULL && (oldest == NULL || held + size <= SHOTS_MOST_BYTES)) {
            return idle;
        }
        drop(oldest);
    }
}

static void give(uint32_t file, const struct fuse_asked *asked) {
    struct shot *shot = find(asked->handle);
    if (shot != NULL && asked->offset == 0) {
        drop(shot);
        shot = NULL;
    }
    if (shot == NULL) {
        size_t size = 0;
        char *data = made(file, &size);
        if (data == NULL) {
            fuse_refuse(server.devices[file], asked, EIO);
            return;
        }
        shot = slot_for(size);
        *shot = (struct shot){.handle = asked->handle, .data = data, .size = size};
    }
    shot->used = ++server.last_use;
    uint64_t at = asked->offset < shot->size ? asked->offset : shot->size;
    fuse_give(server.devices[file], asked, shot->data + at, shot->size - at);
    if (asked->offset >= shot->size) {
        drop(shot); /* the reader saw its end */
    }
}

static void opened(uint32_t file, const struct fuse_asked *asked) {
    if (!__atomic_load_n(&server.shared->denied, __ATOMIC_RELAXED)) {
        fuse_opened(server.devices[file], asked, ++server.last_handle);
        return;
    }
    struct view_note note = {(uint32_t)asked->pid, file};
    fuse_refuse(server.devices[file], asked, EACCES);
    ssize_t ignored = write(server.note_fd, &note, sizeof(note)); /* full: it is refused all the same */
    (void)ignored;
}

static void stated(uint32_t file, const struct fuse_asked *asked) {
    size_t size = 0;
    free(made(file, &size));
    fuse_stated(server.devices[file], asked, size);
}

static void answer(uint32_t file) {
    struct fuse_asked asked;
    enum fuse_wish wish = fuse_next(server.devices[file], &asked);
    struct shot *shot = wish == WISH_CLOSE ? find(asked.handle) : NULL;
    if (wish == WISH_STAT) {
        stated(file, &asked);
    } else if (wish == WISH_OPEN) {
        opened(file, &asked);
    } else if (wish == WISH_READ) {
        give(file, &asked);
    } else if (shot != NULL) {
        drop(shot);
    } else if (wish == WISH_GONE) {
        close(server.devices[file]);
        server.devices[file] = -1;
    }
}

/* Nothing of the agent's stays open but these. */
static bool keep(const int *devices, int note_fd) {
    for (int file = 0; file < VIEW_FILES; file++) {
        server.devices[file] = fcntl(devices[file], F_DUPFD_CLOEXEC, KEPT_FD + file);
        if (server.devices[file] != KEPT_FD + file) {
            return false;
        }
    }
    server.note_fd = fcntl(note_fd, F_DUPFD_CLOEXEC, NOTE_FD);
    return server.note_fd == NOTE_FD && close_range(0, KEPT_FD - 1, 0) == 0 &&
           close_range(NOTE_FD + 1, ~0u, 0) == 0;
}

_Noreturn void viewfiles_run(const struct view_shared *shared, const int *devices, int note_fd) {
    struct pollfd waits[VIEW_FILES];
    server.shared = shared;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    prctl(PR_SET_NAME, "sysview");
    prctl(PR_SET_DUMPABLE, 0, 0, 0, 0);
    bool left = keep(devices, note_fd);
    while (left) {
        left = false;
        for (int file = 0; file < VIEW_FILES; file++) {
            waits[file] = (struct pollfd){.fd = server.devices[file], .events = POLLIN};
            left = left || server.devices[file] >= 0;
        }
        if (left && poll(waits, VIEW_FILES, -1) > 0) {
            for (uint32_t file = 0; file < VIEW_FILES; file++) {
                if (waits[file].revents != 0) {
                    answer(file);
                }
            }
        }
    }
    _exit(0);
}
