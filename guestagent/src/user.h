/* Who a process runs as: "", "uid[:gid]", "name[:group]", by the guest's own /etc/passwd and /etc/group.
 * Pure.
 *
 * The files are the image's, so anything may be in them: lines of any length, NUL bytes, numbers out of
 * range. Lines that cannot be read are passed over. Text is fed in pieces of any cut.
 */
#ifndef SANDLOOM_USER_H
#define SANDLOOM_USER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { LINE_BYTES = 1024, HOME_BYTES = 256, NAME_BYTES = 64, MAX_GROUPS = 64 };

struct user {
    char name[NAME_BYTES]; /* as asked for, or found by uid; empty when neither */
    char group[NAME_BYTES];
    char home[HOME_BYTES]; /* empty: unknown */
    uint32_t uid, gid;
    bool uid_known, gid_known; /* a number was given, or found */
    bool group_asked;
    uint32_t groups[MAX_GROUPS];
    uint32_t group_count;
};

/* Cuts text into lines of at most LINE_BYTES (longer ones are passed over). */
struct lines {
    char line[LINE_BYTES];
    size_t size;
    bool too_long;
};

/* False when the text is none of the forms. */
bool user_parse(struct user *user, const char *text, size_t size);
void user_passwd_feed(struct user *user, struct lines *lines, const char *text, size_t size);
void user_group_feed(struct user *user, struct lines *lines, const char *text, size_t size);

#endif
