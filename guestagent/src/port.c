/* The connection to the host: a virtio-serial port, or on a build machine a socket. Non-blocking.
 *
 * virtio_console (drivers/char/virtio_console.c): read gives 0 and write EAGAIN while the host's end is
 * closed; the wait queue is woken when it opens, closes, sends, or has taken what was written.
 */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "agent.h"
#include "services.h"

#define PORTS "/sys/class/virtio-ports"
enum { POLL_MS = 2 };

static bool has_name(const char *port, const char *wanted) {
    char path_buffer[128], name[64];
    struct text path;
    text_init(&path, path_buffer, sizeof(path_buffer));
    text_add(&path, PORTS "/");
    text_add(&path, port);
    text_add(&path, "/name");
    int fd = open(path.data, O_RDONLY | O_CLOEXEC);
    if (fd < 0) {
        return false;
    }
    ssize_t size = read(fd, name, sizeof(name));
    close(fd);
    return size > 0 && (size_t)size == strlen(wanted) + 1 && memcmp(name, wanted, (size_t)size - 1) == 0;
}

static int open_port(const char *wanted) {
    DIR *ports = opendir(PORTS);
    int fd = -1;
    struct dirent *entry;
    while (ports != NULL && fd < 0 && (entry = readdir(ports)) != NULL) {
        if (entry->d_name[0] != '.' && has_name(entry->d_name, wanted)) {
            char path_buffer[64];
            struct text path;
            text_init(&path, path_buffer, sizeof(path_buffer));
            text_add(&path, "/dev/");
            text_add(&path, entry->d_name);
            fd = open(path.data, O_RDWR | O_NONBLOCK | O_CLOEXEC);
        }
    }
    if (ports != NULL) {
        closedir(ports);
    }
    return fd;
}

int services_port(struct agent *agent) {
    if (agent->supervises) {
        return accept4(agent->services_listener_fd, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
    }
    return agent->in_guest ? open_port("sandloom.services") : agent->services_given_fd;
}

bool port_find(struct agent *agent, uint64_t deadline_ms) {
    uint64_t give_up = now_ms() + deadline_ms;
    while ((agent->port_fd = open_port("sandloom.agent")) < 0) {
        if (now_ms() > give_up) {
            return false;
        }
        nanosleep(&(struct timespec){.tv_nsec = POLL_MS * 1000000}, NULL);
    }
    return watch(agent, agent->port_fd, ROLE_PORT, 0, 0, EPOLLIN | EPOLLOUT | EPOLLET) == 0;
}

/* On a build machine: the next connection of a listening socket stands for the host opening the port again.
 */
static void accept_next(struct agent *agent) {
    if (agent->port_fd < 0 && agent->listener_fd >= 0) {
        agent->port_fd = accept4(agent->listener_fd, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
        if (agent->port_fd >= 0) {
            watch(agent, agent->port_fd, ROLE_PORT, 0, 0, EPOLLIN | EPOLLOUT | EPOLLET);
        }
    }
}

static void hung_up(struct agent *agent) {
    /* An answer that waits is kept: a port may have bytes of a host that the kernel does not show as
     * connected yet. What came half stays too; the next host's flush ends it. */
    if (agent->greeted) {
        session_end(agent);
    }
    if (!agent->in_guest) {
        close(agent->port_fd);
        agent->port_fd = -1;
        agent->peer_gone = agent->listener_fd < 0;
    }
}

/* The buffers are sized for the longest frame; pages that only such a one touched go back to the kernel. */
static void release(uint8_t *buffer, size_t used, size_t *peak, size_t size) {
    enum { KEEP = 16384 };
    *peak = used > *peak ? used : *peak;
    if (used <= KEEP && *peak > KEEP) {
        madvise(buffer + KEEP, size - KEEP, MADV_DONTNEED);
        *peak = used;
    }
}

static bool take_all(struct agent *agent) {
    const uint8_t *payload;
    size_t size;
    /* While there is no room for an answer nothing is asked of us: the host has to read first. */
    while (tx_used(&agent->tx) <= TX_BUSY_BYTES) {
        switch (rx_next(&agent->rx, &payload, &size)) {
        case RX_SYNC:
            session_begin(agent);
            break;
        case RX_FRAME:
            dispatch(agent, payload, size);
            break;
        default:
            return true;
        }
    }
    return false;
}

bool port_receive(struct agent *agent) {
    bool any = false;
    accept_next(agent);
    while (agent->port_fd >= 0) {
        if (!take_all(agent)) {
            return any;
        }
        size_t room;
        uint8_t *at = rx_space(&agent->rx, &room);
        ssize_t size = read(agent->port_fd, at, room);
        if (size > 0) {
            rx_add(&agent->rx, (size_t)size);
            agent->rx_peak = agent->rx.end > agent->rx_peak ? agent->rx.end : agent->rx_peak;
            any = true;
        } else if (size < 0 && errno == EINTR) {
            continue;
        } else {
            if (size == 0 || (errno != EAGAIN && errno != EWOULDBLOCK)) {
                hung_up(agent);
            }
            break;
        }
    }
    release(agent->rx.buffer, agent->rx.end, &agent->rx_peak, RX_BYTES);
    return any;
}

bool port_send(struct agent *agent) {
    bool any = false;
    size_t size;
    for (const uint8_t *at; agent->port_fd >= 0 && (at = tx_pending(&agent->tx, &size), size > 0);) {
        agent->tx_peak = agent->tx.end > agent->tx_peak ? agent->tx.end : agent->tx_peak;
        ssize_t done = write(agent->port_fd, at, size);
        if (done > 0) {
            tx_written(&agent->tx, (size_t)done);
            any = true;
        } else if (done < 0 && errno == EINTR) {
            continue;
        } else {
            if (errno != EAGAIN && errno != EWOULDBLOCK) {
                hung_up(agent); /* only a socket says so */
            }
            break; /* full, or nobody there: an edge tells when that changes */
        }
    }
    release(agent->tx.buffer, agent->tx.end, &agent->tx_peak, TX_BYTES);
    return any;
}
