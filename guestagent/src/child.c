#include "child.h"

#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <termios.h>
#include <unistd.h>

#include "supervise.h"
#include "text.h"
#include "user.h"

enum { STATUS_FD = 3, PATH_BYTES = 4096, OPEN_FILES_SOFT = 1024, OPEN_FILES_HARD = 524288 };

#define DEFAULT_PATH "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

static int status_fd;

static _Noreturn void fail(int error, const char *what, const void *subject, size_t size) {
    struct report report = {.error = error};
    struct text text;
    const char *name = strerrordesc_np(error);
    text_init(&text, report.text, sizeof(report.text));
    text_add(&text, what);
    text_add_printable(&text, subject, size > 120 ? 120 : size);
    text_add(&text, text.length > 0 ? ": " : "");
    text_add(&text, name ? name : "unknown error");
    ssize_t ignored = write(status_fd, &report, sizeof(report));
    (void)ignored; /* the agent sees the exit then */
    _exit(127);
}

static void check(int result, const char *what) {
    if (result < 0) {
        fail(errno, what, "", 0);
    }
}

/* By system call: libc keeps signals 32 and 33 for itself and refuses to touch them, but an exec hands on
 * what is ignored all the same. */
static void reset_signals(void) {
    struct {
        uint64_t handler, flags, restorer, mask;
    } standard = {0}; /* SIG_DFL; struct sigaction of the kernel's x86-64 ABI (asm/signal.h) */
    sigset_t none;
    for (int signal = 1; signal <= MAX_SIGNAL; signal++) {
        syscall(SYS_rt_sigaction, signal, &standard, NULL, sizeof(standard.mask));
    }
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
}

/* 0, 1, 2 and the status pipe at 3; nothing else of the agent's stays open. */
static void place_files(const struct child *child) {
    int in = fcntl(child->in, F_DUPFD, 10), out = fcntl(child->out, F_DUPFD, 10),
        err = fcntl(child->err, F_DUPFD, 10);
    status_fd = fcntl(child->status, F_DUPFD_CLOEXEC, 10);
    check(in | out | err | status_fd, "files");
    check(dup2(in, 0), "stdin");
    check(dup2(out, 1), "stdout");
    check(dup2(err, 2), "stderr");
    check(dup3(status_fd, STATUS_FD, O_CLOEXEC), "status pipe");
    status_fd = STATUS_FD;
    check(close_range(STATUS_FD + 1, ~0u, 0), "files");
}

static void feed_file(const char *path, struct user *user,
                      void (*feed)(struct user *, struct lines *, const char *, size_t)) {
    struct lines lines = {.size = 0};
    struct stat info;
    char piece[1024];
    ssize_t size;
    /* The image may have anything here: a fifo must not hold us up, and no file is read without end. */
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
    if (fd < 0) {
        return;
    }
    for (size_t total = 0; fstat(fd, &info) == 0 && S_ISREG(info.st_mode) && total < (1u << 20);
         total += (size_t)size) {
        size = read(fd, piece, sizeof(piece));
        if (size <= 0) {
            break;
        }
        feed(user, &lines, piece, (size_t)size);
    }
    feed(user, &lines, "\n", 1);
    close(fd);
}

static void find_user(const struct bytes *asked, struct user *user) {
    if (!user_parse(user, asked->data, asked->size)) {
        fail(EINVAL, "user ", asked->data, asked->size);
    }
    feed_file("/etc/passwd", user, user_passwd_feed);
    feed_file("/etc/group", user, user_group_feed);
    if (!user->uid_known || (user->group[0] != '\0' && !user->gid_known)) {
        fail(EINVAL,
             user->uid_known ? "no such group in the image: " : "no such user in the image: ", asked->data,
             asked->size);
    }
}

/* While it may still be done; what is left to do until exec makes no call that is served. */
static void confine(const struct policy *policy) {
    struct report with = {.pid = getpid()};
    union {
        struct cmsghdr header;
        char room[CMSG_SPACE(sizeof(int))];
    } extra = {
        .header = {.cmsg_len = CMSG_LEN(sizeof(int)), .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS}};
    struct iovec piece = {&with, sizeof(with)};
    struct msghdr message = {
        .msg_iov = &piece, .msg_iovlen = 1, .msg_control = &extra, .msg_controllen = sizeof(extra)};
    int listener = filter_install(policy);
    if (listener < 0 && errno == 0) {
        return;
    }
    check(listener, "seccomp");
    memcpy(CMSG_DATA(&extra.header), &listener, sizeof(listener));
    check((int)sendmsg(status_fd, &message, 0), "status socket");
    close(listener);
}

static void become(const struct user *user, bool powerless) {
    gid_t groups[MAX_GROUPS];
    for (uint32_t i = 0; i < user->group_count; i++) {
        groups[i] = user->groups[i];
    }
    for (int fd = 0; fd < 3; fd++) { /* so that /dev/stdout and the terminal can be opened again */
        struct stat info;
        if (fstat(fd, &info) == 0 && (S_ISFIFO(info.st_mode) || isatty(fd))) {
            check(fchown(fd, user->uid, (gid_t)-1), "stdio");
        }
    }
    errno = capabilities_limit(powerless);
    check(errno ? -1 : 0, "capabilities");
    check(setgroups(user->group_count, groups), "groups");
    check(setresgid(user->gid, user->gid, user->gid), "gid");
    check(setresuid(user->uid, user->uid, user->uid), "uid");
    if (user->uid == 0) {
        errno = capabilities_apply(false);
        check(errno ? -1 : 0, "capabilities");
    }
}

static char *copy(const struct bytes *text) {
    char *made = malloc(text->size + 1);
    if (made == NULL) {
        fail(ENOMEM, "memory", "", 0);
    }
    if (text->size > 0) {
        memcpy(made, text->data, text->size);
    }
    made[text->size] = '\0';
    return made;
}

static char **strings(const msgpack_object_array *array, uint32_t extra) {
    char **made = calloc(array->size + extra + 1, sizeof(*made));
    if (made == NULL) {
        fail(ENOMEM, "memory", "", 0);
    }
    for (uint32_t i = 0; i < array->size; i++) {
        struct bytes item = {array->ptr[i].via.bin.ptr, array->ptr[i].via.bin.size};
        made[i] = copy(&item);
    }
    return made;
}

static const char *variable(char *const *env, const char *name) {
    size_t size = strlen(name);
    const char *found = NULL;
    for (; *env != NULL; env++) {
        if (strncmp(*env, name, size) == 0 && (*env)[size] == '=') {
            found = *env + size + 1; /* the last one counts, as in a shell */
        }
    }
    return found;
}

/* The first of PATH's entries that holds the command; what made the others fail decides the error. */
static _Noreturn void run(char **argv, char **env) {
    const char *name = argv[0], *path = variable(env, "PATH");
    if (strchr(name, '/') != NULL) {
        execve(name, argv, env);
        int error = errno;
        bool there = error == ENOENT && access(name, F_OK) == 0;
        fail(error, there ? "its interpreter is missing: " : "", name, strlen(name));
    }
    int worst = ENOENT;
    for (const char *at = path ? path : DEFAULT_PATH; at != NULL;) {
        char full[PATH_BYTES];
        struct text text;
        const char *colon = strchr(at, ':');
        text_init(&text, full, sizeof(full));
        text_add_bytes(&text, at, colon ? (size_t)(colon - at) : strlen(at));
        text_add(&text, text.length > 0 ? "/" : "./");
        text_add(&text, name);
        at = colon ? colon + 1 : NULL;
        if (text.cut) {
            continue;
        }
        execve(full, argv, env);
        if (errno == EACCES) {
            worst = EACCES;
        } else if (errno != ENOENT && errno != ENOTDIR) {
            fail(errno, "", full, strlen(full));
        }
    }
    fail(worst, worst == ENOENT ? "not found in PATH: " : "", name, strlen(name));
}

static void standard_limits(void) {
    struct rlimit files = {OPEN_FILES_SOFT, OPEN_FILES_HARD};
    setrlimit(RLIMIT_NOFILE, &files); /* as it was, where that is not allowed */
    int fd = open("/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC);
    if (fd >= 0) {
        ssize_t ignored = write(fd, "0", 1); /* only the agent is spared */
        (void)ignored;
        close(fd);
    }
    umask(022);
}

_Noreturn void child_run(const struct child *child) {
    const struct start *start = child->start;
    struct report hello = {.pid = getpid()};
    struct user user;
    prctl(PR_SET_DUMPABLE, 0, 0, 0, 0); /* it is the agent's memory until exec: nobody may look */
    reset_signals();
    status_fd = child->status;
    check((int)write(status_fd, &hello, sizeof(hello)), "status pipe");
    check(child->rehearsal ? rehearsal_enter() : 0, "rehearsal");
    check(setns(child->mnt_fd, CLONE_NEWNS), "mount namespace");
    check(child->rehearsal ? rehearsal_confine() : setns(child->ipc_fd, CLONE_NEWIPC), "IPC namespace");
    place_files(child);
    check(chdir("/"), "root");
    check(setsid(), "session");
    if (start->tty) {
        check(ioctl(0, TIOCSCTTY, 0), "terminal");
    }
    char **argv = strings(&start->argv, 0), **env = strings(&start->env, 1);
    char *cwd = copy(&start->cwd);
    find_user(&start->user, &user);
    if (variable(env, "HOME") == NULL) { /* only here is the guest's passwd read */
        char line[HOME_BYTES + 8];
        struct text text;
        text_init(&text, line, sizeof(line));
        text_add(&text, "HOME=");
        text_add(&text, user.home[0] != '\0' ? user.home : "/");
        struct bytes home = {line, text.length};
        env[start->env.size] = copy(&home);
    }
    standard_limits();
    if (child->rehearsal) {
        user = (struct user){.uid = REHEARSAL_UID, .gid = REHEARSAL_UID};
    }
    if (!child->rehearsal) {
        confine(child->policy);
    }
    become(&user, child->rehearsal);
    if (chdir(cwd) < 0) {
        struct text why;
        char buffer[64];
        text_init(&why, buffer, sizeof(buffer));
        text_add(&why, "cwd (");
        text_add(&why, strerrordesc_np(errno));
        text_add(&why, ") ");
        fail(EINVAL, why.data, cwd, strlen(cwd));
    }
    check(child->rehearsal ? rehearsal_bound() : 0, "rehearsal");
    run(argv, env);
}
