/* The agent protocol's requests (guestagent/PROTOCOL.md), as far as they make sense without a guest. */
#include "monitor.h"

#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

enum {
    READ_BYTES = 8192, /* small, so that a session's opening flush does not make all of the buffer resident */
};

void session_reset(struct monitor *monitor) {
    monitor->greeted = false;
    for (size_t i = 0; i < MAX_PROCS; i++) {
        struct process *process = &monitor->processes[i];
        process->followed = process->exit_sent = false;
        process->start_id = process->again_id = 0; /* nobody waits for that reply any more */
        output_restart(&process->streams[0]);
        output_restart(&process->streams[1]);
        process->input.acked = process->input.window.base;
    }
}

static void pack_text(msgpack_packer *packer, const char *text, size_t size) {
    msgpack_pack_str(packer, size);
    msgpack_pack_str_body(packer, text, size);
}

static void pack_key(msgpack_packer *packer, const char *key) {
    pack_text(packer, key, strlen(key));
}

static void reply(struct monitor *monitor, uint32_t id, int error, const char *text, size_t size) {
    if (id == 0) {
        return;
    }
    msgpack_packer *packer = tx_begin(&monitor->tx, KIND_REPLY, id, 4);
    msgpack_pack_int(packer, error);
    if (error != 0) {
        pack_text(packer, text, size);
    } else {
        msgpack_pack_nil(packer);
    }
    tx_end(&monitor->tx);
}

void reply_refusal(struct monitor *monitor, uint32_t id, int error, const char *text, size_t size) {
    reply(monitor, id, error, text, size);
}

void reply_errno(struct monitor *monitor, uint32_t id, int error) {
    const char *text = strerror(error);
    reply(monitor, id, error, text, strlen(text));
}

void reply_pid(struct monitor *monitor, uint32_t id, pid_t pid) {
    if (id == 0) {
        return;
    }
    msgpack_packer *packer = tx_begin(&monitor->tx, KIND_REPLY, id, 4);
    msgpack_pack_int(packer, 0);
    msgpack_pack_uint32(packer, (uint32_t)pid);
    tx_end(&monitor->tx);
}

static void pack_process(msgpack_packer *packer, const struct process *process) {
    msgpack_pack_map(packer, 6);
    pack_key(packer, "proc");
    msgpack_pack_uint32(packer, process->proc);
    pack_key(packer, "pid");
    msgpack_pack_uint32(packer, (uint32_t)process->pid);
    pack_key(packer, "exited");
    process->stage == STAGE_ENDED ? msgpack_pack_true(packer) : msgpack_pack_false(packer);
    pack_key(packer, "stdin_offset");
    msgpack_pack_uint64(packer, window_end(&process->input.window));
    pack_key(packer, "out_offset");
    msgpack_pack_uint64(packer, process->streams[0].window.base);
    pack_key(packer, "err_offset");
    msgpack_pack_uint64(packer, process->streams[1].window.base);
}

static void hello(struct monitor *monitor, const struct message *message) {
    uint32_t count = 0;
    if (message->of.version != PROTOCOL_VERSION) {
        reply_errno(monitor, message->id, EPROTONOSUPPORT);
        return;
    }
    monitor->greeted = true;
    for (size_t i = 0; i < MAX_PROCS; i++) {
        count += monitor->processes[i].proc != 0;
    }
    msgpack_packer *packer = tx_begin(&monitor->tx, KIND_REPLY, message->id, 4);
    msgpack_pack_int(packer, 0);
    msgpack_pack_map(packer, 5);
    pack_key(packer, "version");
    msgpack_pack_int(packer, PROTOCOL_VERSION);
    pack_key(packer, "agent");
    pack_key(packer, "monitor 1");
    pack_key(packer, "boot_id");
    pack_key(packer, monitor->boot_id);
    pack_key(packer, "configured");
    msgpack_pack_true(packer);
    pack_key(packer, "procs");
    msgpack_pack_array(packer, count);
    for (size_t i = 0; i < MAX_PROCS; i++) {
        if (monitor->processes[i].proc != 0) {
            pack_process(packer, &monitor->processes[i]);
        }
    }
    tx_end(&monitor->tx);
}

static void start(struct monitor *monitor, const struct message *message) {
    struct process *process = process_find(monitor, 0);
    int error = 0;
    if (process_find(monitor, message->proc) != NULL) {
        reply_errno(monitor, message->id, EEXIST);
        return;
    }
    if (process == NULL) {
        const char *text = "the sandbox has as many processes as its monitor can hold";
        reply(monitor, message->id, EAGAIN, text, strlen(text));
        return;
    }
    bool first = true, has_init = false;
    for (size_t i = 0; i < MAX_PROCS; i++) {
        struct process *other = &monitor->processes[i];
        first = first && other->proc == 0;
        has_init = has_init || (other->proc != 0 && other->with_init);
        if (other->proc == MAIN_PROC || (other->proc != 0 && other->with_init)) {
            process_settle(monitor, other);
        }
    }
    process_init(process, message->proc);
    process->start_id = message->id;
    process->tty = message->of.start.tty;
    process->rows = message->of.start.rows;
    process->cols = message->of.start.cols;
    process->with_init = monitor->settings.with_init && !has_init && (first || message->proc == MAIN_PROC);
    process->followed = true;
    for (size_t i = 0; i < 2 && message->proc == MAIN_PROC; i++) {
        process->streams[i].window.base = process->streams[i].sent = monitor->settings.begin[i];
    }
    const char *problem = spawn_runtime(process, &message->of.start, &monitor->settings, &error);
    if (problem != NULL) {
        reply(monitor, message->id, error, problem, strlen(problem));
        process_free(process);
    }
}

static void take_input(struct process *process, const struct message *message) {
    if (process == NULL) {
        return;
    }
    process->followed = true;
    if (process->input.window.ring == NULL && (process->input.window.ring = malloc(WINDOW_BYTES)) == NULL) {
        return; /* not acknowledged: the host says it again to the next session */
    }
    input_take(&process->input, message->of.input.offset, (const uint8_t *)message->of.input.data.data,
               message->of.input.data.size, message->of.input.eof);
    process_pump(process);
}

static void forget(struct monitor *monitor, struct process *process, uint32_t id) {
    bool running = process->stage != STAGE_ENDED;
    if (!running) {
        process_free(process);
    }
    reply_errno(monitor, id, running ? EBUSY : 0);
}

static void about_process(struct monitor *monitor, const struct message *message) {
    struct process *process = process_find(monitor, message->proc);
    if (process == NULL) {
        reply_errno(monitor, message->id, ESRCH);
        return;
    }
    process->followed = true;
    if (message->kind == KIND_SIGNAL) {
        reply_errno(monitor, message->id, process_signal(process, message->of.signal));
    } else if (message->kind == KIND_WINSIZE) {
        reply_errno(monitor, message->id,
                    process_resize(process, message->of.size.rows, message->of.size.cols));
    } else {
        forget(monitor, process, message->id);
    }
}

static void thaw(struct monitor *monitor, uint32_t id) {
    struct process *process = process_find(monitor, MAIN_PROC);
    int error = process == NULL ? 0 : hold_end(monitor, process, id);
    if (error >= 0) {
        reply_errno(monitor, id, error);
    }
}

static void handle(struct monitor *monitor, const struct message *message) {
    struct process *process;
    switch (message->kind) {
    case KIND_HELLO:
        hello(monitor, message);
        return;
    case KIND_START:
        start(monitor, message);
        return;
    case KIND_STDIN:
        take_input(process_find(monitor, message->proc), message);
        return;
    case KIND_ACK:
        process = process_find(monitor, message->proc);
        if (process != NULL) {
            process->followed = true;
            output_ack(&process->streams[message->of.ack.stream - 1], message->of.ack.offset);
        }
        return;
    case KIND_SIGNAL:
    case KIND_WINSIZE:
    case KIND_FORGET:
        about_process(monitor, message);
        return;
    case KIND_FREEZE:
        process = process_find(monitor, MAIN_PROC);
        reply_errno(monitor, message->id, process == NULL ? ESRCH : hold_begin(process));
        return;
    case KIND_THAW:
        thaw(monitor, message->id);
        return;
    default: /* CONFIGURE, STATS and SHUTDOWN are for a guest of its own */
        reply_errno(monitor, message->id, EOPNOTSUPP);
    }
}

static void take_frame(struct monitor *monitor, const uint8_t *payload, size_t size) {
    msgpack_unpacked room;
    struct message message;
    msgpack_unpacked_init(&room);
    const char *problem = message_parse(payload, size, &room, &message);
    if (problem != NULL) {
        reply(monitor, message.id, EINVAL, problem, strlen(problem));
    } else {
        handle(monitor, &message);
    }
    msgpack_unpacked_destroy(&room);
}

void session_receive(struct monitor *monitor) {
    const uint8_t *payload;
    size_t size;
    uint8_t *at = rx_space(&monitor->rx, &size);
    ssize_t got = read(monitor->client, at, size < READ_BYTES ? size : READ_BYTES);
    if (got <= 0) {
        if (got == 0 || (errno != EAGAIN && errno != EINTR)) {
            close_fd(&monitor->client); /* hostd is gone; what runs goes on */
            session_reset(monitor);
        }
        return;
    }
    rx_add(&monitor->rx, (size_t)got);
    for (;;) {
        enum rx_event event = rx_next(&monitor->rx, &payload, &size);
        if (event == RX_MORE) {
            return;
        }
        if (event == RX_SYNC) {
            session_reset(monitor);
            tx_answer(&monitor->tx, monitor->rx.nonce);
        } else {
            take_frame(monitor, payload, size);
        }
    }
}

static void say_output(struct monitor *monitor, struct process *process, uint32_t stream) {
    struct output *output = &process->streams[stream - 1];
    for (;;) {
        uint32_t size;
        const uint8_t *at = output_next(output, &size);
        if (at == NULL && !output_at_end(output)) {
            return;
        }
        if (tx_used(&monitor->tx) > TX_BUSY_BYTES) {
            return; /* replies always have room */
        }
        msgpack_packer *packer = tx_begin(&monitor->tx, KIND_OUTPUT, 0, 6);
        msgpack_pack_uint32(packer, process->proc);
        msgpack_pack_uint32(packer, stream);
        msgpack_pack_uint64(packer, output->sent);
        msgpack_pack_bin(packer, size);
        if (size > 0) {
            msgpack_pack_bin_body(packer, at, size);
        }
        tx_end(&monitor->tx);
        output->sent += size;
        output->end_sent = size == 0;
    }
}

static void say_exit(struct monitor *monitor, struct process *process) {
    int status = process->wait_status;
    bool signaled = WIFSIGNALED(status);
    msgpack_packer *packer = tx_begin(&monitor->tx, KIND_EXITED, 0, 6);
    msgpack_pack_uint32(packer, process->proc);
    msgpack_pack_int(packer, signaled ? -1 : WEXITSTATUS(status));
    msgpack_pack_int(packer, signaled ? WTERMSIG(status) : 0);
    signaled &&WCOREDUMP(status) ? msgpack_pack_true(packer) : msgpack_pack_false(packer);
    process->exit_sent = tx_end(&monitor->tx);
}

static void say_input(struct monitor *monitor, struct process *process) {
    struct input *input = &process->input;
    if (input->acked == input->window.base) {
        return;
    }
    msgpack_packer *packer = tx_begin(&monitor->tx, KIND_STDIN_ACK, 0, 4);
    msgpack_pack_uint32(packer, process->proc);
    msgpack_pack_uint64(packer, input->window.base);
    tx_end(&monitor->tx);
    input->acked = input->window.base;
}

void session_say(struct monitor *monitor) {
    for (size_t i = 0; i < MAX_PROCS; i++) {
        struct process *process = &monitor->processes[i];
        if (process->proc == 0 || process->stage == STAGE_STARTING) {
            continue;
        }
        process_pump(process);
        if (!monitor->greeted || !process->followed || monitor->client < 0) {
            continue;
        }
        say_output(monitor, process, 1);
        say_output(monitor, process, 2);
        say_input(monitor, process);
        if (process->stage == STAGE_ENDED && process->streams[0].end_sent && process->streams[1].end_sent &&
            !process->exit_sent) {
            say_exit(monitor, process);
        }
    }
}
