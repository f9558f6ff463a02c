/* FREEZE, THAW and RENEW: the workload stands still while its guest is copied, and goes on in a copy only
 * after that has become a sandbox of its own.
 *
 * The workload lives in a cgroup (v2) from its first process on. Its freezer, unlike SIGSTOP, shows to nobody
 * inside: no parent is told, no shell sees a stopped job. Frozen outlives sessions: a copy's host connects
 * anew and finds it frozen.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/sched.h>
#include <signal.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "agent.h"

#define TREE "/sys/fs/cgroup"
#define GROUP TREE "/workload"
#define APART TREE "/rehearsal"

enum { FREEZE_RETRY_MS = 2, EVENTS_BYTES = 256 };

/* Whether a group's events have that line. */
static bool says(int group_fd, const char *line) {
    char events[EVENTS_BYTES];
    int fd = openat(group_fd, "cgroup.events", O_RDONLY | O_CLOEXEC);
    ssize_t size = fd < 0 ? -1 : read(fd, events, sizeof(events) - 1);
    if (fd >= 0) {
        close(fd);
    }
    events[size > 0 ? size : 0] = '\0';
    return strstr(events, line) != NULL;
}

/* One by one: a kernel may lack one of them, and what needs it says so. */
static bool give_controllers(void) {
    static const char *const wanted[] = {"+memory", "+hugetlb"};
    int fd = open(TREE "/cgroup.subtree_control", O_WRONLY | O_CLOEXEC);
    for (unsigned i = 0; fd >= 0 && i < sizeof(wanted) / sizeof(wanted[0]); i++) {
        if (write(fd, wanted[i], strlen(wanted[i])) < 0) {
            log_line("no controller for the workload: ", wanted[i], errno);
        }
    }
    if (fd >= 0) {
        close(fd);
    }
    return fd >= 0;
}

void freezer_open(struct agent *agent) {
    if (mount("cgroup2", TREE, "cgroup2", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL) < 0 ||
        !give_controllers() || (mkdir(GROUP, 0755) < 0 && errno != EEXIST) ||
        (mkdir(APART, 0755) < 0 && errno != EEXIST)) {
        log_line("no cgroup for the workload: ", GROUP, errno); /* FREEZE says so, too */
        return;
    }
    agent->freezer.group_fd = open(GROUP, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    agent->freezer.apart_fd = open(APART, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
}

static pid_t fork_into(int group_fd, uint64_t flags) {
    struct clone_args how = {.flags = flags, .exit_signal = SIGCHLD};
    if (group_fd >= 0) {
        how.flags |= CLONE_INTO_CGROUP;
        how.cgroup = (uint64_t)group_fd;
    }
    return (pid_t)syscall(SYS_clone3, &how, sizeof(how));
}

pid_t freezer_fork(const struct agent *agent) {
    return agent->freezer.group_fd < 0 ? fork() : fork_into(agent->freezer.group_fd, 0);
}

pid_t freezer_fork_apart(const struct agent *agent) {
    return fork_into(agent->freezer.apart_fd, CLONE_NEWPID);
}

/* Any process of a rehearsal, or a record of one. */
bool rehearsal_lives(const struct agent *agent) {
    return agent->proc_end > 0 ||
           (agent->freezer.apart_fd >= 0 && !says(agent->freezer.apart_fd, "populated 0"));
}

static int set_frozen(const struct agent *agent, bool frozen) {
    int fd = openat(agent->freezer.group_fd, "cgroup.freeze", O_WRONLY | O_CLOEXEC);
    int error = fd < 0 || write(fd, frozen ? "1" : "0", 1) < 0 ? errno : 0;
    if (fd >= 0) {
        close(fd);
    }
    return error;
}

int thaw(struct agent *agent) {
    struct freezer *freezer = &agent->freezer;
    int error = freezer->group_fd < 0 ? 0 : set_frozen(agent, false);
    freezer->id = 0;
    freezer->frozen = freezer->frozen && error != 0;
    return error ? because(agent, error, "the workload cannot be thawed", "") : 0;
}

int freeze_begin(struct agent *agent, const struct message *message) {
    struct freezer *freezer = &agent->freezer;
    if (freezer->group_fd < 0) {
        return because(agent, EOPNOTSUPP, "the workload has no cgroup", "");
    }
    if (!agent->configured) {
        return because(agent, EAGAIN, "CONFIGURE comes first", "");
    }
    if (freezer->frozen || freezer->id != 0) {
        return because(agent, EALREADY, "the workload is frozen, or about to be", "");
    }
    int error = set_frozen(agent, true);
    if (error) {
        return because(agent, error, "the workload cannot be frozen", "");
    }
    freezer->id = message->id;
    freezer->retry_ms = now_ms();
    freezer->deadline_ms = freezer->retry_ms + message->of.deadline_ms;
    return 0;
}

void freeze_step(struct agent *agent, uint64_t now) {
    struct freezer *freezer = &agent->freezer;
    if (freezer->id == 0 || now < freezer->retry_ms) {
        return;
    }
    uint32_t id = freezer->id;
    if (says(freezer->group_fd, "frozen 1")) {
        freezer->frozen = true;
        freezer->id = 0;
        reply_nil(agent, id);
    } else if (now < freezer->deadline_ms) {
        freezer->retry_ms = now + FREEZE_RETRY_MS;
    } else {
        thaw(agent);
        reply_error(agent, id,
                    because(agent, ETIMEDOUT, "a process of the workload does not stand still", ""));
    }
}

/* The host that asked is gone and cannot have copied anything yet. */
void freeze_cancel(struct agent *agent) {
    if (agent->freezer.id != 0) {
        thaw(agent);
    }
}

int renew(struct agent *agent, const struct configure *identity) {
    if (!agent->freezer.frozen) {
        return because(agent, EINVAL, "FREEZE comes first", "");
    }
    int error = identity_kernel(agent, identity);
    if (error) {
        return error;
    }
    struct pending_configure *names = &agent->pending;
    memset(names->hostname, 0, sizeof(names->hostname));
    memset(names->machine_id, 0, sizeof(names->machine_id));
    memcpy(names->hostname, identity->hostname.data, identity->hostname.size);
    memcpy(names->machine_id, identity->machine_id.data, identity->machine_id.size);
    error = identity_files(agent);
    return error ? error : thaw(agent);
}
