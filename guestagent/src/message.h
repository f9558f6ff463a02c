/* What the host says, parsed once into checked values (PROTOCOL.md), pure.
 *
 * The host is trusted, but a frame is still only bytes: shape, depth and counts are checked on the encoded
 * form before msgpack-c makes objects of it, and every field before it is used. All pointers go into the
 * payload and `room`, and are good as long as those are.
 */
#ifndef SANDLOOM_MESSAGE_H
#define SANDLOOM_MESSAGE_H

#include <msgpack.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum {
    PROTOCOL_VERSION = 1,
    MAX_DEPTH = 6,
    MAX_ENTRIES = 4096,
    MAX_NODES = 16384,
    MAX_LAYERS = 128,
    UUID_BYTES = 16,
    MIN_ENTROPY_BYTES = 32,
    MAX_ENTROPY_BYTES = 4096,
    MACHINE_ID_BYTES = 32,
    MAX_HOSTNAME_BYTES = 64,
    MAX_SIGNAL = 64,
    MAX_BLOCKS = 1 << 25, /* of 2 MiB: 64 TiB of addresses */
    MAX_VCPUS = 256,
};

enum kind {
    KIND_HELLO = 1,
    KIND_CONFIGURE = 2,
    KIND_START = 3,
    KIND_STDIN = 4,
    KIND_ACK = 5,
    KIND_SIGNAL = 6,
    KIND_WINSIZE = 7,
    KIND_STATS = 8,
    KIND_SHUTDOWN = 9,
    KIND_FORGET = 10,
    KIND_PREPARE = 11,
    KIND_RENEW = 12,
    KIND_FREEZE = 13,
    KIND_THAW = 14,
    KIND_BALLOON = 15,
    KIND_BALLOON_RUNS = 16,
    KIND_BALLOON_DONE = 17,
    KIND_CPUS = 18,
    KIND_SERVICES = 20,
    KIND_CLOCK = 21,
    KIND_REHEARSE = 30,
    KIND_REPLY = 64,
    KIND_OUTPUT = 65,
    KIND_EXITED = 66,
    KIND_STDIN_ACK = 67,
    KIND_EVENT = 68,
};

struct bytes {
    const char *data;
    size_t size;
};

/* All of it in CONFIGURE and REHEARSE; of PREPARE only layers and deadline_ms; of RENEW all but layers,
 * upper_mib and deadline_ms. */
struct configure {
    struct bytes hostname, entropy, machine_id;
    struct bytes layers[MAX_LAYERS]; /* UUID_BYTES each, lowest first */
    uint32_t layer_count;
    uint64_t upper_mib, time_unix_ns, deadline_ms;
};

struct start {
    msgpack_object_array argv, env; /* of bin without NUL; argv is not empty */
    struct bytes cwd, user;
    uint16_t rows, cols;
    bool tty, stdin_wanted;
};

struct services_wanted {
    uint8_t who[7]; /* enum answerer, by service */
    struct bytes nonce;
};

struct message {
    enum kind kind;
    uint32_t id;   /* 0: a notice */
    uint32_t proc; /* 0 when it is about no process */
    union {
        uint64_t version;
        struct configure configure;
        struct start start;
        struct services_wanted services;
        struct {
            uint64_t offset;
            struct bytes data;
            bool eof;
        } input;
        struct {
            uint64_t offset;
            uint32_t stream; /* 1 or 2 */
        } ack;
        int signal;
        struct {
            uint16_t rows, cols;
        } size;
        struct {
            uint64_t blocks, first, end; /* of 2 MiB of guest-physical memory; RUNS: first only */
            uint64_t deadline_ms;
        } balloon;
        struct {
            uint64_t count, deadline_ms;
        } cpus;
        uint64_t grace_ms, deadline_ms, time_unix_ns;
    } of;
};

/* Whether the payload is one whole msgpack value within the limits on depth and counts. */
bool shape_ok(const uint8_t *payload, size_t size);

/* NULL, or what is wrong with it (then kind and id are as far as they could be read, else 0). */
const char *message_parse(const uint8_t *payload, size_t size, msgpack_unpacked *room,
                          struct message *message);

#endif
