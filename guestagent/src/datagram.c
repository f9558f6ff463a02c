/* The tun device: what the sandbox sends to the world, packet by packet. A SYN belongs to a connect that is
 * being served, or is refused; a datagram goes to the host as it is. All else is nobody's. */
#include <errno.h>
#include <string.h>
#include <unistd.h>

#include "packet.h"
#include "services.h"

enum { PACKETS_AT_ONCE = 64 };

static uint8_t incoming[PACKET_MOST_BYTES], outgoing[PACKET_MOST_BYTES + PACKET_HEADERS_BYTES];

static void say(struct agent *agent, size_t size) {
    if (size > 0) {
        ssize_t ignored = write(agent->services->tun_fd, outgoing, size);
        (void)ignored; /* a packet may be lost */
    }
}

void datagram_refuse(struct agent *agent, const struct flow *flow, int error) {
    say(agent, error == ECONNREFUSED
                   ? packet_reset(outgoing, &flow->theirs, &flow->ours, flow->sequence)
                   : packet_unreachable(outgoing, &flow->theirs, &flow->ours, flow->sequence, error));
}

static void take_syn(struct agent *agent, const struct packet *packet) {
    struct services *services = agent->services;
    for (uint32_t slot = 0; slot < services->flow_end; slot++) {
        struct flow *flow = &services->flows[slot];
        if (flow->state == FLOW_DIALING && endpoint_same(&flow->ours, &packet->from) &&
            endpoint_same(&flow->theirs, &packet->to)) {
            flow->sequence = packet->sequence;
            flow->sequence_known = true;
            if (flow->failed) {
                connect_fail(agent, flow, flow->failed);
            }
            return;
        }
    }
    say(agent, packet_reset(outgoing, &packet->to, &packet->from, packet->sequence));
}

static void take_datagram(struct agent *agent, const struct packet *packet) {
    struct mux *mux = &agent->services->mux;
    size_t size = 2 * ENDPOINT_BYTES + packet->size;
    if (!services_connected(agent) || !mux_open(mux) || size > MUX_MOST_BYTES) {
        return; /* as any network may lose it */
    }
    uint8_t *at = mux_begin(mux, MUX_DATAGRAM, 0, size);
    if (at != NULL) {
        put_endpoint(at, &packet->from);
        put_endpoint(at + ENDPOINT_BYTES, &packet->to);
        memcpy(at + 2 * ENDPOINT_BYTES, packet->data, packet->size);
        mux_end(mux, size);
    }
}

void datagram_ready(struct agent *agent) {
    struct packet packet;
    for (int i = 0; i < PACKETS_AT_ONCE; i++) {
        ssize_t size = read(agent->services->tun_fd, incoming, sizeof(incoming));
        if (size <= 0) {
            return;
        }
        switch (packet_parse(incoming, (size_t)size, &packet)) {
        case PACKET_SYN:
            take_syn(agent, &packet);
            break;
        case PACKET_UDP:
            take_datagram(agent, &packet);
            break;
        default:
            break;
        }
    }
}

void datagram_take(struct agent *agent, const struct mux_frame *frame) {
    struct endpoint from, to;
    if (agent->services->tun_fd < 0 || frame->size < 2 * ENDPOINT_BYTES ||
        !get_endpoint(frame->data, &from) || !get_endpoint(frame->data + ENDPOINT_BYTES, &to)) {
        return;
    }
    say(agent,
        packet_udp(outgoing, &from, &to, frame->data + 2 * ENDPOINT_BYTES, frame->size - 2 * ENDPOINT_BYTES));
}
