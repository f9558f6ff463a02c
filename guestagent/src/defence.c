/* Self-defence: before the guest's OOM killer acts, the workload is slowed down, the balloon gives back, and
 * the host is asked for more.
 *
 * The kernel's OOM killer comes within milliseconds of a workload that allocates faster than anybody can plug
 * memory, long before PSI has seen 100 ms of stall. So the workload's cgroup has a memory.high a little below
 * what there is: above it the kernel stalls whoever allocates, ever longer, and tells us (memory.events).
 * Then (and when PSI's trigger says so)
 *
 *     there is more memory by now than the mark knew of   → the mark is raised
 *     the balloon holds some                              → it gives a part back, the mark is raised
 *     else                                                → the host is asked (EVENT psi_memory, wants_kib)
 *
 * A stall ends: after STALL_MS without help the mark is lifted, the workload goes on, and if it still wants
 * more than there is the kernel kills, which EVENT oom_kill tells. The mark comes back when there is room.
 */
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <unistd.h>

#include "agent.h"

enum {
    STALL_MS = 5000,
    LOOK_MS = 40,     /* how often a stalled workload's guest looks for memory that was plugged */
    LIFTED_MS = 1000, /* how often one without a mark looks for room */
    TELL_MS = 250,    /* between two events: the host counts no more than 10 a second */
    LEAST_RESERVE_KIB = 12 << 10,
    MOST_RESERVE_KIB = 64 << 10,
    STEP_BLOCKS = 16, /* the balloon gives back 32 MiB at least */
    STEP_KIB = 1 << 10,
    ASK_KIB = 64 << 10, /* at least; more in a larger guest */
    FILE_BYTES = 256,
};

static uint64_t kib_of(const struct agent *agent, const char *name) {
    char text[FILE_BYTES];
    uint64_t value = 0;
    int fd = openat(agent->freezer.group_fd, name, O_RDONLY | O_CLOEXEC);
    ssize_t size = fd < 0 ? -1 : read(fd, text, sizeof(text));
    if (fd >= 0) {
        close(fd);
    }
    return size > 1 && parse_u64(text, (size_t)size - 1, &value) ? value >> 10 : 0;
}

static bool write_group(const struct agent *agent, const char *name, const char *value) {
    int fd = openat(agent->freezer.group_fd, name, O_WRONLY | O_CLOEXEC);
    bool done = fd >= 0 && write(fd, value, strlen(value)) > 0;
    if (fd >= 0) {
        close(fd);
    }
    return done;
}

uint64_t defence_reserve_kib(void) {
    uint64_t kib = meminfo_kib("MemTotal") / 16;
    return kib < LEAST_RESERVE_KIB ? LEAST_RESERVE_KIB : kib > MOST_RESERVE_KIB ? MOST_RESERVE_KIB : kib;
}

void defence_open(struct agent *agent) {
    struct defence *defence = &agent->defence;
    defence->events_fd = -1;
    if (agent->freezer.group_fd < 0) {
        return; /* on a build machine */
    }
    /* Pages of the balloon are nobody's to map. A kernel without one of the files has no such pages to give.
     */
    write_group(agent, "hugetlb.2MB.max", "0");
    write_group(agent, "hugetlb.2MB.rsvd.max", "0");
    defence->events_fd = openat(agent->freezer.group_fd, "memory.events", O_RDONLY | O_CLOEXEC);
    if (defence->events_fd < 0 || watch(agent, defence->events_fd, ROLE_MEMORY, 0, 0, EPOLLPRI) != 0) {
        log_line("no self-defence against want of memory: ", "memory.events", errno);
    }
}

/* What the workload may have now, KiB: what it has and what there is, less the reserve. */
static uint64_t room_kib(const struct agent *agent) {
    uint64_t all = kib_of(agent, "memory.current") + meminfo_kib("MemAvailable"),
             reserve = defence_reserve_kib();
    return all > reserve ? all - reserve : 0;
}

static void set_mark(struct agent *agent, uint64_t kib) {
    char buffer[24];
    struct text number;
    text_init(&number, buffer, sizeof(buffer));
    text_add_u64(&number, kib << 10);
    if (write_group(agent, "memory.high", number.data)) {
        agent->defence.mark_kib = kib;
    }
}

void defence_adjust(struct agent *agent) {
    struct defence *defence = &agent->defence;
    if (defence->events_fd < 0 || !agent->configured || defence->stall_ms != 0 || defence->lifted) {
        return; /* the steps see to it */
    }
    set_mark(agent, room_kib(agent));
}

static void tell(struct agent *agent, uint64_t gave_back_kib) {
    struct defence *defence = &agent->defence;
    uint64_t now = now_ms();
    defence->gave_back_kib += gave_back_kib;
    if (now < defence->tell_ms) {
        return;
    }
    uint64_t total = meminfo_kib("MemTotal") - balloon_blocks() * 2048, ask = total / 4;
    pressure_tell(agent, total, defence->gave_back_kib, ask > ASK_KIB ? ask : ASK_KIB);
    defence->gave_back_kib = 0;
    defence->tell_ms = now + TELL_MS;
}

/* Whether there is more room than the mark says; then it is raised, and a stall is over. */
static bool raise_mark(struct agent *agent) {
    struct defence *defence = &agent->defence;
    uint64_t room = room_kib(agent);
    if (room <= defence->mark_kib + STEP_KIB) {
        return false;
    }
    defence->stall_ms = defence->retry_ms = 0;
    set_mark(agent, room);
    return true;
}

/* The workload stalls, or is about to. */
void defence_relieve(struct agent *agent, bool stalled) {
    struct defence *defence = &agent->defence;
    if (defence->events_fd < 0 || !agent->configured || (stalled && !defence->lifted && raise_mark(agent))) {
        return;
    }
    defence->late = agent->balloon.told;
    uint64_t gave_back_kib = balloon_give_back(agent, STEP_BLOCKS);
    tell(agent, gave_back_kib);
    if (defence->lifted || raise_mark(agent) || !stalled) {
        return;
    }
    uint64_t now = now_ms();
    defence->retry_ms = now + LOOK_MS;
    if (defence->stall_ms == 0) {
        defence->stall_ms = now + STALL_MS;
    }
}

/* The host is done with what it was told: what could not be given back meanwhile is given back now. */
void defence_catch_up(struct agent *agent) {
    if (agent->defence.late) {
        defence_relieve(agent, agent->defence.stall_ms != 0);
    }
}

void defence_ready(struct agent *agent) {
    struct defence *defence = &agent->defence;
    char text[FILE_BYTES];
    uint64_t high = 0;
    ssize_t size = pread(defence->events_fd, text, sizeof(text), 0);
    if (size > 0 && fact_u64(text, (size_t)size, "high", &high) && high != defence->high) {
        defence->high = high;
        defence_relieve(agent, true);
    }
    oom_check(agent);
}

void defence_step(struct agent *agent, uint64_t now) {
    struct defence *defence = &agent->defence;
    if (defence->adjust_ms != 0 && now >= defence->adjust_ms) {
        defence->adjust_ms = 0;
        defence_adjust(agent);
    }
    if (defence->retry_ms == 0 || now < defence->retry_ms) {
        return;
    }
    if (defence->lifted) {
        defence->retry_ms = now + LIFTED_MS;
        if (meminfo_kib("MemAvailable") > 2 * defence_reserve_kib()) {
            defence->lifted = false;
            defence->retry_ms = 0;
            defence_adjust(agent);
        }
        return;
    }
    defence->retry_ms = now + LOOK_MS;
    if (raise_mark(agent)) {
        return;
    }
    tell(agent, 0);
    if (now >= defence->stall_ms) { /* nobody helped: never a hang */
        write_group(agent, "memory.high", "max");
        defence->mark_kib = defence->stall_ms = 0;
        defence->lifted = true;
        defence->retry_ms = now + LIFTED_MS;
    }
}
