#include "viewing.h"

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/syscall.h>
#include <sys/sysinfo.h>
#include <sys/wait.h>
#include <unistd.h>

#include "fuse.h"
#include "services.h"

enum {
    FIRST_BYTES = 8192,
    MOST_BYTES = 1 << 20,
    BLOCK_KIB = 2048, /* boot RAM is made of these, but for what the firmware keeps of it */
    PAGE_KIB = 4,
    MASK_WORDS = 128, /* 8192 CPUs: the most that a kernel is built for */
};

const char *const VIEW_PATHS[VIEW_FILES] = {"/proc/meminfo", "/proc/cpuinfo", "/proc/stat",
                                            "/sys/devices/system/cpu/online"};

char *view_slurp(const char *path, size_t *size) {
    size_t room = FIRST_BYTES;
    char *data = malloc(room);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t got = fd < 0 ? -1 : 1;
    *size = 0;
    while (data != NULL && got > 0) {
        if (*size == room) {
            char *more = room < MOST_BYTES ? realloc(data, room *= 2) : NULL;
            if (more == NULL) {
                errno = ENOMEM;
                got = -1;
                break;
            }
            data = more;
        }
        got = read(fd, data + *size, room - *size);
        *size += got > 0 ? (size_t)got : 0;
    }
    if (fd >= 0) {
        close(fd);
    }
    if (got < 0) {
        free(data);
        return NULL;
    }
    return data;
}

/* RAM that the kernel found, KiB: "present" of every zone. */
static uint64_t present_kib(void) {
    static const char KEY[] = "        present  "; /* mm/vmstat.c, zoneinfo_show_print */
    const size_t key_size = sizeof(KEY) - 1;
    size_t size = 0;
    uint64_t pages = 0, kib = 0;
    char *text = view_slurp("/proc/zoneinfo", &size);
    for (size_t at = 0; text != NULL && at < size;) {
        char *end = memchr(text + at, '\n', size - at);
        size_t length = end ? (size_t)(end - (text + at)) : size - at;
        if (length > key_size && memcmp(text + at, KEY, key_size) == 0 &&
            parse_u64(text + at + key_size, length - key_size, &pages)) {
            kib += pages * PAGE_KIB;
        }
        at += length + 1;
    }
    free(text);
    return kib;
}

bool viewing_open(struct agent *agent) {
    struct viewing *viewing = &agent->services->viewing;
    viewing->note_fd = -1;
    viewing->shared =
        mmap(NULL, sizeof(*viewing->shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    return viewing->shared != MAP_FAILED;
}

void viewing_measure(struct agent *agent) {
    struct view_shared *shared = agent->services->viewing.shared;
    uint64_t boot_kib = (present_kib() + BLOCK_KIB - 1) / BLOCK_KIB * BLOCK_KIB;
    uint64_t total_kib = meminfo_kib("MemTotal");
    shared->in_guest = 1;
    shared->reserved_kib = boot_kib > total_kib ? boot_kib - total_kib : 0;
}

void viewing_granted(struct agent *agent, uint64_t cpus) {
    __atomic_store_n(&agent->services->viewing.shared->cpus_granted, cpus, __ATOMIC_RELAXED);
}

struct view view_now(const struct view_shared *shared, const char *meminfo, size_t size) {
    struct machine machine = {.reserved_kib = shared->reserved_kib,
                              .cpus_granted = __atomic_load_n(&shared->cpus_granted, __ATOMIC_RELAXED)};
    char list[VIEW_CPUS * 4];
    fact_u64(meminfo, size, "MemTotal", &machine.total_kib);
    if (shared->in_guest) {
        fact_u64(meminfo, size, "Hugetlb", &machine.held_kib);
    }
    int fd = open(VIEW_PATHS[VIEW_ONLINE], O_RDONLY | O_CLOEXEC);
    ssize_t got = fd < 0 ? -1 : read(fd, list, sizeof(list));
    if (fd >= 0) {
        close(fd);
    }
    if (got < 2 || !cpus_parse(list, (size_t)got - 1, &machine.online)) {
        memset(&machine.online, 0xff, sizeof(machine.online));
    }
    return view_of(&machine);
}

/* The files. */

/* Over the kernel's own, in the workload's mounts: a descriptor of the agent's never goes there. */
static _Noreturn void attach_run(const struct agent *agent, const int *mounts) {
    int failed = setns(agent->world.mnt_fd, CLONE_NEWNS) < 0 ? errno : 0;
    for (uint32_t file = 0; file < VIEW_FILES && !failed; file++) {
        failed =
            move_mount(mounts[file], "", AT_FDCWD, VIEW_PATHS[file], MOVE_MOUNT_F_EMPTY_PATH) < 0 ? errno : 0;
    }
    _exit(failed);
}

static int attach(struct agent *agent, const int *mounts) {
    int status = 0;
    pid_t pid = world_fork_beside(agent);
    if (pid == 0) {
        attach_run(agent, mounts);
    }
    if (pid < 0 || waitpid(pid, &status, 0) < 0) {
        return errno;
    }
    return WIFEXITED(status) ? WEXITSTATUS(status) : ECHILD;
}

/* The server first: whoever looks at a file finds it answered. It ends with the mounts. */
static int serve_files(struct agent *agent, const int *devices, const int *mounts) {
    struct viewing *viewing = &agent->services->viewing;
    int note[2];
    if (pipe2(note, O_CLOEXEC | O_NONBLOCK) < 0) {
        return errno;
    }
    pid_t pid = world_fork_beside(agent);
    int error = pid < 0 ? errno : 0;
    if (pid == 0) {
        viewfiles_run(viewing->shared, devices, note[1]);
    }
    close(note[1]);
    error = error ? error : attach(agent, mounts);
    error = error ? error : watch(agent, note[0], ROLE_VIEW, 0, 0, EPOLLIN);
    if (error) {
        close(note[0]);
        return error;
    }
    viewing->note_fd = note[0];
    return 0;
}

int viewing_begin(struct agent *agent, bool denied) {
    struct viewing *viewing = &agent->services->viewing;
    int devices[VIEW_FILES], mounts[VIEW_FILES], error = 0;
    __atomic_store_n(&viewing->shared->denied, denied, __ATOMIC_RELAXED);
    if (viewing->attached) {
        return 0;
    }
    memset(devices, -1, sizeof(devices));
    memset(mounts, -1, sizeof(mounts));
    for (uint32_t file = 0; file < VIEW_FILES && !error; file++) {
        error = fuse_make(&devices[file], &mounts[file]);
    }
    error = error ? error : serve_files(agent, devices, mounts);
    for (uint32_t file = 0; file < VIEW_FILES; file++) {
        if (mounts[file] >= 0) {
            close(mounts[file]);
        }
        if (devices[file] >= 0) {
            close(devices[file]);
        }
    }
    viewing->attached = error == 0;
    return error ? because(agent, error, "sysview: files of FUSE over /proc and /sys", "") : 0;
}

void viewing_ready(struct agent *agent) {
    struct viewing *viewing = &agent->services->viewing;
    struct view_note note;
    ssize_t size = read(viewing->note_fd, &note, sizeof(note));
    if (size == (ssize_t)sizeof(note)) {
        struct call call = {.thread = (pid_t)note.pid, .number = SYS_openat, .arguments = {note.file}};
        agent->services->decisions[SERVICE_SYSVIEW][ANSWER_DENY]++;
        services_refused(agent, &call, SERVICE_SYSVIEW);
    } else if (size == 0) { /* the server ended, with its mounts or killed: then the files say ENOTCONN */
        unwatch(agent, viewing->note_fd);
        close(viewing->note_fd);
        viewing->note_fd = -1;
    }
}

/* The calls. */

static void sysinfo_serve(struct agent *agent, const struct call *call) {
    struct sysinfo info;
    size_t size = 0;
    char *meminfo = view_slurp(VIEW_PATHS[VIEW_MEMINFO], &size);
    if (meminfo == NULL || sysinfo(&info) < 0) {
        free(meminfo);
        call_error(call, ENOMEM);
        return;
    }
    struct view view = view_now(agent->services->viewing.shared, meminfo, size);
    free(meminfo);
    info.totalram = view.total_kib * 1024 / info.mem_unit;
    if (!call_write(call, call->arguments[0], &info, sizeof(info))) {
        call_error(call, EFAULT);
        return;
    }
    call_value(call, 0);
}

/* Another's affinity, by the number that the workload's own /proc has it under. */
static bool affinity_of(const struct agent *agent, uint64_t number, struct cpu_set *cpus) {
    static const char KEY[] = "\nCpus_allowed:\t";
    char buffer[48], status[4096];
    struct text path;
    text_init(&path, buffer, sizeof(buffer));
    text_add_u64(&path, number);
    text_add(&path, "/status");
    int fd = openat(agent->world.proc_fd, path.data, O_RDONLY | O_CLOEXEC);
    ssize_t size = fd < 0 ? -1 : read(fd, status, sizeof(status) - 1);
    if (fd >= 0) {
        close(fd);
    }
    status[size > 0 ? size : 0] = '\0';
    const char *at = strstr(status, KEY);
    return at != NULL && cpus_parse_mask(at + sizeof(KEY) - 1, strcspn(at + sizeof(KEY) - 1, "\n"), cpus);
}

static void affinity_serve(struct agent *agent, const struct call *call) {
    uint64_t mask[MASK_WORDS] = {0}, size = (uint32_t)call->arguments[1],
             number = (uint32_t)call->arguments[0];
    struct cpu_set cpus;
    if (number != 0 && !call_is_of_world(call)) {
        call_kernel(call); /* numbers of a namespace below: decided by values alone */
        return;
    }
    if (size % sizeof(mask[0]) != 0) {
        call_error(call, EINVAL);
        return;
    }
    /* The caller's mask; of another's it is how many bytes the kernel answers with. */
    long got = syscall(SYS_sched_getaffinity, number ? 0 : call->thread,
                       size < sizeof(mask) ? size : sizeof(mask), mask);
    if (got < 0) {
        call_error(call, errno);
        return;
    }
    memcpy(&cpus, mask, sizeof(cpus));
    if (number != 0 && !affinity_of(agent, number, &cpus)) {
        call_error(call, ESRCH);
        return;
    }
    struct view view = view_now(agent->services->viewing.shared, "", 0);
    cpus = view_affinity(&view, &cpus);
    memset(mask, 0, sizeof(mask));
    memcpy(mask, &cpus, sizeof(cpus));
    if (!call_write(call, call->arguments[2], mask, (size_t)got)) {
        call_error(call, EFAULT);
        return;
    }
    call_value(call, got);
}

void viewing_serve(struct agent *agent, const struct call *call) {
    if (call->number == SYS_sysinfo) {
        sysinfo_serve(agent, call);
    } else {
        affinity_serve(agent, call);
    }
}
