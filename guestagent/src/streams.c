/* Between the pipes (or terminals) of processes and the host: reading, writing, and what to say of it. */
#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <termios.h>
#include <unistd.h>

#include "agent.h"

static bool ring_ready(struct window *window) {
    if (window->ring == NULL) {
        void *ring = mmap(NULL, WINDOW_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        window->ring = ring == MAP_FAILED ? NULL : ring;
    }
    return window->ring != NULL;
}

/* An empty window that was once large gives its pages back. */
static void ring_rest(struct window *window) {
    enum { KEEP = 4096 };
    if (window->held == 0 && window->peak > KEEP) {
        madvise(window->ring + KEEP, WINDOW_BYTES - KEEP, MADV_DONTNEED);
        window->peak = 0;
    }
}

static uint32_t slot_of(const struct agent *agent, const struct proc *proc) {
    return (uint32_t)(proc - agent->procs);
}

void stream_close(struct agent *agent, struct stream *stream) {
    if (stream->fd >= 0) {
        if (stream->watched) {
            unwatch(agent, stream->fd);
        }
        close(stream->fd);
    }
    stream->fd = -1;
    stream->watched = false;
    stream->out.closed = true;
}

void stream_settle(struct agent *agent, struct proc *proc, int which) {
    struct stream *stream = &proc->streams[which];
    ring_rest(&stream->out.window);
    if (stream->fd < 0) {
        return;
    }
    bool wanted = window_room(&stream->out.window) > 0;
    if (wanted && !stream->watched) {
        stream->watched = watch(agent, stream->fd, which == 0 ? ROLE_OUT : ROLE_ERR, slot_of(agent, proc),
                                proc->generation, stream->deserted ? EPOLLIN | EPOLLET : EPOLLIN) == 0;
    } else if (!wanted && stream->watched) { /* not only its EPOLLIN: EPOLLHUP cannot be masked */
        unwatch(agent, stream->fd);
        stream->watched = false;
    }
}

/* A terminal says EIO while nobody has it open. Closing ours then would hang up on a process that lives on,
 * if only to end: so it stays, and is looked at again when something happens to it (edge-triggered: the
 * hang-up is a level). */
static void desert(struct agent *agent, struct stream *stream, bool deserted) {
    if (stream->watched && stream->deserted != deserted) {
        unwatch(agent, stream->fd);
        stream->watched = false;
    }
    stream->deserted = deserted;
}

/* One read: level-triggered, so what is left comes on the next turn, after the other processes'. */
void stream_read(struct agent *agent, struct proc *proc, int which) {
    struct stream *stream = &proc->streams[which];
    uint32_t room = 0;
    if (stream->fd < 0 || !ring_ready(&stream->out.window)) {
        return;
    }
    uint8_t *at = window_space(&stream->out.window, &room);
    if (room > 0 && stream->left > 0) {
        ssize_t size = read(stream->fd, at, room < stream->left ? room : (size_t)stream->left);
        if (size > 0) {
            desert(agent, stream, false);
            window_add(&stream->out.window, (uint32_t)size);
            stream->left -= stream->left == UINT64_MAX ? 0 : (uint64_t)size;
        } else if (size < 0 && errno == EIO && proc->tty && proc->state == PROC_RUNNING) {
            desert(agent, stream, true);
        } else if (size == 0 || (errno != EAGAIN && errno != EINTR)) {
            stream->left = 0; /* its end */
        } else if (stream->left != UINT64_MAX) {
            stream->left = 0; /* somebody else took what was counted */
        }
    }
    if (stream->left == 0) {
        stream_close(agent, stream);
    }
    stream_settle(agent, proc, which);
}

void stdin_close(struct agent *agent, struct proc *proc) {
    if (proc->stdin_fd >= 0) {
        if (proc->stdin_watched) {
            unwatch(agent, proc->stdin_fd);
        }
        close(proc->stdin_fd);
    }
    proc->stdin_fd = -1;
    proc->stdin_watched = false;
    input_drop(&proc->in);
    if (proc->in.window.ring != NULL) {
        ring_rest(&proc->in.window);
    }
}

/* End of file: a pipe is closed, a terminal is told by its VEOF character. False when it has to wait for
 * room. */
static bool say_end(struct agent *agent, struct proc *proc) {
    struct termios mode;
    if (proc->tty) {
        char end = tcgetattr(proc->stdin_fd, &mode) == 0 ? (char)mode.c_cc[VEOF] : 4;
        if (write(proc->stdin_fd, &end, 1) < 0 && errno == EAGAIN) {
            return false;
        }
    }
    stdin_close(agent, proc);
    return true;
}

void stdin_settle(struct agent *agent, struct proc *proc) {
    bool full = false;
    uint32_t size;
    for (const uint8_t *at; proc->stdin_fd >= 0 && !full;) {
        at = window_at(&proc->in.window, proc->in.window.base, &size);
        if (at == NULL) {
            break;
        }
        ssize_t done = write(proc->stdin_fd, at, size);
        if (done > 0) {
            window_drop(&proc->in.window, (uint32_t)done);
        } else if (done < 0 && errno == EAGAIN) {
            full = true;
        } else if (done < 0 && errno != EINTR) {
            stdin_close(agent, proc); /* EPIPE: it closed its end */
        }
    }
    if (proc->stdin_fd >= 0 && !full && proc->in.end_taken) {
        full = !say_end(agent, proc);
    }
    if (proc->stdin_fd >= 0 && full != proc->stdin_watched) {
        if (full) {
            watch(agent, proc->stdin_fd, ROLE_IN, slot_of(agent, proc), proc->generation, EPOLLOUT);
        } else {
            unwatch(agent, proc->stdin_fd);
        }
        proc->stdin_watched = full;
    }
    if (proc->in.window.ring != NULL) {
        ring_rest(&proc->in.window);
    }
}

void proc_take_stdin(struct agent *agent, struct proc *proc, const struct message *message) {
    if (ring_ready(&proc->in.window)) {
        input_take(&proc->in, message->of.input.offset, (const uint8_t *)message->of.input.data.data,
                   message->of.input.data.size, message->of.input.eof);
        if (proc->state == PROC_RUNNING) {
            stdin_settle(agent, proc);
        }
    }
}

void proc_ready(struct agent *agent, uint32_t slot, enum role role) {
    struct proc *proc = &agent->procs[slot];
    if (role == ROLE_STATUS) {
        /* Reaped earlier in the same batch of events, it has been read to its end: it must not run again. */
        if (proc->status_fd >= 0) {
            proc_status(agent, proc);
        }
    } else if (role == ROLE_IN) {
        stdin_settle(agent, proc);
    } else {
        stream_read(agent, proc, role == ROLE_OUT ? 0 : 1);
    }
}

static void say_output(struct agent *agent, struct proc *proc, int which, const uint8_t *data,
                       uint32_t size) {
    struct output *out = &proc->streams[which].out;
    msgpack_packer *packer = tx_begin(&agent->tx, KIND_OUTPUT, 0, 6);
    msgpack_pack_uint32(packer, proc->number);
    msgpack_pack_uint32(packer, (uint32_t)which + 1);
    msgpack_pack_uint64(packer, out->sent);
    msgpack_pack_bin(packer, size);
    msgpack_pack_bin_body(packer, data, size);
    if (tx_end(&agent->tx)) {
        out->sent += size;
        out->end_sent = size == 0;
    }
}

static void say_exit(struct agent *agent, struct proc *proc) {
    int status = proc->wait_status;
    bool signalled = WIFSIGNALED(status);
    msgpack_packer *packer = tx_begin(&agent->tx, KIND_EXITED, 0, 6);
    msgpack_pack_uint32(packer, proc->number);
    msgpack_pack_int(packer, signalled ? -1 : WEXITSTATUS(status));
    msgpack_pack_int(packer, signalled ? WTERMSIG(status) : 0);
    if (signalled && WCOREDUMP(status)) {
        msgpack_pack_true(packer);
    } else {
        msgpack_pack_false(packer);
    }
    proc->exit_sent = tx_end(&agent->tx);
}

static void say_stdin_ack(struct agent *agent, struct proc *proc) {
    msgpack_packer *packer = tx_begin(&agent->tx, KIND_STDIN_ACK, 0, 4);
    msgpack_pack_uint32(packer, proc->number);
    msgpack_pack_uint64(packer, proc->in.window.base);
    if (tx_end(&agent->tx)) {
        proc->in.acked = proc->in.window.base;
    }
}

/* At most one message of this process; whether one was queued. */
static bool speak(struct agent *agent, struct proc *proc) {
    uint32_t size;
    if (proc->in.acked < proc->in.window.base) {
        say_stdin_ack(agent, proc);
        return true;
    }
    for (int which = 0; which < 2; which++) {
        struct output *out = &proc->streams[which].out;
        const uint8_t *data = output_next(out, &size);
        if (data != NULL || output_at_end(out)) {
            say_output(agent, proc, which, data, size);
            return true;
        }
    }
    bool told = proc->streams[0].out.end_sent && proc->streams[1].out.end_sent;
    if (proc->state == PROC_EXITED && told && !proc->exit_sent) {
        say_exit(agent, proc);
        return true;
    }
    return false;
}

bool procs_speak(struct agent *agent) {
    bool any = false;
    uint32_t silent = 0;
    while (agent->greeted && silent < agent->proc_end && tx_used(&agent->tx) <= OUTPUT_BYTES) {
        if (agent->next_turn >= agent->proc_end) {
            agent->next_turn = 0;
        }
        struct proc *proc = &agent->procs[agent->next_turn++];
        bool may = proc->state >= PROC_RUNNING && proc->followed;
        if (may && speak(agent, proc)) {
            any = true;
            silent = 0;
        } else {
            silent++;
        }
    }
    return any;
}
