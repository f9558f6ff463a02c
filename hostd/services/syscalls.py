"""The names of system calls that services answer, for people who read refusals (x86-64, asm/unistd_64.h)."""

from __future__ import annotations

NAMES = {
    41: "socket", 42: "connect", 44: "sendto", 46: "sendmsg", 49: "bind", 50: "listen", 99: "sysinfo", 159: "adjtimex",
    164: "settimeofday", 204: "sched_getaffinity", 227: "clock_settime", 257: "openat", 305: "clock_adjtime",
}  # fmt: skip


def syscall_name(number: int) -> str:
    """`connect`, or `syscall 999` for one that is not known here."""
    return NAMES.get(number, f"syscall {number}")
