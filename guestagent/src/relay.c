/* Connections between a socket of the sandbox and the host. `fd` is our end: its peer is the sandbox's own
 * socket, so half-close, reset and backpressure are the kernel's. To the host a flow is frames with credit:
 * each side sends at most WINDOW_FLOW_BYTES that the other has not consumed.
 */
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "services.h"

enum { TELL_BYTES = WINDOW_FLOW_BYTES / 4 };

uint32_t flow_slot(const struct agent *agent, const struct flow *flow) {
    return (uint32_t)(flow - agent->services->flows);
}

static void set_up(struct agent *agent, struct flow *flow, enum flow_state state, uint32_t id) {
    memset(flow, 0, sizeof(*flow));
    flow->state = state;
    flow->id = id;
    flow->generation = ++agent->generation;
    flow->fd = flow->held = -1;
    flow->credit = WINDOW_FLOW_BYTES;
}

struct flow *flow_new(struct agent *agent) {
    struct services *services = agent->services;
    for (uint32_t slot = 0; slot < HOST_FLOWS; slot++) {
        if (services->flows[slot].state == FLOW_FREE) {
            services->flow_end = slot >= services->flow_end ? slot + 1 : services->flow_end;
            set_up(agent, &services->flows[slot], FLOW_DIALING, ++services->serial << 12 | slot);
            return &services->flows[slot];
        }
    }
    return NULL;
}

struct flow *flow_of_host(struct agent *agent, uint32_t id) {
    struct flow *flow = &agent->services->flows[id % MAX_FLOWS];
    if (id % MAX_FLOWS < HOST_FLOWS || flow->state != FLOW_FREE) {
        return NULL;
    }
    set_up(agent, flow, FLOW_JOINING, id);
    return flow;
}

struct flow *flow_find(struct agent *agent, uint32_t id) {
    struct flow *flow = &agent->services->flows[id % MAX_FLOWS];
    return flow->state != FLOW_FREE && flow->id == id ? flow : NULL;
}

void flow_say(struct agent *agent, struct flow *flow, enum mux_type type) {
    if (mux_begin(&agent->services->mux, type, flow->id, 0) != NULL) {
        mux_end(&agent->services->mux, 0);
    }
}

void flow_free(struct agent *agent, struct flow *flow) {
    struct services *services = agent->services;
    if (flow->fd >= 0) {
        close(flow->fd); /* nobody else has it: epoll forgets it, too */
    }
    if (flow->held >= 0) {
        unwatch(agent, flow->held);
        close(flow->held);
    }
    if (flow->ring != NULL) {
        munmap(flow->ring, WINDOW_FLOW_BYTES);
    }
    flow->state = FLOW_FREE;
    flow->generation = 0;
    while (services->flow_end > 0 && services->flows[services->flow_end - 1].state == FLOW_FREE) {
        services->flow_end--;
    }
}

static void reset_end(struct flow *flow) {
    struct linger now = {.l_onoff = 1};
    setsockopt(flow->fd, SOL_SOCKET, SO_LINGER, &now, sizeof(now));
}

void flow_abort(struct agent *agent, struct flow *flow) {
    flow_say(agent, flow, MUX_RESET);
    if (flow->fd >= 0) {
        reset_end(flow);
    }
    connect_answer(flow, ECONNRESET);
    flow_free(agent, flow);
}

static void set_events(struct agent *agent, struct flow *flow, uint32_t events) {
    struct epoll_event event = {.events = events};
    if (events == flow->watched) {
        return;
    }
    event.data.u64 = (uint64_t)flow->generation << 32 | flow_slot(agent, flow) << 8 | ROLE_FLOW;
    /* Not only without events: EPOLLHUP cannot be masked. */
    int how = events == 0 ? EPOLL_CTL_DEL : flow->watched == 0 ? EPOLL_CTL_ADD : EPOLL_CTL_MOD;
    epoll_ctl(agent->epoll_fd, how, flow->fd, &event);
    flow->watched = events;
}

void flow_opens(struct agent *agent, struct flow *flow) {
    bool joining = flow->state == FLOW_JOINING;
    flow->watched = joining ? EPOLLOUT : EPOLLIN;
    flow->state = joining ? FLOW_JOINING : FLOW_OPEN;
    watch(agent, flow->fd, ROLE_FLOW, flow_slot(agent, flow), flow->generation, flow->watched);
}

/* The sandbox's listener took the host's client, or did not. */
void flow_joined(struct agent *agent, struct flow *flow, int error) {
    uint8_t *at = mux_begin(&agent->services->mux, MUX_OPENED, flow->id, 4);
    if (at != NULL) {
        put_be32(at, (uint32_t)error);
        mux_end(&agent->services->mux, 4);
    }
    if (error) {
        flow_free(agent, flow);
        return;
    }
    flow->state = FLOW_OPEN;
    flow_settle(agent, flow);
}

/* What may happen to it next: at an end, told to the host; else watched as there is room. */
void flow_settle(struct agent *agent, struct flow *flow) {
    if (flow->end_came && flow->kept == 0 && !flow->end_done) {
        shutdown(flow->fd, SHUT_WR);
        flow->end_done = true;
    }
    if (flow->end_done && flow->end_sent) {
        flow_free(agent, flow);
        return;
    }
    bool room = mux_open(&agent->services->mux);
    bool more = !flow->end_sent && flow->credit > 0;
    agent->services->stalled = agent->services->stalled || (more && !room);
    set_events(agent, flow, (more && room ? EPOLLIN : 0u) | (flow->kept > 0 ? EPOLLOUT : 0u));
}

/* What the sandbox said goes to the host, straight from the socket into the frame. False: it is reset. */
static bool forward(struct agent *agent, struct flow *flow) {
    struct mux *mux = &agent->services->mux;
    while (flow->credit > 0 && !flow->end_sent && mux_open(mux)) {
        size_t most = flow->credit < CHUNK_BYTES ? flow->credit : CHUNK_BYTES;
        uint8_t *at = mux_begin(mux, MUX_DATA, flow->id, most);
        ssize_t size = at == NULL ? -1 : read(flow->fd, at, most);
        if (size > 0) {
            mux_end(mux, (size_t)size);
            flow->credit -= (uint32_t)size;
            if ((size_t)size < most) {
                return true;
            }
            continue;
        }
        int error = errno;
        mux_drop(mux);
        if (size == 0) {
            flow->end_sent = true;
            flow_say(agent, flow, MUX_EOF);
        } else {
            return error == EAGAIN || error == EINTR;
        }
    }
    return true;
}

static void consumed(struct agent *agent, struct flow *flow, size_t size) {
    flow->owed += (uint32_t)size;
    if (flow->owed < TELL_BYTES) {
        return;
    }
    uint8_t *at = mux_begin(&agent->services->mux, MUX_CREDIT, flow->id, 4);
    if (at != NULL) {
        put_be32(at, flow->owed);
        mux_end(&agent->services->mux, 4);
        flow->owed = 0;
    }
}

static ssize_t give(struct flow *flow, const uint8_t *data, size_t size) {
    ssize_t done = send(flow->fd, data, size, MSG_NOSIGNAL);
    return done < 0 && (errno == EAGAIN || errno == EINTR) ? 0 : done;
}

/* What was kept for the sandbox. False: it is reset. */
static bool drain(struct agent *agent, struct flow *flow) {
    while (flow->kept > 0) {
        size_t piece = WINDOW_FLOW_BYTES - flow->head;
        ssize_t done = give(flow, flow->ring + flow->head, piece < flow->kept ? piece : flow->kept);
        if (done <= 0) {
            return done == 0;
        }
        flow->head = (flow->head + (uint32_t)done) % WINDOW_FLOW_BYTES;
        flow->kept -= (uint32_t)done;
        consumed(agent, flow, (size_t)done);
    }
    if (flow->ring != NULL) {
        munmap(flow->ring, WINDOW_FLOW_BYTES);
        flow->ring = NULL;
        flow->head = 0;
    }
    return true;
}

static bool keep(struct flow *flow, const uint8_t *data, size_t size) {
    if (flow->ring == NULL) {
        void *ring =
            mmap(NULL, WINDOW_FLOW_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        flow->ring = ring == MAP_FAILED ? NULL : ring;
    }
    if (flow->ring == NULL || size > WINDOW_FLOW_BYTES - flow->kept) {
        return false; /* the host went beyond its window */
    }
    uint32_t tail = (flow->head + flow->kept) % WINDOW_FLOW_BYTES;
    size_t first = size < WINDOW_FLOW_BYTES - tail ? size : WINDOW_FLOW_BYTES - tail;
    memcpy(flow->ring + tail, data, first);
    memcpy(flow->ring, data + first, size - first);
    flow->kept += (uint32_t)size;
    return true;
}

static bool take_data(struct agent *agent, struct flow *flow, const struct mux_frame *frame) {
    size_t done = 0;
    if (flow->end_came) {
        return false;
    }
    if (flow->kept == 0) {
        ssize_t given = give(flow, frame->data, frame->size);
        if (given < 0) {
            return false;
        }
        done = (size_t)given;
        consumed(agent, flow, done);
    }
    return done == frame->size || keep(flow, frame->data + done, frame->size - done);
}

void flow_take(struct agent *agent, struct flow *flow, const struct mux_frame *frame) {
    bool fine = flow->state == FLOW_OPEN;
    if (frame->type == MUX_RESET) {
        if (flow->fd >= 0) {
            reset_end(flow);
        }
        connect_answer(flow, ECONNRESET);
        flow_free(agent, flow);
        return;
    }
    if (fine && frame->type == MUX_DATA) {
        fine = take_data(agent, flow, frame);
    } else if (fine && frame->type == MUX_EOF) {
        flow->end_came = true;
    } else if (fine && frame->type == MUX_CREDIT && frame->size == 4) {
        uint32_t more = get_be32(frame->data);
        fine = more <= WINDOW_FLOW_BYTES - flow->credit;
        flow->credit += fine ? more : 0;
        fine = fine && forward(agent, flow);
    } else {
        fine = false;
    }
    fine ? flow_settle(agent, flow) : flow_abort(agent, flow);
}

void flow_ready(struct agent *agent, uint32_t slot, uint32_t generation, uint32_t events) {
    struct flow *flow = &agent->services->flows[slot % MAX_FLOWS];
    if (flow->state == FLOW_FREE || flow->generation != generation) {
        return;
    }
    if (flow->held >= 0) {
        connect_ready(agent, flow);
        return;
    }
    if (flow->state == FLOW_JOINING) {
        int error = 0;
        socklen_t size = sizeof(error);
        getsockopt(flow->fd, SOL_SOCKET, SO_ERROR, &error, &size);
        flow_joined(agent, flow, error);
        return;
    }
    bool fine = (events & EPOLLOUT) == 0 || drain(agent, flow);
    fine = fine && forward(agent, flow);
    if (fine && (events & EPOLLERR) != 0) {
        fine = false;
    }
    fine ? flow_settle(agent, flow) : flow_abort(agent, flow);
}
