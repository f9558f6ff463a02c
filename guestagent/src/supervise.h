/* The supervisor: answers the system calls that the filter (policy.h) sends to it. Each START has a listener
 * of its own, which ends with the last process under that filter.
 *
 * A tool is `void serve(struct agent *, const struct call *)`, one a service, in supervise.c's table. It
 * reads arguments with call_read, once, and checks what it got, not what is there; takes the caller's
 * descriptors with call_take_fd; and answers with exactly one of call_value, call_error, call_fd, now or
 * later (keep a copy of the call). call_kernel (SECCOMP_USER_NOTIF_FLAG_CONTINUE) is only for what was
 * decided without looking at memory that the caller can change. A caller that was killed meanwhile makes
 * every answer ENOENT, which is fine.
 *
 * Nobody hangs: the listener's end (the supervisor died) is ENOSYS for every caller, and a tool that answers
 * later has a deadline.
 */
#ifndef SANDLOOM_SUPERVISE_H
#define SANDLOOM_SUPERVISE_H

#include "policy.h"

#include <sys/types.h>

struct agent;

struct call {
    int listener;
    uint64_t id;
    pid_t thread;
    uint32_t number;
    uint64_t arguments[6];
};

/* Installs the filter for this process and what it becomes; needs CAP_SYS_ADMIN. The listener, or -1 with
 * errno; -1 with errno 0 when the policy needs none. */
int filter_install(const struct policy *policy);

/* Takes over a listener. The policy is fixed from then on. False, and it is closed, when there are too many.
 */
bool supervise_add(struct agent *agent, int listener);
/* Answers what waits at the listener in slot `slot`; closes it when its last process is gone. */
void supervise_ready(struct agent *agent, uint32_t slot, uint32_t events);

/* `size` bytes of the caller's memory, once; false (and nothing may be concluded) when they cannot be read or
 * the caller is gone. */
bool call_read(const struct call *call, uint64_t address, void *to, size_t size);
/* A duplicate of the caller's descriptor, close-on-exec; -1 with errno (EBADF: it has none such). */
int call_take_fd(const struct call *call, int fd);
/* Writes to the caller's memory; false when it cannot be written, or the caller is gone. */
bool call_write(const struct call *call, uint64_t address, const void *from, size_t size);
bool call_alive(const struct call *call);
/* The caller's /proc/PID/status, as much as there is room for, NUL at its end; false when it is gone. */
bool call_status(const struct call *call, char *status, size_t room);
/* Whether it lives in the workload's PID namespace, not in one below: numbers of processes mean the same. */
bool call_is_of_world(const struct call *call);

void call_value(const struct call *call, int64_t value);
void call_error(const struct call *call, int error);
/* Gives the caller a duplicate of `fd` as its lowest free descriptor, which becomes the call's result. */
void call_fd(const struct call *call, int fd, bool close_on_exec);
void call_kernel(const struct call *call);

#endif
