/* START: pipes or a terminal, a fork, and the child's word on whether its program runs. */
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <termios.h>
#include <unistd.h>

#include "agent.h"
#include "child.h"
#include "services.h"

/* Ours first, the child's second. All of ours are close-on-exec; those we poll do not block. */
struct ends {
    int in[2], out[2], err[2], status[2];
};

static void close_ends(struct ends *ends, int which) {
    int fds[] = {ends->in[which], ends->out[which], ends->err[which], ends->status[which]};
    for (unsigned i = 0; i < 4; i++) {
        bool again = false;
        for (unsigned j = 0; j < i; j++) {
            again = again || fds[j] == fds[i];
        }
        if (fds[i] >= 0 && !again) {
            close(fds[i]);
        }
    }
}

static int make_pipe(int *ours, int *its, bool we_write) {
    int pair[2];
    if (pipe2(pair, O_CLOEXEC) < 0) {
        return errno;
    }
    *ours = pair[we_write];
    *its = pair[!we_write];
    fcntl(*ours, F_SETFL, O_NONBLOCK | (we_write ? O_WRONLY : O_RDONLY));
    return 0;
}

/* What the child says, and its filter's listener with it. */
static int make_status(struct ends *ends) {
    int pair[2];
    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) < 0) {
        return errno;
    }
    ends->status[0] = pair[0];
    ends->status[1] = pair[1];
    fcntl(pair[0], F_SETFL, O_NONBLOCK);
    return 0;
}

static int open_terminal(struct agent *agent, const struct start *start, struct ends *ends) {
    struct winsize size = {.ws_row = start->rows, .ws_col = start->cols};
    int unlock = 0;
    /* By the workload's own devpts, held since before it ran: no path of the image is followed. */
    int master = openat(agent->world.pts_fd, "ptmx", O_RDWR | O_NOCTTY | O_CLOEXEC | O_NONBLOCK);
    if (master < 0) {
        return errno;
    }
    ends->out[0] = master;
    if (ioctl(master, TIOCSPTLCK, &unlock) < 0 || ioctl(master, TIOCSWINSZ, &size) < 0) {
        return errno;
    }
    ends->in[1] = ends->out[1] = ends->err[1] = ioctl(master, TIOCGPTPEER, O_RDWR | O_NOCTTY | O_CLOEXEC);
    ends->in[0] = fcntl(master, F_DUPFD_CLOEXEC, 0);
    return ends->in[1] < 0 || ends->in[0] < 0 ? errno : 0;
}

static int open_pipes(const struct start *start, struct ends *ends) {
    int error;
    if (start->stdin_wanted) {
        error = make_pipe(&ends->in[0], &ends->in[1], true);
    } else {
        ends->in[1] = open("/dev/null", O_RDONLY | O_CLOEXEC);
        error = ends->in[1] < 0 ? errno : 0;
    }
    error = error ? error : make_pipe(&ends->out[0], &ends->out[1], false);
    return error ? error : make_pipe(&ends->err[0], &ends->err[1], false);
}

static int fork_child(struct agent *agent, const struct start *start, struct ends *ends, pid_t *pid) {
    int error = make_status(ends);
    error = error ? error : start->tty ? open_terminal(agent, start, ends) : open_pipes(start, ends);
    if (error) {
        return error;
    }
    struct child child = {
        .start = start,
        .mnt_fd = agent->world.mnt_fd,
        .ipc_fd = agent->world.ipc_fd,
        .in = ends->in[1],
        .out = ends->out[1],
        .err = ends->err[1],
        .status = ends->status[1],
        .policy = &agent->services->policy,
        .rehearsal = !agent->configured,
    };
    *pid = child.rehearsal ? world_fork_apart(agent) : freezer_fork(agent);
    if (*pid == 0) {
        child_run(&child);
    }
    return *pid < 0 ? errno : 0;
}

int proc_start(struct agent *agent, const struct message *message) {
    const struct start *start = &message->of.start;
    struct ends ends;
    memset(&ends, -1, sizeof(ends));
    if (!agent->configured && !agent->rehearsed) {
        return because(agent, EAGAIN, "CONFIGURE comes first", "");
    }
    if (!agent->configured && message->proc == MAIN_PROC) {
        return because(agent, EINVAL, "a rehearsal has no main process", "");
    }
    if (agent->shutdown != SHUTDOWN_NONE || agent->world.init == 0 || agent->world.ended) {
        return because(agent, ESHUTDOWN, "the sandbox's main process has ended", "");
    }
    if (proc_find(agent, message->proc) != NULL) {
        return because(agent, EEXIST, "the process number is taken", "");
    }
    struct proc *proc = proc_new(agent, message->proc);
    if (proc == NULL) {
        return because(agent, EMFILE, "too many processes are remembered: FORGET some", "");
    }
    int error = fork_child(agent, start, &ends, &proc->pid);
    close_ends(&ends, 1);
    if (error) {
        close_ends(&ends, 0);
        proc_free(agent, proc);
        return because(agent, error, "no process can be made", "");
    }
    agent->services->used = agent->services->used || agent->configured;
    proc->start_id = message->id;
    proc->tty = start->tty;
    proc->followed = true;
    proc->status_fd = ends.status[0];
    proc->stdin_fd = ends.in[0];
    proc->streams[0].fd = ends.out[0];
    proc->streams[1].fd = ends.err[0];
    proc->streams[1].out.closed = start->tty;
    proc->in.end_taken = !start->stdin_wanted; /* a terminal nobody writes to is at its end from the start */
    uint32_t slot = (uint32_t)(proc - agent->procs);
    watch(agent, proc->status_fd, ROLE_STATUS, slot, proc->generation, EPOLLIN);
    return 0;
}

static void runs(struct agent *agent, struct proc *proc) {
    unwatch(agent, proc->status_fd);
    close(proc->status_fd);
    proc->status_fd = -1;
    proc->state = PROC_RUNNING;
    if (proc->start_id != 0) {
        reply_uint(agent, proc->start_id, (uint64_t)proc->its_pid);
        proc->start_id = 0;
    }
    stream_settle(agent, proc, 0);
    stream_settle(agent, proc, 1);
    stdin_settle(agent, proc);
}

static void failed(struct agent *agent, struct proc *proc, const struct report *report) {
    text_init(&agent->reason, agent->reason_buffer, sizeof(agent->reason_buffer));
    text_add_bytes(&agent->reason, report->text, strnlen(report->text, sizeof(report->text)));
    if (proc->start_id != 0) {
        reply_error(agent, proc->start_id, report->error);
    }
    proc_free(agent, proc); /* its exit is reaped as a stranger's */
}

/* A report, as read(2) gives it; a listener that came with it is taken over. */
static ssize_t receive(struct agent *agent, const struct proc *proc, struct report *report) {
    union {
        struct cmsghdr header;
        char room[CMSG_SPACE(sizeof(int))];
    } extra;
    struct iovec piece = {report, sizeof(*report)};
    struct msghdr message = {
        .msg_iov = &piece, .msg_iovlen = 1, .msg_control = &extra, .msg_controllen = sizeof(extra)};
    ssize_t size = recvmsg(proc->status_fd, &message, MSG_CMSG_CLOEXEC);
    struct cmsghdr *given = size > 0 ? CMSG_FIRSTHDR(&message) : NULL;
    if (given != NULL && given->cmsg_type == SCM_RIGHTS) {
        int listener;
        memcpy(&listener, CMSG_DATA(given), sizeof(listener));
        if (!supervise_add(agent, listener)) {
            log_line("too many filters at once: the calls of a process fail with ENOSYS", "", 0);
        }
    }
    return size;
}

void proc_status(struct agent *agent, struct proc *proc) {
    struct report report;
    for (;;) {
        ssize_t size = receive(agent, proc, &report);
        if (size == (ssize_t)sizeof(report) && report.error != 0) {
            failed(agent, proc, &report);
            return;
        }
        if (size == (ssize_t)sizeof(report)) {
            proc->its_pid = report.pid;
        } else if (size < 0 && (errno == EAGAIN || errno == EINTR)) {
            return;
        } else {
            runs(agent, proc); /* exec closed the pipe (or the child was killed: its exit follows) */
            return;
        }
    }
}

void proc_winsize(struct proc *proc, uint16_t rows, uint16_t cols) {
    struct winsize size = {.ws_row = rows, .ws_col = cols};
    if (proc->tty && proc->streams[0].fd >= 0) {
        ioctl(proc->streams[0].fd, TIOCSWINSZ, &size);
    }
}
