/* connect(2), served. Inside the sandbox it is the kernel's, done by us on the caller's own socket, so that
 * what was checked is what is done. To the world: the caller's socket sends its SYN, which ends in the tun
 * device, and stays in SYN_SENT while the host dials; so poll, non-blocking callers, deadlines and signals
 * are what the kernel makes of them. When the host has the connection, our socket, which has the peer's
 * address, connects to the caller's: TCP's simultaneous open. When it has not, the caller's SYN is answered
 * as a network would, with a reset or ICMP.
 */
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <poll.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

#include "services.h"

union address {
    struct sockaddr any;
    struct sockaddr_in v4;
    struct sockaddr_in6 v6;
    struct sockaddr_storage room;
};

static int option(int fd, int name, int otherwise) {
    int value;
    socklen_t size = sizeof(value);
    return getsockopt(fd, SOL_SOCKET, name, &value, &size) < 0 ? otherwise : value;
}

/* False for what is no internet address. An IPv4 address mapped into IPv6 is the IPv4 address. */
static bool endpoint_of(const union address *address, socklen_t size, struct endpoint *to) {
    memset(to, 0, sizeof(*to));
    if (size >= sizeof(address->v4) && address->any.sa_family == AF_INET) {
        to->family = 4;
        to->port = ntohs(address->v4.sin_port);
        memcpy(to->address, &address->v4.sin_addr, 4);
        return true;
    }
    if (size < offsetof(struct sockaddr_in6, sin6_scope_id) || address->any.sa_family != AF_INET6) {
        return false;
    }
    bool mapped = IN6_IS_ADDR_V4MAPPED(&address->v6.sin6_addr);
    to->family = mapped ? 4 : 6;
    to->port = ntohs(address->v6.sin6_port);
    memcpy(to->address, (const uint8_t *)&address->v6.sin6_addr + (mapped ? 12 : 0), mapped ? 4 : 16);
    return true;
}

static bool own_endpoint(int fd, struct endpoint *to) {
    union address address;
    socklen_t size = sizeof(address);
    return getsockname(fd, &address.any, &size) == 0 && endpoint_of(&address, size, to);
}

/* As a non-blocking socket, for the moment of the call: we never block. */
static int start(int fd, const union address *address, socklen_t size, bool *blocking) {
    int flags = fcntl(fd, F_GETFL);
    *blocking = !(flags & O_NONBLOCK);
    if (*blocking) {
        fcntl(fd, F_SETFL, flags | O_NONBLOCK);
    }
    int error = connect(fd, &address->any, size) < 0 ? errno : 0;
    if (*blocking) {
        fcntl(fd, F_SETFL, flags);
    }
    return error;
}

static uint64_t patience_ms(int fd) {
    struct timeval limit = {0};
    socklen_t size = sizeof(limit);
    getsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &limit, &size);
    uint64_t ms = (uint64_t)limit.tv_sec * 1000 + (uint64_t)limit.tv_usec / 1000;
    return ms;
}

void connect_answer(struct flow *flow, int error) {
    if (flow->waiting && error) {
        call_error(&flow->call, error);
    } else if (flow->waiting) {
        call_value(&flow->call, 0);
    }
    flow->waiting = false;
}

static void wait_for(struct flow *flow, const struct call *call, bool blocking, uint64_t most_ms) {
    uint64_t ms = blocking ? patience_ms(flow->held) : 0;
    flow->impatient = ms > 0;
    flow->waiting = blocking;
    flow->call = *call;
    flow->deadline_ms = ms || most_ms ? now_ms() + (ms ? ms : most_ms) : 0;
    if (!blocking) {
        call_error(call, EINPROGRESS);
    }
}

static void local(struct agent *agent, const struct call *call, int held, const union address *address,
                  socklen_t size) {
    bool blocking;
    int error = start(held, address, size, &blocking);
    struct flow *flow = NULL;
    if ((error == EINPROGRESS || error == EALREADY) && blocking) {
        flow = flow_new(agent);
    }
    if (flow == NULL) {
        close(held);
        error ? call_error(call, error) : call_value(call, 0);
        return;
    }
    flow->state = FLOW_LOCAL;
    flow->held = held;
    wait_for(flow, call, true, 0);
    watch(agent, held, ROLE_FLOW, flow_slot(agent, flow), flow->generation, EPOLLOUT);
}

static bool ask_host(struct agent *agent, const struct flow *flow) {
    struct mux *mux = &agent->services->mux;
    uint8_t *at = mux_begin(mux, MUX_OPEN, flow->id, 8 + ENDPOINT_BYTES);
    if (at == NULL) {
        return false;
    }
    put_be32(at, (uint32_t)flow->call.thread);
    put_be32(at + 4, flow->call.number);
    put_endpoint(at + 8, &flow->theirs);
    mux_end(mux, 8 + ENDPOINT_BYTES);
    return true;
}

static int dial(struct agent *agent, const struct call *call, int held, const union address *address,
                socklen_t size, const struct endpoint *to) {
    bool blocking;
    if (!services_connected(agent)) {
        return ENETUNREACH;
    }
    struct flow *flow = flow_new(agent);
    if (flow == NULL) {
        return ENOBUFS;
    }
    int error = start(held, address, size, &blocking);
    if (error != EINPROGRESS) { /* it is connected, or about to be, or cannot be */
        flow_free(agent, flow);
        if (error == 0) {
            close(held);
            call_value(call, 0);
        } else if (error == EALREADY && blocking) {
            local(agent, call, held, address, size); /* waits for what began before */
            error = 0;
        }
        return error;
    }
    flow->theirs = *to;
    flow->call = *call;
    if (!own_endpoint(held, &flow->ours) || !ask_host(agent, flow)) {
        flow_free(agent, flow);
        return ENETDOWN;
    }
    flow->held = held;
    wait_for(flow, call, blocking, OPEN_DEADLINE_MS);
    return 0;
}

void connect_serve(struct agent *agent, const struct call *call) {
    union address address;
    struct endpoint to;
    int held = call_take_fd(call, (int)call->arguments[0]);
    if (held < 0) {
        call_error(call, errno);
        return;
    }
    int domain = option(held, SO_DOMAIN, -1);
    if (domain != AF_INET && domain != AF_INET6) { /* by the socket alone, before any memory is looked at */
        close(held);
        call_kernel(call);
        return;
    }
    socklen_t size = (socklen_t)call->arguments[2];
    memset(&address, 0, sizeof(address));
    int error = size > sizeof(address)                                 ? EINVAL
                : !call_read(call, call->arguments[1], &address, size) ? EFAULT
                                                                       : 0;
    if (error == 0) {
        bool world = option(held, SO_TYPE, 0) == SOCK_STREAM && endpoint_of(&address, size, &to) &&
                     !network_is_local(&to);
        if (!world) {
            local(agent, call, held, &address, size);
            return;
        }
        error = dial(agent, call, held, &address, size, &to);
    }
    if (error) {
        close(held);
        call_error(call, error);
    }
}

/* The caller's kernel has decided: of a connection of its own, or of the one that we joined. */
void connect_ready(struct agent *agent, struct flow *flow) {
    int error = option(flow->held, SO_ERROR, EIO);
    if (flow->waiting && error == 0) {
        union address again = {.any.sa_family = AF_INET};  /* the second call's is not looked at */
        connect(flow->held, &again.any, sizeof(again.v4)); /* takes note: the third would be EISCONN */
    }
    connect_answer(flow, error);
    if (flow->state == FLOW_LOCAL) {
        flow_free(agent, flow);
        return;
    }
    unwatch(agent, flow->held); /* the caller has it still: closing ours would not end that */
    close(flow->held);
    flow->held = -1;
    flow_settle(agent, flow);
}

void connect_late(struct agent *agent, struct flow *flow) {
    if (flow->waiting && flow->impatient) { /* SO_SNDTIMEO: the attempt goes on without its caller */
        connect_answer(flow, EINPROGRESS);
        flow->impatient = false;
        flow->deadline_ms = now_ms() + OPEN_DEADLINE_MS;
        if (flow->state == FLOW_LOCAL) {
            flow_free(agent, flow);
        }
    } else if (flow->failed) {
        flow_free(agent, flow);
    } else {
        connect_fail(agent, flow, ETIMEDOUT);
    }
}

void connect_fail(struct agent *agent, struct flow *flow, int error) {
    if (flow->waiting) {
        union address none = {.any.sa_family = AF_UNSPEC};
        connect(flow->held, &none.any, sizeof(none.any)); /* it may be used again, as after any failure */
        connect_answer(flow, error);
        flow_free(agent, flow);
        return;
    }
    if (!flow->sequence_known) {
        flow->failed = error; /* its SYN is on the way to us */
        flow->deadline_ms = now_ms() + OPEN_DEADLINE_MS;
        return;
    }
    datagram_refuse(agent, flow, error);
    flow_free(agent, flow);
}

void connect_opened(struct agent *agent, struct flow *flow, int error) {
    uint32_t mark = FLOW_MARK;
    if (error == 0 && setsockopt(flow->held, SOL_SOCKET, SO_MARK, &mark, sizeof(mark)) < 0) {
        error = errno;
    }
    if (error == 0) {
        flow->fd = flow_socket(&flow->theirs, &flow->ours);
        error = flow->fd < 0 ? errno : 0;
    }
    if (error) {
        connect_fail(agent, flow, error);
        return;
    }
    struct pollfd joined = {.fd = flow->held, .events = POLLOUT};
    flow->deadline_ms = 0;
    flow_opens(agent, flow);
    if (!flow->waiting || poll(&joined, 1, 0) > 0) { /* as a rule at once: all of it is in this kernel */
        connect_ready(agent, flow);
    } else {
        watch(agent, flow->held, ROLE_FLOW, flow_slot(agent, flow), flow->generation, EPOLLOUT);
    }
}
