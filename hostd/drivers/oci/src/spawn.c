/* Starting a runtime's command with the pipes that its workload will keep. */
#include "monitor.h"
#include "text.h"

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

enum { FIRST_FREE_FD = 16 };

void close_fd(int *fd) {
    if (*fd >= 0) {
        close(*fd);
        *fd = -1;
    }
}

/* NUL-terminated copies in one piece of memory: a vector, then its strings. */
static char **strings(const msgpack_object_array *array) {
    size_t size = (array->size + 1) * sizeof(char *);
    for (uint32_t i = 0; i < array->size; i++) {
        size += array->ptr[i].via.bin.size + 1;
    }
    char **vector = malloc(size);
    if (vector == NULL) {
        return NULL;
    }
    char *at = (char *)(vector + array->size + 1);
    for (uint32_t i = 0; i < array->size; i++) {
        size_t length = array->ptr[i].via.bin.size;
        vector[i] = at;
        memcpy(at, array->ptr[i].via.bin.ptr, length);
        at[length] = '\0';
        at += length + 1;
    }
    vector[array->size] = NULL;
    return vector;
}

/* Our end goes to *ours, made non-blocking; the child's is returned. -1 with errno. */
static int make_pipe(int *ours, bool we_read) {
    int ends[2];
    if (pipe2(ends, O_CLOEXEC) < 0) {
        return -1;
    }
    *ours = ends[we_read ? 0 : 1];
    fcntl(*ours, F_SETFL, O_NONBLOCK);
    return ends[we_read ? 1 : 0];
}

/* A pair of sockets: whoever writes to the other end is named by the kernel (SO_PASSCRED of unix(7)). */
static int make_reports(int *ours) {
    int ends[2], yes = 1;
    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends) < 0) {
        return -1;
    }
    *ours = ends[0];
    setsockopt(*ours, SOL_SOCKET, SO_PASSCRED, &yes, sizeof(yes));
    return ends[1];
}

static int make_console(uint32_t proc) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    struct text path;
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    text_init(&path, address.sun_path, sizeof(address.sun_path));
    text_add_u64(&path, proc);
    text_add(&path, ".tty");
    unlink(address.sun_path);
    if (fd >= 0 && (bind(fd, (struct sockaddr *)&address, sizeof(address)) < 0 || listen(fd, 1) < 0)) {
        close_fd(&fd);
    }
    return fd;
}

struct child_fds {
    int in, out, err, reports;
};

static _Noreturn void complain(const char *what, const char *which) {
    char line[512];
    struct text text;
    int error = errno;
    text_init(&text, line, sizeof(line));
    text_add(&text, what);
    text_add(&text, which);
    text_add(&text, ": ");
    text_add(&text, strerror(error));
    text_add(&text, "\n");
    ssize_t done = write(2, line, text.length);
    _exit(done < 0 ? 126 : 127);
}

static void hide(const struct settings *settings) {
    if (unshare(CLONE_NEWNS) < 0 || mount(NULL, "/", NULL, MS_REC | MS_SLAVE, NULL) < 0) {
        complain("cannot have its own mounts", "");
    }
    if (settings->hide != NULL && umount2(settings->hide, MNT_DETACH) < 0 && errno != EINVAL) {
        complain("cannot hide ", settings->hide);
    }
    if (settings->cover != NULL && mount("none", settings->cover, "tmpfs", MS_RDONLY, "size=4k") < 0) {
        complain("cannot cover ", settings->cover);
    }
}

static _Noreturn void child(char **argv, char **env, struct child_fds fds, const struct settings *settings) {
    int *all[] = {&fds.in, &fds.out, &fds.err, &fds.reports}, program = -1;
    for (size_t i = 0; i < sizeof(all) / sizeof(all[0]);
         i++) { /* out of the way of the numbers they will get */
        *all[i] = *all[i] < 0 ? -1 : fcntl(*all[i], F_DUPFD_CLOEXEC, FIRST_FREE_FD);
    }
    dup2(fds.err, 2);
    dup2(fds.in, 0);
    dup2(fds.out, 1);
    if (fds.reports >= 0) {
        program = fcntl(settings->program, F_DUPFD_CLOEXEC, FIRST_FREE_FD);
        dup2(program, INIT_PROGRAM_FD);
        dup2(fds.reports, INIT_REPORT_FD);
    }
    setsid();
    int oom = open("/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC);
    if (oom >= 0 && write(oom, "0", 1) < 0 &&
        errno != EACCES) { /* EACCES: it was above, and may not go down */
        complain("cannot set ", "/proc/self/oom_score_adj");
    }
    if (settings->hide != NULL || settings->cover != NULL) {
        hide(settings);
    }
    sigset_t none;
    sigemptyset(&none);
    signal(SIGPIPE, SIG_DFL);
    sigprocmask(SIG_SETMASK, &none, NULL);
    execve(argv[0], argv, env);
    complain("cannot run ", argv[0]);
}

static const char *make_fds(struct process *process, bool stdin_wanted, struct child_fds *theirs) {
    int null = open("/dev/null", O_RDWR | O_CLOEXEC);
    theirs->in = theirs->out = null;
    if (null < 0 || (theirs->err = make_pipe(&process->err, true)) < 0) {
        return "cannot make its pipes";
    }
    if (process->with_init && (theirs->reports = make_reports(&process->reports)) < 0) {
        return "cannot make init's socket";
    }
    if (process->tty) {
        process->console = make_console(process->proc);
        return process->console < 0 ? "cannot make its console socket" : NULL;
    }
    if (stdin_wanted && (theirs->in = make_pipe(&process->in, false)) < 0) {
        return "cannot make its stdin";
    }
    if ((theirs->out = make_pipe(&process->out, true)) < 0) {
        return "cannot make its stdout";
    }
    if (stdin_wanted) {
        close(null);
    }
    return NULL;
}

const char *spawn_runtime(struct process *process, const struct start *start, const struct settings *settings,
                          int *error) {
    struct child_fds theirs = {-1, -1, -1, -1};
    char **argv = strings(&start->argv), **env = strings(&start->env);
    const char *problem =
        argv != NULL && env != NULL ? make_fds(process, start->stdin_wanted, &theirs) : "out of memory";
    if (problem == NULL) {
        process->runtime = fork();
        if (process->runtime == 0) {
            child(argv, env, theirs, settings);
        }
        if (process->runtime < 0) {
            process->runtime = 0;
            problem = "cannot fork";
        }
    }
    *error = problem != NULL ? (errno != 0 ? errno : EIO) : 0;
    if (theirs.out != theirs.in) {
        close_fd(&theirs.out);
    }
    close_fd(&theirs.in);
    close_fd(&theirs.err);
    close_fd(&theirs.reports);
    free(argv);
    free(env);
    return problem;
}

/* FOLDER/again: the words of a command, each with its NUL. */
static char **read_again(char *text, size_t room, char **words, size_t most) {
    int fd = open("again", O_RDONLY | O_CLOEXEC | O_NOFOLLOW);
    ssize_t size = fd >= 0 ? read(fd, text, room) : -1;
    close_fd(&fd);
    size_t count = 0;
    if (size <= 0 || text[size - 1] != '\0') {
        return NULL;
    }
    for (char *at = text; at < text + size && count + 1 < most; at += strlen(at) + 1) {
        words[count++] = at;
    }
    words[count] = NULL;
    return count > 0 ? words : NULL;
}

const char *spawn_again(struct process *process, const struct settings *settings, int *error) {
    static char path[] = "PATH=/usr/sbin:/usr/bin:/sbin:/bin";
    char text[8192], *words[64], *env[] = {path, NULL};
    struct child_fds theirs = {process->kept[0], process->kept[1], process->kept[2], -1};
    char **argv = read_again(text, sizeof(text), words, sizeof(words) / sizeof(words[0]));
    *error = EINVAL;
    if (argv == NULL) {
        return "no command to go on with";
    }
    process->runtime = fork();
    if (process->runtime == 0) {
        child(argv, env, theirs, settings);
    }
    *error = errno;
    if (process->runtime < 0) {
        process->runtime = 0;
        return "cannot fork";
    }
    return NULL;
}
