/* SHUTDOWN: SIGTERM to main, SIGKILL to all after the grace, the last output to the host, power off. */
#include <signal.h>
#include <sys/reboot.h>
#include <unistd.h>

#include "agent.h"

void shutdown_begin(struct agent *agent, uint64_t grace_ms) {
    if (agent->shutdown != SHUTDOWN_NONE) {
        return;
    }
    struct proc *main_proc = proc_find(agent, MAIN_PROC);
    if (main_proc != NULL && (main_proc->state == PROC_RUNNING || main_proc->state == PROC_STARTING)) {
        kill(main_proc->pid, SIGTERM);
    }
    agent->shutdown = SHUTDOWN_GRACE;
    agent->shutdown_ms = now_ms() + grace_ms;
}

static bool all_told(const struct agent *agent) {
    for (uint32_t i = 0; i < agent->proc_end; i++) {
        const struct proc *proc = &agent->procs[i];
        if (proc->followed && !proc->exit_sent) {
            return false;
        }
    }
    return tx_used(&agent->tx) == 0;
}

static void power_off(struct agent *agent) {
    sync();
    if (agent->in_guest) {
        reboot(RB_POWER_OFF);
        log_line("cannot power off", "", 0);
    }
    agent->peer_gone = true;
}

void shutdown_step(struct agent *agent, uint64_t now) {
    struct proc *main_proc = proc_find(agent, MAIN_PROC);
    bool main_runs =
        main_proc != NULL && (main_proc->state == PROC_RUNNING || main_proc->state == PROC_STARTING);
    if (agent->shutdown == SHUTDOWN_GRACE && (now >= agent->shutdown_ms || !main_runs)) {
        world_kill(agent);
        agent->shutdown = SHUTDOWN_KILLED;
        agent->shutdown_ms = now + DRAIN_MS;
    }
    bool gone = !procs_running(agent) && all_told(agent);
    if (agent->shutdown == SHUTDOWN_KILLED && (gone || now >= agent->shutdown_ms)) {
        agent->shutdown = SHUTDOWN_DRAINED;
        agent->shutdown_ms = now + SETTLE_MS;
    } else if (agent->shutdown == SHUTDOWN_DRAINED && now >= agent->shutdown_ms) {
        power_off(agent);
    }
}
