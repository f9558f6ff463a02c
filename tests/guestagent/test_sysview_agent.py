"""`sysview` by the real agent, sanitized, on this machine: files, calls, refusals, and nothing that hangs."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

from controlplane.api.services import Answerer, ServicePolicy
from tests.guestagent.servicesagent import ServedAgent, served

TOOL, DENY = ServicePolicy(sysview=Answerer.TOOL), ServicePolicy(sysview=Answerer.DENY)
BEGIN = """
import ctypes, errno, json, os, threading
libc = ctypes.CDLL(None, use_errno=True)
def raw(*a):
    r = libc.syscall(*a)
    return errno.errorcode[ctypes.get_errno()] if r < 0 else r
def no(call):
    try: call()
    except OSError as error: return errno.errorcode[error.errno]
    return "fine"
FILES = "/proc/meminfo", "/proc/cpuinfo", "/proc/stat", "/sys/devices/system/cpu/online"
"""


async def python(agent: ServedAgent, script: str) -> str:
    code, said = await agent.run("/usr/bin/python3", "-c", BEGIN + textwrap.dedent(script))
    assert code == 0, said
    return said.strip()


async def test_files_and_calls_are_answered(sanitized_agent: Path, tmp_path: Path) -> None:
    async with served(sanitized_agent, tmp_path, TOOL) as agent:
        said = json.loads(
            await python(
                agent,
                """
            texts = [open(name).read() for name in FILES]
            total = int(texts[0].split()[1])
            info = (ctypes.c_ulong * 16)()
            again = os.open(FILES[0], os.O_RDONLY)
            pieces = [os.pread(again, 7, at) for at in range(0, 70, 7)]
            online = open(FILES[3]).read().strip()
            cpus = os.sched_getaffinity(0)
            print(json.dumps({
                "kinds": [text.split()[0] for text in texts],
                "same total": raw(99, info) == 0 and info[4] // 1024 == total,
                "affinity": sorted(cpus) == sorted(os.sched_getaffinity(os.getpid())) == sorted(
                    os.sched_getaffinity(os.getppid())),
                "pieces": b"".join(pieces)[:9].decode(),
                "stat": sum(line.startswith("cpu") for line in texts[2].splitlines()) - 1 == os.sysconf(84),
                "cpuinfo": texts[1].count("processor\\t") == os.sysconf(84),
                "filesystem": len(set(os.stat(name).st_dev for name in FILES)),
                "wrong": [raw(204, 0, 7, info), raw(204, 0, 0, info), raw(204, 999999, 128, info),
                          raw(204, 0, 128, 8), raw(99, 8), no(lambda: open(FILES[0], "w"))],
            }))
            """,
            )
        )
        assert said.pop("kinds")[0] == "MemTotal:"
        assert said.pop("wrong") == ["EINVAL", "EINVAL", "ESRCH", "EFAULT", "EFAULT", "EROFS"]
        assert said.pop("pieces") == "MemTotal:" and said.pop("filesystem") == 4
        assert said == {"same total": True, "affinity": True, "stat": True, "cpuinfo": True}
        code, said_free = await agent.run("/bin/sh", "-c", "nproc; free -k; cat /proc/stat; grep -c . /proc/cpuinfo")
        assert code == 0 and "Mem:" in said_free


async def test_many_readers_at_once_see_whole_texts(sanitized_agent: Path, tmp_path: Path) -> None:
    async with served(sanitized_agent, tmp_path, TOOL) as agent:
        assert await python(
            agent, """
            held = [os.open(FILES[i % 3], os.O_RDONLY) for i in range(200)]
            begun = [os.read(fd, 5) for fd in held]
            rest = [b"".join(iter(lambda: os.read(fd, 4096), b"")) for fd in held]
            whole = all((a + b).startswith((b"MemTotal:", b"processor", b"cpu ")) and b.endswith(b"\\n")
                        for a, b in zip(begun, rest))
            def read():
                for _ in range(20):
                    for name in FILES: open(name).read(); os.sched_getaffinity(0)
            threads = [threading.Thread(target=read) for _ in range(8)]
            [t.start() for t in threads]; [t.join() for t in threads]
            pids = []
            for _ in range(8):
                pid = os.fork()
                if pid == 0:
                    while True: open(FILES[1]).read(); os.sched_getaffinity(0)
                pids.append(pid)
            read()
            [os.kill(pid, 9) for pid in pids]; [os.waitpid(pid, 0) for pid in pids]
            read()
            print(whole)
            """) == "True"  # fmt: skip


async def test_splicing_into_a_pipe_that_the_agent_reads_hangs_nobody(sanitized_agent: Path, tmp_path: Path) -> None:
    async with served(sanitized_agent, tmp_path, TOOL) as agent:
        code, said = await agent.run(
            "/usr/bin/python3", "-c", BEGIN + textwrap.dedent("""
            for i in range(300):
                fd = os.open(FILES[i % 4], os.O_RDONLY)
                while os.splice(fd, 1, 100): pass
                os.close(fd)
            """)
        )  # fmt: skip
        assert code == 0 and said.count("MemTotal") == 75 and said.count("intr ") == 75


async def test_denied_is_refused_and_told(sanitized_agent: Path, tmp_path: Path) -> None:
    async with served(sanitized_agent, tmp_path, DENY) as agent:
        said = await python(
            agent, """
            info = (ctypes.c_ulong * 16)()
            print(*(no(lambda: open(name)) for name in FILES), raw(99, info), no(lambda: os.sched_getaffinity(0)),
                  no(lambda: open("/proc/uptime")))
            """)  # fmt: skip
        assert said == "EACCES " * 6 + "fine"
        assert any("sysview: pid" in line and "openat(/proc/cpuinfo): sysview: deny" in line for line in agent.told)
        assert any("sched_getaffinity(0): sysview: deny" in line for line in agent.told)


async def test_kernel_leaves_the_kernels_own_files(sanitized_agent: Path, tmp_path: Path) -> None:
    async with served(sanitized_agent, tmp_path, ServicePolicy(time=Answerer.KERNEL)) as agent:
        assert await python(agent, "print(os.stat('/proc/meminfo').st_dev == os.stat('/proc/uptime').st_dev)") == "True"
