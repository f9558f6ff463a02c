/* The one loop: wait, take what came, act on deadlines, say what there is to say. */
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/signalfd.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "agent.h"
#include "services.h"

enum { EVENTS_AT_ONCE = 16, LOG_BYTES = 256 };

uint64_t now_ms(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000 + (uint64_t)now.tv_nsec / 1000000;
}

void log_line(const char *what, const char *on, int error) {
    char buffer[LOG_BYTES];
    struct text line;
    text_init(&line, buffer, sizeof(buffer) - 1);
    text_add(&line, getpid() == 1 ? "<3>sandloom-agent: " : "sandloom-agent: ");
    text_add(&line, what);
    text_add_printable(&line, on, strlen(on));
    if (error != 0) {
        text_add(&line, ": ");
        text_add(&line, strerrordesc_np(error) ? strerrordesc_np(error) : "unknown error");
    }
    line.data[line.length++] = '\n';
    int fd = getpid() == 1 ? open("/dev/kmsg", O_WRONLY | O_CLOEXEC) : dup(STDERR_FILENO);
    if (fd >= 0) {
        ssize_t ignored = write(fd, line.data, line.length);
        (void)ignored; /* there is nowhere to say that the log is lost */
        close(fd);
    }
}

int because(struct agent *agent, int error, const char *what, const char *subject) {
    const char *name = strerrordesc_np(error);
    text_init(&agent->reason, agent->reason_buffer, sizeof(agent->reason_buffer));
    text_add(&agent->reason, what);
    text_add_printable(&agent->reason, subject, strlen(subject));
    text_add(&agent->reason, ": ");
    text_add(&agent->reason, name ? name : "unknown error");
    return error;
}

int watch(struct agent *agent, int fd, enum role role, uint32_t slot, uint32_t generation, uint32_t events) {
    struct epoll_event event = {.events = events};
    event.data.u64 = (uint64_t)generation << 32 | slot << 8 | role;
    return epoll_ctl(agent->epoll_fd, EPOLL_CTL_ADD, fd, &event) < 0 ? errno : 0;
}

void unwatch(struct agent *agent, int fd) {
    epoll_ctl(agent->epoll_fd, EPOLL_CTL_DEL, fd, NULL);
}

static void reap(struct agent *agent) {
    struct signalfd_siginfo info;
    while (read(agent->signal_fd, &info, sizeof(info)) > 0) {
    }
    int status;
    pid_t pid;
    while ((pid = waitpid(-1, &status, WNOHANG)) > 0) {
        if (pid == agent->world.init) {
            agent->world.init = 0;
        } else {
            proc_reaped(agent, pid, status);
        }
        if (WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL) {
            agent->oom_check_ms = now_ms();
        }
    }
}

static void take(struct agent *agent, const struct epoll_event *event) {
    enum role role = (enum role)(event->data.u64 & 0xff);
    uint32_t slot = (uint32_t)(event->data.u64 >> 8 & 0xffffff);
    switch (role) {
    case ROLE_SIGNALS:
        reap(agent);
        break;
    case ROLE_PRESSURE:
        pressure_ready(agent);
        break;
    case ROLE_MEMORY:
        defence_ready(agent);
        break;
    case ROLE_NOTIFY:
        if (slot < MAX_LISTENERS && agent->services->listeners[slot].generation == event->data.u64 >> 32) {
            supervise_ready(agent, slot, event->events);
        }
        break;
    case ROLE_TUN:
        datagram_ready(agent);
        break;
    case ROLE_SERVICES:
        services_port_ready(agent, event->events);
        break;
    case ROLE_FLOW:
        flow_ready(agent, slot, (uint32_t)(event->data.u64 >> 32), event->events);
        break;
    case ROLE_RUNTIME:
        host_ready(agent, slot);
        break;
    case ROLE_VIEW:
        viewing_ready(agent);
        break;
    case ROLE_PORT: /* read and written on every turn, see below */
    case ROLE_LISTENER:
        break;
    default:
        if (slot < MAX_PROCS && agent->procs[slot].generation == event->data.u64 >> 32) {
            proc_ready(agent, slot, role);
        }
    }
}

/* Acts on what is due; the milliseconds until the next deadline, -1 for none. */
static int deadlines(struct agent *agent) {
    uint64_t now = now_ms();
    uint64_t next = procs_linger(agent, now), services = services_deadlines(agent, now);
    next = services < next ? services : next;
    configure_step(agent, now);
    freeze_step(agent, now);
    balloon_step(agent, now);
    cpus_step(agent, now);
    defence_step(agent, now);
    shutdown_step(agent, now);
    if (agent->oom_check_ms != 0 && now >= agent->oom_check_ms) {
        oom_check(agent);
    }
    uint64_t others[] = {agent->pending.id ? agent->pending.retry_ms : 0,
                         agent->freezer.id ? agent->freezer.retry_ms : 0,
                         agent->shutdown ? agent->shutdown_ms : 0,
                         agent->oom_check_ms,
                         agent->balloon.id ? 1 : 0,
                         agent->cpus.id ? agent->cpus.retry_ms : 0,
                         agent->defence.retry_ms,
                         agent->defence.adjust_ms};
    for (unsigned i = 0; i < sizeof(others) / sizeof(others[0]); i++) {
        if (others[i] != 0 && others[i] < next) {
            next = others[i];
        }
    }
    if (next == UINT64_MAX) {
        return -1;
    }
    now = now_ms();
    return next <= now ? 0 : next - now > 60000 ? 60000 : (int)(next - now);
}

int agent_loop(struct agent *agent) {
    struct epoll_event events[EVENTS_AT_ONCE];
    while (!agent->peer_gone) {
        int wait_ms = -1;
        /* The port is edge-triggered (its hang-up is a level that would never let us sleep) and is simply
         * tried on each turn: no edge can be lost that way. */
        for (bool moved = true; moved;) {
            moved = port_receive(agent);
            wait_ms = deadlines(agent);
            moved = procs_speak(agent) || moved;
            moved = port_send(agent) || moved;
            moved = services_move(agent) || moved;
        }
        int count = epoll_wait(agent->epoll_fd, events, EVENTS_AT_ONCE, wait_ms);
        for (int i = 0; i < count; i++) {
            take(agent, &events[i]);
        }
    }
    return 0;
}
