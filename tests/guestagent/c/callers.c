/* Callers under a filter whose supervisor will be killed:
 *
 *     callers NOTIFY_SOCKET THREADS ADDRESS PORT...
 *
 * Installs the filter of `sockets: tool`, takes its listener to NOTIFY_SOCKET as an OCI runtime does, and has
 * each thread connect to one of the ports after the other, over and over, blocking and not, until a connect
 * says ENOSYS. Prints "ready" once every thread has begun, and then, when all are done, the nanoseconds
 * (CLOCK_MONOTONIC) at which the last thread heard it, and how many connects there were. A thread that never
 * hears it hangs, and so does this.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/seccomp.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include "policy.h"

enum { MOST_THREADS = 64 };

static struct in_addr address;
static int ports, *port_of;
static atomic_long connects, last_ns, begun;

static int install(void) {
    struct policy policy = {.who = {[SERVICE_SOCKETS] = ANSWER_TOOL}};
    struct sock_filter code[FILTER_MOST];
    struct sock_fprog program = {.filter = code};
    program.len = (unsigned short)filter_build(&policy, code, FILTER_MOST);
    prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
    return (int)syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_NEW_LISTENER, &program);
}

/* `fd` is connected already: under the filter nothing of this program's connects by itself. */
static int hand_over(int fd, int listener) {
    char room[CMSG_SPACE(sizeof(int))] = {0};
    struct iovec text = {"{}", 2};
    struct msghdr message = {
        .msg_iov = &text, .msg_iovlen = 1, .msg_control = room, .msg_controllen = sizeof(room)};
    struct cmsghdr *head = CMSG_FIRSTHDR(&message);
    head->cmsg_level = SOL_SOCKET;
    head->cmsg_type = SCM_RIGHTS;
    head->cmsg_len = CMSG_LEN(sizeof(int));
    memcpy(CMSG_DATA(head), &listener, sizeof(int));
    return sendmsg(fd, &message, 0) == 2 ? 0 : -1;
}

static void *call(void *arg) {
    long round = (long)arg;
    atomic_fetch_add(&begun, 1);
    for (;; round++) {
        struct sockaddr_in to = {.sin_family = AF_INET, .sin_addr = address};
        to.sin_port = htons((uint16_t)port_of[round % ports]);
        int fd = socket(AF_INET, SOCK_STREAM | (round % 3 == 0 ? SOCK_NONBLOCK : 0), 0);
        int error = connect(fd, (struct sockaddr *)&to, sizeof(to)) < 0 ? errno : 0;
        close(fd);
        atomic_fetch_add(&connects, 1);
        if (error == ENOSYS) {
            struct timespec now;
            clock_gettime(CLOCK_MONOTONIC, &now);
            long ns = now.tv_sec * 1000000000L + now.tv_nsec, before = atomic_load(&last_ns);
            while (before < ns && !atomic_compare_exchange_weak(&last_ns, &before, ns)) {
            }
            return NULL;
        }
    }
}

int main(int argc, char **argv) {
    int threads = argc > 4 ? atoi(argv[2]) : 0;
    pthread_t ids[MOST_THREADS];
    struct sockaddr_un path = {.sun_family = AF_UNIX};
    if (threads < 1 || threads > MOST_THREADS || inet_aton(argv[3], &address) == 0) {
        return 2;
    }
    ports = argc - 4;
    port_of = calloc((size_t)ports, sizeof(*port_of));
    for (int i = 0; i < ports; i++) {
        port_of[i] = atoi(argv[4 + i]);
    }
    strncpy(path.sun_path, argv[1], sizeof(path.sun_path) - 1);
    int fd = socket(AF_UNIX, SOCK_STREAM, 0);
    if (connect(fd, (struct sockaddr *)&path, sizeof(path)) < 0) {
        perror("notify socket");
        return 2;
    }
    int listener = install();
    if (listener < 0 || hand_over(fd, listener) < 0) {
        perror("filter");
        return 2;
    }
    close(listener);
    close(fd);
    for (long i = 0; i < threads; i++) {
        pthread_create(&ids[i], NULL, call, (void *)i);
    }
    while (atomic_load(&begun) < threads) {
        usleep(1000);
    }
    puts("ready");
    fflush(stdout);
    for (int i = 0; i < threads; i++) {
        pthread_join(ids[i], NULL);
    }
    printf("%ld %ld\n", atomic_load(&last_ns), atomic_load(&connects));
    return 0;
}
