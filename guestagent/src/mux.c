#include "mux.h"

#include <string.h>

void put_be16(uint8_t *at, uint16_t value) {
    at[0] = (uint8_t)(value >> 8);
    at[1] = (uint8_t)value;
}

void put_be32(uint8_t *at, uint32_t value) {
    put_be16(at, (uint16_t)(value >> 16));
    put_be16(at + 2, (uint16_t)value);
}

uint16_t get_be16(const uint8_t *at) {
    return (uint16_t)(at[0] << 8 | at[1]);
}

uint32_t get_be32(const uint8_t *at) {
    return (uint32_t)get_be16(at) << 16 | get_be16(at + 2);
}

void put_endpoint(uint8_t *at, const struct endpoint *endpoint) {
    at[0] = endpoint->family;
    at[1] = 0;
    put_be16(at + 2, endpoint->port);
    memcpy(at + 4, endpoint->address, sizeof(endpoint->address));
}

bool get_endpoint(const uint8_t *at, struct endpoint *endpoint) {
    memset(endpoint, 0, sizeof(*endpoint));
    endpoint->family = at[0];
    endpoint->port = get_be16(at + 2);
    memcpy(endpoint->address, at + 4, at[0] == 4 ? 4 : sizeof(endpoint->address));
    return (at[0] == 4 || at[0] == 6) && at[1] == 0;
}

bool endpoint_same(const struct endpoint *one, const struct endpoint *other) {
    return one->family == other->family && one->port == other->port &&
           memcmp(one->address, other->address, one->family == 4 ? 4 : 16) == 0;
}

void mux_begin_session(struct mux *mux, const uint8_t nonce[MUX_NONCE_BYTES]) {
    mux->rx_start = mux->rx_end = mux->tx_start = mux->tx_frame = 0;
    mux->hunting = true;
    mux->overflow = false;
    memcpy(mux->nonce, nonce, MUX_NONCE_BYTES);
    memcpy(mux->tx, nonce, MUX_NONCE_BYTES);
    mux->tx_end = MUX_NONCE_BYTES;
}

uint8_t *mux_space(struct mux *mux, size_t *size) {
    if (mux->rx_start > 0) {
        memmove(mux->rx, mux->rx + mux->rx_start, mux->rx_end - mux->rx_start);
        mux->rx_end -= mux->rx_start;
        mux->rx_start = 0;
    }
    *size = MUX_RX_BYTES - mux->rx_end;
    return mux->rx + mux->rx_end;
}

void mux_add(struct mux *mux, size_t size) {
    mux->rx_end += size;
}

static bool hunt(struct mux *mux) {
    size_t size = mux->rx_end - mux->rx_start;
    const uint8_t *from = mux->rx + mux->rx_start;
    const uint8_t *found = size ? memmem(from, size, mux->nonce, MUX_NONCE_BYTES) : NULL;
    if (found != NULL) {
        mux->rx_start = (size_t)(found - mux->rx) + MUX_NONCE_BYTES;
        mux->hunting = false;
    } else if (size >= MUX_NONCE_BYTES) {
        mux->rx_start = mux->rx_end - (MUX_NONCE_BYTES - 1);
    }
    return found != NULL;
}

enum mux_event mux_next(struct mux *mux, struct mux_frame *frame) {
    if (mux->hunting && !hunt(mux)) {
        return MUX_MORE;
    }
    size_t size = mux->rx_end - mux->rx_start;
    const uint8_t *at = mux->rx + mux->rx_start;
    if (size < MUX_HEADER_BYTES) {
        return MUX_MORE;
    }
    frame->size = get_be32(at);
    if (frame->size > MUX_MOST_BYTES || at[5] != 0 || at[6] != 0 || at[7] != 0) {
        return MUX_BROKEN;
    }
    if (size < MUX_HEADER_BYTES + frame->size) {
        return MUX_MORE;
    }
    frame->type = at[4];
    frame->id = get_be32(at + 8);
    frame->data = at + MUX_HEADER_BYTES;
    mux->rx_start += MUX_HEADER_BYTES + frame->size;
    return MUX_FRAME;
}

bool mux_open(const struct mux *mux) {
    return mux->tx_end - mux->tx_start < MUX_BUSY_BYTES && !mux->overflow;
}

uint8_t *mux_begin(struct mux *mux, enum mux_type type, uint32_t id, size_t most) {
    if (mux->tx_start > 0 && MUX_TX_BYTES - mux->tx_end < MUX_HEADER_BYTES + most) {
        memmove(mux->tx, mux->tx + mux->tx_start, mux->tx_end - mux->tx_start);
        mux->tx_end -= mux->tx_start;
        mux->tx_start = 0;
    }
    if (MUX_TX_BYTES - mux->tx_end < MUX_HEADER_BYTES + most || mux->overflow) {
        mux->overflow = true;
        return NULL;
    }
    uint8_t *at = mux->tx + mux->tx_end;
    memset(at, 0, MUX_HEADER_BYTES);
    at[4] = (uint8_t)type;
    put_be32(at + 8, id);
    mux->tx_frame = mux->tx_end;
    return at + MUX_HEADER_BYTES;
}

void mux_end(struct mux *mux, size_t size) {
    put_be32(mux->tx + mux->tx_frame, (uint32_t)size);
    mux->tx_end = mux->tx_frame + MUX_HEADER_BYTES + size;
}

void mux_drop(struct mux *mux) {
    mux->tx_end = mux->tx_frame;
}

const uint8_t *mux_pending(const struct mux *mux, size_t *size) {
    *size = mux->tx_end - mux->tx_start;
    return mux->tx + mux->tx_start;
}

void mux_written(struct mux *mux, size_t size) {
    mux->tx_start += size;
    if (mux->tx_start == mux->tx_end) {
        mux->tx_start = mux->tx_end = 0;
    }
}
