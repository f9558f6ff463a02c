/* The table of processes: numbers are the host's, slots are ours. A record stays until FORGET. */
#include <errno.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "agent.h"

struct proc *proc_find(struct agent *agent, uint32_t number) {
    for (uint32_t i = 0; i < agent->proc_end; i++) {
        if (agent->procs[i].state != PROC_FREE && agent->procs[i].number == number) {
            return &agent->procs[i];
        }
    }
    return NULL;
}

struct proc *proc_new(struct agent *agent, uint32_t number) {
    uint32_t slot = 0;
    while (slot < agent->proc_end && agent->procs[slot].state != PROC_FREE) {
        slot++;
    }
    if (slot == MAX_PROCS) {
        return NULL;
    }
    if (slot == agent->proc_end) {
        agent->proc_end++;
    }
    struct proc *proc = &agent->procs[slot];
    memset(proc, 0, sizeof(*proc));
    proc->state = PROC_STARTING;
    proc->number = number;
    proc->generation = ++agent->generation;
    proc->status_fd = proc->stdin_fd = proc->streams[0].fd = proc->streams[1].fd = -1;
    proc->streams[0].left = proc->streams[1].left = UINT64_MAX;
    return proc;
}

static void ring_free(struct window *window) {
    if (window->ring != NULL) {
        munmap(window->ring, WINDOW_BYTES);
        window->ring = NULL;
    }
}

void proc_free(struct agent *agent, struct proc *proc) {
    for (int which = 0; which < 2; which++) {
        stream_close(agent, &proc->streams[which]);
        ring_free(&proc->streams[which].out.window);
    }
    stdin_close(agent, proc);
    ring_free(&proc->in.window);
    if (proc->status_fd >= 0) {
        unwatch(agent, proc->status_fd);
        close(proc->status_fd);
    }
    proc->state = PROC_FREE;
    proc->generation = 0;
    while (agent->proc_end > 0 && agent->procs[agent->proc_end - 1].state == PROC_FREE) {
        agent->proc_end--;
    }
}

bool procs_running(const struct agent *agent) {
    for (uint32_t i = 0; i < agent->proc_end; i++) {
        if (agent->procs[i].state == PROC_STARTING || agent->procs[i].state == PROC_RUNNING) {
            return true;
        }
    }
    return false;
}

void proc_reaped(struct agent *agent, pid_t pid, int wait_status) {
    for (uint32_t i = 0; i < agent->proc_end; i++) {
        struct proc *proc = &agent->procs[i];
        if (proc->pid != pid || (proc->state != PROC_RUNNING && proc->state != PROC_STARTING)) {
            continue;
        }
        if (proc->state == PROC_STARTING) {
            proc_status(agent, proc); /* what it said last is in the pipe still */
            if (proc->state != PROC_RUNNING) {
                return;
            }
        }
        proc->state = PROC_EXITED;
        proc->wait_status = wait_status;
        proc->linger_until_ms = now_ms() + LINGER_MS;
        stdin_close(agent, proc);
        if (proc->streams[0].deserted) {
            stream_read(agent, proc, 0); /* now its end is the end */
        }
        if (proc->number == MAIN_PROC) {
            world_kill(agent);
        }
        return;
    }
}

/* Others may hold the pipes of a process that is gone. What was written until now is still read; then the
 * agent lets go of them, so that a daemon left behind does not hold up the news of the exit. */
static void give_up(struct agent *agent, struct proc *proc) {
    for (int which = 0; which < 2; which++) {
        struct stream *stream = &proc->streams[which];
        int waiting = 0;
        if (stream->fd >= 0 && stream->left == UINT64_MAX) {
            ioctl(stream->fd, FIONREAD, &waiting);
            stream->left = waiting > 0 ? (uint64_t)waiting : 0;
            stream_read(agent, proc, which);
        }
    }
}

uint64_t procs_linger(struct agent *agent, uint64_t now) {
    uint64_t next = UINT64_MAX;
    for (uint32_t i = 0; i < agent->proc_end; i++) {
        struct proc *proc = &agent->procs[i];
        bool open = proc->streams[0].fd >= 0 || proc->streams[1].fd >= 0;
        if (proc->state != PROC_EXITED || !open || proc->linger_until_ms == UINT64_MAX) {
            continue;
        }
        if (now >= proc->linger_until_ms) {
            proc->linger_until_ms = UINT64_MAX;
            give_up(agent, proc);
        } else if (proc->linger_until_ms < next) {
            next = proc->linger_until_ms;
        }
    }
    return next;
}
