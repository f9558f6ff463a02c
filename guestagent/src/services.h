/* What the agent does for the services that the kernel does not answer (PROTOCOL.md, "The services port").
 *
 * services.c has the policy and the port, supervise.c the callers, connect.c and relay.c the TCP connections,
 * datagram.c the tun device, network.c how addresses and routes are set up for all that.
 */
#ifndef SANDLOOM_SERVICES_H
#define SANDLOOM_SERVICES_H

#include "agent.h"

#include "mux.h"
#include "policy.h"
#include "supervise.h"
#include "viewing.h"

enum {
    MAX_LISTENERS = MAX_PROCS,
    /* A flow's slot is the low 12 bits of its id; the lower half is the agent's to give, the upper the
     * host's. */
    MAX_FLOWS = 4096,
    HOST_FLOWS = MAX_FLOWS / 2,
    WINDOW_FLOW_BYTES = 262144, /* of a flow, in each direction: what was sent and not consumed */
    CHUNK_BYTES = 32768 - MUX_HEADER_BYTES,
    OPEN_DEADLINE_MS = 60000,
    FLOW_MARK = 0x5a4c, /* of packets that stay in this kernel, between a sandbox's socket and ours */
};

struct listener {
    int fd; /* -1: free */
    uint32_t generation;
};

enum flow_state {
    FLOW_FREE,
    FLOW_LOCAL,   /* the caller waits for its own kernel */
    FLOW_DIALING, /* the caller's socket sent its SYN, the host dials */
    FLOW_JOINING, /* the host has a client, we connect to the sandbox's listener */
    FLOW_OPEN,
};

/* A connection between a socket of the sandbox and the host: see relay.c. */
struct flow {
    enum flow_state state;
    uint32_t id, generation;
    int fd;         /* our end, whose peer is the sandbox's socket; -1 before FLOW_JOINING */
    int held;       /* the caller's socket until it is connected, else -1 */
    bool waiting;   /* the caller is blocked in `call` */
    bool impatient; /* it has set a deadline of its own (SO_SNDTIMEO) */
    struct call call;
    uint64_t deadline_ms;         /* 0: none */
    struct endpoint ours, theirs; /* the sandbox's address, and who it speaks with */
    uint32_t sequence;            /* of the caller's SYN */
    bool sequence_known;
    int failed;            /* an errno to tell by a packet, as soon as the SYN is seen */
    uint32_t credit, owed; /* what we may send; what was consumed and not told */
    uint8_t *ring;         /* what the sandbox does not take yet, WINDOW_FLOW_BYTES; NULL: nothing */
    uint32_t head, kept;
    uint32_t watched; /* events */
    bool end_came, end_done, end_sent;
};

struct services {
    bool configured, used; /* SERVICES came; a process was started under its policy */
    struct policy policy;
    struct listener listeners[MAX_LISTENERS];
    uint64_t decisions[SERVICES][ANSWERERS];
    int port_fd, tun_fd;
    bool port_readable, port_blocked, heard; /* heard: the host's nonce came in this session */
    bool stalled;                            /* flows wait for room in the mux */
    struct mux mux;
    struct flow *flows; /* MAX_FLOWS */
    uint32_t flow_end;  /* slots of ours in use are below it */
    uint32_t serial;
    struct viewing viewing;
};

/* services.c */
bool services_open(struct agent *agent);
int services_begin(struct agent *agent, const struct message *message);
/* The port's end here: opened by its name, or given (main.c). -1: there is none. */
int services_port(struct agent *agent);
void services_port_ready(struct agent *agent, uint32_t events);
bool services_move(struct agent *agent); /* takes what came, writes what waits; whether anything moved */
void services_hung_up(struct agent *agent);
bool services_connected(const struct agent *agent);
void services_refused(struct agent *agent, const struct call *call, enum service service);
void services_caller_gone(struct agent *agent, int listener);
uint64_t services_deadlines(struct agent *agent, uint64_t now); /* the next one, UINT64_MAX: none */

/* connect.c */
void connect_serve(struct agent *agent, const struct call *call);
void connect_opened(struct agent *agent, struct flow *flow, int error);
void connect_fail(struct agent *agent, struct flow *flow, int error);
void connect_ready(struct agent *agent, struct flow *flow);
void connect_late(struct agent *agent, struct flow *flow);
void connect_answer(struct flow *flow, int error);

/* relay.c */
struct flow *flow_new(struct agent *agent);
struct flow *flow_of_host(struct agent *agent, uint32_t id);
struct flow *flow_find(struct agent *agent, uint32_t id);
void flow_free(struct agent *agent, struct flow *flow);
void flow_abort(struct agent *agent, struct flow *flow); /* tells both ends by a reset */
void flow_opens(struct agent *agent, struct flow *flow);
void flow_ready(struct agent *agent, uint32_t slot, uint32_t generation, uint32_t events);
void flow_take(struct agent *agent, struct flow *flow, const struct mux_frame *frame);
void flow_settle(struct agent *agent, struct flow *flow);
uint32_t flow_slot(const struct agent *agent, const struct flow *flow);
/* Queues a frame without payload. */
void flow_say(struct agent *agent, struct flow *flow, enum mux_type type);
void flow_joined(struct agent *agent, struct flow *flow, int error);
/* host.c: beside a sandbox of the host's own kernel */
bool host_open(struct agent *agent, char **numbers);
void host_ready(struct agent *agent, uint32_t slot);
int host_tell_calls(const char *who);

/* datagram.c */
void datagram_ready(struct agent *agent);
void datagram_take(struct agent *agent, const struct mux_frame *frame);
void datagram_refuse(struct agent *agent, const struct flow *flow, int error);

/* clock.c */
void clock_serve(struct agent *agent, const struct call *call);

/* network.c */
int network_up(struct agent *agent); /* 0 or an errno, with a reason */
/* A socket at an address that is not this machine's, connecting to one of the sandbox's; -1 with errno. */
int flow_socket(const struct endpoint *at, const struct endpoint *to);
bool network_is_local(const struct endpoint *endpoint);
extern const struct endpoint SANDBOX_V4, SANDBOX_V6;

#endif
