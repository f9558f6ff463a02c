/* The processes of a sandbox: their start through the runtime, their streams, their end. */
#include "monitor.h"
#include "text.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

static const char END_OF_INPUT = 4; /* ^D, what a terminal takes for end of file */

void process_init(struct process *process, uint32_t proc) {
    memset(process, 0, sizeof(*process));
    process->proc = proc;
    process->in = process->out = process->err = process->console = process->reports = process->pidfd = -1;
    process->kept[0] = process->kept[1] = process->kept[2] = -1;
}

void unlink_own(const struct process *process, const char *suffix) {
    char name[32];
    struct text text;
    text_init(&text, name, sizeof(name));
    text_add_u64(&text, process->proc);
    text_add(&text, suffix);
    unlink(name);
}

void process_free(struct process *process) {
    int *fds[] = {&process->in,    &process->out,     &process->err,     &process->console, &process->reports,
                  &process->pidfd, &process->kept[0], &process->kept[1], &process->kept[2]};
    for (size_t i = 0; i < sizeof(fds) / sizeof(fds[0]); i++) {
        close_fd(fds[i]);
    }
    unlink_own(process, ".pid");
    unlink_own(process, ".tty");
    free(process->streams[0].window.ring);
    free(process->streams[1].window.ring);
    free(process->input.window.ring);
    process_init(process, 0);
}

struct process *process_find(struct monitor *monitor, uint32_t proc) {
    for (size_t i = 0; i < MAX_PROCS; i++) {
        if (monitor->processes[i].proc == proc) {
            return &monitor->processes[i];
        }
    }
    return NULL;
}

/* The start failed: says so, with what the runtime printed, and forgets the process. When hostd went away
 * meanwhile the process has ended instead, as the next one will see. */
static void refuse(struct monitor *monitor, struct process *process, int error, const char *fallback) {
    if (process->again) {
        hold_over(monitor, process, false);
        return;
    }
    if (process->start_id == 0) {
        process->stage = STAGE_ENDED;
        process->wait_status = (error == ENOENT ? 127 : 126) << 8;
        process->pid = 0;
        return;
    }
    char text[4096];
    ssize_t size = process->err >= 0 ? read(process->err, text, sizeof(text)) : 0;
    while (size > 0 && (text[size - 1] == '\n' || text[size - 1] == ' ')) {
        size--;
    }
    size_t skip = size > TEXT_BYTES ? (size_t)size - TEXT_BYTES : 0;
    if (size > 0) {
        reply_refusal(monitor, process->start_id, error, text + skip, (size_t)size - skip);
    } else {
        reply_refusal(monitor, process->start_id, error, fallback, strlen(fallback));
    }
    process_free(process);
}

/* The number in the file PROC.pid, 0 when there is none. */
static pid_t read_pid_file(const struct process *process) {
    char name[32], digits[24];
    struct text text;
    uint64_t value = 0;
    text_init(&text, name, sizeof(name));
    text_add_u64(&text, process->proc);
    text_add(&text, ".pid");
    int fd = open(name, O_RDONLY | O_CLOEXEC | O_NOFOLLOW);
    ssize_t size = fd >= 0 ? read(fd, digits, sizeof(digits)) : 0;
    close_fd(&fd);
    while (size > 0 && digits[size - 1] == '\n') {
        size--;
    }
    return size > 0 && parse_u64(digits, (size_t)size, &value) && value < INT32_MAX ? (pid_t)value : 0;
}

/* The workload runs. */
static void started(struct monitor *monitor, struct process *process) {
    process->stage = STAGE_RUNNING;
    if (process->again) {
        hold_over(monitor, process, true);
        return;
    }
    if (process->tty) {
        close_fd(&process->err);
        process->streams[1].closed = true;
    }
    reply_pid(monitor, process->start_id, process->pid);
    process->start_id = 0;
    if (process->doomed) {
        process_signal(process, SIGKILL);
    }
}

void process_ended(struct monitor *monitor, struct process *process, int wait_status) {
    if (hold_takes(monitor, process, wait_status)) {
        return;
    }
    process_report(monitor, process); /* init's last word comes before init's end */
    if (process->proc == 0) {
        return; /* it said that exec failed: refused and forgotten */
    }
    if (!process->told) {
        process->wait_status = wait_status;
    }
    process->pid = 0;
    close_fd(&process->pidfd);
    close_fd(&process->reports);
    if (process->stage == STAGE_STARTING) {
        refuse(monitor, process, EIO, "it ended before it had started");
        return;
    }
    process->stage = STAGE_ENDED;
}

/* The runtime's command is done: with status 0 the workload's pid is in its file. What runs behind init has
 * told its start, and its pid, before. */
static void runtime_done(struct monitor *monitor, struct process *process, int wait_status) {
    bool failed = !WIFEXITED(wait_status) || WEXITSTATUS(wait_status) != 0;
    process->runtime = 0;
    if (process->with_init) {
        process_report(monitor, process);
    }
    pid_t told = failed ? 0 : read_pid_file(process);
    unlink_own(process, ".pid");
    if (process->proc == 0 || process->stage != STAGE_STARTING) {
        if (failed && process->pid != 0) {
            kill(process->pid, SIGKILL); /* it runs, but the runtime does not know it */
        }
    } else if (failed) {
        refuse(monitor, process, EIO, "the runtime ended without a word");
    } else if (told == 0) {
        refuse(monitor, process, EIO, "the runtime told no pid");
    } else if (process->tty && !process_take_terminal(process)) {
        kill(told, SIGKILL);
        refuse(monitor, process, EIO, "the runtime sent no terminal");
    } else {
        process->pid = told;
        if (!process->with_init) {
            started(monitor, process);
        }
    }
    for (size_t i = 0; i < MAX_UNCLAIMED && process->proc != 0 && process->pid != 0; i++) {
        struct unclaimed *one = &monitor->unclaimed[i];
        if (one->pid == process->pid) {
            one->pid = 0;
            process_ended(monitor, process, one->wait_status);
        }
    }
}

void process_settle(struct monitor *monitor, struct process *process) {
    int status;
    if (process->runtime != 0 && process->stage == STAGE_RUNNING &&
        waitpid(process->runtime, &status, 0) == process->runtime) {
        runtime_done(monitor, process, status);
    }
}

/* Main's own process: the only child of init at that moment. */
static int open_main(pid_t init) {
    char path[64], digits[24];
    struct text text;
    uint64_t pid = 0;
    text_init(&text, path, sizeof(path));
    text_add(&text, "/proc/");
    text_add_u64(&text, (uint64_t)init);
    text_add(&text, "/task/");
    text_add_u64(&text, (uint64_t)init);
    text_add(&text, "/children");
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t size = fd >= 0 ? read(fd, digits, sizeof(digits)) : 0;
    close_fd(&fd);
    size_t length = 0;
    while ((ssize_t)length < size && digits[length] != ' ') {
        length++;
    }
    if (length == 0 || (ssize_t)length == size || !parse_u64(digits, length, &pid) || pid > INT32_MAX) {
        return -1;
    }
    return (int)syscall(SYS_pidfd_open, (pid_t)pid, 0);
}

/* One report and, by the kernel's word, the pid of who sent it. */
static ssize_t read_report(int fd, struct report *report, pid_t *sender) {
    char room[CMSG_SPACE(sizeof(struct ucred))];
    struct iovec data = {report, sizeof(*report)};
    struct msghdr message = {
        .msg_iov = &data, .msg_iovlen = 1, .msg_control = room, .msg_controllen = sizeof(room)};
    struct ucred who;
    ssize_t size;
    do {
        size = recvmsg(fd, &message, MSG_CMSG_CLOEXEC | MSG_DONTWAIT);
    } while (size < 0 && errno == EINTR);
    struct cmsghdr *head = size > 0 ? CMSG_FIRSTHDR(&message) : NULL;
    *sender = 0;
    if (head != NULL && head->cmsg_type == SCM_CREDENTIALS && head->cmsg_len == CMSG_LEN(sizeof(who))) {
        memcpy(&who, CMSG_DATA(head), sizeof(who));
        *sender = who.pid;
    }
    return size;
}

/* Init says that the command runs, or why it does not. */
static void take_start(struct monitor *monitor, struct process *process, uint32_t failed, pid_t init) {
    if (failed != 0) {
        int error = failed < 4096 ? (int)failed : EIO;
        close_fd(&process->err);
        refuse(monitor, process, error, strerror(error));
        return;
    }
    if (process->tty && !process_take_terminal(process)) {
        kill(init, SIGKILL);
        refuse(monitor, process, EIO, "the runtime sent no terminal");
        return;
    }
    process->pid = init;
    process->pidfd = open_main(init);
    started(monitor, process);
}

void process_report(struct monitor *monitor, struct process *process) {
    struct report report;
    pid_t sender;
    ssize_t size;
    while (process->reports >= 0 && (size = read_report(process->reports, &report, &sender)) > 0) {
        if (size != sizeof(report) || sender <= 0) {
            continue;
        }
        if (report.kind == REPORT_STARTED && process->stage == STAGE_STARTING) {
            take_start(monitor, process, report.value, sender);
        } else if (report.kind == REPORT_ENDED && sender == process->pid && !process->told) {
            process->told = true;
            process->wait_status = (int)report.value;
        }
    }
}

void processes_reap(struct monitor *monitor) {
    int status;
    pid_t pid;
    while ((pid = waitpid(-1, &status, WNOHANG)) > 0) {
        if (pid == monitor->supervisor) {
            supervisor_gone(monitor, status);
        }
        bool claimed = false;
        for (size_t i = 0; i < MAX_PROCS && !claimed; i++) {
            struct process *process = &monitor->processes[i];
            if (process->proc == 0) {
                continue;
            }
            claimed = process->runtime == pid || process->pid == pid;
            if (process->runtime == pid) {
                runtime_done(monitor, process, status);
            } else if (process->pid == pid) {
                process_ended(monitor, process, status);
            }
        }
        if (!claimed) {
            monitor->unclaimed[monitor->next_unclaimed++ % MAX_UNCLAIMED] = (struct unclaimed){pid, status};
        }
    }
}

/* Reads what fits; at the end of the process, what is there is all there will be. */
static void pump_output(struct output *output, int *fd, bool process_ended) {
    while (*fd >= 0 && window_room(&output->window) > 0) {
        uint32_t room;
        if (output->window.ring == NULL && (output->window.ring = malloc(WINDOW_BYTES)) == NULL) {
            return;
        }
        uint8_t *at = window_space(&output->window, &room);
        ssize_t size = read(*fd, at, room);
        if (size > 0) {
            window_add(&output->window, (uint32_t)size);
        } else if (size < 0 && errno == EINTR) {
            continue;
        } else if (size < 0 && errno == EAGAIN && !process_ended) {
            return;
        } else {
            close_fd(fd);
        }
    }
    output->closed = *fd < 0;
}

static void pump_input(struct process *process) {
    struct input *input = &process->input;
    while (process->in >= 0 && input->window.held > 0) {
        uint32_t size;
        const uint8_t *at = window_at(&input->window, input->window.base, &size);
        ssize_t done = write(process->in, at, size);
        if (done > 0) {
            window_drop(&input->window, (uint32_t)done);
        } else if (done < 0 && errno == EINTR) {
            continue;
        } else if (done < 0 && errno == EAGAIN) {
            return;
        } else {
            close_fd(&process->in);
        }
    }
    if (process->in >= 0 && input->end_taken && input->window.held == 0) {
        if (process->tty && write(process->in, &END_OF_INPUT, 1) < 0 && errno == EAGAIN) {
            return;
        }
        close_fd(&process->in);
    }
    if (process->in < 0 && process->stage != STAGE_STARTING) {
        input_drop(input);
    }
}

void process_pump(struct process *process) {
    bool over = process->stage == STAGE_ENDED;
    if (process->stage == STAGE_STARTING) {
        return;
    }
    pump_output(&process->streams[0], &process->out, over);
    pump_output(&process->streams[1], &process->err, over);
    hold_tell(process);
    if (over || (process->tty && process->out < 0)) {
        close_fd(&process->in);
    }
    pump_input(process);
}

int process_signal(struct process *process, int signo) {
    if (process->stage == STAGE_STARTING && signo == SIGKILL) {
        process->doomed = true;
        return 0;
    }
    if (process->pid == 0 || process->stage != STAGE_RUNNING) {
        return ESRCH;
    }
    if (process->pidfd >= 0) {
        return syscall(SYS_pidfd_send_signal, process->pidfd, signo, NULL, 0) < 0 ? errno : 0;
    }
    return kill(process->pid, signo) < 0 ? errno : 0;
}
