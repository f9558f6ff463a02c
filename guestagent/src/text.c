#include "text.h"

#include <string.h>

void text_init(struct text *text, char *buffer, size_t size) {
    text->data = buffer;
    text->size = size;
    text->length = 0;
    text->cut = false;
    if (size > 0) {
        buffer[0] = '\0';
    }
}

void text_add_bytes(struct text *text, const void *more, size_t size) {
    size_t room = text->size > text->length ? text->size - text->length - 1 : 0;
    if (size > room) {
        size = room;
        text->cut = true;
    }
    if (size > 0) {
        memcpy(text->data + text->length, more, size);
        text->length += size;
        text->data[text->length] = '\0';
    }
}

void text_add(struct text *text, const char *more) {
    text_add_bytes(text, more, strlen(more));
}

void text_add_printable(struct text *text, const void *more, size_t size) {
    const unsigned char *bytes = more;
    for (size_t i = 0; i < size && !text->cut; i++) {
        char c = bytes[i] >= 0x20 && bytes[i] < 0x7f ? (char)bytes[i] : '?';
        text_add_bytes(text, &c, 1);
    }
}

void text_add_u64(struct text *text, uint64_t value) {
    char digits[20];
    size_t at = sizeof(digits);
    do {
        digits[--at] = (char)('0' + value % 10);
        value /= 10;
    } while (value > 0);
    text_add_bytes(text, digits + at, sizeof(digits) - at);
}

void text_add_hex(struct text *text, const uint8_t *bytes, size_t size) {
    static const char digits[] = "0123456789abcdef";
    for (size_t i = 0; i < size; i++) {
        char pair[2] = {digits[bytes[i] >> 4], digits[bytes[i] & 15]};
        text_add_bytes(text, pair, 2);
    }
}

bool parse_u64(const char *at, size_t size, uint64_t *value) {
    uint64_t sum = 0;
    if (size == 0 || size > 20) {
        return false;
    }
    for (size_t i = 0; i < size; i++) {
        unsigned digit = (unsigned)((unsigned char)at[i] - '0');
        if (digit > 9 || sum > (UINT64_MAX - digit) / 10) {
            return false;
        }
        sum = sum * 10 + digit;
    }
    *value = sum;
    return true;
}

/* The line that starts with `key` and goes on with a character that cannot be part of a longer key. */
static const char *find_line(const char *text, size_t size, const char *key, size_t *length) {
    size_t key_size = strlen(key);
    const char *at = text, *end = text + size;
    while (at < end) {
        const char *stop = memchr(at, '\n', (size_t)(end - at));
        size_t line = (size_t)((stop ? stop : end) - at);
        if (line > key_size && memcmp(at, key, key_size) == 0 && strchr(": \t", at[key_size]) != NULL) {
            *length = line;
            return at;
        }
        at += line + 1;
    }
    return NULL;
}

static bool number_at(const char *at, const char *end, uint64_t *value) {
    while (at < end && (*at == ' ' || *at == '\t' || *at == ':')) {
        at++;
    }
    size_t digits = 0;
    while (at + digits < end && at[digits] >= '0' && at[digits] <= '9') {
        digits++;
    }
    return parse_u64(at, digits, value);
}

bool fact_u64(const char *text, size_t size, const char *key, uint64_t *value) {
    size_t length;
    const char *line = find_line(text, size, key, &length);
    return line != NULL && number_at(line + strlen(key), line + length, value);
}

bool fact_in_line(const char *text, size_t size, const char *key, const char *word, uint64_t *value) {
    size_t length, word_size = strlen(word);
    const char *line = find_line(text, size, key, &length);
    if (line == NULL) {
        return false;
    }
    for (size_t i = 0; i + word_size <= length; i++) {
        if (memcmp(line + i, word, word_size) == 0) {
            return number_at(line + i + word_size, line + length, value);
        }
    }
    return false;
}
