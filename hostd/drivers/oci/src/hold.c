/* A checkpoint of a user-space kernel ends it; the sandbox goes on in another one, from what was saved.
 *
 * FREEZE   main is held: its end does not count, and the monitor keeps the far ends of its pipes, so that
 * what is in them stays when it has ended and all that it had printed was taken: the file `lapsed`, "OUT
 * ERR", its offsets THAW     without a file `again`: as it was, or, when it has ended, it has, as if killed;
 * with one: the command in it is started on the kept ends as soon as main has ended, and the reply tells
 * whether that works
 */
#include "monitor.h"
#include "text.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <unistd.h>

static int far_end(int fd, int flags) {
    char path[48];
    struct text text;
    text_init(&text, path, sizeof(path));
    text_add(&text, "/proc/self/fd/");
    text_add_u64(&text, (uint64_t)fd);
    return open(path, flags | O_CLOEXEC);
}

static void let_go(struct process *process) {
    for (size_t i = 0; i < 3; i++) {
        close_fd(&process->kept[i]);
    }
    process->held = process->lapsed = process->lapse_told = process->again = false;
    process->again_id = 0;
}

int hold_begin(struct process *process) {
    if (process->stage != STAGE_RUNNING || process->pid == 0 || process->held) {
        return EBUSY;
    }
    if (process->with_init || process->tty) {
        return EOPNOTSUPP;
    }
    process->kept[0] =
        process->in >= 0 ? far_end(process->in, O_RDONLY) : open("/dev/null", O_RDONLY | O_CLOEXEC);
    process->kept[1] =
        process->out >= 0 ? far_end(process->out, O_WRONLY) : open("/dev/null", O_WRONLY | O_CLOEXEC);
    process->kept[2] =
        process->err >= 0 ? far_end(process->err, O_WRONLY) : open("/dev/null", O_WRONLY | O_CLOEXEC);
    for (size_t i = 0; i < 3; i++) {
        if (process->kept[i] < 0) {
            int error = errno;
            let_go(process);
            return error;
        }
    }
    unlink("lapsed");
    process->held = true;
    return 0;
}

static void go_on(struct monitor *monitor, struct process *process) {
    int error;
    process->again = true;
    process->stage = STAGE_STARTING;
    process->lapsed = false;
    if (spawn_again(process, &monitor->settings, &error) != NULL) {
        hold_over(monitor, process, false);
    }
}

int hold_end(struct monitor *monitor, struct process *process, uint32_t id) {
    if (!process->held) {
        return 0;
    }
    if (process->again || process->again_id != 0) {
        return EBUSY;
    }
    if (access("again", F_OK) == 0) {
        process->again_id = id;
        if (process->lapsed) {
            go_on(monitor, process);
        }
        return -1;
    }
    bool lapsed = process->lapsed;
    let_go(process);
    if (lapsed) {
        process_ended(monitor, process, SIGKILL);
    }
    return lapsed ? ESRCH : 0;
}

bool hold_takes(struct monitor *monitor, struct process *process, int wait_status) {
    if (!process->held || process->again) {
        return false;
    }
    process->pid = 0;
    process->lapsed = true;
    process->wait_status = wait_status;
    if (process->again_id != 0) {
        go_on(monitor, process);
    }
    return true;
}

static bool is_empty(int fd) {
    int waiting = 0;
    return fd < 0 || ioctl(fd, FIONREAD, &waiting) < 0 || waiting == 0;
}

void hold_tell(struct process *process) {
    if (!process->lapsed || process->lapse_told || !is_empty(process->out) || !is_empty(process->err)) {
        return;
    }
    char line[64];
    struct text text;
    text_init(&text, line, sizeof(line));
    text_add_u64(&text, window_end(&process->streams[0].window));
    text_add(&text, " ");
    text_add_u64(&text, window_end(&process->streams[1].window));
    text_add(&text, "\n");
    int fd = open("lapsed.new", O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    if (fd >= 0 && write(fd, line, text.length) == (ssize_t)text.length) {
        process->lapse_told = rename("lapsed.new", "lapsed") == 0;
    }
    close_fd(&fd);
}

void hold_over(struct monitor *monitor, struct process *process, bool runs) {
    uint32_t id = process->again_id;
    let_go(process);
    if (!runs) {
        process->pid = 0;
        process->wait_status = SIGKILL; /* for the host: its kernel is gone */
        process->stage = STAGE_ENDED;
    }
    reply_errno(monitor, id, runs ? 0 : EIO);
}
