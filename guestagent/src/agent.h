/* The agent: one epoll loop over the port, its processes' pipes, SIGCHLD and PSI. No threads; every buffer
 * bounded.
 *
 * `struct agent` is the whole state. Who owns what: port.c the connection, proc.c the processes, world.c the
 * namespaces they live in, configure.c the way from a booted guest to one sandbox, dispatch.c what each
 * message does. What comes later is each one more source in the loop
 * (enum role) and, where the host speaks with it, one more kind in dispatch.c.
 */
#ifndef SANDLOOM_AGENT_H
#define SANDLOOM_AGENT_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/epoll.h>
#include <sys/types.h>

#include "flow.h"
#include "message.h"
#include "text.h"
#include "wire.h"

enum {
    MAX_PROCS = 512,    /* records held at once: HELLO's reply must fit into a frame */
    MAIN_PROC = 1,      /* when it ends, all end */
    LINGER_MS = 2000,   /* how long output may still come from others after the process itself is gone */
    DRAIN_MS = 1000,    /* how long a shutdown waits for the host to take the last output */
    SETTLE_MS = 30,     /* from the last byte given to the port until the power goes */
    REASON_BYTES = 240, /* of an error message */
    SCRATCH_BYTES = 16384,
};

/* What an epoll event is about. The first four are a process's, by its slot. */
enum role {
    ROLE_OUT,
    ROLE_ERR,
    ROLE_IN,
    ROLE_STATUS,
    ROLE_PORT,
    ROLE_LISTENER,
    ROLE_SIGNALS,
    ROLE_PRESSURE,
    ROLE_MEMORY,
    ROLE_NOTIFY,
    ROLE_TUN,
    ROLE_SERVICES,
    ROLE_FLOW,
    ROLE_RUNTIME,
    ROLE_VIEW
};

enum proc_state { PROC_FREE, PROC_STARTING, PROC_RUNNING, PROC_EXITED };

struct stream {
    int fd; /* -1: closed */
    bool watched;
    bool deserted; /* a terminal that nobody holds just now; its process may open it again */
    uint64_t left; /* bytes to read before it is closed; UINT64_MAX: until its end */
    struct output out;
};

struct proc {
    enum proc_state state;
    uint32_t number;   /* the host's */
    uint32_t start_id; /* START's request, 0 when it was answered or its session is gone */
    uint32_t generation;
    pid_t pid;       /* ours */
    int32_t its_pid; /* as the workload sees it */
    int status_fd, stdin_fd;
    bool tty, followed, exit_sent, stdin_watched;
    int wait_status;
    uint64_t linger_until_ms; /* 0: not yet gone */
    struct stream streams[2];
    struct input in;
};

/* The namespaces of the workload: an init that only reaps, and what we hold of it. */
struct world {
    pid_t init; /* 0: none runs */
    bool ended; /* killed, and not replaced */
    int mnt_fd, ipc_fd, pid_fd, pts_fd, proc_fd, shm_fd;
};

/* The workload's cgroup, in which it can be made to stand still. */
struct freezer {
    int group_fd; /* -1: there is none, on a build machine */
    int apart_fd; /* the group of rehearsals */
    bool frozen;
    uint32_t id; /* FREEZE's request while it is not all still, else 0 */
    uint64_t deadline_ms, retry_ms;
};

/* What CONFIGURE asked for, kept while its layers' devices are waited for. */
struct pending_configure {
    uint32_t id;   /* 0: none is pending */
    bool nameless; /* PREPARE or REHEARSE: nobody lives there afterwards */
    uint64_t deadline_ms, retry_ms;
    uint64_t upper_mib;
    uint32_t layer_count;
    uint8_t layers[MAX_LAYERS][UUID_BYTES];
    char devices[MAX_LAYERS][16]; /* "pmem3"; empty: not found yet */
    char hostname[MAX_HOSTNAME_BYTES + 1];
    char machine_id[MACHINE_ID_BYTES + 1];
};

/* Blocks (2 MiB of guest-physical memory) between `first` and `end` that the host wants, and what it was
 * told. */
struct balloon {
    uint32_t id; /* BALLOON's request while blocks are being taken, else 0 */
    bool told;   /* the host makes its holes: nothing may be given back */
    uint64_t target, first, end, chunk, deadline_ms;
};

struct cpus {
    uint32_t id; /* CPUS' request while it is not as wanted, else 0 */
    uint64_t wanted, deadline_ms, retry_ms;
};

/* The mark (memory.high) above which the workload is stalled; see defence.c. */
struct defence {
    int events_fd; /* of memory.events; -1: there is no defence */
    bool lifted;   /* a stall that nobody ended is over: no mark */
    bool late;     /* something was to be given back while the host made its holes */
    uint64_t mark_kib, high, gave_back_kib;
    uint64_t stall_ms, retry_ms, tell_ms; /* when a stall is ended by force, to look again, to tell again */
    uint64_t adjust_ms;                   /* when the mark is set anew; 0: need not */
};

enum shutdown_phase { SHUTDOWN_NONE, SHUTDOWN_GRACE, SHUTDOWN_KILLED, SHUTDOWN_DRAINED };

struct agent {
    bool in_guest;    /* PID 1 of a guest; else the same program on a build machine (main.c) */
    bool supervises;  /* and nothing else: beside a sandbox of the host's kernel (host.c) */
    const char *root; /* what becomes the workload's root */
    int epoll_fd, signal_fd, port_fd, listener_fd, pressure_fd;
    bool greeted;   /* HELLO was answered in this session */
    bool prepared;  /* the layers named in `pending` are mounted, the workload's world is made; nobody lives
                       there */
    bool rehearsed; /* and REHEARSE gave it an identity to throw away: a program may run, apart from all */
    bool configured, peer_gone;
    char boot_id[40];
    struct rx rx;
    struct tx tx;
    size_t rx_peak, tx_peak; /* how far into their buffers they were since the last release */
    struct proc procs[MAX_PROCS];
    uint32_t proc_end, next_turn; /* slots in use are below proc_end; whose output is first next time */
    uint32_t generation;
    struct world world;
    struct freezer freezer;
    struct pending_configure pending;
    struct balloon balloon;
    struct cpus cpus;
    struct defence defence;
    struct services *services; /* services.h */
    int services_given_fd;     /* on a build machine: the port, or -1 */
    int services_listener_fd;  /* beside a sandbox: where hosts connect to the port, one after the other */
    int runtime_fd;            /* and where the runtime brings listeners of filters */
    enum shutdown_phase shutdown;
    uint64_t shutdown_ms; /* when its phase is over */
    uint64_t oom_kills, oom_check_ms;
    char reason_buffer[REASON_BYTES];
    struct text reason; /* of the error that is being made */
};

/* loop.c */
uint64_t now_ms(void);
int agent_loop(struct agent *agent); /* returns the exit status, on a build machine */
int watch(struct agent *agent, int fd, enum role role, uint32_t slot, uint32_t generation, uint32_t events);
void unwatch(struct agent *agent, int fd);
void log_line(const char *what, const char *on, int error); /* to the kernel's log; error 0: none */
/* `error`, with a message in agent->reason: WHAT + SUBJECT (made printable) + the errno's name for people. */
int because(struct agent *agent, int error, const char *what, const char *subject);

/* port.c */
bool port_find(struct agent *agent, uint64_t deadline_ms);
bool port_receive(struct agent *agent); /* whether anything came */
bool port_send(struct agent *agent);    /* whether anything went */

/* dispatch.c */
void dispatch(struct agent *agent, const uint8_t *payload, size_t size);
void reply_nil(struct agent *agent, uint32_t id);
void reply_error(struct agent *agent, uint32_t id, int error); /* with agent->reason */
void reply_uint(struct agent *agent, uint32_t id, uint64_t value);
void session_begin(struct agent *agent);
void session_end(struct agent *agent);

/* proc.c */
struct proc *proc_find(struct agent *agent, uint32_t number);
struct proc *proc_new(struct agent *agent, uint32_t number);
void proc_free(struct agent *agent, struct proc *proc);
bool procs_running(const struct agent *agent);
void proc_reaped(struct agent *agent, pid_t pid, int wait_status);
uint64_t procs_linger(struct agent *agent, uint64_t now); /* the next deadline, UINT64_MAX: none */

/* streams.c */
void proc_ready(struct agent *agent, uint32_t slot, enum role role);
void proc_take_stdin(struct agent *agent, struct proc *proc, const struct message *message);
void stream_close(struct agent *agent, struct stream *stream);
void stream_settle(struct agent *agent, struct proc *proc,
                   int which); /* watches it, or not, as its window has room */
void stdin_close(struct agent *agent, struct proc *proc);
void stdin_settle(struct agent *agent, struct proc *proc); /* writes what it can */
void stream_read(struct agent *agent, struct proc *proc, int which);
bool procs_speak(struct agent *agent); /* queues what may be said; whether anything was */

/* start.c */
int proc_start(struct agent *agent,
               const struct message *message);            /* 0 (the reply comes later) or an errno */
void proc_status(struct agent *agent, struct proc *proc); /* its child reported, or runs its program */
void proc_winsize(struct proc *proc, uint16_t rows, uint16_t cols);

/* configure.c, layers.c, world.c, identity.c: 0 or an errno, with a message in agent->reason. */
int prepare_begin(struct agent *agent, const struct message *message);
int configure_begin(struct agent *agent, const struct message *message); /* 0: the reply comes later */
int rehearse_begin(struct agent *agent, const struct message *message);
void configure_step(struct agent *agent, uint64_t now);
void configure_cancel(struct agent *agent);
bool layers_find(struct pending_configure *pending);
int layers_resize_upper(struct agent *agent);
int layers_mount(struct agent *agent);
void layers_unmount(void);
int world_start(struct agent *agent);
int world_resize(struct agent *agent);
pid_t world_fork_apart(struct agent *agent);
pid_t world_fork_beside(struct agent *agent);
void world_kill(struct agent *agent);
void world_leave(struct agent *agent); /* at the end, on a build machine */
int clock_set(struct agent *agent, uint64_t unix_ns);
int identity_kernel(struct agent *agent, const struct configure *configure);
int identity_resolver(struct agent *agent); /* resolv.conf names the host's */
int identity_files(struct agent *agent);    /* in PREPARE: with nobody's names in them */
int loopback_up(void);
#define BOOT_ID_FILE "/u/boot-id"

/* freezer.c */
void freezer_open(struct agent *agent);
pid_t freezer_fork(const struct agent *agent); /* fork(2), the child in the workload's cgroup */
pid_t freezer_fork_apart(
    const struct agent *agent); /* in that of rehearsals, and a PID namespace of its own */
bool rehearsal_lives(const struct agent *agent);
int freeze_begin(struct agent *agent, const struct message *message); /* 0: the reply comes later */
void freeze_step(struct agent *agent, uint64_t now);
void freeze_cancel(struct agent *agent);
int thaw(struct agent *agent);
int renew(struct agent *agent, const struct configure *identity);

/* balloon.c, cpus.c: 0 (the reply comes, or came) or an errno, with a message in agent->reason. */
int balloon_begin(struct agent *agent, const struct message *message);
int balloon_runs(struct agent *agent, const struct message *message);
int balloon_done(struct agent *agent);
void balloon_step(struct agent *agent, uint64_t now);
void balloon_cancel(struct agent *agent);
uint64_t balloon_blocks(void);
/* A quarter of what is held, and no less than so many blocks; KiB. */
uint64_t balloon_give_back(struct agent *agent, uint64_t at_least);
int cpus_begin(struct agent *agent, const struct message *message);
void cpus_step(struct agent *agent, uint64_t now);

/* defence.c */
void defence_open(struct agent *agent);
void defence_adjust(struct agent *agent); /* there may be more memory, or less */
void defence_relieve(struct agent *agent, bool stalled);
void defence_catch_up(struct agent *agent);
void defence_ready(struct agent *agent);
void defence_step(struct agent *agent, uint64_t now);
uint64_t defence_reserve_kib(void);

/* boot.c */
void boot(struct agent *agent);

/* stats.c */
void stats_reply(struct agent *agent, uint32_t id);
void pressure_open(struct agent *agent);
void pressure_ready(struct agent *agent);
void pressure_tell(struct agent *agent, uint64_t total_kib, uint64_t gave_back_kib, uint64_t wants_kib);
uint64_t meminfo_kib(const char *key);
void oom_check(struct agent *agent);

/* shutdown.c */
void shutdown_begin(struct agent *agent, uint64_t grace_ms);
void shutdown_step(struct agent *agent, uint64_t now);

#endif
