/* `sysview`: the sandbox's files and calls about its memory and CPUs (sysview.h has the numbers).
 *
 * The files are FUSE mounts of one file each over the kernel's own, in the workload's mounts only. A pass
 * over a file (from a read at 0 to its end) sees one moment. Under `deny` opening one is EACCES.
 *
 * A process of its own answers for them (viewfiles.c). The agent must not: whoever splices from such a file
 * into a pipe holds the pipe's lock while it waits for the answer, and the agent, reading that pipe, would
 * wait for the lock. When that process dies the files fail with ENOTCONN.
 */
#ifndef SANDLOOM_VIEWING_H
#define SANDLOOM_VIEWING_H

#include "supervise.h"
#include "sysview.h"

/* The order is hostd's, too (REFUSED's argument). */
enum { VIEW_MEMINFO, VIEW_CPUINFO, VIEW_STAT, VIEW_ONLINE, VIEW_FILES };
extern const char *const VIEW_PATHS[VIEW_FILES];

/* Of the agent, for the files' process. */
struct view_shared {
    uint64_t in_guest, reserved_kib; /* of boot RAM, what MemTotal leaves out */
    uint64_t cpus_granted;           /* 0: whatever is online */
    uint64_t denied;
};

/* A refused open, told to the agent. */
struct view_note {
    uint32_t pid, file;
};

struct viewing {
    bool attached;
    struct view_shared *shared;
    int note_fd;
};

bool viewing_open(struct agent *agent);
/* In a guest, once, before any memory is plugged. */
void viewing_measure(struct agent *agent);
void viewing_granted(struct agent *agent, uint64_t cpus);
/* Mounts the files, when they are not; 0 or an errno, with a reason. */
int viewing_begin(struct agent *agent, bool denied);
void viewing_ready(struct agent *agent);
void viewing_serve(struct agent *agent, const struct call *call);

/* All of a file that does not say its size; NULL with errno. The caller frees it. */
char *view_slurp(const char *path, size_t *size);
/* Of one moment, as far as the kernel's own text of /proc/meminfo is; all CPUs when they cannot be read. */
struct view view_now(const struct view_shared *shared, const char *meminfo, size_t size);

/* viewfiles.c */
_Noreturn void viewfiles_run(const struct view_shared *shared, const int *devices, int note_fd);

#endif
