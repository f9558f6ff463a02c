#include "supervise.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/audit.h>
#include <linux/seccomp.h>
#include <signal.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include "agent.h"
#include "services.h"

#ifndef SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV /* 5.19 */
#define SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV (1UL << 5)
#endif
#ifndef SECCOMP_IOCTL_NOTIF_SET_FLAGS /* 6.6 */
#define SECCOMP_IOCTL_NOTIF_SET_FLAGS SECCOMP_IOW(4, uint64_t)
#define SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP (1UL << 0)
#endif
#ifndef SECCOMP_ADDFD_FLAG_SEND /* 5.14 */
#define SECCOMP_ADDFD_FLAG_SEND (1UL << 1)
#endif

enum { NOTIFICATION_ROOM = 512, AT_ONCE = 64 };

int filter_install(const struct policy *policy) {
    struct sock_filter code[FILTER_MOST];
    struct sock_fprog program = {.filter = code};
    program.len = (unsigned short)filter_build(policy, code, FILTER_MOST);
    errno = 0;
    if (program.len == 0) {
        return -1;
    }
    unsigned long flags = SECCOMP_FILTER_FLAG_NEW_LISTENER | SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV;
    long listener = syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, flags, &program);
    if (listener < 0 && errno == EINVAL) { /* an older kernel: a signal may interrupt what is being served */
        flags = SECCOMP_FILTER_FLAG_NEW_LISTENER;
        listener = syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, flags, &program);
    }
    return (int)listener;
}

/* Of the kernel's structs, which may be larger than those this was built with: we read what we know. */
static union {
    struct seccomp_notif it;
    uint8_t room[NOTIFICATION_ROOM];
} notification;

bool supervise_add(struct agent *agent, int listener) {
    struct services *services = agent->services;
    struct seccomp_notif_sizes sizes;
    uint32_t slot = 0;
    while (slot < MAX_LISTENERS && services->listeners[slot].fd >= 0) {
        slot++;
    }
    if (slot == MAX_LISTENERS || syscall(SYS_seccomp, SECCOMP_GET_NOTIF_SIZES, 0, &sizes) < 0 ||
        sizes.seccomp_notif > NOTIFICATION_ROOM) {
        close(listener);
        return false;
    }
    /* Where the kernel has it the caller runs on as soon as it is answered, on the same CPU. */
    ioctl(listener, SECCOMP_IOCTL_NOTIF_SET_FLAGS, SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP);
    services->used = true;
    services->listeners[slot].fd = listener;
    services->listeners[slot].generation = ++agent->generation;
    watch(agent, listener, ROLE_NOTIFY, slot, services->listeners[slot].generation, EPOLLIN);
    return true;
}

static void serve(struct agent *agent, const struct call *call) {
    const struct policy *policy = &agent->services->policy;
    const struct served *why = served_why(policy, call->number, call->arguments);
    if (why == NULL) {
        call_error(call, ENOSYS);
        return;
    }
    agent->services->decisions[why->service][why->answerer]++;
    if (why->service == SERVICE_TIME) { /* whoever answers: it reads, and never sets */
        clock_serve(agent, call);
        return;
    }
    if (why->answerer == ANSWER_DENY) {
        call_error(call, EACCES);
        services_refused(agent, call, (enum service)why->service);
        return;
    }
    switch (why->service) {
    case SERVICE_SOCKETS:
        connect_serve(agent, call);
        break;
    case SERVICE_SYSVIEW:
        viewing_serve(agent, call);
        break;
    default:
        call_error(call, ENOSYS);
    }
}

static void stop(struct agent *agent, struct listener *listener) {
    unwatch(agent, listener->fd);
    close(listener->fd);
    services_caller_gone(agent, listener->fd);
    listener->fd = -1;
    listener->generation = 0;
}

void supervise_ready(struct agent *agent, uint32_t slot, uint32_t events) {
    struct listener *listener = &agent->services->listeners[slot];
    if (!(events & EPOLLIN)) {
        stop(agent, listener); /* only EPOLLHUP: nobody is under this filter any more */
        return;
    }
    memset(notification.room, 0, sizeof(notification.room)); /* or the kernel refuses */
    if (ioctl(listener->fd, SECCOMP_IOCTL_NOTIF_RECV, &notification) < 0) {
        return; /* ENOENT: it was killed a moment ago */
    }
    struct call call = {.listener = listener->fd,
                        .id = notification.it.id,
                        .thread = (pid_t)notification.it.pid,
                        .number = (uint32_t)notification.it.data.nr};
    for (int i = 0; i < 6; i++) {
        call.arguments[i] = notification.it.data.args[i];
    }
    if (notification.it.data.arch != AUDIT_ARCH_X86_64) {
        call_error(&call, ENOSYS); /* its numbers are another table's */
        return;
    }
    serve(agent, &call);
}

bool call_alive(const struct call *call) {
    return ioctl(call->listener, SECCOMP_IOCTL_NOTIF_ID_VALID, &call->id) == 0;
}

bool call_read(const struct call *call, uint64_t address, void *to, size_t size) {
    struct iovec ours = {to, size}, theirs = {(void *)(uintptr_t)address, size};
    return process_vm_readv(call->thread, &ours, 1, &theirs, 1, 0) == (ssize_t)size && call_alive(call);
}

static int open_of(const struct call *call, const char *name, int flags) {
    char buffer[48];
    struct text path;
    text_init(&path, buffer, sizeof(buffer));
    text_add(&path, "/proc/");
    text_add_u64(&path, (uint64_t)call->thread);
    text_add(&path, name);
    return open(path.data, flags | O_CLOEXEC);
}

/* By a descriptor of the caller's memory that was opened while it waited: no number is used again meanwhile.
 */
bool call_write(const struct call *call, uint64_t address, const void *from, size_t size) {
    int fd = open_of(call, "/mem", O_WRONLY);
    bool done = fd >= 0 && call_alive(call) && pwrite(fd, from, size, (off_t)address) == (ssize_t)size;
    if (fd >= 0) {
        close(fd);
    }
    return done;
}

bool call_status(const struct call *call, char *status, size_t room) {
    int fd = open_of(call, "/status", O_RDONLY);
    ssize_t size = fd < 0 ? -1 : read(fd, status, room - 1);
    if (fd >= 0) {
        close(fd);
    }
    status[size > 0 ? size : 0] = '\0';
    return size > 0 && call_alive(call);
}

bool call_is_of_world(const struct call *call) {
    char status[4096];
    const char *at = call_status(call, status, sizeof(status)) ? strstr(status, "\nNSpid:") : NULL;
    size_t numbers = 0;
    for (; at != NULL && at[1] != '\n' && at[1] != '\0'; at++) {
        numbers += at[1] == '\t';
    }
    return numbers == 2; /* ours and the workload's */
}

/* The process of a thread: pidfds are of processes. */
static pid_t process_of(const struct call *call) {
    char status[512];
    uint64_t process = 0;
    if (!call_status(call, status, sizeof(status))) {
        return 0;
    }
    const char *at = strstr(status, "\nTgid:\t"); /* a name cannot hold a line's end: it is escaped */
    if (at == NULL || !parse_u64(at + 7, strcspn(at + 7, "\n"), &process)) {
        return 0;
    }
    return (pid_t)process;
}

int call_take_fd(const struct call *call, int fd) {
    int process = (int)syscall(SYS_pidfd_open, call->thread, 0);
    if (process < 0) {
        pid_t leader = process_of(call);
        process = leader > 0 ? (int)syscall(SYS_pidfd_open, leader, 0) : -1;
    }
    if (process < 0) {
        errno = ESRCH;
        return -1;
    }
    int taken = (int)syscall(SYS_pidfd_getfd, process, fd, 0);
    int error = errno;
    close(process);
    if (taken >= 0 && !call_alive(call)) {
        close(taken);
        taken = -1;
        error = ESRCH;
    }
    errno = error;
    return taken;
}

static void respond(const struct call *call, int64_t value, int error, uint32_t flags) {
    struct seccomp_notif_resp response = {.id = call->id, .val = value, .error = -error, .flags = flags};
    while (ioctl(call->listener, SECCOMP_IOCTL_NOTIF_SEND, &response) < 0 && errno == EINTR) {
    }
}

void call_value(const struct call *call, int64_t value) {
    respond(call, value, 0, 0);
}

void call_error(const struct call *call, int error) {
    respond(call, 0, error, 0);
}

void call_kernel(const struct call *call) {
    respond(call, 0, 0, SECCOMP_USER_NOTIF_FLAG_CONTINUE);
}

void call_fd(const struct call *call, int fd, bool close_on_exec) {
    struct seccomp_notif_addfd give = {.id = call->id,
                                       .flags = SECCOMP_ADDFD_FLAG_SEND,
                                       .srcfd = (uint32_t)fd,
                                       .newfd_flags = close_on_exec ? O_CLOEXEC : 0};
    if (ioctl(call->listener, SECCOMP_IOCTL_NOTIF_ADDFD, &give) < 0 && errno != ENOENT) {
        call_error(call, errno == EMFILE ? EMFILE : EIO);
    }
}
