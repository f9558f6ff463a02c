#include "wire.h"

#include <string.h>

static const uint8_t SYNC_MAGIC[MAGIC_BYTES] = {'S', 'L', 'S', 'Y', 'N', 'C', 0, 1};
static const uint8_t ANSWER_MAGIC[MAGIC_BYTES] = {'S', 'L', 'S', 'Y', 'N', 'A', 0, 1};

/* zlib's polynomial, four bits at a time: a table of 64 bytes instead of 1 KiB. */
uint32_t crc32_of(const uint8_t *data, size_t size) {
    static const uint32_t table[16] = {
        0x00000000, 0x1db71064, 0x3b6e20c8, 0x26d930ac, 0x76dc4190, 0x6b6b51f4, 0x4db26158, 0x5005713c,
        0xedb88320, 0xf00f9344, 0xd6d6a3e8, 0xcb61b38c, 0x9b64c2b0, 0x86d3d2d4, 0xa00ae278, 0xbdbdf21c,
    };
    uint32_t crc = 0xffffffff;
    for (size_t i = 0; i < size; i++) {
        crc ^= data[i];
        crc = crc >> 4 ^ table[crc & 15];
        crc = crc >> 4 ^ table[crc & 15];
    }
    return ~crc;
}

static uint32_t get_u32(const uint8_t *at) {
    return (uint32_t)at[0] << 24 | (uint32_t)at[1] << 16 | (uint32_t)at[2] << 8 | at[3];
}

static void put_u32(uint8_t *at, uint32_t value) {
    at[0] = (uint8_t)(value >> 24);
    at[1] = (uint8_t)(value >> 16);
    at[2] = (uint8_t)(value >> 8);
    at[3] = (uint8_t)value;
}

void rx_init(struct rx *rx, uint8_t *buffer) {
    memset(rx, 0, sizeof(*rx));
    rx->buffer = buffer;
}

uint8_t *rx_space(struct rx *rx, size_t *size) {
    rx->start += rx->done;
    rx->done = 0;
    if (rx->start == rx->end) {
        rx->start = rx->end = 0;
    } else if (rx->start > 0 && RX_BYTES - rx->end < RX_BYTES / 8) {
        memmove(rx->buffer, rx->buffer + rx->start, rx->end - rx->start);
        rx->end -= rx->start;
        rx->start = 0;
    }
    *size = RX_BYTES - rx->end;
    return rx->buffer + rx->end;
}

void rx_add(struct rx *rx, size_t size) {
    rx->end += size;
}

/* Drops all up to the next SYNC; true when it was that of a new session. Leaves bytes when it needs more. */
static bool hunt(struct rx *rx) {
    const uint8_t *at = rx->buffer + rx->start;
    size_t size = rx->end - rx->start;
    const uint8_t *found = memmem(at, size, SYNC_MAGIC, MAGIC_BYTES);
    if (found == NULL) {
        rx->start = rx->end - (size < MAGIC_BYTES ? size : MAGIC_BYTES - 1);
        return false;
    }
    rx->start = (size_t)(found - rx->buffer);
    if (rx->end - rx->start < SYNC_BYTES) {
        return false;
    }
    rx->start += SYNC_BYTES;
    rx->hunting = false;
    if (rx->synced && memcmp(rx->nonce, found + MAGIC_BYTES, NONCE_BYTES) == 0) {
        return false;
    }
    memcpy(rx->nonce, found + MAGIC_BYTES, NONCE_BYTES);
    rx->synced = true;
    return true;
}

/* One step at `start`: a frame, a SYNC, or a byte sequence that is neither. */
static enum rx_event step(struct rx *rx, const uint8_t **payload, size_t *size) {
    if (!rx->synced || rx->hunting) {
        return hunt(rx) ? RX_SYNC : RX_MORE;
    }
    if (rx->end - rx->start < HEADER_BYTES) {
        return RX_MORE;
    }
    const uint8_t *at = rx->buffer + rx->start;
    size_t length = get_u32(at);
    if (length < 1 || length > MAX_PAYLOAD_BYTES) {
        rx->hunting = true;
        return hunt(rx) ? RX_SYNC : RX_MORE;
    }
    if (rx->end - rx->start < HEADER_BYTES + length) {
        return RX_MORE;
    }
    if (crc32_of(at + HEADER_BYTES, length) != get_u32(at + 4)) {
        rx->hunting = true; /* a SYNC may well lie inside of what claimed to be a frame */
        return hunt(rx) ? RX_SYNC : RX_MORE;
    }
    *payload = at + HEADER_BYTES;
    *size = length;
    rx->done = HEADER_BYTES + length;
    return RX_FRAME;
}

enum rx_event rx_next(struct rx *rx, const uint8_t **payload, size_t *size) {
    rx->start += rx->done;
    rx->done = 0;
    for (;;) {
        size_t before = rx->end - rx->start;
        bool hunted = rx->hunting;
        enum rx_event event = step(rx, payload, size);
        if (event != RX_MORE) {
            return event;
        }
        if (rx->end - rx->start == before && rx->hunting == hunted) {
            return RX_MORE;
        }
    }
}

static int tx_append(void *data, const char *bytes, size_t size) {
    struct tx *tx = data;
    if (tx->overflow || size > TX_BYTES - tx->end) {
        tx->overflow = true;
        return -1;
    }
    if (size > 0) {
        memcpy(tx->buffer + tx->end, bytes, size);
        tx->end += size;
    }
    return 0;
}

void tx_init(struct tx *tx, uint8_t *buffer) {
    memset(tx, 0, sizeof(*tx));
    tx->buffer = buffer;
    msgpack_packer_init(&tx->packer, tx, tx_append);
}

void tx_reset(struct tx *tx) {
    tx->start = tx->end = tx->frame = 0;
    tx->overflow = false;
}

size_t tx_used(const struct tx *tx) {
    return tx->end - tx->start;
}

void tx_answer(struct tx *tx, const uint8_t nonce[NONCE_BYTES]) {
    tx_reset(tx);
    memcpy(tx->buffer, ANSWER_MAGIC, MAGIC_BYTES);
    memcpy(tx->buffer + MAGIC_BYTES, nonce, NONCE_BYTES);
    tx->end = SYNC_BYTES;
}

msgpack_packer *tx_begin(struct tx *tx, uint32_t kind, uint32_t id, uint32_t fields) {
    static const char header[HEADER_BYTES];
    if (tx->start > 0) {
        memmove(tx->buffer, tx->buffer + tx->start, tx->end - tx->start);
        tx->end -= tx->start;
        tx->start = 0;
    }
    tx->frame = tx->end;
    tx->overflow = false;
    tx_append(tx, header, sizeof(header));
    msgpack_pack_array(&tx->packer, fields);
    msgpack_pack_uint32(&tx->packer, kind);
    msgpack_pack_uint32(&tx->packer, id);
    return &tx->packer;
}

bool tx_end(struct tx *tx) {
    if (tx->overflow) {
        tx->end = tx->frame;
        tx->overflow = false;
        return false;
    }
    uint8_t *at = tx->buffer + tx->frame;
    size_t length = tx->end - tx->frame - HEADER_BYTES;
    put_u32(at, (uint32_t)length);
    put_u32(at + 4, crc32_of(at + HEADER_BYTES, length));
    return true;
}

const uint8_t *tx_pending(const struct tx *tx, size_t *size) {
    *size = tx_used(tx);
    return tx->buffer + tx->start;
}

void tx_written(struct tx *tx, size_t size) {
    tx->start += size;
    if (tx->start == tx->end) {
        tx->start = tx->end = 0;
    }
}
