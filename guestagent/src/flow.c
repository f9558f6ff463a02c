#include "flow.h"

#include <string.h>

uint32_t window_room(const struct window *window) {
    return WINDOW_BYTES - window->held;
}

uint64_t window_end(const struct window *window) {
    return window->base + window->held;
}

uint8_t *window_space(const struct window *window, uint32_t *size) {
    uint32_t tail = (window->head + window->held) % WINDOW_BYTES;
    uint32_t to_seam = WINDOW_BYTES - tail, room = window_room(window);
    *size = room < to_seam ? room : to_seam;
    return window->ring + tail;
}

void window_add(struct window *window, uint32_t size) {
    uint32_t reached = (window->head + window->held) % WINDOW_BYTES + size;
    window->peak = reached > window->peak ? reached : window->peak;
    window->held += size;
}

const uint8_t *window_at(const struct window *window, uint64_t offset, uint32_t *size) {
    if (offset < window->base || offset >= window_end(window)) {
        *size = 0;
        return NULL;
    }
    uint32_t skip = (uint32_t)(offset - window->base);
    uint32_t place = (window->head + skip) % WINDOW_BYTES;
    uint32_t left = window->held - skip, to_seam = WINDOW_BYTES - place;
    *size = left < to_seam ? left : to_seam;
    return window->ring + place;
}

void window_drop(struct window *window, uint32_t size) {
    window->base += size;
    window->held -= size;
    /* Starting over at the ring's front keeps a stream of small pieces within the ring's first page. */
    window->head = window->held > 0 ? (window->head + size) % WINDOW_BYTES : 0;
}

void output_restart(struct output *output) {
    output->sent = output->window.base;
    output->end_sent = false;
}

bool output_ack(struct output *output, uint64_t offset) {
    if (offset <= output->window.base || offset > window_end(&output->window)) {
        return false;
    }
    window_drop(&output->window, (uint32_t)(offset - output->window.base));
    if (output->sent < offset) {
        output->sent = offset; /* sent in an earlier session */
    }
    return true;
}

const uint8_t *output_next(const struct output *output, uint32_t *size) {
    const uint8_t *at = window_at(&output->window, output->sent, size);
    if (*size > OUTPUT_BYTES) {
        *size = OUTPUT_BYTES;
    }
    return at;
}

bool output_at_end(const struct output *output) {
    return output->closed && !output->end_sent && output->sent == window_end(&output->window);
}

void input_take(struct input *input, uint64_t offset, const uint8_t *data, size_t size, bool end) {
    struct window *window = &input->window;
    uint64_t next = window_end(window);
    if (input->end_taken || offset > next || size > UINT64_MAX - offset || offset + size < next) {
        return;
    }
    data += next - offset;
    size -= (size_t)(next - offset);
    if (input->dropped) {
        window->base += size;
        size = 0;
    }
    while (size > 0 && window_room(window) > 0) {
        uint32_t room;
        uint8_t *at = window_space(window, &room);
        uint32_t piece = size < room ? (uint32_t)size : room;
        memcpy(at, data, piece);
        window_add(window, piece);
        data += piece;
        size -= piece;
    }
    if (end && size == 0) {
        input->end_taken = true;
    }
}

void input_drop(struct input *input) {
    input->dropped = true;
    window_drop(&input->window, input->window.held);
}
