#include "dax.h"

#include <errno.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#define KEY(text) text, sizeof(text) - 1

/* In the kernel's own order (fs/proc/task_mmu.c, __show_smap), so that the next key is the next entry,
 * mostly. */
static const struct {
    const char *key;
    size_t length;
    enum dax_size size;
} keys[] = {
    {KEY("Rss"), DAX_RSS},
    {KEY("Pss"), DAX_PSS},
    {KEY("Shared_Clean"), DAX_SHARED_CLEAN},
    {KEY("Shared_Dirty"), DAX_SHARED_DIRTY},
    {KEY("Private_Clean"), DAX_PRIVATE_CLEAN},
    {KEY("Private_Dirty"), DAX_PRIVATE_DIRTY},
    {KEY("Anonymous"), DAX_ANONYMOUS},
    {KEY("AnonHugePages"), DAX_ANON_HUGE},
    {KEY("ShmemPmdMapped"), DAX_SHMEM_HUGE},
    {KEY("FilePmdMapped"), DAX_FILE_HUGE},
    {KEY("Shared_Hugetlb"), DAX_SHARED_HUGETLB},
    {KEY("Private_Hugetlb"), DAX_PRIVATE_HUGETLB},
    {KEY("Swap"), DAX_SWAP},
    {KEY("SwapPss"), DAX_SWAP_PSS},
};

#define KEYS (sizeof keys / sizeof keys[0])

/* What is left of a line. */
struct cursor {
    const char *at;
    const char *end;
};

static bool take(struct cursor *line, char wanted) {
    if (line->at == line->end || *line->at != wanted)
        return false;
    line->at++;
    return true;
}

static void skip_spaces(struct cursor *line) {
    while (take(line, ' '))
        ;
}

/* An unsigned number without sign or prefix; false when there is none or it does not fit. */
static bool take_number(struct cursor *line, unsigned base, uint64_t *value) {
    const char *begin = line->at;
    *value = 0;
    for (; line->at != line->end; line->at++) {
        char c = *line->at;
        unsigned digit = c >= '0' && c <= '9'   ? (unsigned)(c - '0')
                         : c >= 'a' && c <= 'f' ? (unsigned)(c - 'a') + 10
                                                : 99;
        if (digit >= base)
            break;
        if (__builtin_mul_overflow(*value, base, value) || __builtin_add_overflow(*value, digit, value))
            return false;
    }
    return line->at != begin;
}

/* "7f0e1000-7f0e2000 r--p 00000000 fe:00 12345    /path" */
static bool read_header(struct cursor line, struct dax_mapping *mapping) {
    uint64_t major, minor;
    *mapping = (struct dax_mapping){0};
    if (!take_number(&line, 16, &mapping->start) || !take(&line, '-') ||
        !take_number(&line, 16, &mapping->end) || !take(&line, ' ') || line.end - line.at < 5)
        return false;
    memcpy(mapping->perms, line.at, 4);
    line.at += 4;
    if (!take(&line, ' ') || !take_number(&line, 16, &mapping->offset) || !take(&line, ' ') ||
        !take_number(&line, 16, &major) || !take(&line, ':') || !take_number(&line, 16, &minor) ||
        !take(&line, ' ') || !take_number(&line, 10, &mapping->inode) || major > UINT32_MAX ||
        minor > UINT32_MAX)
        return false;
    skip_spaces(&line);
    mapping->major = (uint32_t)major;
    mapping->minor = (uint32_t)minor;
    mapping->path = line.at;
    mapping->path_length = (size_t)(line.end - line.at);
    return mapping->start < mapping->end;
}

/* "Private_Dirty:       12 kB"; keys that are not kept (VmFlags, THPeligible, what a later kernel adds) are
 * passed over. *next is where to look first. */
static bool read_size(struct cursor line, struct dax_mapping *mapping, size_t *next) {
    const char *colon = memchr(line.at, ':', (size_t)(line.end - line.at));
    if (colon == NULL)
        return false;
    size_t length = (size_t)(colon - line.at);
    for (size_t tried = 0; tried < KEYS; tried++) {
        size_t i = (*next + tried) % KEYS;
        if (keys[i].length != length || memcmp(keys[i].key, line.at, length) != 0)
            continue;
        *next = i + 1;
        line.at = colon + 1;
        skip_spaces(&line);
        return take_number(&line, 10, &mapping->kib[keys[i].size]);
    }
    return true;
}

static bool is_header(const char *at) {
    return (*at >= '0' && *at <= '9') || (*at >= 'a' && *at <= 'f');
}

/* Room for one more; false when out of memory. */
static bool grow(struct dax_mapping **mappings, size_t count, size_t *room) {
    if (count < *room)
        return true;
    size_t more = *room ? *room * 2 : 256;
    struct dax_mapping *larger = realloc(*mappings, more * sizeof *larger);
    if (larger == NULL)
        return false;
    *mappings = larger;
    *room = more;
    return true;
}

int dax_smaps_parse(const char *text, size_t length, struct dax_mapping **mappings, size_t *count) {
    struct dax_mapping *made = NULL;
    size_t room = 0, used = 0, next = 0;
    int error = 0;
    const char *end = length ? text + length : text;
    for (const char *at = text; at != end && error == 0;) {
        const char *newline = memchr(at, '\n', (size_t)(end - at));
        struct cursor line = {at, newline ? newline : end};
        if (is_header(at)) {
            next = 0;
            if (!grow(&made, used, &room))
                error = -ENOMEM;
            else if (!read_header(line, &made[used++]))
                error = -EBADMSG;
        } else if (used == 0 || !read_size(line, &made[used - 1], &next)) {
            error = -EBADMSG;
        }
        at = newline ? newline + 1 : end;
    }
    if (error) {
        free(made);
        made = NULL;
        used = 0;
    }
    *mappings = made;
    *count = used;
    return error;
}
