/* The per-sandbox monitor: holds what must outlive hostd (pipes, terminals, exit statuses), and nothing else.
 *
 *     sandloom-monitor FOLDER LISTENER [--init] [--hide PATH] [--cover PATH]
 *         [--begin OUT ERR] [--supervisor PROGRAM AGENT SERVICES RUNTIME] -- CGROUP_PROCS...
 *
 * It speaks the agent protocol (guestagent/PROTOCOL.md) on FOLDER/agent.sock, as a guest's agent does on its
 * port. START's argv is the command of an OCI runtime that detaches: `crun run --detach`, `runsc exec
 * --detach`. For the process with the number N that command has to write the workload's pid to FOLDER/N.pid
 * and, with a tty, to send the terminal to the socket FOLDER/N.tty. The workload becomes the monitor's child,
 * because the monitor is a subreaper; so its end cannot be missed and its pid cannot be another's.
 *
 * --init: the process that makes the container, the first, runs behind our own init (init.c), which gets its
 * program as descriptor 3 and a socket for its reports as descriptor 4, with which the kernel tells init's
 * pid. --hide: a mount that the runtime must not see (crun refuses cgroup v1 beside v2); --cover: a folder
 * that is empty for it. --begin: how much main had printed before, in a sandbox that goes on from a
 * checkpoint.
 *
 * --supervisor: the monitor has a network namespace of its own, which its container is to join, and in it
 * PROGRAM, which answers the container's system calls by three listening sockets (guestagent/src/host.c).
 * Neither outlives the other: without a supervisor the monitor kills all it knows, and ends.
 *
 * FREEZE and THAW frame a checkpoint, which ends the runtime's process (hold.c): what is held does not count
 * as ended, keeps its pipes, and is started again by THAW with the command in FOLDER/again.
 */
#ifndef SANDLOOM_MONITOR_H
#define SANDLOOM_MONITOR_H

#include "flow.h"
#include "message.h"
#include "wire.h"

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

enum {
    MAX_PROCS = 64,
    MAIN_PROC = 1,
    MAX_UNCLAIMED = 32,
    TEXT_BYTES = 480, /* of a runtime's error that are passed on; the host takes 512 characters */
    INIT_PROGRAM_FD = 3,
    INIT_REPORT_FD = 4,
};

/* What init tells through its socket. The workload could reach that only by breaking into init; what it
 * could tell then is its own exit status. */
enum report_kind { REPORT_STARTED = 1, REPORT_ENDED = 2 };
struct report {
    uint32_t kind;
    uint32_t value; /* STARTED: 0 or the errno of exec; ENDED: the wait status */
};

enum stage { STAGE_STARTING, STAGE_RUNNING, STAGE_ENDED };

struct process {
    uint32_t proc; /* the host's number; 0: this slot is free */
    enum stage stage;
    uint32_t start_id; /* the START without a reply yet; 0: answered */
    pid_t runtime;     /* the runtime's command while it runs */
    pid_t pid;         /* the workload, a child of ours; 0: not known (yet) */
    int pidfd;         /* main's own process behind init, -1 when there is none */
    int in, out, err;  /* our ends of its pipes; a terminal is in `in` and `out`; -1: closed */
    int console;       /* where the runtime sends the terminal, until it did */
    int reports;       /* our end of init's socket */
    bool tty, with_init, told, followed, exit_sent;
    bool doomed;                   /* to be killed as soon as it runs */
    bool held, lapsed, lapse_told; /* hold.c: its end does not count; it has ended; and the file says so */
    bool again;                    /* the runtime's command that runs is of THAW */
    uint32_t again_id;             /* the THAW that waits for it */
    int kept[3];                   /* its ends of stdin, stdout, stderr while it is held; -1: none */
    int wait_status;
    uint16_t rows, cols;
    struct output streams[2];
    struct input input;
};

struct settings {
    bool with_init;
    const char *hide, *cover;
    char **supervisor; /* program and the numbers of its sockets; NULL: none is wanted */
    uint64_t begin[2]; /* offsets of main's streams */
    int program;       /* our own executable, for init */
};

/* A child that ended before anybody knew whose it was. */
struct unclaimed {
    pid_t pid;
    int wait_status;
};

struct monitor {
    struct settings settings;
    struct process processes[MAX_PROCS];
    struct unclaimed unclaimed[MAX_UNCLAIMED];
    unsigned next_unclaimed;
    int listener, client, signals;
    pid_t supervisor;
    bool greeted;
    struct rx rx;
    struct tx tx;
    char boot_id[48];
};

/* spawn.c. NULL, or what failed with errno in *error; then nothing is left of it. */
const char *spawn_runtime(struct process *process, const struct start *start, const struct settings *settings,
                          int *error);
/* The same for a held process with the command in the file `again`, and the ends that were kept. */
const char *spawn_again(struct process *process, const struct settings *settings, int *error);
void close_fd(int *fd);

/* process.c */
/* Removes FOLDER/PROC<suffix>. */
void unlink_own(const struct process *process, const char *suffix);
void process_init(struct process *process, uint32_t proc);
void process_free(struct process *process);
struct process *process_find(struct monitor *monitor, uint32_t proc);
/* Reaps every child that ended. */
void processes_reap(struct monitor *monitor);
/* Waits for the runtime to have done all it does at a start: before that it cannot be asked for anything. */
void process_settle(struct monitor *monitor, struct process *process);
/* Takes init's reports. */
void process_report(struct monitor *monitor, struct process *process);
/* Moves bytes between the process and its windows as far as both allow. */
void process_pump(struct process *process);
/* 0 or an errno. */
int process_signal(struct process *process, int signo);

/* terminal.c. False while, and when, none came; 0 or an errno. */
bool process_take_terminal(struct process *process);
int process_resize(const struct process *process, uint16_t rows, uint16_t cols);

/* hold.c. 0 or an errno; -1: the reply comes later. */
int hold_begin(struct process *process);
int hold_end(struct monitor *monitor, struct process *process, uint32_t id);
/* Whether this end of a process is none: it is held. */
bool hold_takes(struct monitor *monitor, struct process *process, int wait_status);
/* Says in the file `lapsed` how much it had printed, once all of that was taken out of its pipes. */
void hold_tell(struct process *process);
/* THAW's command is done; whether the process runs. */
void hold_over(struct monitor *monitor, struct process *process, bool runs);

/* supervisor.c. At the start, in the sandbox's cgroup; false with errno. */
bool supervisor_start(struct monitor *monitor);
/* It has ended. */
_Noreturn void supervisor_gone(struct monitor *monitor, int wait_status);

/* process.c: the end of a process, for whoever waits for it. */
void process_ended(struct monitor *monitor, struct process *process, int wait_status);

/* session.c */
void session_reset(struct monitor *monitor);
/* Takes what came from the host. */
void session_receive(struct monitor *monitor);
/* Queues what followed processes may say now. */
void session_say(struct monitor *monitor);
void reply_pid(struct monitor *monitor, uint32_t id, pid_t pid);
void reply_errno(struct monitor *monitor, uint32_t id, int error);
void reply_refusal(struct monitor *monitor, uint32_t id, int error, const char *text, size_t size);

/* init.c: PID 1 of a container; runs argv as its child. Never returns. */
_Noreturn void init_run(char **argv);

#endif
