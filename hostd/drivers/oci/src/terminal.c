/* A process's terminal: taken from the runtime, sized by the host. */
#include "monitor.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

enum { TERMINAL_DEADLINE_S = 5 };

/* The terminal that the runtime sends: see "--console-socket" in crun(1). Taken as soon as it comes, so that
 * a program that asks for its size at once finds it. False while, and when, none came. */
bool process_take_terminal(struct process *process) {
    char byte, room[CMSG_SPACE(sizeof(int))];
    struct iovec data = {&byte, 1};
    struct msghdr message = {
        .msg_iov = &data, .msg_iovlen = 1, .msg_control = room, .msg_controllen = sizeof(room)};
    if (process->out >= 0) {
        return true;
    }
    int peer = process->console >= 0 ? accept4(process->console, NULL, NULL, SOCK_CLOEXEC) : -1;
    struct timeval patience = {.tv_sec = TERMINAL_DEADLINE_S};
    if (peer >= 0) {
        setsockopt(peer, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience));
    }
    ssize_t got = peer >= 0 ? recvmsg(peer, &message, MSG_CMSG_CLOEXEC) : -1;
    struct cmsghdr *head = got >= 0 ? CMSG_FIRSTHDR(&message) : NULL;
    if (head != NULL && head->cmsg_type == SCM_RIGHTS && head->cmsg_len == CMSG_LEN(sizeof(int))) {
        memcpy(&process->out, CMSG_DATA(head), sizeof(int));
        fcntl(process->out, F_SETFL, O_NONBLOCK);
        process->in = fcntl(process->out, F_DUPFD_CLOEXEC, 0);
    }
    if (peer >= 0) {
        close_fd(&peer);
        close_fd(&process->console);
        unlink_own(process, ".tty");
    }
    return process->out >= 0 && process_resize(process, process->rows, process->cols) == 0;
}

int process_resize(const struct process *process, uint16_t rows, uint16_t cols) {
    struct winsize size = {.ws_row = rows, .ws_col = cols};
    if (!process->tty || process->out < 0) {
        return process->stage == STAGE_ENDED ? ESRCH : ENOTTY;
    }
    return ioctl(process->out, TIOCSWINSZ, &size) < 0 ? errno : 0;
}
