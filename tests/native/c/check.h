/* The C tests' one tool: a check that names itself and ends the program. */
#ifndef SANDLOOM_CHECK_H
#define SANDLOOM_CHECK_H

#include <inttypes.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#define CHECK(condition)                                                                                     \
    do {                                                                                                     \
        if (!(condition)) {                                                                                  \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);                                  \
            exit(1);                                                                                         \
        }                                                                                                    \
    } while (0)

#define CHECK_EQUAL(left, right)                                                                             \
    do {                                                                                                     \
        uint64_t check_left = (uint64_t)(left), check_right = (uint64_t)(right);                             \
        if (check_left != check_right) {                                                                     \
            fprintf(stderr, "%s:%d: %s is %" PRIu64 ", not %s, %" PRIu64 "\n", __FILE__, __LINE__, #left,    \
                    check_left, #right, check_right);                                                        \
            exit(1);                                                                                         \
        }                                                                                                    \
    } while (0)

/* xorshift64*: the same numbers on every machine. */
static inline uint64_t random_next(uint64_t *state) {
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    return *state * 0x2545F4914F6CDD1Dull;
}

static inline uint64_t random_below(uint64_t *state, uint64_t bound) {
    return random_next(state) % bound;
}

#endif
