#include "user.h"

#include <string.h>

#include "text.h"

static bool id_of(const char *text, size_t size, uint32_t *id) {
    uint64_t value;
    if (!parse_u64(text, size, &value) || value >= UINT32_MAX) { /* the last one means "leave as it is" */
        return false;
    }
    *id = (uint32_t)value;
    return true;
}

static bool name_of(const char *text, size_t size, char to[NAME_BYTES]) {
    if (size == 0 || size >= NAME_BYTES) {
        return false;
    }
    memcpy(to, text, size);
    to[size] = '\0';
    return true;
}

bool user_parse(struct user *user, const char *text, size_t size) {
    memset(user, 0, sizeof(*user));
    if (size == 0) {
        user->uid_known = true;
        return true;
    }
    const char *colon = memchr(text, ':', size);
    size_t first = colon ? (size_t)(colon - text) : size;
    user->uid_known = id_of(text, first, &user->uid);
    if (!user->uid_known && !name_of(text, first, user->name)) {
        return false;
    }
    if (colon == NULL) {
        return true;
    }
    user->group_asked = true;
    user->gid_known = id_of(colon + 1, size - first - 1, &user->gid);
    return user->gid_known || name_of(colon + 1, size - first - 1, user->group);
}

struct field {
    const char *at;
    size_t size;
};

/* The first `count` colon-separated fields; false when there are fewer. */
static bool split(const char *line, size_t size, struct field *fields, unsigned count) {
    for (unsigned i = 0; i < count; i++) {
        const char *colon = memchr(line, ':', size);
        fields[i].at = line;
        fields[i].size = colon ? (size_t)(colon - line) : size;
        if (colon == NULL) {
            return i + 1 == count;
        }
        size -= fields[i].size + 1;
        line = colon + 1;
    }
    return true;
}

static bool equals(const struct field *field, const char *name) {
    return field->size == strlen(name) && memcmp(field->at, name, field->size) == 0;
}

/* name:password:uid:gid:comment:home:shell */
static void passwd_line(struct user *user, const char *line, size_t size) {
    struct field fields[6];
    uint32_t uid, gid;
    if (user->home[0] != '\0' || !split(line, size, fields, 6) ||
        !id_of(fields[2].at, fields[2].size, &uid) || !id_of(fields[3].at, fields[3].size, &gid)) {
        return;
    }
    bool by_name = user->name[0] != '\0' && !user->uid_known && equals(&fields[0], user->name);
    bool by_number = user->name[0] == '\0' && user->uid_known && uid == user->uid;
    if ((!by_name && !by_number) || !name_of(fields[0].at, fields[0].size, user->name)) {
        return;
    }
    user->uid = uid;
    user->uid_known = true;
    if (!user->gid_known && user->group[0] == '\0') {
        user->gid = gid;
        user->gid_known = true;
    }
    if (fields[5].size > 0 && fields[5].size < HOME_BYTES &&
        memchr(fields[5].at, 0, fields[5].size) == NULL) {
        memcpy(user->home, fields[5].at, fields[5].size);
        user->home[fields[5].size] = '\0';
    }
}

static bool is_member(const struct field *members, const char *name) {
    const char *at = members->at, *end = members->at + members->size;
    while (at < end) {
        const char *comma = memchr(at, ',', (size_t)(end - at));
        struct field one = {at, (size_t)((comma ? comma : end) - at)};
        if (equals(&one, name)) {
            return true;
        }
        at += one.size + 1;
    }
    return false;
}

/* name:password:gid:member,member */
static void group_line(struct user *user, const char *line, size_t size) {
    struct field fields[4];
    uint32_t gid;
    if (!split(line, size, fields, 4) || !id_of(fields[2].at, fields[2].size, &gid)) {
        return;
    }
    if (user->group[0] != '\0' && !user->gid_known && equals(&fields[0], user->group)) {
        user->gid = gid;
        user->gid_known = true;
    }
    /* A group that was asked for is the only one. */
    if (user->name[0] != '\0' && !user->group_asked && user->group_count < MAX_GROUPS &&
        is_member(&fields[3], user->name)) {
        user->groups[user->group_count++] = gid;
    }
}

static void feed(struct user *user, struct lines *lines, const char *text, size_t size,
                 void (*take)(struct user *, const char *, size_t)) {
    for (size_t i = 0; i < size; i++) {
        if (text[i] == '\n') {
            if (!lines->too_long) {
                take(user, lines->line, lines->size);
            }
            lines->size = 0;
            lines->too_long = false;
        } else if (lines->size == LINE_BYTES) {
            lines->too_long = true;
        } else {
            lines->line[lines->size++] = text[i];
        }
    }
}

void user_passwd_feed(struct user *user, struct lines *lines, const char *text, size_t size) {
    feed(user, lines, text, size, passwd_line);
}

void user_group_feed(struct user *user, struct lines *lines, const char *text, size_t size) {
    feed(user, lines, text, size, group_line);
}
