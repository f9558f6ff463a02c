/* The msgpack tags by how to step over them: https://github.com/msgpack/msgpack/blob/master/spec.md */
#include "message.h"

struct cursor {
    const uint8_t *data;
    size_t at, size;
};

/* Big-endian number of `width` bytes; moves on. False when cut short. */
static bool take_number(struct cursor *cursor, unsigned width, uint64_t *value) {
    if (width > cursor->size - cursor->at) {
        return false;
    }
    *value = 0;
    for (unsigned i = 0; i < width; i++) {
        *value = *value << 8 | cursor->data[cursor->at++];
    }
    return true;
}

static bool skip(struct cursor *cursor, uint64_t count) {
    if (count > cursor->size - cursor->at) {
        return false;
    }
    cursor->at += (size_t)count;
    return true;
}

/* Past one value, or past a container's head: its children go to *children. */
static bool step(struct cursor *cursor, uint64_t *children) {
    uint64_t count;
    uint8_t tag = cursor->data[cursor->at++];
    *children = 0;
    if (tag < 0x80 || tag >= 0xe0) {
        return true;
    }
    if (tag < 0x90) {
        *children = 2 * (tag & 0x0fu);
        return true;
    }
    if (tag < 0xa0) {
        *children = tag & 0x0fu;
        return true;
    }
    if (tag < 0xc0) {
        return skip(cursor, tag & 0x1fu);
    }
    switch (tag) {
    case 0xc0: /* nil, false, true */
    case 0xc2:
    case 0xc3:
        return true;
    case 0xc4: /* bin and str, by the width of their length */
    case 0xd9:
        return take_number(cursor, 1, &count) && skip(cursor, count);
    case 0xc5:
    case 0xda:
        return take_number(cursor, 2, &count) && skip(cursor, count);
    case 0xc6:
    case 0xdb:
        return take_number(cursor, 4, &count) && skip(cursor, count);
    case 0xca: /* floats and integers */
    case 0xce:
    case 0xd2:
        return skip(cursor, 4);
    case 0xcb:
    case 0xcf:
    case 0xd3:
        return skip(cursor, 8);
    case 0xcc:
    case 0xd0:
        return skip(cursor, 1);
    case 0xcd:
    case 0xd1:
        return skip(cursor, 2);
    case 0xdc: /* arrays and maps */
    case 0xdd:
    case 0xde:
    case 0xdf:
        if (!take_number(cursor, tag & 1 ? 4 : 2, &count) || count > MAX_ENTRIES) {
            return false;
        }
        *children = tag >= 0xde ? 2 * count : count;
        return true;
    default: /* extensions are not in the protocol */
        return false;
    }
}

bool shape_ok(const uint8_t *payload, size_t size) {
    struct cursor cursor = {payload, 0, size};
    uint64_t open[MAX_DEPTH + 1] = {1}, children; /* values still to come, per open container */
    unsigned depth = 0, nodes = 0;
    for (;;) {
        while (open[depth] == 0) {
            if (depth == 0) {
                return cursor.at == size;
            }
            depth--;
        }
        open[depth]--;
        if (++nodes > MAX_NODES || cursor.at >= size || !step(&cursor, &children)) {
            return false;
        }
        if (children > 0) {
            if (depth == MAX_DEPTH || children > size - cursor.at) {
                return false;
            }
            open[++depth] = children;
        }
    }
}
