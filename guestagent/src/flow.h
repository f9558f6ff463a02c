/* The streams of a process, pure: what is held of them, by offsets that count bytes from 0.
 *
 * A window is a ring of at most WINDOW_BYTES, in memory that the caller lends when there is something to
 * hold.
 */
#ifndef SANDLOOM_FLOW_H
#define SANDLOOM_FLOW_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { WINDOW_BYTES = 65536, OUTPUT_BYTES = 16384 };

struct window {
    uint8_t *ring; /* WINDOW_BYTES, or NULL while nothing was ever held */
    uint64_t base; /* offset of the oldest byte held */
    uint32_t head; /* its place in the ring; 0 whenever the window is empty */
    uint32_t held; /* bytes held */
    uint32_t peak; /* the furthest place written to since the ring was last clean */
};

uint32_t window_room(const struct window *window);
uint64_t window_end(const struct window *window);
/* Free space in one piece, to be filled from its start and then counted by window_add. */
uint8_t *window_space(const struct window *window, uint32_t *size);
void window_add(struct window *window, uint32_t size);
/* Bytes held from `offset` on, in one piece: fewer than all at the ring's seam. */
const uint8_t *window_at(const struct window *window, uint64_t offset, uint32_t *size);
void window_drop(struct window *window, uint32_t size);

/* One output stream. Bytes before `sent` were said to the host in this session, those before `base`
 * acknowledged. */
struct output {
    struct window window;
    uint64_t sent;
    bool closed;   /* nothing more will come from the process */
    bool end_sent; /* and the host was told */
};

/* A new session: all that is held is said again. */
void output_restart(struct output *output);
/* False (and nothing changes) when the offset was not sent or is acknowledged already. */
bool output_ack(struct output *output, uint64_t offset);
/* The next piece to say, NULL when there is none. */
const uint8_t *output_next(const struct output *output, uint32_t *size);
/* Whether the end of the stream is the next thing to say. */
bool output_at_end(const struct output *output);

/* Stdin. The window's base is what reached the process (or was dropped), its end what was taken from the
 * host. */
struct input {
    struct window window;
    uint64_t acked; /* told to the host in this session or before */
    bool end_taken; /* the host said end of file, after the window's end */
    bool dropped;   /* the process closed its end: everything is taken and dropped */
};

/* Takes what is new of `data`; what lies beyond a gap or the window is left out. The offset of the next byte
 * wanted is window_end. Needs window.ring. */
void input_take(struct input *input, uint64_t offset, const uint8_t *data, size_t size, bool end);
/* The process closed its end. */
void input_drop(struct input *input);

#endif
