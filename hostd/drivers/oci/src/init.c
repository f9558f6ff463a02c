/* PID 1 of a host-kernel container: runs the command as its child, reaps orphans, passes signals on.
 *
 * The kernel spares PID 1 every signal that it has no handler for, so a command that were PID 1 itself could
 * not be stopped by SIGTERM, nor end itself by a signal. What exec said and how the command ended go to
 * INIT_REPORT_FD.
 */
#include "monitor.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

extern char **environ;

static void report(uint32_t kind, uint32_t value) {
    struct report made = {kind, value};
    ssize_t done;
    do {
        done = write(INIT_REPORT_FD, &made, sizeof(made));
    } while (done < 0 && errno == EINTR);
}

/* execvp without its fallback to sh: what is no executable is an error. Returns the errno. */
static int run(char **argv) {
    const char *path = getenv("PATH");
    char full[4096];
    int kept = ENOENT;
    if (strchr(argv[0], '/') != NULL) {
        execve(argv[0], argv, environ);
        return errno;
    }
    if (path == NULL) {
        path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
    }
    for (const char *at = path;; at++) {
        size_t length = strcspn(at, ":"), name = strlen(argv[0]);
        if (length + name + 2 <= sizeof(full) && length > 0) {
            memcpy(full, at, length);
            full[length] = '/';
            memcpy(full + length + 1, argv[0], name + 1);
            execve(full, argv, environ);
            if (errno != ENOENT && errno != ENOTDIR) {
                kept = errno;
            }
        }
        at += length;
        if (*at == '\0') {
            return kept;
        }
    }
}

static _Noreturn void child(char **argv, int failed) {
    if (isatty(0)) {
        setpgid(0, 0); /* a group of its own in the foreground; SIGTTOU is still blocked here */
        tcsetpgrp(0, getpid());
    } else {
        setsid();
    }
    sigset_t none;
    sigemptyset(&none);
    for (int signo = 1; signo <= MAX_SIGNAL; signo++) {
        signal(signo, SIG_DFL);
    }
    sigprocmask(SIG_SETMASK, &none, NULL);
    uint32_t error = (uint32_t)run(argv);
    ssize_t done = write(failed, &error, sizeof(error));
    _exit(done < 0 ? 126 : 127);
}

static void reap(pid_t main_pid) {
    int status;
    for (;;) {
        pid_t pid = waitpid(-1, &status, WNOHANG);
        if (pid == main_pid) {
            report(REPORT_ENDED, (uint32_t)status);
            _exit(WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status));
        }
        if (pid <= 0) {
            return;
        }
    }
}

_Noreturn void init_run(char **argv) {
    sigset_t all;
    int failed[2];
    uint32_t error = 0;
    close(INIT_PROGRAM_FD);
    fcntl(INIT_REPORT_FD, F_SETFD, FD_CLOEXEC);
    prctl(PR_SET_DUMPABLE, 0);
    sigfillset(&all);
    sigprocmask(SIG_SETMASK, &all, NULL);
    if (pipe2(failed, O_CLOEXEC) < 0) {
        report(REPORT_STARTED, (uint32_t)errno);
        _exit(126);
    }
    pid_t pid = fork();
    if (pid == 0) {
        child(argv, failed[1]);
    }
    error = pid < 0 ? (uint32_t)errno : 0;
    close(failed[1]);
    if (pid > 0 && read(failed[0], &error, sizeof(error)) != sizeof(error)) {
        error = 0; /* end of file: exec closed it */
    }
    close(failed[0]);
    report(REPORT_STARTED, error);
    if (error != 0) {
        _exit(error == ENOENT ? 127 : 126);
    }
    for (;;) {
        siginfo_t info;
        int signo = sigwaitinfo(&all, &info);
        if (signo == SIGCHLD) {
            reap(pid);
        } else if (signo > 0) {
            kill(pid, signo);
        }
    }
}
