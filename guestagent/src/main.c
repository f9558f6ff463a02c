/* sandloom-agent: PID 1 of a guest; or, for tests on a build machine,
 *
 *     sandloom-agent --port FD --root DIR [--services FD]
 *
 * the same program without what only a fresh guest may do (mounts of layers, modules, clock, entropy, names,
 * power): FD is a connected stream socket, or a listening one whose connections follow each other as hosts on
 * a port do. DIR
 * ("/" too) is the root of the workload, which gets its namespaces, its /dev and its limits as in a guest.
 * Needs root. Or, beside a sandbox of the host's own kernel (host.c),
 *
 *     sandloom-agent --supervise AGENT_FD SERVICES_FD RUNTIME_FD
 *     sandloom-agent --calls WHO
 */
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include "agent.h"
#include "services.h"

static struct agent agent;

static uint8_t *pages(size_t size) {
    void *made = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return made == MAP_FAILED ? NULL : made;
}

static void read_boot_id(void) {
    int fd = open("/proc/sys/kernel/random/boot_id", O_RDONLY | O_CLOEXEC);
    ssize_t size = fd < 0 ? -1 : read(fd, agent.boot_id, sizeof(agent.boot_id) - 1);
    agent.boot_id[size > 0 ? size - 1 : 0] = '\0'; /* without its newline */
    if (fd >= 0) {
        close(fd);
    }
}

static bool prepare(void) {
    sigset_t children;
    uint8_t *rx = pages(RX_BYTES), *tx = pages(TX_BYTES);
    sigemptyset(&children);
    sigaddset(&children, SIGCHLD);
    sigprocmask(SIG_BLOCK, &children, NULL);
    signal(SIGPIPE, SIG_IGN);
    agent.epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    agent.signal_fd = signalfd(-1, &children, SFD_NONBLOCK | SFD_CLOEXEC);
    agent.port_fd = agent.listener_fd = agent.pressure_fd = -1;
    agent.services_given_fd = agent.services_listener_fd = agent.runtime_fd = -1;
    agent.freezer.group_fd = agent.freezer.apart_fd = -1;
    if (!services_open(&agent) || rx == NULL || tx == NULL || agent.epoll_fd < 0 || agent.signal_fd < 0) {
        return false;
    }
    rx_init(&agent.rx, rx);
    tx_init(&agent.tx, tx);
    text_init(&agent.reason, agent.reason_buffer, sizeof(agent.reason_buffer));
    return watch(&agent, agent.signal_fd, ROLE_SIGNALS, 0, 0, EPOLLIN) == 0;
}

static bool use_socket(const char *number) {
    uint64_t fd;
    int listening = 0;
    socklen_t size = sizeof(listening);
    if (!parse_u64(number, strlen(number), &fd) || fd > 1 << 20 ||
        getsockopt((int)fd, SOL_SOCKET, SO_ACCEPTCONN, &listening, &size) < 0) {
        return false;
    }
    fcntl((int)fd, F_SETFL, O_NONBLOCK);
    fcntl((int)fd, F_SETFD, FD_CLOEXEC);
    if (listening) {
        agent.listener_fd = (int)fd;
        return watch(&agent, (int)fd, ROLE_LISTENER, 0, 0, EPOLLIN) == 0;
    }
    agent.port_fd = (int)fd;
    return watch(&agent, (int)fd, ROLE_PORT, 0, 0, EPOLLIN | EPOLLOUT | EPOLLET) == 0;
}

static bool use_services(char **given) {
    uint64_t fd;
    if (given == NULL) {
        return true;
    }
    if (strcmp(given[0], "--services") != 0 || !parse_u64(given[1], strlen(given[1]), &fd) || fd > 1 << 20) {
        return false;
    }
    agent.services_given_fd = (int)fd;
    fcntl((int)fd, F_SETFL, O_NONBLOCK);
    fcntl((int)fd, F_SETFD, FD_CLOEXEC);
    return true;
}

static void spare_from_oom(void) {
    int fd = open("/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC);
    if (fd < 0 || write(fd, "-1000", 5) < 0) {
        log_line("the OOM killer may take the agent", "", errno);
    }
    if (fd >= 0) {
        close(fd);
    }
}

static int supervise(char **numbers) {
    agent.supervises = agent.configured = true;
    if (!use_socket(numbers[0]) || !host_open(&agent, numbers + 1)) {
        log_line("no listening sockets to supervise by", "", errno);
        return 2;
    }
    read_boot_id();
    return agent_loop(&agent);
}

int main(int argc, char **argv) {
    agent.in_guest = getpid() == 1;
    if (!agent.in_guest && argc == 3 && strcmp(argv[1], "--calls") == 0) {
        return host_tell_calls(argv[2]);
    }
    if (!prepare()) {
        log_line("cannot begin", "", errno);
        return 1;
    }
    if (!agent.in_guest && argc == 5 && strcmp(argv[1], "--supervise") == 0) {
        return supervise(argv + 2);
    }
    if (agent.in_guest) {
        agent.root = "/o";
        boot(&agent);
        spare_from_oom();
    } else {
        if ((argc != 5 && argc != 7) || strcmp(argv[1], "--port") != 0 || strcmp(argv[3], "--root") != 0 ||
            !use_socket(argv[2]) || !use_services(argc == 7 ? &argv[5] : NULL)) {
            log_line("usage, outside of a guest: sandloom-agent --port SOCKET_FD --root DIR [--services "
                     "SOCKET_FD]",
                     "", 0);
            return 2;
        }
        agent.root = argv[4];
    }
    read_boot_id();
    pressure_open(&agent);
    defence_open(&agent);
    int status = agent_loop(&agent);
    world_leave(&agent);
    return status;
}
