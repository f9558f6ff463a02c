#include "policy.h"

#include <errno.h>
#include <linux/audit.h>
#include <linux/seccomp.h>
#include <sys/socket.h>
#include <sys/syscall.h>

enum { X32_BIT = 0x40000000 };

static const struct served served_calls[] = {
    {SYS_connect, SERVICE_SOCKETS, ANSWER_TOOL, NO_ARGUMENT, 0},
    {SYS_socket, SERVICE_SOCKETS, ANSWER_DENY, 0, AF_INET},
    {SYS_socket, SERVICE_SOCKETS, ANSWER_DENY, 0, AF_INET6},
    {SYS_socket, SERVICE_SOCKETS, ANSWER_DENY, 0, AF_PACKET},
    {SYS_socket, SERVICE_SOCKETS, ANSWER_DENY, 0, AF_VSOCK},
    {SYS_sysinfo, SERVICE_SYSVIEW, ANSWER_TOOL, NO_ARGUMENT, 0},
    {SYS_sched_getaffinity, SERVICE_SYSVIEW, ANSWER_TOOL, NO_ARGUMENT, 0},
    {SYS_sysinfo, SERVICE_SYSVIEW, ANSWER_DENY, NO_ARGUMENT, 0},
    {SYS_sched_getaffinity, SERVICE_SYSVIEW, ANSWER_DENY, NO_ARGUMENT, 0},
    {SYS_clock_settime, SERVICE_TIME, ANSWER_TOOL, NO_ARGUMENT, 0},
    {SYS_settimeofday, SERVICE_TIME, ANSWER_TOOL, NO_ARGUMENT, 0},
    {SYS_adjtimex, SERVICE_TIME, ANSWER_TOOL, NO_ARGUMENT, 0},
    {SYS_clock_adjtime, SERVICE_TIME, ANSWER_TOOL, NO_ARGUMENT, 0},
    {SYS_clock_settime, SERVICE_TIME, ANSWER_DENY, NO_ARGUMENT, 0},
    {SYS_settimeofday, SERVICE_TIME, ANSWER_DENY, NO_ARGUMENT, 0},
    {SYS_adjtimex, SERVICE_TIME, ANSWER_DENY, NO_ARGUMENT, 0},
    {SYS_clock_adjtime, SERVICE_TIME, ANSWER_DENY, NO_ARGUMENT, 0},
};
enum { ROWS = sizeof(served_calls) / sizeof(served_calls[0]) };

static bool applies(const struct served *row, const struct policy *policy) {
    return policy->who[row->service] == row->answerer;
}

bool policy_filters(const struct policy *policy) {
    for (int service = 0; service < SERVICES; service++) {
        if (policy->who[service] != ANSWER_KERNEL) {
            return true;
        }
    }
    return false;
}

struct program {
    struct sock_filter *to;
    size_t size, room;
};

static void add(struct program *program, uint32_t code, uint32_t value, uint8_t yes, uint8_t no) {
    if (program->size < program->room) {
        program->to[program->size] = (struct sock_filter){(uint16_t)code, yes, no, value};
    }
    program->size++;
}

static void load(struct program *program, uint32_t offset) {
    add(program, BPF_LD | BPF_W | BPF_ABS, offset, 0, 0);
}

static void answer(struct program *program, uint32_t verdict) {
    add(program, BPF_RET | BPF_K, verdict, 0, 0);
}

static void add_row(struct program *program, const struct served *row) {
    if (row->argument == NO_ARGUMENT) {
        add(program, BPF_JMP | BPF_JEQ | BPF_K, row->number, 0, 1);
        answer(program, SECCOMP_RET_USER_NOTIF);
        return;
    }
    add(program, BPF_JMP | BPF_JEQ | BPF_K, row->number, 0, 4);
    load(program, (uint32_t)(offsetof(struct seccomp_data, args) + row->argument * sizeof(uint64_t)));
    add(program, BPF_JMP | BPF_JEQ | BPF_K, row->value, 0, 1);
    answer(program, SECCOMP_RET_USER_NOTIF);
    load(program, offsetof(struct seccomp_data, nr));
}

size_t filter_build(const struct policy *policy, struct sock_filter *to, size_t room) {
    struct program program = {.to = to, .room = room};
    if (!policy_filters(policy)) {
        return 0;
    }
    load(&program, offsetof(struct seccomp_data, arch));
    add(&program, BPF_JMP | BPF_JEQ | BPF_K, AUDIT_ARCH_X86_64, 1, 0);
    answer(&program, SECCOMP_RET_ERRNO | ENOSYS);
    load(&program, offsetof(struct seccomp_data, nr));
    add(&program, BPF_JMP | BPF_JGE | BPF_K, X32_BIT, 0, 1);
    answer(&program, SECCOMP_RET_ERRNO | ENOSYS);
    add(&program, BPF_JMP | BPF_JEQ | BPF_K, SYS_io_uring_setup, 0, 1);
    answer(&program, SECCOMP_RET_ERRNO | ENOSYS);
    for (size_t i = 0; i < ROWS; i++) {
        if (applies(&served_calls[i], policy)) {
            add_row(&program, &served_calls[i]);
        }
    }
    answer(&program, SECCOMP_RET_ALLOW);
    return program.size <= room ? program.size : 0;
}

const struct served *served_next(const struct policy *policy, size_t *at) {
    while (*at < ROWS) {
        const struct served *row = &served_calls[(*at)++];
        if (applies(row, policy)) {
            return row;
        }
    }
    return NULL;
}

const struct served *served_why(const struct policy *policy, uint32_t number, const uint64_t arguments[6]) {
    for (size_t i = 0; i < ROWS; i++) {
        const struct served *row = &served_calls[i];
        if (row->number == number && applies(row, policy) &&
            (row->argument == NO_ARGUMENT || (uint32_t)arguments[row->argument] == row->value)) {
            return row;
        }
    }
    return NULL;
}
