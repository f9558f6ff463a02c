/* Who answers a sandbox's system calls, and the seccomp filter that follows from it. Pure: no I/O, no
 * allocation.
 *
 * `served_calls` (policy.c) is the one table of it: which call, under which answerer of which service,
 * reaches the supervisor. A service plugs in with rows there and a function in supervise.c's table of tools.
 * Everything else is the kernel's own affair and never leaves it.
 */
#ifndef SANDLOOM_POLICY_H
#define SANDLOOM_POLICY_H

#include <linux/filter.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* The order is the wire's (PROTOCOL.md, SERVICES). */
enum service {
    SERVICE_SOCKETS,
    SERVICE_DNS,
    SERVICE_FILES,
    SERVICE_SECRETS,
    SERVICE_TIME,
    SERVICE_SYSVIEW,
    SERVICE_DEVICES,
    SERVICES
};
enum answerer { ANSWER_KERNEL, ANSWER_TOOL, ANSWER_DENY, ANSWERERS };

struct policy {
    uint8_t who[SERVICES];
};

enum { NO_ARGUMENT = 6, FILTER_MOST = 512 };

/* A call that is served. With an argument only when its low 32 bits are `value`: the kernel takes an int
 * there. */
struct served {
    uint32_t number;
    uint8_t service, answerer;
    uint8_t argument; /* 0 … 5, or NO_ARGUMENT */
    uint32_t value;
};

/* Whether anything is answered by somebody else than the kernel. */
bool policy_filters(const struct policy *policy);

/* The filter: notifies exactly what `served_calls` says for the policy, allows the rest. Calls by another
 * architecture's numbers (32-bit, x32) and io_uring_setup, whose rings would bypass any filter, fail with
 * ENOSYS. Returns the instructions written; 0 when there is nothing to filter, or no room. */
size_t filter_build(const struct policy *policy, struct sock_filter *to, size_t room);

/* The next row that applies under the policy, from `*at` on, which moves behind it; NULL after the last. */
const struct served *served_next(const struct policy *policy, size_t *at);

/* Why the filter notified this call; NULL when it would not have. */
const struct served *served_why(const struct policy *policy, uint32_t number, const uint64_t arguments[6]);

#endif
