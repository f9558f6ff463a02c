/* CPUS: brings vCPUs online that the host plugged, and takes them offline. CPU 0 always stays. */
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <unistd.h>

#include "agent.h"
#include "services.h"

enum { MAX_CPUS = 256, RETRY_MS = 5 };

static int open_cpu(unsigned cpu, int flags) {
    char buffer[64];
    struct text path;
    text_init(&path, buffer, sizeof(buffer));
    text_add(&path, "/sys/devices/system/cpu/cpu");
    text_add_u64(&path, cpu);
    text_add(&path, "/online");
    return open(path.data, flags | O_CLOEXEC);
}

/* 1, 0, or -1 when there is no such CPU (yet). CPU 0 may have no switch: it is online. */
static int state_of(unsigned cpu) {
    char state = '1';
    int fd = open_cpu(cpu, O_RDONLY);
    if (fd < 0) {
        return cpu == 0 ? 1 : -1;
    }
    ssize_t size = read(fd, &state, 1);
    close(fd);
    return size == 1 && state == '1';
}

static bool set_state(unsigned cpu, bool online) {
    int fd = open_cpu(cpu, O_WRONLY);
    bool done = fd >= 0 && write(fd, online ? "1" : "0", 1) == 1;
    if (fd >= 0) {
        close(fd);
    }
    return done;
}

static uint64_t count_online(void) {
    uint64_t count = 0;
    for (unsigned cpu = 0; cpu < MAX_CPUS; cpu++) {
        count += state_of(cpu) == 1;
    }
    return count;
}

/* Goes as near to `wanted` as can be now; how many are online. The lowest come first, the highest go first.
 */
static uint64_t approach(uint64_t wanted) {
    uint64_t online = count_online();
    for (unsigned cpu = 1; cpu < MAX_CPUS && online < wanted; cpu++) {
        online += state_of(cpu) == 0 && set_state(cpu, true);
    }
    for (unsigned cpu = MAX_CPUS - 1; cpu > 0 && online > wanted; cpu--) {
        online -= state_of(cpu) == 1 && set_state(cpu, false);
    }
    return online;
}

int cpus_begin(struct agent *agent, const struct message *message) {
    if (agent->cpus.id != 0) {
        return because(agent, EBUSY, "vCPUs are being brought on or off", "");
    }
    agent->cpus.id = message->id;
    agent->cpus.wanted = message->of.cpus.count;
    viewing_granted(agent, agent->cpus.wanted);
    agent->cpus.retry_ms = now_ms();
    agent->cpus.deadline_ms = agent->cpus.retry_ms + message->of.cpus.deadline_ms;
    return 0;
}

void cpus_step(struct agent *agent, uint64_t now) {
    struct cpus *cpus = &agent->cpus;
    if (cpus->id == 0 || now < cpus->retry_ms) {
        return;
    }
    uint64_t online = approach(cpus->wanted);
    if (online != cpus->wanted && now < cpus->deadline_ms) {
        cpus->retry_ms = now_ms() + RETRY_MS; /* what was plugged a moment ago is not there yet */
        return;
    }
    reply_uint(agent, cpus->id, online);
    cpus->id = 0;
}
