/* What confines a rehearsal: a program of the image that runs before there is anybody whose program it could
 * be.
 *
 * It is alone in a PID namespace (world_fork_apart), so that all it makes ends with it; sees every mount
 * read-only, so that nothing it does is kept; has IPC of its own, a uid that nobody else has, no capability
 * and no way to one. What the agent gave the guest by REHEARSE is all that it can learn: there is no secret,
 * no network, no argument of a sandbox yet.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/mount.h>
#include <sched.h>
#include <sys/mount.h>
#include <sys/personality.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "child.h"

enum { MOST_PROCESSES = 64, MOST_DATA_BYTES = 128 << 20 };

/* The first whom the OOM killer takes. */
int rehearsal_enter(void) {
    int fd = open("/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC);
    int result = fd < 0 ? -1 : (int)write(fd, "1000", 4);
    if (fd >= 0) {
        close(fd);
    }
    return result < 0 ? -1 : 0;
}

static int limit(__rlimit_resource_t resource, rlim_t most) {
    struct rlimit both = {most, most};
    return setrlimit(resource, &both);
}

int rehearsal_confine(void) {
    struct mount_attr attributes = {.attr_set = MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID,
                                    .propagation = MS_PRIVATE};
    if (unshare(CLONE_NEWNS | CLONE_NEWIPC) < 0) {
        return -1;
    }
    return mount_setattr(AT_FDCWD, "/", AT_RECURSIVE, &attributes, sizeof(attributes));
}

int rehearsal_bound(void) {
    if (limit(RLIMIT_NPROC, MOST_PROCESSES) < 0 || limit(RLIMIT_DATA, MOST_DATA_BYTES) < 0 ||
        limit(RLIMIT_FSIZE, 0) < 0 || limit(RLIMIT_CORE, 0) < 0 || limit(RLIMIT_MSGQUEUE, 0) < 0) {
        return -1;
    }
    /* TCG keeps translations by virtual address: unlike a tenant's, one rehearsal's do for the next. */
    if (personality(ADDR_NO_RANDOMIZE) < 0) {
        return -1;
    }
    return prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
}
