#include "packet.h"

#include <errno.h>
#include <string.h>

enum {
    PROTOCOL_ICMP = 1,
    PROTOCOL_TCP = 6,
    PROTOCOL_UDP = 17,
    PROTOCOL_ICMP6 = 58,
    IP4_BYTES = 20,
    IP6_BYTES = 40,
    TCP_BYTES = 20,
    UDP_BYTES = 8,
    ICMP_BYTES = 8,
    FLAG_SYN = 2,
    FLAG_RST = 4,
    FLAG_ACK = 16,
    HOPS = 64
};

static uint32_t sum(const uint8_t *at, size_t size, uint32_t start) {
    uint64_t total = start;
    for (size_t i = 0; i + 1 < size; i += 2) {
        total += get_be16(at + i);
    }
    if (size & 1) {
        total += (uint32_t)at[size - 1] << 8;
    }
    while (total >> 16) {
        total = (total & 0xffff) + (total >> 16);
    }
    return (uint32_t)total;
}

static enum packet_kind transport(const uint8_t *at, size_t size, uint8_t protocol, struct packet *packet) {
    if (protocol == PROTOCOL_TCP && size >= TCP_BYTES) {
        packet->sequence = get_be32(at + 4);
        packet->kind = (at[13] & (FLAG_SYN | FLAG_ACK | FLAG_RST)) == FLAG_SYN ? PACKET_SYN : PACKET_OTHER;
    } else if (protocol == PROTOCOL_UDP && size >= UDP_BYTES && get_be16(at + 4) >= UDP_BYTES &&
               get_be16(at + 4) <= size) {
        packet->data = at + UDP_BYTES;
        packet->size = get_be16(at + 4) - UDP_BYTES;
        packet->kind = PACKET_UDP;
    } else {
        return PACKET_OTHER;
    }
    packet->from.port = get_be16(at);
    packet->to.port = get_be16(at + 2);
    return packet->kind;
}

enum packet_kind packet_parse(const uint8_t *bytes, size_t size, struct packet *packet) {
    memset(packet, 0, sizeof(*packet));
    packet->head = bytes;
    packet->head_size = size;
    if (size >= IP4_BYTES && bytes[0] >> 4 == 4) {
        size_t header = (size_t)(bytes[0] & 15) * 4, total = get_be16(bytes + 2);
        bool fragment = (get_be16(bytes + 6) & 0x3fff) != 0;
        if (header < IP4_BYTES || total < header || total > size || fragment) {
            return PACKET_OTHER;
        }
        packet->from.family = packet->to.family = 4;
        memcpy(packet->from.address, bytes + 12, 4);
        memcpy(packet->to.address, bytes + 16, 4);
        return transport(bytes + header, total - header, bytes[9], packet);
    }
    if (size >= IP6_BYTES && bytes[0] >> 4 == 6) {
        size_t payload = get_be16(bytes + 4);
        if (payload > size - IP6_BYTES) {
            return PACKET_OTHER;
        }
        packet->from.family = packet->to.family = 6;
        memcpy(packet->from.address, bytes + 8, 16);
        memcpy(packet->to.address, bytes + 24, 16);
        return transport(bytes + IP6_BYTES, payload, bytes[6], packet);
    }
    return PACKET_OTHER;
}

/* The IP header before `size` bytes of `protocol`; its size. */
static size_t put_ip(uint8_t *to, const struct endpoint *from, const struct endpoint *target,
                     uint8_t protocol, size_t size) {
    memset(to, 0, IP6_BYTES);
    if (from->family == 4) {
        to[0] = 0x45;
        put_be16(to + 2, (uint16_t)(IP4_BYTES + size));
        to[8] = HOPS;
        to[9] = protocol;
        memcpy(to + 12, from->address, 4);
        memcpy(to + 16, target->address, 4);
        put_be16(to + 10, (uint16_t)~sum(to, IP4_BYTES, 0));
        return IP4_BYTES;
    }
    to[0] = 0x60;
    put_be16(to + 4, (uint16_t)size);
    to[6] = protocol;
    to[7] = HOPS;
    memcpy(to + 8, from->address, 16);
    memcpy(to + 24, target->address, 16);
    return IP6_BYTES;
}

/* Of the transport's header and data at `at`, with the pseudo header in front. */
static uint16_t checksum(const uint8_t *at, size_t size, const struct endpoint *from,
                         const struct endpoint *target, uint8_t protocol) {
    size_t length = from->family == 4 ? 4 : 16;
    uint32_t total = sum(from->address, length, protocol);
    total = sum(target->address, length, total + (uint32_t)size);
    return (uint16_t)~sum(at, size, total);
}

size_t packet_reset(uint8_t *to, const struct endpoint *from, const struct endpoint *sender,
                    uint32_t sequence) {
    size_t header = put_ip(to, from, sender, PROTOCOL_TCP, TCP_BYTES);
    uint8_t *tcp = to + header;
    memset(tcp, 0, TCP_BYTES);
    put_be16(tcp, from->port);
    put_be16(tcp + 2, sender->port);
    put_be32(tcp + 8, sequence + 1);
    tcp[12] = TCP_BYTES / 4 << 4;
    tcp[13] = FLAG_RST | FLAG_ACK;
    put_be16(tcp + 16, checksum(tcp, TCP_BYTES, from, sender, PROTOCOL_TCP));
    return header + TCP_BYTES;
}

static uint8_t unreachable_code(int family, int error) {
    if (error == ENETUNREACH) {
        return 0; /* no route, in both */
    }
    if (family == 6) {
        return error == EACCES ? 1 : 3; /* prohibited, or address unreachable */
    }
    return 1; /* host unreachable */
}

size_t packet_unreachable(uint8_t *to, const struct endpoint *from, const struct endpoint *sender,
                          uint32_t sequence, int error) {
    bool v4 = from->family == 4;
    size_t inner = v4 ? IP4_BYTES : IP6_BYTES, size = ICMP_BYTES + inner + TCP_BYTES;
    uint8_t protocol = v4 ? PROTOCOL_ICMP : PROTOCOL_ICMP6;
    size_t header = put_ip(to, from, sender, protocol, size);
    uint8_t *icmp = to + header, *tcp = icmp + ICMP_BYTES + inner;
    memset(icmp, 0, size);
    icmp[0] = v4 ? 3 : 1; /* destination unreachable */
    icmp[1] = unreachable_code(from->family, error);
    uint8_t quoted[IP6_BYTES];
    put_ip(quoted, sender, from, PROTOCOL_TCP, TCP_BYTES);
    memcpy(icmp + ICMP_BYTES, quoted, inner);
    put_be16(tcp, sender->port);
    put_be16(tcp + 2, from->port);
    put_be32(tcp + 4, sequence);
    tcp[12] = TCP_BYTES / 4 << 4;
    tcp[13] = FLAG_SYN;
    put_be16(icmp + 2, v4 ? (uint16_t)~sum(icmp, size, 0) : checksum(icmp, size, from, sender, protocol));
    return header + size;
}

size_t packet_udp(uint8_t *to, const struct endpoint *from, const struct endpoint *target,
                  const uint8_t *data, size_t size) {
    size_t headers = (from->family == 4 ? IP4_BYTES : 0) + UDP_BYTES; /* an IPv6 header is not counted */
    if (size > PACKET_MOST_BYTES - headers || from->family != target->family) {
        return 0;
    }
    size_t header = put_ip(to, from, target, PROTOCOL_UDP, UDP_BYTES + size);
    uint8_t *udp = to + header;
    put_be16(udp, from->port);
    put_be16(udp + 2, target->port);
    put_be16(udp + 4, (uint16_t)(UDP_BYTES + size));
    put_be16(udp + 6, 0);
    memcpy(udp + UDP_BYTES, data, size);
    uint16_t check = checksum(udp, UDP_BYTES + size, from, target, PROTOCOL_UDP);
    put_be16(udp + 6, check ? check : 0xffff); /* 0 means that there is none */
    return header + UDP_BYTES + size;
}
