/* Bounded text and numbers, pure: building messages, and reading the kernel's text files.
 *
 * Nothing here allocates, and no input makes anything overrun: what does not fit is cut. stdio is left out of
 * the whole program on purpose: its tables and buffers would be a good part of the 1 MiB an agent may hold.
 */
#ifndef SANDLOOM_TEXT_H
#define SANDLOOM_TEXT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Always NUL-terminated; `length` never reaches `size`. `cut` tells that something did not fit. */
struct text {
    char *data;
    size_t size;
    size_t length;
    bool cut;
};

void text_init(struct text *text, char *buffer, size_t size);
void text_add(struct text *text, const char *more);
void text_add_bytes(struct text *text, const void *more, size_t size);
/* Bytes of unknown origin: all but printable ASCII becomes '?'. */
void text_add_printable(struct text *text, const void *more, size_t size);
void text_add_u64(struct text *text, uint64_t value);
void text_add_hex(struct text *text, const uint8_t *bytes, size_t size);

/* All of [at, at+size) as a decimal number of 1 to 20 digits; false when it is anything else or too large. */
bool parse_u64(const char *at, size_t size, uint64_t *value);

/* The number after `key` at the start of a line, as /proc/meminfo and /proc/vmstat have it ("Cached:   12
 * kB", "oom_kill 3"). False when there is no such line. */
bool fact_u64(const char *text, size_t size, const char *key, uint64_t *value);

/* The number after `word` in the line that starts with `key` ("some avg10=… total=123": key "some", word
 * "total="). False when there is none. */
bool fact_in_line(const char *text, size_t size, const char *key, const char *word, uint64_t *value);

#endif
