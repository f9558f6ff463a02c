/* Between fork and exec: a child becomes a process of the workload, or says why it cannot. */
#ifndef SANDLOOM_CHILD_H
#define SANDLOOM_CHILD_H

#include "message.h"
#include "policy.h"

enum { REPORT_TEXT_BYTES = 240 };

/* What a child says on its status pipe: once, its pid as the workload sees it (error 0), and once more when
 * it fails. Small enough to be written and read as a whole. */
struct report {
    int32_t error;
    int32_t pid;
    char text[REPORT_TEXT_BYTES];
};

struct child {
    const struct start *start;
    int mnt_fd, ipc_fd; /* the workload's namespaces */
    int in, out, err;   /* what become 0, 1 and 2; with a terminal all the same */
    int status;
    const struct policy *policy;
    bool rehearsal; /* there is no identity yet: apart from all, and nothing of it is kept */
};

_Noreturn void child_run(const struct child *child);
/* Gives up every capability but those a workload has (a docker-like set), or all when `none`. */
int capabilities_limit(bool none);
/* The set in force for uid 0. */
int capabilities_apply(bool none);

/* rehearsal.c: 0, or -1 with errno. enter: within the agent's own mounts still; confine: when the root is the
 * workload's; bound: last, before the exec. */
int rehearsal_enter(void);
int rehearsal_confine(void);
int rehearsal_bound(void);
enum { REHEARSAL_UID = 0x7ffffffe }; /* nobody's, and nobody's keys are found by another */

#endif
