/* The pure core of the services, under ASan and UBSan: `services-core SEED ROUNDS` prints "ok".
 *
 * Filters: every policy's program is run by a BPF interpreter on many calls, and must notify exactly what
 * `served_why` says. Frames and packets: bytes made, mutated and cut by a fixed generator; what is taken must
 * be what was put in, and nothing is read or written out of bounds.
 */
#include <errno.h>
#include <linux/audit.h>
#include <linux/seccomp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>

#include "mux.h"
#include "packet.h"
#include "policy.h"

#define CHECK(condition)                                                                                     \
    do {                                                                                                     \
        if (!(condition)) {                                                                                  \
            fprintf(stderr, "%s:%d: %s does not hold\n", __FILE__, __LINE__, #condition);                    \
            abort();                                                                                         \
        }                                                                                                    \
    } while (0)

static uint64_t state;

static uint32_t rnd(void) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(state >> 33);
}

/* Classic BPF as seccomp(2) allows it: aligned loads of seccomp_data, jumps, returns. */
static uint32_t run(const struct sock_filter *code, size_t size, const struct seccomp_data *data) {
    uint32_t a = 0;
    for (size_t at = 0; at < size; at++) {
        const struct sock_filter *now = &code[at];
        switch (now->code) {
        case BPF_LD | BPF_W | BPF_ABS:
            CHECK(now->k % 4 == 0 && now->k + 4 <= sizeof(*data));
            memcpy(&a, (const uint8_t *)data + now->k, 4);
            break;
        case BPF_JMP | BPF_JEQ | BPF_K:
            at += a == now->k ? now->jt : now->jf;
            break;
        case BPF_JMP | BPF_JGE | BPF_K:
            at += a >= now->k ? now->jt : now->jf;
            break;
        case BPF_RET | BPF_K:
            return now->k;
        default:
            CHECK(!"an instruction that seccomp has");
        }
    }
    CHECK(!"every path returns");
    return 0;
}

static const uint32_t NUMBERS[] = {
    SYS_connect,           SYS_socket,        SYS_read,          SYS_openat, SYS_sendto, SYS_bind,
    SYS_io_uring_setup,    SYS_exit_group,    SYS_clock_gettime, 0,          999,        SYS_sysinfo,
    SYS_sched_getaffinity, SYS_clock_settime, SYS_adjtimex};

static void try_call(const struct policy *policy, const struct sock_filter *code, size_t size) {
    struct seccomp_data data = {.arch = AUDIT_ARCH_X86_64};
    data.nr = (int)NUMBERS[rnd() % (sizeof(NUMBERS) / sizeof(NUMBERS[0]))];
    uint64_t arguments[6];
    for (int i = 0; i < 6; i++) {
        arguments[i] = data.args[i] = (uint64_t)(rnd() % 3 == 0 ? rnd() : 0) << 32 | rnd() % 48;
    }
    uint32_t verdict = run(code, size, &data);
    const struct served *why = served_why(policy, (uint32_t)data.nr, arguments);
    if (data.nr == SYS_io_uring_setup) {
        CHECK(verdict == (SECCOMP_RET_ERRNO | ENOSYS));
    } else {
        CHECK((verdict == SECCOMP_RET_USER_NOTIF) == (why != NULL));
        CHECK(why != NULL || verdict == SECCOMP_RET_ALLOW);
    }
    data.nr |= 0x40000000;
    CHECK(run(code, size, &data) == (SECCOMP_RET_ERRNO | ENOSYS)); /* x32 */
    data.arch = AUDIT_ARCH_I386;
    CHECK(run(code, size, &data) == (SECCOMP_RET_ERRNO | ENOSYS));
}

static void try_filters(void) {
    struct sock_filter code[FILTER_MOST];
    for (int number = 0; number < 2187; number++) { /* 3 to the power of 7 */
        struct policy policy;
        for (int service = 0, rest = number; service < SERVICES; service++, rest /= 3) {
            policy.who[service] = (uint8_t)(rest % 3);
        }
        size_t size = filter_build(&policy, code, FILTER_MOST);
        CHECK((size == 0) == (number == 0) && size <= FILTER_MOST);
        CHECK(filter_build(&policy, code, size > 0 ? size - 1 : 0) == 0); /* no room, no half filter */
        size = filter_build(&policy, code, FILTER_MOST);
        for (int i = 0; size > 0 && i < 200; i++) {
            try_call(&policy, code, size);
        }
    }
}

static struct mux made(void) {
    struct mux mux = {.rx = malloc(MUX_RX_BYTES), .tx = malloc(MUX_TX_BYTES)};
    return mux;
}

static void feed(struct mux *to, const uint8_t *bytes, size_t size) {
    size_t room;
    uint8_t *at = mux_space(to, &room);
    CHECK(room >= size);
    memcpy(at, bytes, size);
    mux_add(to, size);
}

/* One frame, cut anywhere, after noise, comes out as it was. */
static void try_frame(struct mux *from, struct mux *to, const uint8_t *noise) {
    uint8_t nonce[MUX_NONCE_BYTES];
    struct mux_frame frame;
    for (size_t i = 0; i < sizeof(nonce); i++) {
        nonce[i] = (uint8_t)rnd();
    }
    mux_begin_session(from, nonce);
    mux_begin_session(to, nonce);
    uint32_t size = rnd() % 8 == 0 ? rnd() % MUX_MOST_BYTES : rnd() % 100, id = rnd();
    uint8_t *at = mux_begin(from, MUX_DATA, id, size);
    CHECK(at != NULL);
    memset(at, (int)id & 0xff, size);
    mux_end(from, size);
    size_t pending, noisy = rnd() % 64, fed = 0;
    const uint8_t *bytes = mux_pending(from, &pending);
    feed(to, noise, noisy);
    enum mux_event event = mux_next(to, &frame);
    CHECK(event == MUX_MORE);
    while (event == MUX_MORE && fed < pending) {
        size_t piece = 1 + rnd() % (pending - fed);
        feed(to, bytes + fed, piece);
        fed += piece;
        event = mux_next(to, &frame);
    }
    CHECK(event == MUX_FRAME && frame.type == MUX_DATA && frame.id == id && frame.size == size);
    CHECK(size == 0 || (frame.data[0] == (uint8_t)id && frame.data[size - 1] == (uint8_t)id));
    CHECK(mux_next(to, &frame) == MUX_MORE);
    mux_written(from, pending);
}

/* Any bytes after the nonce: taken, waited for or broken, never out of bounds. */
static void try_noise(struct mux *to) {
    static const uint8_t NONCE[MUX_NONCE_BYTES] = {1, 2, 3};
    uint8_t bytes[256];
    struct mux_frame frame;
    size_t size = rnd() % sizeof(bytes);
    for (size_t i = 0; i < size; i++) {
        bytes[i] = (uint8_t)(rnd() % 4 == 0 ? rnd() : 0);
    }
    mux_begin_session(to, NONCE);
    feed(to, NONCE, sizeof(NONCE));
    feed(to, bytes, size);
    for (int i = 0; i < 32 && mux_next(to, &frame) == MUX_FRAME; i++) {
        struct endpoint endpoint;
        if (frame.size >= ENDPOINT_BYTES && get_endpoint(frame.data, &endpoint)) {
            uint8_t again[ENDPOINT_BYTES];
            put_endpoint(again, &endpoint);
            CHECK(endpoint_same(&endpoint, &endpoint));
        }
    }
}

static struct endpoint any_endpoint(uint8_t family) {
    struct endpoint made = {.family = family, .port = (uint16_t)rnd()};
    for (int i = 0; i < (family == 4 ? 4 : 16); i++) {
        made.address[i] = (uint8_t)rnd();
    }
    return made;
}

static void try_packets(void) {
    static uint8_t bytes[PACKET_MOST_BYTES + PACKET_HEADERS_BYTES], data[2048];
    struct packet packet;
    uint8_t family = rnd() % 2 ? 4 : 6;
    struct endpoint from = any_endpoint(family), to = any_endpoint(family);
    size_t length = rnd() % sizeof(data), size = packet_udp(bytes, &from, &to, data, length);
    CHECK(size > 0 && packet_parse(bytes, size, &packet) == PACKET_UDP);
    CHECK(packet.size == length && endpoint_same(&packet.from, &from) && endpoint_same(&packet.to, &to));
    size_t cut = rnd() % size;
    uint8_t *exact = malloc(cut ? cut : 1); /* so that ASan sees one byte too many */
    memcpy(exact, bytes, cut);
    CHECK(packet_parse(exact, cut, &packet) == PACKET_OTHER);
    for (int i = 0; i < 4 && cut > 0; i++) {
        exact[rnd() % (cut < 60 ? cut : 60)] = (uint8_t)rnd();
    }
    if (packet_parse(exact, cut, &packet) == PACKET_UDP) {
        CHECK(packet.data >= exact && packet.data + packet.size <= exact + cut);
    }
    free(exact);
    CHECK(packet_parse(bytes, packet_reset(bytes, &from, &to, rnd()), &packet) == PACKET_OTHER);
    CHECK(packet_unreachable(bytes, &from, &to, rnd(), EHOSTUNREACH) <= PACKET_HEADERS_BYTES);
    CHECK(packet_udp(bytes, &from, &to, data, PACKET_MOST_BYTES) == 0);
}

int main(int argc, char **argv) {
    if (argc != 3) {
        return 2;
    }
    uint8_t noise[64];
    struct mux from = made(), to = made();
    state = strtoull(argv[1], NULL, 10);
    for (size_t i = 0; i < sizeof(noise); i++) {
        noise[i] = (uint8_t)rnd();
    }
    try_filters();
    for (long round = strtol(argv[2], NULL, 10); round > 0; round--) {
        try_noise(&to);
        try_packets();
        if (round % 16 == 0) {
            try_frame(&from, &to, noise);
        }
    }
    free(from.rx);
    free(from.tx);
    free(to.rx);
    free(to.tx);
    puts("ok");
    return 0;
}
