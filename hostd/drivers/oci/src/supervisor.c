/* The supervisor of a sandbox's services: a child that lives and dies with the monitor. */
#include "monitor.h"
#include "text.h"

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

enum { SOCKETS = 3 };

static _Noreturn void child(char **wanted, pid_t parent) {
    static char option[] = "--supervise";
    char *argv[] = {wanted[0], option, wanted[1], wanted[2], wanted[3], NULL}, *env[] = {NULL};
    sigset_t none;
    sigemptyset(&none);
    if (prctl(PR_SET_PDEATHSIG, SIGKILL) < 0 || getppid() != parent) {
        _exit(126);
    }
    sigprocmask(SIG_SETMASK, &none, NULL);
    execve(argv[0], argv, env);
    _exit(errno == ENOENT ? 127 : 126);
}

/* Its sockets are inherited by this process for it, and closed here. */
bool supervisor_start(struct monitor *monitor) {
    char **wanted = monitor->settings.supervisor;
    int sockets[SOCKETS];
    for (int i = 0; i < SOCKETS; i++) {
        uint64_t fd;
        if (!parse_u64(wanted[i + 1], strlen(wanted[i + 1]), &fd) || fd > 1023) {
            errno = EBADF;
            return false;
        }
        sockets[i] = (int)fd;
    }
    if (unshare(CLONE_NEWNET) < 0) {
        return false;
    }
    pid_t parent = getpid();
    monitor->supervisor = fork();
    if (monitor->supervisor == 0) {
        child(wanted, parent);
    }
    for (int i = 0; i < SOCKETS; i++) {
        close_fd(&sockets[i]);
    }
    return monitor->supervisor > 0;
}

_Noreturn void supervisor_gone(struct monitor *monitor, int wait_status) {
    char line[128];
    struct text text;
    for (size_t i = 0; i < MAX_PROCS; i++) {
        if (monitor->processes[i].proc != 0) {
            process_signal(&monitor->processes[i], SIGKILL);
            if (monitor->processes[i].pid != 0) {
                kill(monitor->processes[i].pid, SIGKILL); /* init, and with it all in its namespace */
            }
        }
    }
    text_init(&text, line, sizeof(line));
    text_add(&text, "sandloom-monitor: the supervisor of the sandbox's services ended by ");
    text_add(&text, WIFSIGNALED(wait_status) ? "signal " : "itself, status ");
    text_add_u64(&text,
                 (uint64_t)(WIFSIGNALED(wait_status) ? WTERMSIG(wait_status) : WEXITSTATUS(wait_status)));
    text_add(&text, "\n");
    ssize_t done = write(2, line, text.length);
    _exit(done < 0 ? 4 : 3);
}
