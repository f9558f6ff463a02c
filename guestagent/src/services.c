/* SERVICES and the port beside the agent's own: one session a host, which begins with SERVICES' nonce. */
#include "services.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { FRAMES_AT_ONCE = 256 };

static void *pages(size_t size) {
    void *made = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return made == MAP_FAILED ? NULL : made;
}

/* Memory that nobody touches costs nothing. */
bool services_open(struct agent *agent) {
    struct services *services = agent->services = pages(sizeof(*services));
    if (services == NULL) {
        return false;
    }
    services->mux.rx = pages(MUX_RX_BYTES);
    services->mux.tx = pages(MUX_TX_BYTES);
    services->flows = pages(MAX_FLOWS * sizeof(*services->flows));
    services->port_fd = services->tun_fd = -1;
    for (uint32_t slot = 0; slot < MAX_LISTENERS; slot++) {
        services->listeners[slot].fd = -1;
    }
    return viewing_open(agent) && services->mux.rx != NULL && services->mux.tx != NULL &&
           services->flows != NULL;
}

bool services_connected(const struct agent *agent) {
    return agent->services->heard;
}

/* Every connection ends with its session: nobody is left who could go on with it. */
static void end_flows(struct agent *agent) {
    for (uint32_t slot = 0; slot < MAX_FLOWS; slot++) {
        struct flow *flow = &agent->services->flows[slot];
        if (slot == agent->services->flow_end && slot < HOST_FLOWS) {
            slot = HOST_FLOWS - 1;
        } else if (flow->state == FLOW_DIALING) {
            connect_fail(agent, flow, ECONNABORTED);
        } else if (flow->state == FLOW_OPEN || flow->state == FLOW_JOINING) {
            flow_abort(agent, flow);
        }
    }
}

void services_hung_up(struct agent *agent) {
    struct services *services = agent->services;
    if (services->heard || services->mux.overflow) {
        services->heard = false;
        end_flows(agent);
        mux_begin_session(&services->mux, services->mux.nonce);
        services->mux.tx_end = 0; /* the next SERVICES says with which nonce it goes on */
        services->stalled = false;
    }
}

static int open_port(struct agent *agent) {
    struct services *services = agent->services;
    if (services->port_fd < 0 || agent->supervises) {
        int port = services_port(agent);
        if (port < 0 && services->port_fd < 0) {
            return because(agent, ENODEV, "the host is not at the port ", "sandloom.services");
        }
        if (port >= 0 && services->port_fd >= 0) {
            close(services->port_fd); /* a former host's; epoll forgets it, too */
        }
        if (port >= 0) {
            services->port_fd = port;
            services->port_blocked = false;
            watch(agent, port, ROLE_SERVICES, 0, 0, EPOLLIN | EPOLLET);
        }
    }
    return 0;
}

int services_begin(struct agent *agent, const struct message *message) {
    struct services *services = agent->services;
    const struct services_wanted *wanted = &message->of.services;
    struct policy policy;
    memcpy(policy.who, wanted->who, sizeof(policy.who));
    if (!agent->configured) {
        return because(agent, EAGAIN, "CONFIGURE comes first", "");
    }
    if (services->used && memcmp(&policy, &services->policy, sizeof(policy)) != 0) {
        return because(agent, EBUSY, "processes run under another policy already", "");
    }
    int error = policy_filters(&policy) ? open_port(agent) : 0;
    if (error == 0 && policy.who[SERVICE_SOCKETS] == ANSWER_TOOL && services->tun_fd < 0) {
        error = network_up(agent);
    }
    if (error == 0 && policy.who[SERVICE_DNS] == ANSWER_TOOL && !services->configured && agent->in_guest) {
        error = identity_resolver(agent);
    }
    if (error == 0 && policy.who[SERVICE_SYSVIEW] != ANSWER_KERNEL) {
        error = viewing_begin(agent, policy.who[SERVICE_SYSVIEW] == ANSWER_DENY);
    }
    if (error) {
        return error;
    }
    services->policy = policy;
    services->configured = true;
    services->heard = true; /* so that what an earlier host left is ended */
    services_hung_up(agent);
    mux_begin_session(&services->mux, (const uint8_t *)wanted->nonce.data);
    services->port_readable = services->port_fd >= 0;
    return 0;
}

static void take(struct agent *agent, const struct mux_frame *frame) {
    struct endpoint from;
    struct flow *flow = frame->type == MUX_INCOMING ? NULL : flow_find(agent, frame->id);
    if (frame->type == MUX_DATAGRAM) {
        datagram_take(agent, frame);
    } else if (frame->type == MUX_INCOMING && frame->size == 4 + ENDPOINT_BYTES &&
               get_endpoint(frame->data + 4, &from) && (flow = flow_of_host(agent, frame->id)) != NULL) {
        flow->theirs = from;
        flow->ours = from.family == 4 ? SANDBOX_V4 : SANDBOX_V6;
        flow->ours.port = get_be16(frame->data);
        flow->fd = flow_socket(&flow->theirs, &flow->ours);
        if (flow->fd < 0) {
            flow_joined(agent, flow, errno);
        } else {
            flow_opens(agent, flow);
        }
    } else if (flow != NULL && frame->type == MUX_OPENED) {
        if (flow->state == FLOW_DIALING && !flow->failed && frame->size == 4) {
            connect_opened(agent, flow, (int)(get_be32(frame->data) & 0xfff));
        }
    } else if (flow != NULL && flow->state == FLOW_DIALING) {
        connect_fail(agent, flow, ECONNREFUSED); /* RESET: the host gave up */
    } else if (flow != NULL) {
        flow_take(agent, flow, frame);
    } /* else it ended a moment ago, as the host will hear */
}

static bool take_all(struct agent *agent) {
    struct services *services = agent->services;
    struct mux_frame frame;
    for (int i = 0; i < FRAMES_AT_ONCE; i++) {
        enum mux_event event = mux_next(&services->mux, &frame);
        services->heard = services->heard || !services->mux.hunting;
        if (event == MUX_MORE) {
            return true;
        }
        if (event == MUX_BROKEN) {
            log_line("a broken frame on the services port", "", 0);
            services_hung_up(agent);
            return true;
        }
        take(agent, &frame);
    }
    return false;
}

static bool receive(struct agent *agent) {
    struct services *services = agent->services;
    bool any = false;
    while (services->port_readable) {
        if (!take_all(agent)) {
            return true; /* what came is answered before more is read */
        }
        size_t room;
        uint8_t *at = mux_space(&services->mux, &room);
        ssize_t size = read(services->port_fd, at, room);
        if (size > 0) {
            mux_add(&services->mux, (size_t)size);
            any = true;
        } else if (size == 0 || errno != EINTR) {
            services->port_readable = false;
            if (size == 0 || errno != EAGAIN) {
                services_hung_up(agent);
            }
        }
    }
    return any;
}

static bool deliver(struct agent *agent) {
    struct services *services = agent->services;
    bool any = false;
    size_t size;
    for (const uint8_t *at; !services->port_blocked && (at = mux_pending(&services->mux, &size), size > 0);) {
        ssize_t done = write(services->port_fd, at, size);
        if (done > 0) {
            mux_written(&services->mux, (size_t)done);
            any = true;
        } else if (done == 0 || errno != EINTR) {
            struct epoll_event event = {.events = EPOLLIN | EPOLLOUT | EPOLLET, .data.u64 = ROLE_SERVICES};
            services->port_blocked = true;
            epoll_ctl(agent->epoll_fd, EPOLL_CTL_MOD, services->port_fd, &event);
        }
    }
    if (services->stalled && mux_open(&services->mux)) {
        services->stalled = false;
        for (uint32_t slot = 0; slot < MAX_FLOWS; slot++) {
            if (services->flows[slot].state == FLOW_OPEN) {
                flow_settle(agent, &services->flows[slot]);
            } else if (slot == services->flow_end && slot < HOST_FLOWS) {
                slot = HOST_FLOWS - 1;
            }
        }
    }
    return any;
}

void services_port_ready(struct agent *agent, uint32_t events) {
    struct services *services = agent->services;
    services->port_readable = services->port_readable || (events & (EPOLLIN | EPOLLHUP)) != 0;
    if (services->port_blocked && (events & (EPOLLOUT | EPOLLHUP)) != 0) {
        struct epoll_event event = {.events = EPOLLIN | EPOLLET, .data.u64 = ROLE_SERVICES};
        services->port_blocked = false;
        epoll_ctl(agent->epoll_fd, EPOLL_CTL_MOD, services->port_fd, &event);
    }
}

bool services_move(struct agent *agent) {
    if (agent->services->port_fd < 0) {
        return false;
    }
    bool moved = receive(agent);
    moved = deliver(agent) || moved;
    if (agent->services->mux.overflow) {
        log_line("the host does not read the services port", "", 0);
        services_hung_up(agent);
    }
    return moved;
}

void services_refused(struct agent *agent, const struct call *call, enum service service) {
    struct mux *mux = &agent->services->mux;
    if (!services_connected(agent) || !mux_open(mux)) {
        return; /* it is counted all the same */
    }
    uint8_t *at = mux_begin(mux, MUX_REFUSED, 0, 20);
    if (at != NULL) {
        put_be32(at, (uint32_t)service);
        put_be32(at + 4, (uint32_t)call->thread);
        put_be32(at + 8, call->number);
        put_be32(at + 12, (uint32_t)(call->arguments[0] >> 32));
        put_be32(at + 16, (uint32_t)call->arguments[0]);
        mux_end(mux, 20);
    }
}

void services_caller_gone(struct agent *agent, int listener) {
    for (uint32_t slot = 0; slot < agent->services->flow_end; slot++) {
        struct flow *flow = &agent->services->flows[slot];
        if (flow->waiting && flow->call.listener == listener) {
            flow->waiting = false;
        }
    }
}

uint64_t services_deadlines(struct agent *agent, uint64_t now) {
    uint64_t next = UINT64_MAX;
    for (uint32_t slot = 0; slot < agent->services->flow_end; slot++) {
        struct flow *flow = &agent->services->flows[slot];
        if (flow->state == FLOW_FREE || flow->deadline_ms == 0) {
            continue;
        }
        if (flow->deadline_ms <= now) {
            connect_late(agent, flow);
        } else if (flow->deadline_ms < next) {
            next = flow->deadline_ms;
        }
    }
    return next;
}
