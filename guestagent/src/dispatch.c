/* What each message does. A request gets exactly one REPLY, here or (START, CONFIGURE and the like, FREEZE)
 * when it is done. */
#include <errno.h>
#include <signal.h>
#include <string.h>

#include "agent.h"
#include "services.h"

#define AGENT_VERSION "0.1.0"

static void pack_text(msgpack_packer *packer, const char *text) {
    size_t size = strlen(text);
    msgpack_pack_str(packer, size);
    msgpack_pack_str_body(packer, text, size);
}

static void pack_uint_field(msgpack_packer *packer, const char *key, uint64_t value) {
    pack_text(packer, key);
    msgpack_pack_uint64(packer, value);
}

static void pack_flag_field(msgpack_packer *packer, const char *key, bool value) {
    pack_text(packer, key);
    if (value) {
        msgpack_pack_true(packer);
    } else {
        msgpack_pack_false(packer);
    }
}

static msgpack_packer *reply_begin(struct agent *agent, uint32_t id, int error) {
    msgpack_packer *packer = tx_begin(&agent->tx, KIND_REPLY, id, 4);
    msgpack_pack_int(packer, error);
    return packer;
}

void reply_nil(struct agent *agent, uint32_t id) {
    msgpack_pack_nil(reply_begin(agent, id, 0));
    tx_end(&agent->tx);
}

void reply_uint(struct agent *agent, uint32_t id, uint64_t value) {
    msgpack_pack_uint64(reply_begin(agent, id, 0), value);
    tx_end(&agent->tx);
}

void reply_error(struct agent *agent, uint32_t id, int error) {
    pack_text(reply_begin(agent, id, error), agent->reason.data);
    tx_end(&agent->tx);
}

static void pack_proc(msgpack_packer *packer, const struct proc *proc) {
    msgpack_pack_map(packer, 6);
    pack_uint_field(packer, "proc", proc->number);
    pack_uint_field(packer, "pid", (uint64_t)proc->its_pid);
    pack_flag_field(packer, "exited", proc->state == PROC_EXITED);
    pack_uint_field(packer, "stdin_offset", window_end(&proc->in.window));
    pack_uint_field(packer, "out_offset", proc->streams[0].out.window.base);
    pack_uint_field(packer, "err_offset", proc->streams[1].out.window.base);
}

static int hello(struct agent *agent, const struct message *message) {
    if (message->of.version != PROTOCOL_VERSION) {
        return because(agent, EPROTONOSUPPORT, "this agent speaks version 1 only", "");
    }
    uint32_t count = 0;
    for (uint32_t i = 0; i < agent->proc_end; i++) {
        count += agent->procs[i].state >= PROC_RUNNING;
    }
    msgpack_packer *packer = reply_begin(agent, message->id, 0);
    msgpack_pack_map(packer, 5);
    pack_uint_field(packer, "version", PROTOCOL_VERSION);
    pack_text(packer, "agent");
    pack_text(packer, AGENT_VERSION);
    pack_text(packer, "boot_id");
    pack_text(packer, agent->boot_id);
    pack_flag_field(packer, "configured", agent->configured);
    pack_text(packer, "procs");
    msgpack_pack_array(packer, count);
    for (uint32_t i = 0; i < agent->proc_end; i++) {
        if (agent->procs[i].state >= PROC_RUNNING) {
            pack_proc(packer, &agent->procs[i]);
        }
    }
    tx_end(&agent->tx);
    agent->greeted = true;
    return 0;
}

static int send_signal(struct agent *agent, const struct proc *proc, int signal) {
    if (proc->state != PROC_RUNNING || kill(proc->pid, signal) < 0) {
        return because(agent, proc->state == PROC_RUNNING ? errno : ESRCH, "it has exited", "");
    }
    return 0;
}

static int forget(struct agent *agent, struct proc *proc) {
    if (proc->state != PROC_EXITED) {
        return because(agent, EBUSY, "it has not exited", "");
    }
    proc_free(agent, proc);
    return 0;
}

/* Requests about one process. */
static int about_proc(struct agent *agent, struct proc *proc, const struct message *message) {
    proc->followed = true;
    switch (message->kind) {
    case KIND_SIGNAL:
        return send_signal(agent, proc, message->of.signal);
    case KIND_WINSIZE:
        proc_winsize(proc, message->of.size.rows, message->of.size.cols);
        return 0;
    default:
        return forget(agent, proc);
    }
}

static void notice(struct agent *agent, struct proc *proc, const struct message *message) {
    if (proc == NULL) {
        return; /* forgotten a moment ago, as far as the host knows */
    }
    proc->followed = true;
    if (message->kind == KIND_STDIN) {
        proc_take_stdin(agent, proc, message);
        return;
    }
    int which = (int)message->of.ack.stream - 1;
    if (output_ack(&proc->streams[which].out, message->of.ack.offset)) {
        stream_settle(agent, proc, which);
    }
}

/* 0: REPLY nil. ALREADY: it was replied to, or will be. Else an errno, with a reason. */
enum { ALREADY = -1 };

static int request(struct agent *agent, const struct message *message) {
    int error;
    if (agent->supervises && message->kind != KIND_SERVICES) {
        return because(agent, EOPNOTSUPP, "this one answers system calls, and nothing else", "");
    }
    switch (message->kind) {
    case KIND_CONFIGURE:
        error = configure_begin(agent, message);
        return error ? error : ALREADY;
    case KIND_PREPARE:
        error = prepare_begin(agent, message);
        return error ? error : ALREADY;
    case KIND_REHEARSE:
        error = rehearse_begin(agent, message);
        return error ? error : ALREADY;
    case KIND_FREEZE:
        error = freeze_begin(agent, message);
        return error ? error : ALREADY;
    case KIND_SERVICES:
        return services_begin(agent, message);
    case KIND_THAW:
        return thaw(agent);
    case KIND_CLOCK:
        return agent->configured ? clock_set(agent, message->of.time_unix_ns)
                                 : because(agent, EAGAIN, "CONFIGURE comes first", "");
    case KIND_RENEW:
        return renew(agent, &message->of.configure);
    case KIND_BALLOON:
        error = balloon_begin(agent, message);
        return error ? error : ALREADY;
    case KIND_BALLOON_RUNS:
        error = balloon_runs(agent, message);
        return error ? error : ALREADY;
    case KIND_BALLOON_DONE:
        return balloon_done(agent);
    case KIND_CPUS:
        error = cpus_begin(agent, message);
        return error ? error : ALREADY;
    case KIND_START:
        error = proc_start(agent, message);
        return error ? error : ALREADY;
    case KIND_STATS:
        stats_reply(agent, message->id);
        return ALREADY;
    case KIND_SHUTDOWN:
        shutdown_begin(agent, message->of.grace_ms);
        return 0;
    default:
        break;
    }
    struct proc *proc = proc_find(agent, message->proc);
    if (proc == NULL) {
        return because(agent, ESRCH, "it was not started, or is forgotten", "");
    }
    return about_proc(agent, proc, message);
}

static void act(struct agent *agent, const struct message *message) {
    if (message->id == 0) {
        if (agent->greeted) {
            notice(agent, proc_find(agent, message->proc), message);
        }
        return;
    }
    int error;
    if (message->kind == KIND_HELLO) {
        error = hello(agent, message);
        error = error ? error : ALREADY;
    } else if (!agent->greeted) {
        error = because(agent, EPROTO, "HELLO comes first", "");
    } else {
        error = request(agent, message);
    }
    if (error == 0) {
        reply_nil(agent, message->id);
    } else if (error != ALREADY) {
        reply_error(agent, message->id, error);
    }
}

void dispatch(struct agent *agent, const uint8_t *payload, size_t size) {
    struct message message;
    msgpack_unpacked room;
    msgpack_unpacked_init(&room);
    const char *wrong = message_parse(payload, size, &room, &message);
    if (wrong == NULL) {
        act(agent, &message);
    } else if (message.id != 0) {
        reply_error(agent, message.id, because(agent, EINVAL, wrong, ""));
    } else {
        log_line("a message of the host is left out: ", wrong, 0);
    }
    msgpack_unpacked_destroy(&room);
}

void session_begin(struct agent *agent) {
    session_end(agent);
    tx_answer(&agent->tx, agent->rx.nonce);
}

/* Whatever was half said is void; processes run on and their output is kept. */
void session_end(struct agent *agent) {
    tx_reset(&agent->tx);
    agent->greeted = false;
    configure_cancel(agent);
    freeze_cancel(agent);
    balloon_cancel(agent);
    agent->cpus.id = 0;
    for (uint32_t i = 0; i < agent->proc_end; i++) {
        struct proc *proc = &agent->procs[i];
        proc->start_id = 0;
        proc->followed = proc->exit_sent = false;
        output_restart(&proc->streams[0].out);
        output_restart(&proc->streams[1].out);
        proc->in.acked = 0;
    }
}
