/* The few IP packets that the sandbox's kernel and the agent exchange over the tun device. Pure: every length
 * checked; what is not understood is no packet of ours.
 *
 * RFC 791 and 8200 (IP), 9293 (TCP), 768 (UDP), 792 and 4443 (ICMP), 1071 (checksums).
 */
#ifndef SANDLOOM_PACKET_H
#define SANDLOOM_PACKET_H

#include "mux.h"

enum { PACKET_HEADERS_BYTES = 128, PACKET_MOST_BYTES = 65535 };

enum packet_kind { PACKET_OTHER, PACKET_SYN, PACKET_UDP };

struct packet {
    enum packet_kind kind;
    struct endpoint from, to;
    uint32_t sequence;   /* of a SYN */
    const uint8_t *data; /* of UDP */
    size_t size;
    const uint8_t *head; /* the packet from its IP header on, for ICMP, and how much of it there is */
    size_t head_size;
};

enum packet_kind packet_parse(const uint8_t *bytes, size_t size, struct packet *packet);
/* Each gives the packet's size in `to`, which has PACKET_HEADERS_BYTES and, for UDP, `size` bytes more; 0
 * when it would be too long. The answer to a SYN that nobody takes: */
size_t packet_reset(uint8_t *to, const struct endpoint *from, const struct endpoint *sender,
                    uint32_t sequence);
/* ICMP's "unreachable", which gives the socket that sent the SYN that error: ENETUNREACH, EACCES (IPv6 only)
 * or, for all others, EHOSTUNREACH. */
size_t packet_unreachable(uint8_t *to, const struct endpoint *from, const struct endpoint *sender,
                          uint32_t sequence, int error);
size_t packet_udp(uint8_t *to, const struct endpoint *from, const struct endpoint *target,
                  const uint8_t *data, size_t size);

#endif
