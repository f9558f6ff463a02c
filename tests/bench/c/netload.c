/* Network work in a guest, ordered over the network that it measures:
 *
 *     netload ADDRESS PORT     connects there, and does what each line asks for until the connection ends
 *     (as process 1)           first loads /mod and sets the card's address for QEMU's user network, then so
 *
 * Lines, and what is answered: seconds, as a decimal.
 *
 *     up BYTES PORT            connects, sends so many, ends its half, and waits for the other half's end
 *     down BYTES PORT          connects, sends the number as a line, and reads to the end
 *     ping COUNT PORT          connects and has a byte come back, COUNT times; the median, not the sum
 *     rate COUNT PORT          connects, waits for the end and closes, COUNT times
 */
#include <arpa/inet.h>
#include <fcntl.h>
#include <net/if.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { PIECE = 65536, MOST_PINGS = 100000 };

static struct sockaddr_in host = {.sin_family = AF_INET};
static char piece[PIECE];
static double took[MOST_PINGS];

static double now(void) {
    struct timespec at;
    clock_gettime(CLOCK_MONOTONIC, &at);
    return (double)at.tv_sec + (double)at.tv_nsec / 1e9;
}

static int dial(int port) {
    struct sockaddr_in to = host;
    int fd = socket(AF_INET, SOCK_STREAM, 0), on = 1;
    to.sin_port = htons((uint16_t)port);
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
    if (fd < 0 || connect(fd, (struct sockaddr *)&to, sizeof(to)) < 0) {
        perror("connect");
        exit(1);
    }
    return fd;
}

static void to_end(int fd) {
    while (read(fd, piece, sizeof(piece)) > 0) {
    }
    close(fd);
}

static int by_value(const void *one, const void *other) {
    double a = *(const double *)one, b = *(const double *)other;
    return (a > b) - (a < b);
}

static double up(long bytes, int port) {
    int fd = dial(port);
    double begin = now();
    while (bytes > 0) {
        ssize_t done = write(fd, piece, bytes < PIECE ? (size_t)bytes : PIECE);
        if (done <= 0) {
            exit(1);
        }
        bytes -= done;
    }
    shutdown(fd, SHUT_WR);
    to_end(fd);
    return now() - begin;
}

static double down(long bytes, int port) {
    int fd = dial(port);
    double begin = now();
    dprintf(fd, "%ld\n", bytes);
    to_end(fd);
    return now() - begin;
}

static double ping(long count, int port) {
    int fd = dial(port);
    char byte = 1;
    count = count < MOST_PINGS ? count : MOST_PINGS;
    for (long i = 0; i < count; i++) {
        double begin = now();
        if (write(fd, &byte, 1) != 1 || read(fd, &byte, 1) != 1) {
            exit(1);
        }
        took[i] = now() - begin;
    }
    close(fd);
    qsort(took, (size_t)count, sizeof(took[0]), by_value);
    return took[count / 2];
}

static double rate(long count, int port) {
    double begin = now();
    for (long i = 0; i < count; i++) {
        to_end(dial(port));
    }
    return now() - begin;
}

/* Process 1 of a guest with a card on QEMU's user network, whose host is 10.0.2.2. */
static void boot(void) {
    char name[96], path[128];
    mount("none", "/proc", "proc", 0, NULL);
    FILE *order = fopen("/mod/order", "r");
    while (order != NULL && fscanf(order, "%95s", name) == 1) {
        snprintf(path, sizeof(path), "/mod/%s", name);
        int fd = open(path, O_RDONLY);
        syscall(SYS_finit_module, fd, "", 0);
        close(fd);
    }
    int control = socket(AF_INET, SOCK_DGRAM, 0);
    struct ifreq request = {.ifr_name = "eth0"};
    struct sockaddr_in *address = (struct sockaddr_in *)&request.ifr_addr;
    address->sin_family = AF_INET;
    inet_aton("10.0.2.15", &address->sin_addr);
    while (ioctl(control, SIOCSIFADDR, &request) < 0) {
        usleep(10000);
    }
    inet_aton("255.255.255.0", &address->sin_addr);
    ioctl(control, SIOCSIFNETMASK, &request);
    request.ifr_flags = IFF_UP | IFF_RUNNING;
    ioctl(control, SIOCSIFFLAGS, &request);
    close(control);
}

int main(int argc, char **argv) {
    char line[128], what[16];
    long count;
    int port;
    if (argc != 3) {
        return 2;
    }
    if (getpid() == 1) {
        boot();
    }
    inet_aton(argv[1], &host.sin_addr);
    int fd = dial(atoi(argv[2]));
    FILE *orders = fdopen(fd, "r");
    while (fgets(line, sizeof(line), orders) != NULL &&
           sscanf(line, "%15s %ld %d", what, &count, &port) == 3) {
        double seconds = strcmp(what, "up") == 0     ? up(count, port)
                         : strcmp(what, "down") == 0 ? down(count, port)
                         : strcmp(what, "ping") == 0 ? ping(count, port)
                                                     : rate(count, port);
        dprintf(fd, "%.9f\n", seconds);
    }
    if (getpid() == 1) {
        reboot(RB_POWER_OFF);
    }
    return 0;
}
