/* Frames on the services port (PROTOCOL.md), pure: no I/O, no allocation, every length checked.
 *
 *     u32 BE size of payload (0 … 65536) | u8 type | 3 zero bytes | u32 BE id | payload
 *
 * A session begins with the nonce that SERVICES told: whatever is before it in the stream is another's.
 */
#ifndef SANDLOOM_MUX_H
#define SANDLOOM_MUX_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum {
    MUX_HEADER_BYTES = 12,
    MUX_MOST_BYTES = 65536,
    MUX_NONCE_BYTES = 16,
    MUX_RX_BYTES = MUX_HEADER_BYTES + MUX_MOST_BYTES,
    MUX_TX_BYTES = 524288,
    /* Data waits once this much is queued; what is left is for frames that cannot wait. */
    MUX_BUSY_BYTES = 262144,
    ENDPOINT_BYTES = 20,
};

enum mux_type {
    MUX_OPENED = 1,
    MUX_INCOMING = 2,
    MUX_OPEN = 3,
    MUX_DATA = 4,
    MUX_EOF = 5,
    MUX_RESET = 6,
    MUX_CREDIT = 7,
    MUX_DATAGRAM = 8,
    MUX_REFUSED = 9,
};

/* An address and a port, as on the wire: IPv4 in the first four bytes of `address`. */
struct endpoint {
    uint8_t family; /* 4 or 6 */
    uint16_t port;
    uint8_t address[16];
};

struct mux_frame {
    uint8_t type;
    uint32_t id;
    const uint8_t *data; /* until the next call on this mux */
    uint32_t size;
};

struct mux {
    uint8_t *rx, *tx; /* MUX_RX_BYTES and MUX_TX_BYTES of them */
    size_t rx_start, rx_end;
    size_t tx_start, tx_end, tx_frame;
    bool hunting;  /* for the nonce */
    bool overflow; /* a frame that could not wait found no room: the session is void */
    uint8_t nonce[MUX_NONCE_BYTES];
};

void put_be16(uint8_t *at, uint16_t value);
void put_be32(uint8_t *at, uint32_t value);
uint16_t get_be16(const uint8_t *at);
uint32_t get_be32(const uint8_t *at);
/* ENDPOINT_BYTES: u8 family, u8 zero, u16 BE port, 16 bytes of address. */
void put_endpoint(uint8_t *at, const struct endpoint *endpoint);
bool get_endpoint(const uint8_t *at, struct endpoint *endpoint);
bool endpoint_same(const struct endpoint *one, const struct endpoint *other);

/* Forgets everything, hunts for `nonce`, and has it said first. */
void mux_begin_session(struct mux *mux, const uint8_t nonce[MUX_NONCE_BYTES]);
/* Where to read to, and how much at most (never 0 after MUX_MORE). */
uint8_t *mux_space(struct mux *mux, size_t *size);
void mux_add(struct mux *mux, size_t size);
enum mux_event { MUX_MORE, MUX_FRAME, MUX_BROKEN };
enum mux_event mux_next(struct mux *mux, struct mux_frame *frame);

/* Whether a piece of data may be queued now. */
bool mux_open(const struct mux *mux);
/* Opens a frame with up to `most` bytes of payload, to be filled at what it gives; NULL, and the session is
 * void, without room. */
uint8_t *mux_begin(struct mux *mux, enum mux_type type, uint32_t id, size_t most);
/* Closes it with `size` bytes. */
void mux_end(struct mux *mux, size_t size);
/* Leaves the frame out that was opened. */
void mux_drop(struct mux *mux);
const uint8_t *mux_pending(const struct mux *mux, size_t *size);
void mux_written(struct mux *mux, size_t size);

#endif
