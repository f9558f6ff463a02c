/* The agent's pure core against any bytes, under ASan and UBSan.
 *
 * With clang's libFuzzer (-fsanitize=fuzzer) LLVMFuzzerTestOneInput is all; elsewhere the driver at the end
 * mutates seeds by a fixed generator: `fuzz-core SEED ROUNDS FILE...`. `fuzz-core shape` tells, for each
 * length-prefixed payload on stdin, whether its shape is taken, so that the host's own check can be compared
 * with it. A property that does not hold aborts.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "flow.h"
#include "message.h"
#include "text.h"
#include "user.h"
#include "wire.h"

#define CHECK(condition)                                                                                     \
    do {                                                                                                     \
        if (!(condition)) {                                                                                  \
            fprintf(stderr, "%s:%d: %s does not hold\n", __FILE__, __LINE__, #condition);                    \
            abort();                                                                                         \
        }                                                                                                    \
    } while (0)

enum { MOST_STEPS = 400 }; /* of those that move up to 64 KiB each */

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* A digest of what a receiver tells of a stream that comes in pieces of `cut` bytes. */
static uint64_t received(const uint8_t *data, size_t size, size_t cut) {
    struct rx rx;
    uint8_t *buffer = malloc(RX_BYTES);
    uint64_t digest = 1469598103934665603u;
    rx_init(&rx, buffer);
    for (size_t at = 0; at < size;) {
        const uint8_t *payload;
        size_t room, length;
        uint8_t *space = rx_space(&rx, &room);
        CHECK(room > 0);
        size_t piece = size - at < cut ? size - at : cut;
        piece = piece < room ? piece : room;
        memcpy(space, data + at, piece);
        rx_add(&rx, piece);
        at += piece;
        for (enum rx_event event; (event = rx_next(&rx, &payload, &length)) != RX_MORE;) {
            CHECK(event == RX_SYNC || (length >= 1 && length <= MAX_PAYLOAD_BYTES));
            uint32_t crc = event == RX_SYNC ? crc32_of(rx.nonce, NONCE_BYTES) : crc32_of(payload, length);
            digest = (digest ^ crc ^ (uint64_t)event << 32) * 1099511628211u;
        }
    }
    free(buffer);
    return digest;
}

static void try_frames(const uint8_t *data, size_t size) {
    uint64_t whole = received(data, size, RX_BYTES);
    CHECK(received(data, size, 1) == whole);
    CHECK(received(data, size, 7) == whole);
    CHECK(received(data, size, 4093) == whole);
}

static void try_message(const uint8_t *data, size_t size) {
    struct message message;
    msgpack_unpacked room;
    uint8_t *exact = malloc(size > 0 ? size : 1); /* so that ASan sees one byte too far */
    memcpy(exact, data, size);
    msgpack_unpacked_init(&room);
    if (message_parse(exact, size, &room, &message) == NULL) {
        CHECK(shape_ok(exact, size));
        CHECK(message.kind >= KIND_HELLO && message.kind < KIND_REPLY);
        if (message.kind == KIND_START) {
            CHECK(message.proc > 0 && message.of.start.argv.size > 0 && message.of.start.cwd.data[0] == '/');
        }
    }
    msgpack_unpacked_destroy(&room);
    free(exact);
}

/* A frame that is made is a frame that is read. */
static void try_reply(const uint8_t *data, size_t size) {
    struct tx tx;
    struct rx rx;
    static const uint8_t nonce[NONCE_BYTES] = "nonce..";
    uint8_t *out = malloc(TX_BYTES), *in = malloc(RX_BYTES);
    const uint8_t *payload;
    size_t pending, room, length, frames = 0, made = 0;
    size = size < MOST_STEPS ? size : MOST_STEPS;
    tx_init(&tx, out);
    rx_init(&rx, in);
    rx.synced = true;
    tx_answer(&tx, nonce);
    tx_written(&tx, SYNC_BYTES);
    for (size_t at = 0; at < size; at += 1 + data[at] % 64) {
        msgpack_packer *packer = tx_begin(&tx, KIND_OUTPUT, 0, 3);
        size_t piece = (size - at) * (1 + data[at]);
        piece = piece < 70000 ? piece : 70000;
        char *filler = calloc(1, piece);
        msgpack_pack_bin(packer, piece);
        msgpack_pack_bin_body(packer, filler, piece);
        free(filler);
        made += tx_end(&tx);
        if (data[at] & 1) {
            const uint8_t *from = tx_pending(&tx, &pending);
            uint8_t *space = rx_space(&rx, &room);
            pending = pending < room ? pending : room;
            memcpy(space, from, pending);
            rx_add(&rx, pending);
            tx_written(&tx, pending);
            for (enum rx_event event; (event = rx_next(&rx, &payload, &length)) != RX_MORE; frames++) {
                CHECK(event == RX_FRAME && shape_ok(payload, length));
            }
        }
    }
    CHECK(frames <= made);
    free(out);
    free(in);
}

static void try_user(const uint8_t *data, size_t size) {
    struct user user, cut;
    struct lines lines = {.size = 0}, cut_lines = {.size = 0};
    size_t asked = size > 0 ? data[0] % 70u : 0;
    asked = asked < size ? asked : 0;
    const char *text = (const char *)data;
    bool known = user_parse(&user, text, asked);
    user_parse(&cut, text, asked);
    if (!known) {
        return;
    }
    user_passwd_feed(&user, &lines, text + asked, size - asked);
    user_group_feed(&user, &lines, text + asked, size - asked);
    CHECK(user.group_count <= MAX_GROUPS);
    CHECK(memchr(user.home, 0, sizeof(user.home)) != NULL && memchr(user.name, 0, sizeof(user.name)) != NULL);
    for (size_t at = asked; at < size; at++) {
        user_passwd_feed(&cut, &cut_lines, text + at, 1);
    }
    for (size_t at = asked; at < size; at++) {
        user_group_feed(&cut, &cut_lines, text + at, 1);
    }
    CHECK(cut.uid == user.uid && cut.gid == user.gid && cut.group_count == user.group_count);
}

static void try_text(const uint8_t *data, size_t size) {
    char buffer[32];
    struct text text;
    uint64_t value;
    text_init(&text, buffer, 1 + size % sizeof(buffer));
    text_add_printable(&text, data, size);
    text_add_hex(&text, data, size < 8 ? size : 8);
    text_add_u64(&text, size);
    CHECK(strlen(buffer) == text.length && text.length < text.size);
    for (size_t i = 0; i < text.length; i++) {
        CHECK(buffer[i] >= 0x20 && buffer[i] < 0x7f);
    }
    char *exact = malloc(size > 0 ? size : 1);
    memcpy(exact, data, size);
    parse_u64(exact, size, &value);
    fact_u64(exact, size, "Cached", &value);
    fact_in_line(exact, size, "some", "total=", &value);
    free(exact);
}

/* Windows against plain counting: byte number n of a stream is n's low byte. */
static void try_flow(const uint8_t *data, size_t size) {
    struct output output = {.sent = 0};
    struct input input = {.acked = 0};
    output.window.ring = malloc(WINDOW_BYTES);
    input.window.ring = malloc(WINDOW_BYTES);
    uint64_t came = 0;
    size = size < MOST_STEPS * 3 ? size : MOST_STEPS * 3;
    for (size_t at = 0; at + 3 <= size; at += 3) {
        uint32_t amount = (uint32_t)data[at + 1] << 8 | data[at + 2], room;
        switch (data[at] % 6) {
        case 0: { /* the process writes */
            uint8_t *space = window_space(&output.window, &room);
            amount = amount < room ? amount : room;
            for (uint32_t i = 0; i < amount; i++) {
                space[i] = (uint8_t)(came + i);
            }
            window_add(&output.window, amount);
            came += amount;
            break;
        }
        case 1: { /* the agent says */
            const uint8_t *piece = output_next(&output, &room);
            CHECK((piece == NULL) == (output.sent == came));
            for (uint32_t i = 0; piece != NULL && i < room; i++) {
                CHECK(piece[i] == (uint8_t)(output.sent + i));
            }
            output.sent += room;
            break;
        }
        case 2: /* the host acknowledges, rightly or not */
            output_ack(&output, output.window.base + amount);
            break;
        case 3:
            output_restart(&output);
            break;
        case 4: { /* stdin from anywhere near */
            uint8_t *piece = malloc(amount + 1u);
            uint64_t from = window_end(&input.window) + data[at] - 128;
            for (uint32_t i = 0; i < amount; i++) {
                piece[i] = (uint8_t)(from + i);
            }
            input_take(&input, from, piece, amount, amount % 251 == 250);
            free(piece);
            break;
        }
        default: { /* the process reads */
            const uint8_t *piece = window_at(&input.window, input.window.base, &room);
            for (uint32_t i = 0; piece != NULL && i < room; i++) {
                CHECK(piece[i] == (uint8_t)(input.window.base + i));
            }
            window_drop(&input.window, amount < room ? amount : room);
            if (amount == 65535) {
                input_drop(&input);
            }
        }
        }
        CHECK(output.window.held <= WINDOW_BYTES && input.window.held <= WINDOW_BYTES);
        CHECK(output.window.base <= output.sent && output.sent <= window_end(&output.window));
        CHECK(window_end(&output.window) == came);
    }
    free(output.window.ring);
    free(input.window.ring);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static void (*const tries[])(const uint8_t *, size_t) = {try_frames, try_message, try_reply,
                                                             try_user,   try_text,    try_flow};
    if (size > 0) {
        tries[data[0] % 6](data + 1, size - 1);
    }
    return 0;
}

#ifndef LIBFUZZER

enum { MOST_BYTES = 300000 };

static uint64_t state;

static uint32_t next(uint32_t below) { /* xorshift64* */
    state ^= state >> 12;
    state ^= state << 25;
    state ^= state >> 27;
    return (uint32_t)((state * 2685821657736338717u) >> 32) % below;
}

static size_t mutate(uint8_t *data, size_t size) {
    for (uint32_t changes = next(6); changes > 0 && size > 1; changes--) {
        size_t at = 1 + next((uint32_t)size - 1), length = next(64);
        length = length < size - at ? length : size - at;
        switch (next(6)) {
        case 0:
            data[at] ^= (uint8_t)(1u << next(8));
            break;
        case 1:
            data[at] = (uint8_t)next(256);
            break;
        case 2: /* drop */
            memmove(data + at, data + at + length, size - at - length);
            size -= length;
            break;
        case 3: /* repeat */
            if (size + length <= MOST_BYTES) {
                memmove(data + at + length, data + at, size - at);
                size += length;
            }
            break;
        case 4:
            memset(data + at, next(2) ? 0xff : 0, length);
            break;
        default:
            size = at + length;
        }
    }
    return size;
}

static size_t read_file(const char *path, uint8_t *data) {
    FILE *file = strcmp(path, "-") == 0 ? stdin : fopen(path, "rb");
    CHECK(file != NULL);
    size_t size = fread(data, 1, MOST_BYTES, file);
    fclose(file);
    return size;
}

static int tell_shapes(void) {
    static uint8_t payload[MAX_PAYLOAD_BYTES];
    uint8_t head[4];
    while (fread(head, 1, 4, stdin) == 4) {
        size_t size = (size_t)head[0] << 24 | (size_t)head[1] << 16 | (size_t)head[2] << 8 | head[3];
        CHECK(size <= sizeof(payload) && fread(payload, 1, size, stdin) == size);
        putchar(shape_ok(payload, size) ? '1' : '0');
    }
    return 0;
}

int main(int argc, char **argv) {
    if (argc == 2 && strcmp(argv[1], "shape") == 0) {
        return tell_shapes();
    }
    if (argc < 4) {
        fprintf(stderr, "usage: fuzz-core SEED ROUNDS FILE... | fuzz-core shape\n");
        return 2;
    }
    uint8_t *seed = malloc(MOST_BYTES), *data = malloc(MOST_BYTES);
    state = strtoull(argv[1], NULL, 10) | 1;
    unsigned long rounds = strtoul(argv[2], NULL, 10);
    for (int file = 3; file < argc; file++) {
        size_t seed_size = read_file(argv[file], seed);
        LLVMFuzzerTestOneInput(seed, seed_size);
        unsigned long fair =
            8 + rounds * 4096 / (4096 + seed_size); /* large seeds take as much time as small ones */
        for (unsigned long round = 0; round < fair; round++) {
            memcpy(data, seed, seed_size);
            LLVMFuzzerTestOneInput(data, mutate(data, seed_size));
        }
    }
    free(seed);
    free(data);
    return 0;
}

#endif
