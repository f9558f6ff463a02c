/* Frames on the byte stream to the host (PROTOCOL.md), pure: no I/O, no allocation, every length checked.
 *
 *     u32 BE length (1 … 131072) | u32 BE CRC-32 | payload: one msgpack array
 *
 * `rx` cuts what came into payloads and finds SYNC; `tx` holds what is to be written, at most TX_BYTES.
 */
#ifndef SANDLOOM_WIRE_H
#define SANDLOOM_WIRE_H

#include <msgpack.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum {
    HEADER_BYTES = 8,
    MAX_PAYLOAD_BYTES = 131072,
    RX_BYTES = HEADER_BYTES + MAX_PAYLOAD_BYTES,
    MAGIC_BYTES = 8,
    NONCE_BYTES = 8,
    SYNC_BYTES = MAGIC_BYTES + NONCE_BYTES,
    /* Requests are taken while no more than TX_BUSY_BYTES wait. Behind those fit one longest reply (HELLO's,
     * of 512 processes: 48 KiB) and the replies of every START that is under way (344 bytes each): none is
     * ever lost. */
    TX_BUSY_BYTES = 32768,
    TX_BYTES = 262144,
};

uint32_t crc32_of(const uint8_t *data, size_t size);

enum rx_event {
    RX_MORE,  /* nothing whole is left: give more bytes */
    RX_FRAME, /* *payload, *size: valid until the next call on this rx */
    RX_SYNC,  /* a new session: rx->nonce is its nonce; drop all that was queued, answer once */
};

/* Until the first SYNC there is no session and everything is hunted through. */
struct rx {
    uint8_t *buffer; /* RX_BYTES of it */
    size_t start, end;
    size_t done;  /* of the frame given last: gone with the next call */
    bool hunting; /* a frame was broken: everything up to the next SYNC is noise */
    bool synced;
    uint8_t nonce[NONCE_BYTES];
};

void rx_init(struct rx *rx, uint8_t *buffer);
/* Where to read to, and how much at most (never 0 after RX_MORE). */
uint8_t *rx_space(struct rx *rx, size_t *size);
void rx_add(struct rx *rx, size_t size);
enum rx_event rx_next(struct rx *rx, const uint8_t **payload, size_t *size);

struct tx {
    uint8_t *buffer; /* TX_BYTES of it */
    size_t start, end;
    size_t frame; /* where the open frame began */
    bool overflow;
    msgpack_packer packer;
};

void tx_init(struct tx *tx, uint8_t *buffer);
void tx_reset(struct tx *tx);
size_t tx_used(const struct tx *tx);
/* Drops all that is queued, then says the answer to SYNC. */
void tx_answer(struct tx *tx, const uint8_t nonce[NONCE_BYTES]);
/* Opens a frame of [kind, id, …] with `fields` entries in all. Pack the rest with the packer it gives. */
msgpack_packer *tx_begin(struct tx *tx, uint32_t kind, uint32_t id, uint32_t fields);
/* Closes it; false, and nothing was queued, when it did not fit. */
bool tx_end(struct tx *tx);
/* What to write next, and how much of it was written. */
const uint8_t *tx_pending(const struct tx *tx, size_t *size);
void tx_written(struct tx *tx, size_t size);

#endif
