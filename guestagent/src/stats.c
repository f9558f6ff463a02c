/* STATS and EVENT: the guest's own counters, out of the kernel's text files. */
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "agent.h"

#define PRESSURE "/proc/pressure/memory"
/* 100 ms of stall within a second. The kernel tells at most once a window. */
#define TRIGGER "some 100000 1000000"
enum { OOM_RECHECK_MS = 1000, TICK_US = 10000 /* USER_HZ is 100 on every Linux port we run on */ };

static char scratch[SCRATCH_BYTES];

static size_t read_all(const char *path) {
    size_t size = 0;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    for (ssize_t got; fd >= 0 && (got = read(fd, scratch + size, sizeof(scratch) - size)) > 0;) {
        size += (size_t)got;
    }
    if (fd >= 0) {
        close(fd);
    }
    return size;
}

static void put(msgpack_packer *packer, const char *key, uint64_t value) {
    size_t size = strlen(key);
    msgpack_pack_str(packer, size);
    msgpack_pack_str_body(packer, key, size);
    msgpack_pack_uint64(packer, value);
}

static uint64_t fact(size_t size, const char *key) {
    uint64_t value = 0;
    fact_u64(scratch, size, key, &value);
    return value;
}

uint64_t meminfo_kib(const char *key) {
    return fact(read_all("/proc/meminfo"), key);
}

static void put_memory(msgpack_packer *packer) {
    size_t size = read_all("/proc/meminfo");
    put(packer, "mem_total_kib", fact(size, "MemTotal"));
    put(packer, "mem_free_kib", fact(size, "MemFree"));
    put(packer, "mem_available_kib", fact(size, "MemAvailable"));
    put(packer, "cached_kib", fact(size, "Cached"));
    put(packer, "shmem_kib", fact(size, "Shmem"));
    put(packer, "anon_kib", fact(size, "AnonPages"));
    put(packer, "active_kib", fact(size, "Active:"));
    put(packer, "inactive_kib", fact(size, "Inactive:"));
    put(packer, "swapped_kib", fact(size, "SwapTotal") - fact(size, "SwapFree"));
    put(packer, "balloon_kib", fact(size, "Hugetlb"));
}

static uint64_t pressure(const char *path, const char *line) {
    uint64_t value = 0;
    fact_in_line(scratch, read_all(path), line, "total=", &value);
    return value;
}

static void put_pressure(msgpack_packer *packer) {
    put(packer, "psi_mem_some_us", pressure(PRESSURE, "some"));
    put(packer, "psi_mem_full_us", pressure(PRESSURE, "full"));
    put(packer, "psi_cpu_some_us", pressure("/proc/pressure/cpu", "some"));
    put(packer, "psi_io_some_us", pressure("/proc/pressure/io", "some"));
}

/* "cpu  user nice system idle iowait irq softirq …", then a line for each CPU that is online. */
static void put_cpu(msgpack_packer *packer) {
    size_t size = read_all("/proc/stat"), at = 0;
    uint64_t field[7] = {0}, cpus = 0;
    for (unsigned i = 0; i < 7; i++) {
        while (at < size && (scratch[at] < '0' || scratch[at] > '9') && scratch[at] != '\n') {
            at++;
        }
        size_t from = at;
        while (at < size && scratch[at] >= '0' && scratch[at] <= '9') {
            at++;
        }
        parse_u64(scratch + from, at - from, &field[i]);
    }
    for (size_t i = 0; i + 4 < size; i++) {
        cpus += scratch[i] == '\n' && memcmp(scratch + i + 1, "cpu", 3) == 0;
    }
    put(packer, "cpu_user_us", (field[0] + field[1]) * TICK_US);
    put(packer, "cpu_system_us", (field[2] + field[5] + field[6]) * TICK_US);
    put(packer, "cpus_online", cpus);
}

static void put_vmstat(msgpack_packer *packer) {
    size_t size = read_all("/proc/vmstat");
    put(packer, "oom_kills", fact(size, "oom_kill"));
    put(packer, "pgfault", fact(size, "pgfault"));
    put(packer, "refault", fact(size, "workingset_refault_anon") + fact(size, "workingset_refault_file"));
}

struct entry { /* getdents64(2) */
    uint64_t inode, next;
    uint16_t size;
    uint8_t type;
    char name[];
};

/* Processes of the workload, its init left out. */
static uint64_t count_processes(const struct agent *agent) {
    uint64_t count = 0;
    if (!agent->configured || lseek(agent->world.proc_fd, 0, SEEK_SET) < 0) {
        return 0;
    }
    for (long got; (got = syscall(SYS_getdents64, agent->world.proc_fd, scratch, sizeof(scratch))) > 0;) {
        for (long at = 0; at < got;) {
            uint16_t size;
            memcpy(&size, scratch + at + offsetof(struct entry, size), sizeof(size));
            char first = scratch[at + (long)offsetof(struct entry, name)];
            count += first >= '0' && first <= '9';
            at += size;
        }
    }
    return count > 0 ? count - 1 : 0;
}

static uint64_t uptime_ms(void) {
    struct timespec now;
    clock_gettime(CLOCK_BOOTTIME, &now);
    return (uint64_t)now.tv_sec * 1000 + (uint64_t)now.tv_nsec / 1000000;
}

/* By walking our pages: VmRSS is behind by up to 64 faults a kind (kernels before 6.2 count a task's own in
 * batches), which is more than half of what we have. */
static uint64_t resident_kib(void) {
    uint64_t kib = fact(read_all("/proc/self/smaps_rollup"), "Rss");
    return kib > 0 ? kib : fact(read_all("/proc/self/status"), "VmRSS");
}

void stats_reply(struct agent *agent, uint32_t id) {
    if (agent->defence.adjust_ms == 0) {
        agent->defence.adjust_ms = now_ms() + 1; /* the host asks after it plugged something */
    }
    msgpack_packer *packer = tx_begin(&agent->tx, KIND_REPLY, id, 4);
    msgpack_pack_int(packer, 0);
    msgpack_pack_map(packer, 23);
    put_memory(packer);
    put_pressure(packer);
    put_cpu(packer);
    put_vmstat(packer);
    put(packer, "uptime_ms", uptime_ms());
    put(packer, "procs", count_processes(agent));
    put(packer, "agent_rss_kib", resident_kib());
    tx_end(&agent->tx);
}

static void say_event(struct agent *agent, const char *name, const char *const *keys, const uint64_t *values,
                      uint32_t count) {
    if (!agent->greeted) {
        return; /* nobody listens; the counters stay readable by STATS */
    }
    msgpack_packer *packer = tx_begin(&agent->tx, KIND_EVENT, 0, 4);
    size_t size = strlen(name);
    msgpack_pack_str(packer, size);
    msgpack_pack_str_body(packer, name, size);
    msgpack_pack_map(packer, count);
    for (uint32_t i = 0; i < count; i++) {
        put(packer, keys[i], values[i]);
    }
    tx_end(&agent->tx);
}

void oom_check(struct agent *agent) {
    static const char *const keys[] = {"total", "new", "available_kib", "total_kib"};
    uint64_t total = fact(read_all("/proc/vmstat"), "oom_kill");
    if (total > agent->oom_kills) {
        uint64_t values[] = {total, total - agent->oom_kills, meminfo_kib("MemAvailable"),
                             meminfo_kib("MemTotal") - balloon_blocks() * 2048};
        say_event(agent, "oom_kill", keys, values, 4);
        agent->oom_kills = total;
    }
    agent->oom_check_ms = 0;
}

void pressure_open(struct agent *agent) {
    agent->oom_kills = fact(read_all("/proc/vmstat"), "oom_kill");
    agent->pressure_fd = open(PRESSURE, O_RDWR | O_NONBLOCK | O_CLOEXEC);
    if (agent->pressure_fd < 0 || write(agent->pressure_fd, TRIGGER, sizeof(TRIGGER)) < 0 ||
        watch(agent, agent->pressure_fd, ROLE_PRESSURE, 0, 0, EPOLLPRI) != 0) {
        log_line("no memory pressure events: ", PRESSURE, errno);
        if (agent->pressure_fd >= 0) {
            close(agent->pressure_fd);
        }
        agent->pressure_fd = -1;
    }
}

void pressure_tell(struct agent *agent, uint64_t total_kib, uint64_t gave_back_kib, uint64_t wants_kib) {
    static const char *const keys[] = {"some_us",   "full_us",       "available_kib",
                                       "total_kib", "gave_back_kib", "wants_kib"};
    uint64_t values[] = {pressure(PRESSURE, "some"),
                         pressure(PRESSURE, "full"),
                         meminfo_kib("MemAvailable"),
                         total_kib,
                         gave_back_kib,
                         wants_kib};
    say_event(agent, "psi_memory", keys, values, 6);
}

void pressure_ready(struct agent *agent) {
    defence_relieve(agent, false);
    oom_check(agent);
    agent->oom_check_ms = now_ms() + OOM_RECHECK_MS; /* and what is killed a little later */
}
