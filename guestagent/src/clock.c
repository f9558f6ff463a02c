/* The sandbox's clock. It is its own kernel's CLOCK_REALTIME, which no supervisor could answer for: it is
 * read without a system call. So the host says what it shows (CONFIGURE, RENEW, CLOCK: the host's time and
 * the sandbox's offset), and under `time: tool` or `deny` nobody inside moves it: what sets it is EPERM, and
 * told. Reading by adjtimex stays, done by the agent itself with nothing in it that could set anything.
 */
#include <errno.h>
#include <sys/syscall.h>
#include <sys/timex.h>
#include <time.h>

#include "services.h"

enum { READ_ONLY_OFFSET = 0xa001 /* ADJ_OFFSET_SS_READ */ };

int clock_set(struct agent *agent, uint64_t unix_ns) {
    struct timespec time = {.tv_sec = (time_t)(unix_ns / 1000000000),
                            .tv_nsec = (long)(unix_ns % 1000000000)};
    if (!agent->in_guest) { /* it is the build machine's */
        return because(agent, EOPNOTSUPP, "no clock of a sandbox's own", "");
    }
    return clock_settime(CLOCK_REALTIME, &time) < 0 ? because(agent, errno, "clock", "") : 0;
}

/* Whether it was a read, which is answered then. */
static bool read_by_adjtimex(const struct call *call, uint64_t address) {
    struct timex timex;
    if (!call_read(call, address, &timex, sizeof(timex))) {
        call_error(call, EFAULT);
        return true;
    }
    if (timex.modes != 0 && timex.modes != READ_ONLY_OFFSET) {
        return false;
    }
    int state = adjtimex(&timex);
    if (state < 0) {
        call_error(call, errno);
    } else if (!call_write(call, address, &timex, sizeof(timex))) {
        call_error(call, EFAULT);
    } else {
        call_value(call, state);
    }
    return true;
}

void clock_serve(struct agent *agent, const struct call *call) {
    bool adjusts = call->number == SYS_adjtimex || call->number == SYS_clock_adjtime;
    uint64_t address = call->arguments[call->number == SYS_clock_adjtime];
    bool real_time = call->number != SYS_clock_adjtime || (int32_t)call->arguments[0] == CLOCK_REALTIME;
    if (adjusts && real_time && read_by_adjtimex(call, address)) {
        return;
    }
    call_error(call, EPERM);
    services_refused(agent, call, SERVICE_TIME);
}
