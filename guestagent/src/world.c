/* The workload's own world: mount, PID and IPC namespaces under an init that only reaps.
 *
 * Everything that is mounted there is mounted before any workload runs, with the image's root as root, so
 * that no link of an image leads anywhere else. The agent keeps descriptors of what it needs later
 * (namespaces, devpts, /proc, /dev/shm) and never follows a path of the workload's again.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/magic.h>
#include <sched.h>
#include <signal.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include "agent.h"
#include "child.h"

struct node {
    const char *path;
    unsigned major, minor;
};

static const struct node NODES[] = {{"/dev/null", 1, 3},   {"/dev/zero", 1, 5},    {"/dev/full", 1, 7},
                                    {"/dev/random", 1, 8}, {"/dev/urandom", 1, 9}, {"/dev/tty", 5, 0}};

static const char *const LINKS[][2] = {{"pts/ptmx", "/dev/ptmx"},
                                       {"/proc/self/fd", "/dev/fd"},
                                       {"/proc/self/fd/0", "/dev/stdin"},
                                       {"/proc/self/fd/1", "/dev/stdout"},
                                       {"/proc/self/fd/2", "/dev/stderr"}};

/* Root without CAP_SYS_ADMIN may still write these, by their modes: core_pattern runs programs as the agent
 * would. */
static const char *const READ_ONLY[] = {"/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys",
                                        "/proc/sysrq-trigger"};
static const char *const HIDDEN_FILES[] = {"/proc/kcore",       "/proc/keys",         "/proc/timer_list",
                                           "/proc/kpageflags",  "/proc/kpagecount",   "/proc/kpagecgroup",
                                           "/proc/sched_debug", "/proc/latency_stats"};
static const char *const HIDDEN_FOLDERS[] = {"/proc/acpi",    "/proc/scsi",        "/proc/asound",
                                             "/sys/firmware", "/sys/kernel/debug", "/sys/class/virtio-ports"};

#define COUNT(array) (sizeof(array) / sizeof((array)[0]))

static int report_fd;

static void must(int result, const char *what) {
    if (result < 0) {
        struct report report = {.error = errno};
        strncpy(report.text, what, sizeof(report.text) - 1);
        ssize_t ignored = write(report_fd, &report, sizeof(report));
        (void)ignored;
        _exit(1);
    }
}

static void make_folder(const char *path, mode_t mode) {
    must(mkdir(path, mode) < 0 && errno != EEXIST ? -1 : 0, path);
}

/* The agent's own mounts are of no use here, and `root` becomes the root of this namespace. */
static void enter_root(const struct agent *agent) {
    static const char *const OURS[] = {"/l", "/u", "/proc", "/sys", "/dev"};
    must(mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL), "private mounts");
    for (unsigned i = 0; i < COUNT(OURS); i++) {
        must(umount2(OURS[i], MNT_DETACH) < 0 && agent->in_guest ? -1 : 0, OURS[i]);
    }
    if (strcmp(agent->root, "/") == 0) {
        return;
    }
    if (!agent->in_guest) {
        must(mount(agent->root, agent->root, NULL, MS_BIND | MS_REC, NULL), agent->root);
    }
    must(chdir(agent->root), agent->root);
    must(mount(".", "/", NULL, MS_MOVE, NULL), "moving the root");
    must(chroot("."), "root");
    must(chdir("/"), "root");
}

static void shm_size(struct text *size, uint64_t upper_mib) {
    text_add_u64(size, upper_mib / 2 + 1);
    text_add(size, "m");
}

static void mount_devices(uint64_t upper_mib) {
    char buffer[64];
    struct text size;
    make_folder("/dev", 0755);
    must(mount("tmpfs", "/dev", "tmpfs", MS_NOSUID | MS_NOEXEC, "mode=755,size=64k,nr_inodes=64"), "/dev");
    for (unsigned i = 0; i < COUNT(NODES); i++) {
        must(mknod(NODES[i].path, S_IFCHR | 0666, makedev(NODES[i].major, NODES[i].minor)), NODES[i].path);
    }
    for (unsigned i = 0; i < COUNT(LINKS); i++) {
        must(symlink(LINKS[i][0], LINKS[i][1]), LINKS[i][1]);
    }
    make_folder("/dev/pts", 0755);
    must(mount("devpts", "/dev/pts", "devpts", MS_NOSUID | MS_NOEXEC,
               "newinstance,ptmxmode=0666,mode=620,gid=5"),
         "/dev/pts");
    make_folder("/dev/shm", 01777);
    text_init(&size, buffer, sizeof(buffer));
    text_add(&size, "mode=1777,size=");
    shm_size(&size, upper_mib);
    must(mount("shm", "/dev/shm", "tmpfs", MS_NOSUID | MS_NOEXEC | MS_NODEV, size.data), "/dev/shm");
}

static void cover(void) {
    const unsigned long flags = MS_NOSUID | MS_NODEV | MS_NOEXEC;
    for (unsigned i = 0; i < COUNT(READ_ONLY); i++) {
        if (mount(READ_ONLY[i], READ_ONLY[i], NULL, MS_BIND | MS_REC, NULL) == 0) {
            must(mount(NULL, READ_ONLY[i], NULL, MS_BIND | MS_REMOUNT | MS_RDONLY | flags, NULL),
                 READ_ONLY[i]);
        } else {
            must(errno == ENOENT ? 0 : -1, READ_ONLY[i]);
        }
    }
    for (unsigned i = 0; i < COUNT(HIDDEN_FILES); i++) {
        must(mount("/dev/null", HIDDEN_FILES[i], NULL, MS_BIND, NULL) < 0 && errno != ENOENT ? -1 : 0,
             HIDDEN_FILES[i]);
    }
    for (unsigned i = 0; i < COUNT(HIDDEN_FOLDERS); i++) {
        int done = mount("tmpfs", HIDDEN_FOLDERS[i], "tmpfs", MS_RDONLY | flags, "size=0k,nr_inodes=2");
        must(done < 0 && errno != ENOENT && errno != ENOTDIR ? -1 : 0, HIDDEN_FOLDERS[i]);
    }
}

/* A mount of the file with the boot id, in no namespace yet: the agent's paths are soon out of reach. */
static int boot_id_tree(void) {
    struct mount_attr attributes = {.attr_set = MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV |
                                                MOUNT_ATTR_NOEXEC};
    int tree = open_tree(AT_FDCWD, BOOT_ID_FILE, OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC);
    must(tree, BOOT_ID_FILE);
    must(mount_setattr(tree, "", AT_EMPTY_PATH, &attributes, sizeof(attributes)), BOOT_ID_FILE);
    return tree;
}

static void furnish(const struct agent *agent) {
    const unsigned long flags = MS_NOSUID | MS_NODEV | MS_NOEXEC;
    int boot_id =
        agent->in_guest ? boot_id_tree() : -1; /* without a kernel of its own it has no boot of its own */
    umask(0);
    enter_root(agent);
    make_folder("/proc", 0555);
    make_folder("/sys", 0555);
    must(mount("proc", "/proc", "proc", flags, NULL), "/proc");
    must(mount("sysfs", "/sys", "sysfs", flags | MS_RDONLY, NULL), "/sys");
    mount_devices(agent->pending.upper_mib);
    cover();
    if (boot_id >= 0) {
        must(move_mount(boot_id, "", AT_FDCWD, "/proc/sys/kernel/random/boot_id", MOVE_MOUNT_F_EMPTY_PATH),
             "boot id");
    }
}

/* PID 1 of the workload. With SIGCHLD ignored the kernel reaps for it; nothing else is ever asked of it. */
static _Noreturn void init_run(const struct agent *agent, int go_fd) {
    struct report ready = {.pid = getpid()};
    sigset_t none;
    char byte;
    prctl(PR_SET_NAME, "init");
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    signal(SIGCHLD, SIG_IGN);
    must(unshare(CLONE_NEWNS | CLONE_NEWIPC), "namespaces");
    furnish(agent);
    must((int)write(report_fd, &ready, sizeof(ready)), "status pipe");
    ssize_t ignored = read(go_fd, &byte, 1); /* until the agent holds what it needs of us */
    (void)ignored;
    close_range(0, ~0u, 0);
    prctl(PR_SET_DUMPABLE, 0, 0, 0, 0);
    capabilities_limit(true);
    capabilities_apply(true);
    sigfillset(&none);
    sigdelset(&none, SIGCHLD);
    sigprocmask(SIG_SETMASK, &none, NULL);
    for (;;) {
        pause();
    }
}

static int open_of(pid_t pid, const char *name, int flags) {
    char buffer[64];
    struct text path;
    text_init(&path, buffer, sizeof(buffer));
    text_add(&path, "/proc/");
    text_add_u64(&path, (uint64_t)pid);
    text_add(&path, name);
    return open(path.data, flags | O_CLOEXEC);
}

static bool hold(struct world *world) {
    struct statfs info;
    world->mnt_fd = open_of(world->init, "/ns/mnt", O_RDONLY);
    world->ipc_fd = open_of(world->init, "/ns/ipc", O_RDONLY);
    world->pid_fd = open_of(world->init, "/ns/pid", O_RDONLY);
    world->pts_fd = open_of(world->init, "/root/dev/pts", O_RDONLY | O_DIRECTORY);
    world->proc_fd = open_of(world->init, "/root/proc", O_RDONLY | O_DIRECTORY);
    world->shm_fd = open_of(world->init, "/root/dev/shm", O_RDONLY | O_DIRECTORY);
    return world->mnt_fd >= 0 && world->ipc_fd >= 0 && world->pid_fd >= 0 && world->pts_fd >= 0 &&
           world->proc_fd >= 0 && fstatfs(world->shm_fd, &info) == 0 && info.f_type == TMPFS_MAGIC &&
           fstatfs(world->pts_fd, &info) == 0 && info.f_type == DEVPTS_SUPER_MAGIC &&
           fstatfs(world->proc_fd, &info) == 0 && info.f_type == PROC_SUPER_MAGIC;
}

/* The size of /dev/shm, by the descriptor that was opened when it was mounted. */
int world_resize(struct agent *agent) {
    char buffer[32];
    struct text size;
    text_init(&size, buffer, sizeof(buffer));
    shm_size(&size, agent->pending.upper_mib);
    int context = fspick(agent->world.shm_fd, "", FSPICK_EMPTY_PATH | FSPICK_CLOEXEC);
    int error = context < 0 || fsconfig(context, FSCONFIG_SET_STRING, "size", size.data, 0) < 0 ||
                        fsconfig(context, FSCONFIG_CMD_RECONFIGURE, NULL, NULL, 0) < 0
                    ? errno
                    : 0;
    if (context >= 0) {
        close(context);
    }
    return error ? because(agent, error, "/dev/shm: size ", size.data) : 0;
}

/* From now on children of this process are born where it lives itself. */
static int own_pid_namespace(void) {
    int own = open("/proc/self/ns/pid", O_RDONLY | O_CLOEXEC);
    int failed = own < 0 || setns(own, CLONE_NEWPID) < 0 ? errno : 0;
    if (own >= 0) {
        close(own);
    }
    return failed;
}

static pid_t plain_fork(const struct agent *agent) {
    (void)agent;
    return fork();
}

/* From where a PID namespace can be made, too. */
static pid_t fork_outside(struct agent *agent, pid_t (*how)(const struct agent *)) {
    errno = own_pid_namespace();
    if (errno != 0) {
        return -1;
    }
    pid_t pid = how(agent);
    if (pid != 0 && setns(agent->world.pid_fd, CLONE_NEWPID) < 0) {
        int error = errno;
        if (pid > 0) {
            kill(pid, SIGKILL);
        }
        world_kill(agent); /* nothing more can be started in it */
        errno = error;
        return -1;
    }
    return pid;
}

/* A child in a PID namespace of its own beside the workload's, which sees nothing of it: neither a process
 * nor a number that was used. When this child ends, the kernel has ended all that it made. */
pid_t world_fork_apart(struct agent *agent) {
    return fork_outside(agent, freezer_fork_apart);
}

/* A child of the agent's own kind: the workload neither sees nor freezes it. */
pid_t world_fork_beside(struct agent *agent) {
    return fork_outside(agent, plain_fork);
}

int world_start(struct agent *agent) {
    struct report report = {.error = ECHILD, .text = "the workload's init died"};
    int status[2], go[2];
    /* Back first, after an attempt that failed: a namespace cannot be made below one that one is not in. */
    int error = own_pid_namespace();
    error = error ? error : unshare(CLONE_NEWPID) < 0 ? errno : 0;
    if (error || pipe2(status, O_CLOEXEC) < 0) {
        return because(agent, error ? error : errno, "PID namespace", "");
    }
    if (pipe2(go, O_CLOEXEC) < 0) {
        close(status[0]);
        close(status[1]);
        return because(agent, errno, "pipe", "");
    }
    agent->world.ended = false;
    agent->world.init = freezer_fork(agent);
    if (agent->world.init == 0) {
        close(status[0]);
        close(go[1]);
        report_fd = status[1];
        init_run(agent, go[0]);
    }
    close(status[1]);
    close(go[0]);
    if (agent->world.init > 0 && read(status[0], &report, sizeof(report)) == (ssize_t)sizeof(report) &&
        report.error == 0 && !hold(&agent->world)) {
        report.error = EIO;
        strcpy(report.text, "the workload's /proc or /dev/pts is not what was mounted");
    }
    close(status[0]);
    close(go[1]);
    if (agent->world.init < 0 || report.error != 0) {
        world_kill(agent);
        return because(agent, report.error, "preparing the workload: ", report.text);
    }
    return 0;
}

void world_leave(struct agent *agent) {
    world_kill(agent);
    own_pid_namespace();
}

void world_kill(struct agent *agent) {
    agent->world.ended = true;
    if (agent->world.init > 0) {
        kill(agent->world.init, SIGKILL); /* the kernel kills everything in its namespace with it */
    }
}
