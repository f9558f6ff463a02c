/* sandloom-nopunch PROGRAM [ARGUMENT…]: runs PROGRAM so that punching a hole into a file succeeds and does
 * nothing.
 *
 * For a QEMU whose virtio-mem memory is a private mapping of a checkpoint's sealed file. To give a block back
 * QEMU first punches it out of the file, which the seal refuses, and only then drops its own copies of the
 * pages, which is all that a private mapping needs. Answering the first with "done" makes the second happen.
 * It also is one more wall before the file that all forks share: no punch ever leaves such a QEMU.
 *
 * A seccomp filter (seccomp(2)) that answers fallocate(2) with FALLOC_FL_PUNCH_HOLE by 0; another ABI's calls
 * kill the process. It stays over execve and cannot be taken off.
 */
#include <errno.h>
#include <linux/audit.h>
#include <linux/falloc.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef __x86_64__
#error "guests run on x86-64 only"
#endif

#define X32_BIT 0x40000000u
#define LOAD(field) BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, field))
#define ANSWER(what) BPF_STMT(BPF_RET | BPF_K, what)

static struct sock_filter filter[] = {
    LOAD(arch),
    BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, AUDIT_ARCH_X86_64, 0, 2),
    LOAD(nr),
    BPF_JUMP(BPF_JMP | BPF_JGE | BPF_K, X32_BIT, 0, 1),
    ANSWER(SECCOMP_RET_KILL_PROCESS),
    BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_fallocate, 0, 3),
    LOAD(args[1]), /* mode: the low half comes first */
    BPF_JUMP(BPF_JMP | BPF_JSET | BPF_K, FALLOC_FL_PUNCH_HOLE, 0, 1),
    ANSWER(SECCOMP_RET_ERRNO | 0),
    ANSWER(SECCOMP_RET_ALLOW),
};

int main(int argc, char **argv) {
    struct sock_fprog program = {.len = sizeof(filter) / sizeof(filter[0]), .filter = filter};
    if (argc < 2) {
        fputs("usage: sandloom-nopunch PROGRAM [ARGUMENT...]\n", stderr);
        return 2;
    }
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0 ||
        syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &program) < 0) {
        fprintf(stderr, "sandloom-nopunch: no seccomp filter: %s\n", strerror(errno));
        return 126;
    }
    execvp(argv[1], argv + 1);
    fprintf(stderr, "sandloom-nopunch: %s: %s\n", argv[1], strerror(errno));
    return 127;
}
