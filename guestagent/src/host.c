/* The supervisor beside a sandbox of the host's own kernel: the agent's rules and tools without its
 * processes.
 *
 *     sandloom-agent --supervise AGENT_FD SERVICES_FD RUNTIME_FD
 *
 * Three listening sockets: of the agent protocol, as far as HELLO and SERVICES; of the services port, where
 * each SERVICES takes the newest connection; and of the OCI runtime, which brings the listener of each
 * process's filter (`linux.seccomp.listenerPath` of the runtime specification 1.0.2) as the one descriptor of
 * a message whose text, the container's state, is not looked at. It lives in the sandbox's network namespace
 * and cgroup, and otherwise where the host does: pids are the host's. When it ends, every listener closes:
 * who waits gets ENOSYS, and so does whoever calls next.
 *
 *     sandloom-agent --calls WHO
 *
 * prints, for a policy in SERVICES' digits, what the filter has to notify: "NUMBER ARGUMENT VALUE" a line,
 * ARGUMENT 6 for any.
 */
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "services.h"

enum { STATE_BYTES = 65536 };

static bool take_listening(const char *number, int *to) {
    uint64_t fd;
    int listening = 0;
    socklen_t size = sizeof(listening);
    if (!parse_u64(number, strlen(number), &fd) || fd > 1 << 20 ||
        getsockopt((int)fd, SOL_SOCKET, SO_ACCEPTCONN, &listening, &size) < 0 || !listening) {
        return false;
    }
    *to = (int)fd;
    return fcntl(*to, F_SETFL, O_NONBLOCK) == 0 && fcntl(*to, F_SETFD, FD_CLOEXEC) == 0;
}

bool host_open(struct agent *agent, char **numbers) {
    return take_listening(numbers[0], &agent->services_listener_fd) &&
           take_listening(numbers[1], &agent->runtime_fd) &&
           watch(agent, agent->runtime_fd, ROLE_RUNTIME, (uint32_t)agent->runtime_fd, 0, EPOLLIN) == 0;
}

static void take_listener(struct agent *agent, int connection) {
    static char state[STATE_BYTES];
    union {
        struct cmsghdr header;
        char room[CMSG_SPACE(sizeof(int))]; /* the kernel closes what does not fit */
    } control;
    struct iovec text = {state, sizeof(state)};
    struct msghdr message = {
        .msg_iov = &text, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof(control.room)};
    ssize_t size = recvmsg(connection, &message, MSG_CMSG_CLOEXEC | MSG_DONTWAIT);
    if (size < 0 && (errno == EAGAIN || errno == EINTR)) {
        return;
    }
    struct cmsghdr *head = size > 0 ? CMSG_FIRSTHDR(&message) : NULL;
    if (head != NULL && head->cmsg_level == SOL_SOCKET && head->cmsg_type == SCM_RIGHTS &&
        head->cmsg_len == CMSG_LEN(sizeof(int))) {
        int listener;
        memcpy(&listener, CMSG_DATA(head), sizeof(listener));
        if (!supervise_add(agent, listener)) {
            log_line("a filter without a supervisor: its calls fail", "", 0);
        }
    } else {
        log_line("the runtime brought no listener", "", size < 0 ? errno : 0);
    }
    close(connection);
}

/* `slot` is the descriptor: the listening socket, or a connection of the runtime's. */
void host_ready(struct agent *agent, uint32_t slot) {
    if ((int)slot != agent->runtime_fd) {
        take_listener(agent, (int)slot);
        return;
    }
    int connection = accept4(agent->runtime_fd, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
    if (connection >= 0 && watch(agent, connection, ROLE_RUNTIME, (uint32_t)connection, 0, EPOLLIN) != 0) {
        close(connection);
    }
}

int host_tell_calls(const char *who) {
    struct policy policy;
    char buffer[4096];
    struct text lines;
    if (strlen(who) != SERVICES || strspn(who, "012") != SERVICES) {
        log_line("WHO is a digit, 0 to 2, for each service, not ", who, 0);
        return 2;
    }
    for (int service = 0; service < SERVICES; service++) {
        policy.who[service] = (uint8_t)(who[service] - '0');
    }
    text_init(&lines, buffer, sizeof(buffer));
    size_t at = 0;
    for (const struct served *row; (row = served_next(&policy, &at)) != NULL;) {
        text_add_u64(&lines, row->number);
        text_add(&lines, " ");
        text_add_u64(&lines, row->argument);
        text_add(&lines, " ");
        text_add_u64(&lines, row->value);
        text_add(&lines, "\n");
    }
    return write(STDOUT_FILENO, lines.data, lines.length) == (ssize_t)lines.length ? 0 : 1;
}
