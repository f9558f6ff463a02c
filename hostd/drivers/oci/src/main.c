/* The monitor's start and its loop. */
#include "monitor.h"
#include "text.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { FDS_A_PROCESS = 4, MAX_FDS = 3 + FDS_A_PROCESS * MAX_PROCS };

static uint8_t rx_buffer[RX_BYTES], tx_buffer[TX_BYTES];
static struct monitor the_monitor;

static _Noreturn void fail(const char *what, const char *which) {
    char line[512];
    struct text text;
    int error = errno;
    text_init(&text, line, sizeof(line));
    text_add(&text, "sandloom-monitor: ");
    text_add(&text, what);
    text_add(&text, which);
    text_add(&text, error != 0 ? ": " : "");
    text_add(&text, error != 0 ? strerror(error) : "");
    text_add(&text, "\n");
    ssize_t done = write(2, line, text.length);
    _exit(done < 0 ? 2 : 1);
}

static void write_file(const char *path, const char *value) {
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    if (fd < 0 || write(fd, value, strlen(value)) < 0) {
        fail("cannot write ", path);
    }
    close(fd);
}

/* When the sandbox runs out of memory its workload is to go, not this. Without CAP_SYS_RESOURCE it may be. */
static void prefer_to_live(void) {
    int fd = open("/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC);
    if (fd >= 0 && write(fd, "-999", 4) < 0 && errno != EACCES && errno != EPERM) {
        fail("cannot write ", "/proc/self/oom_score_adj");
    }
    close_fd(&fd);
}

/* The number of an inherited, listening socket. */
static int take_listener(const char *number) {
    uint64_t fd;
    if (!parse_u64(number, strlen(number), &fd) || fd > 1023 || fcntl((int)fd, F_SETFD, FD_CLOEXEC) < 0 ||
        fcntl((int)fd, F_SETFL, O_NONBLOCK) < 0) {
        fail("no listening socket: ", number);
    }
    return (int)fd;
}

static int make_signals(void) {
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGCHLD);
    sigprocmask(SIG_BLOCK, &set, NULL);
    signal(SIGPIPE, SIG_IGN);
    return signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
}

static void accept_client(struct monitor *monitor) {
    int fd = accept4(monitor->listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
    if (fd < 0) {
        return;
    }
    close_fd(&monitor->client); /* there is one hostd: the newest */
    monitor->client = fd;
    session_reset(monitor);
    rx_init(&monitor->rx, rx_buffer);
    tx_reset(&monitor->tx);
}

static void flush(struct monitor *monitor) {
    size_t size;
    const uint8_t *at;
    while (monitor->client >= 0 && (at = tx_pending(&monitor->tx, &size), size > 0)) {
        ssize_t done = write(monitor->client, at, size);
        if (done > 0) {
            tx_written(&monitor->tx, (size_t)done);
        } else if (done < 0 && errno == EINTR) {
            continue;
        } else if (done < 0 && errno == EAGAIN) {
            return;
        } else {
            close_fd(&monitor->client);
            session_reset(monitor);
        }
    }
}

static void watch(struct pollfd *fds, size_t *count, int fd, short events) {
    if (fd >= 0 && *count < MAX_FDS) {
        fds[(*count)++] = (struct pollfd){.fd = fd, .events = events};
    }
}

static void watch_process(struct pollfd *fds, size_t *count, const struct process *process) {
    if (process->stage == STAGE_STARTING) {
        watch(fds, count, process->console, POLLIN);
        watch(fds, count, process->reports, POLLIN);
        return;
    }
    watch(fds, count, process->reports, POLLIN);
    if (window_room(&process->streams[0].window) > 0) {
        watch(fds, count, process->out, POLLIN);
    }
    if (window_room(&process->streams[1].window) > 0) {
        watch(fds, count, process->err, POLLIN);
    }
    if (process->input.window.held > 0) {
        watch(fds, count, process->in, POLLOUT);
    }
}

static void wait_for_work(struct monitor *monitor, bool *readable) {
    struct pollfd fds[MAX_FDS];
    size_t count = 0;
    size_t unsaid = tx_used(&monitor->tx);
    bool listens = unsaid <= TX_BUSY_BYTES; /* a host that reads no answers is asked no more */
    watch(fds, &count, monitor->signals, POLLIN);
    watch(fds, &count, monitor->listener, POLLIN);
    watch(fds, &count, monitor->client, (short)((listens ? POLLIN : 0) | (unsaid > 0 ? POLLOUT : 0)));
    for (size_t i = 0; i < MAX_PROCS; i++) {
        if (monitor->processes[i].proc != 0) {
            watch_process(fds, &count, &monitor->processes[i]);
        }
    }
    if (poll(fds, (nfds_t)count, -1) < 0) {
        if (errno != EINTR) {
            fail("cannot poll", "");
        }
        return;
    }
    if (fds[0].revents != 0) {
        struct signalfd_siginfo info;
        while (read(monitor->signals, &info, sizeof(info)) > 0) {
        }
        processes_reap(monitor);
    }
    *readable = monitor->client >= 0 && (fds[2].revents & ~POLLOUT) != 0;
    if (fds[1].revents != 0) {
        accept_client(monitor);
        *readable = false;
    }
}

static void serve(struct monitor *monitor) {
    for (;;) {
        bool readable = false;
        wait_for_work(monitor, &readable);
        for (size_t i = 0; i < MAX_PROCS; i++) {
            struct process *process = &monitor->processes[i];
            if (process->proc != 0 && process->console >= 0) {
                process_take_terminal(process);
            }
            if (process->proc != 0 && process->reports >= 0) {
                process_report(monitor, process);
            }
        }
        if (readable) {
            session_receive(monitor);
        }
        session_say(monitor);
        flush(monitor);
    }
}

static void set_up(struct monitor *monitor, int argc, char **argv) {
    int at = 3;
    if (argc < 3 || chdir(argv[1]) < 0) {
        fail("cannot enter ", argc < 3 ? "FOLDER: it and LISTENER were not given" : argv[1]);
    }
    monitor->listener = take_listener(argv[2]);
    for (; at < argc && strcmp(argv[at], "--") != 0; at++) {
        if (strcmp(argv[at], "--init") == 0) {
            monitor->settings.with_init = true;
        } else if (strcmp(argv[at], "--hide") == 0 && at + 1 < argc) {
            monitor->settings.hide = argv[++at];
        } else if (strcmp(argv[at], "--cover") == 0 && at + 1 < argc) {
            monitor->settings.cover = argv[++at];
        } else if (strcmp(argv[at], "--begin") == 0 && at + 2 < argc &&
                   parse_u64(argv[at + 1], strlen(argv[at + 1]), &monitor->settings.begin[0]) &&
                   parse_u64(argv[at + 2], strlen(argv[at + 2]), &monitor->settings.begin[1])) {
            at += 2;
        } else if (strcmp(argv[at], "--supervisor") == 0 && at + 4 < argc) {
            monitor->settings.supervisor = &argv[at + 1];
            at += 4;
        } else {
            errno = 0;
            fail("unknown argument ", argv[at]);
        }
    }
    for (at++; at < argc; at++) {
        write_file(argv[at], "0");
    }
    prefer_to_live();
    struct text boot;
    struct timespec now;
    clock_gettime(CLOCK_BOOTTIME, &now);
    text_init(&boot, monitor->boot_id, sizeof(monitor->boot_id));
    text_add_u64(&boot, (uint64_t)getpid());
    text_add(&boot, "-");
    text_add_u64(&boot, (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec);
}

int main(int argc, char **argv) {
    struct monitor *monitor = &the_monitor;
    if (argc > 3 && strcmp(argv[1], "init") == 0 && strcmp(argv[2], "--") == 0) {
        init_run(argv + 3);
    }
    if (argc == 2 && strcmp(argv[1], "pause") == 0) {
        for (;;) { /* what a container that is nobody's yet runs, behind init */
            pause();
        }
    }
    if (argc == 3 && strcmp(argv[1], "nodev") == 0) {
        /* An OCI hook, in the container's mounts: crun drops these flags when it binds the root to itself. */
        if (mount(NULL, argv[2], NULL, MS_REMOUNT | MS_BIND | MS_NODEV | MS_NOSUID, NULL) < 0) {
            fail("cannot forbid devices in ", argv[2]);
        }
        char state[4096]; /* crun takes a hook that leaves the container's state unread for one that failed */
        while (read(0, state, sizeof(state)) > 0) {
        }
        return 0;
    }
    if (argc == 2 && (strcmp(argv[1], "probe") == 0 || strcmp(argv[1], "probe-twice") == 0)) {
        /* hostd/drivers/oci/probe.py asks whether a container runs here at all, and goes on from a
         * checkpoint. */
        static const char said[] = "sandloom runs here\n";
        char byte;
        bool done = write(1, said, sizeof(said) - 1) == sizeof(said) - 1;
        if (done && strcmp(argv[1], "probe-twice") == 0) {
            done = read(0, &byte, 1) == 1 && write(1, said, sizeof(said) - 1) == sizeof(said) - 1;
        }
        return done ? 0 : 1;
    }
    umask(077);
    for (size_t i = 0; i < MAX_PROCS; i++) {
        process_init(&monitor->processes[i], 0);
    }
    monitor->client = -1;
    rx_init(&monitor->rx, rx_buffer);
    tx_init(&monitor->tx, tx_buffer);
    set_up(monitor, argc, argv);
    monitor->settings.program = open("/proc/self/exe", O_RDONLY | O_CLOEXEC);
    if (monitor->settings.program < 0 || prctl(PR_SET_CHILD_SUBREAPER, 1) < 0) {
        fail("cannot become a subreaper", "");
    }
    monitor->signals = make_signals();
    if (monitor->settings.supervisor != NULL && !supervisor_start(monitor)) {
        fail("no supervisor: ", monitor->settings.supervisor[0]);
    }
    serve(monitor);
}
