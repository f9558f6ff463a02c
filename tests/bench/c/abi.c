/* What a system call costs under the services' filter: `abi WHAT COUNT` prints nanoseconds a call, the median
 * of BATCHES pieces, so that a busy neighbour does not decide.
 *
 *     call        getppid(2), the least a call can be, as it is here
 *     filtered    the same under the filter of `sockets: tool`, which lets it pass
 *     read        pread(2) of 4 KiB of a file in the page cache, as it is here
 *     read-filtered  the same under that filter
 *     connect     connect(2) on no descriptor, as it is here
 *     served      the same, notified, and answered by another process
 *     served-apart likewise, with caller and answerer on CPUs of their own, where an idle kernel wakes them;
 * exit 4 with one CPU served-sync likewise, woken synchronously on the same CPU (Linux 6.6); exit 3 where the
 * kernel has it not
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/seccomp.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "policy.h"

#ifndef SECCOMP_IOCTL_NOTIF_SET_FLAGS
#define SECCOMP_IOCTL_NOTIF_SET_FLAGS SECCOMP_IOW(4, uint64_t)
#define SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP (1UL << 0)
#endif

static double now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec * 1e9 + (double)now.tv_nsec;
}

enum { BATCHES = 101 };

static int by_value(const void *one, const void *other) {
    double a = *(const double *)one, b = *(const double *)other;
    return (a > b) - (a < b);
}

static void measure(long number, long descriptor, long count) {
    static char data[4096];
    static double took[BATCHES];
    long each = count / BATCHES + 1;
    for (int batch = 0; batch < BATCHES; batch++) {
        double begin = now_ns();
        for (long i = 0; i < each; i++) {
            syscall(number, descriptor, data, sizeof(data), 0);
        }
        took[batch] = (now_ns() - begin) / (double)each;
    }
    qsort(took, BATCHES, sizeof(took[0]), by_value);
    printf("%.1f\n", took[BATCHES / 2]);
    fflush(stdout);
}

static int install(void) {
    struct policy policy = {.who = {[SERVICE_SOCKETS] = ANSWER_TOOL}};
    struct sock_filter code[FILTER_MOST];
    struct sock_fprog program = {.filter = code};
    program.len = (unsigned short)filter_build(&policy, code, FILTER_MOST);
    prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
    return (int)syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_NEW_LISTENER, &program);
}

static void answer(int listener) {
    struct seccomp_notif asked;
    for (;;) {
        memset(&asked, 0, sizeof(asked));
        if (ioctl(listener, SECCOMP_IOCTL_NOTIF_RECV, &asked) < 0) {
            return; /* nobody is under the filter any more */
        }
        struct seccomp_notif_resp said = {.id = asked.id, .error = -EBADF};
        ioctl(listener, SECCOMP_IOCTL_NOTIF_SEND, &said);
    }
}

static void stay_on(int cpu) {
    cpu_set_t only;
    CPU_ZERO(&only);
    CPU_SET(cpu, &only);
    sched_setaffinity(0, sizeof(only), &only);
}

/* The caller hands its listener over by being a child that shares the table of descriptors until then. */
static int served(const char *how, long count) {
    bool synchronous = strcmp(how, "served-sync") == 0, apart = strcmp(how, "served-apart") == 0;
    int pair[2], listener = -1;
    if (apart && sysconf(_SC_NPROCESSORS_ONLN) < 2) {
        return 4;
    }
    if (socketpair(AF_UNIX, SOCK_SEQPACKET, 0, pair) < 0) {
        return 2;
    }
    pid_t caller = fork();
    if (apart) {
        stay_on(caller == 0 ? 0 : 1);
    }
    if (caller == 0) {
        listener = install();
        char go;
        if (write(pair[1], &listener, sizeof(listener)) < 0 || read(pair[1], &go, 1) != 1) {
            _exit(2);
        }
        close(listener);
        measure(SYS_connect, -1, count);
        _exit(0);
    }
    if (read(pair[0], &listener, sizeof(listener)) != sizeof(listener) || listener < 0) {
        return 2;
    }
    int process = (int)syscall(SYS_pidfd_open, caller, 0);
    listener = (int)syscall(SYS_pidfd_getfd, process, listener, 0);
    if (synchronous &&
        ioctl(listener, SECCOMP_IOCTL_NOTIF_SET_FLAGS, SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP) < 0) {
        kill(caller, SIGKILL);
        return 3;
    }
    if (write(pair[0], "g", 1) != 1) {
        return 2;
    }
    answer(listener);
    int status = 0;
    waitpid(caller, &status, 0);
    return WEXITSTATUS(status);
}

int main(int argc, char **argv) {
    long count = argc == 3 ? strtol(argv[2], NULL, 10) : 0;
    if (count <= 0) {
        return 2;
    }
    if (strcmp(argv[1], "call") == 0) {
        measure(SYS_getppid, -1, count);
    } else if (strcmp(argv[1], "connect") == 0) {
        measure(SYS_connect, -1, count);
    } else if (strcmp(argv[1], "filtered") == 0 && install() >= 0) {
        measure(SYS_getppid, -1, count);
    } else if (strcmp(argv[1], "read") == 0) {
        measure(SYS_pread64, open("/proc/self/exe", O_RDONLY), count);
    } else if (strcmp(argv[1], "read-filtered") == 0 && install() >= 0) {
        measure(SYS_pread64, open("/proc/self/exe", O_RDONLY), count);
    } else if (strncmp(argv[1], "served", 6) == 0) {
        return served(argv[1], count);
    } else {
        return 2;
    }
    return 0;
}
