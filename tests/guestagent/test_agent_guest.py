"""The agent as PID 1 of real guests: what only a kernel of its own can show. One guest for the module, and a peer."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import re
import signal
import tarfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from guestagent.errors import GuestRefused
from guestagent.messages import GuestEvent, OutputEnded, Stream
from tests.guestagent.guests import MACHINE_ID, UPPER_MIB, Guest, Image, why_no_guests
from tests.guestagent.realagent import Link
from tests.hostd.busybox import busybox, rootfs_tar
from tests.sharedcache.tarkit import header, make_tar

pytestmark = [pytest.mark.guest, pytest.mark.skipif(bool(why_no_guests()), reason=why_no_guests())]

BIG_BYTES = 112 << 20
SMALL_LAYERS = 101
AGENT_RSS_KIB = 1024
APPLETS = (
    "date",
    "stat",
    "readlink",
    "ln",
    "rm",
    "mkdir",
    "sync",
    "tr",
    "cut",
    "sort",
    "tty",
    "ip",
    "umount",
    "chmod",
    "mv",
)


@dataclass
class Running:
    """A configured guest, its current connection, and the digest of its /big."""

    guest: Guest
    link: Link
    big_sha256: str
    next_proc: int = 2

    def run(self, script: str, *, code: int = 0, **fields: object) -> str:
        """What a script prints on both streams."""
        proc = self.next_proc
        self.next_proc += 1
        self.link.shell(proc, f"exec 2>&1; {script}", env=(b"PATH=/bin",), **fields)
        assert self.link.exited(proc, 60) == (code, 0), self.link.out(proc)
        said = self.link.out(proc).decode().rstrip("\n")
        self.link.ask(self.link.session.forget(proc))
        return said


def base_tar() -> bytes:
    program = busybox()
    assert program is not None
    return rootfs_tar(program, {"etc/gone/file": b"", "etc/gone/other": b"", "etc/kept": b"low", "opaque/low": b""})


def folder(name: str, **fields: object) -> tarfile.TarInfo:
    return header(name, kind=tarfile.DIRTYPE, **fields)


def top_tar() -> bytes:
    """Whiteouts, an opaque folder, links that lead out, a device node, and a root of its own mode."""
    links = [header(f"bin/{name}", kind=tarfile.SYMTYPE, linkname="busybox") for name in APPLETS]
    return make_tar(
        folder(".", mode=0o751), folder("bin"), *links, folder("etc"),
        header("etc/.wh.gone"), header("etc/.wh.kept"),
        folder("opaque"), header("opaque/.wh..wh..opq"), (header("opaque/high"), b""),
        header("etc/hostname", kind=tarfile.SYMTYPE, linkname="/proc/sys/kernel/hostname"),
        header("etc/machine-id", kind=tarfile.SYMTYPE, linkname="../../../../mod/order"),
        header("etc/resolv.conf", kind=tarfile.SYMTYPE, linkname="/nowhere"),
        header("raw", kind=tarfile.BLKTYPE, mode=0o666, devmajor=259, devminor=0),
        header("kmsg", kind=tarfile.CHRTYPE, mode=0o666, devmajor=1, devminor=11),
    )  # fmt: skip


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    """104 layers: a userland, a large file, a hundred small ones, and one that takes things away."""
    made = Image(tmp_path_factory.mktemp("layers"))
    made.add(base_tar())
    made.add(make_tar((header("big"), random.Random(1).randbytes(BIG_BYTES))))
    for number in range(SMALL_LAYERS):
        made.add(make_tar(folder("many"), (header(f"many/{number}"), b"%d" % number), (header("who"), b"%d" % number)))
    made.add(top_tar())
    return made


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, image: Image) -> Iterator[Running]:
    guest = Guest(tmp_path_factory.mktemp("guest"), image)
    try:
        guest.link.ask(guest.link.session.configure(guest.configuration()))
        digest = hashlib.sha256(random.Random(1).randbytes(BIG_BYTES)).hexdigest()
        yield Running(guest, guest.link, digest)
    finally:
        guest.close()


def test_the_image_is_joined_of_all_its_layers(running: Running) -> None:
    assert running.run("ls /many | wc -l; cat /many/0 /many/100 /who; echo; stat -c '%a %u' /") == (
        f"{SMALL_LAYERS}\n0100{SMALL_LAYERS - 1}\n751 0"
    )


def test_whiteouts_and_opaque_folders_hide(running: Running) -> None:
    assert running.run("ls /etc/gone /etc/kept", code=1).count("No such file") == 2
    assert running.run("ls /opaque") == "high"


def test_reading_a_layer_costs_the_guest_no_memory(running: Running) -> None:
    """DAX: 112 MiB are read (and are right), and the guest's page cache does not hold them."""
    before = running.link.stats()
    assert running.run("sha256sum /big").split()[0] == running.big_sha256
    after = running.link.stats()
    assert abs(after.cached_kib - before.cached_kib) < 2048
    assert after.refault == before.refault


def test_the_upper_takes_writes_up_to_its_size(running: Running) -> None:
    assert running.run("echo new > /who; cat /who; mv /many/7 /many/moved; cat /many/moved; ls /many/7", code=1) == (
        "new\n7ls: /many/7: No such file or directory"
    )
    said = running.run(f"dd if=/dev/zero of=/fill bs=1M count={UPPER_MIB + 8}; rm /fill; echo left", code=0)
    assert "No space left on device" in said and said.endswith("left")


def test_the_identity_is_what_configure_gave(running: Running) -> None:
    said = running.run(
        "cat /etc/machine-id /etc/hostname; hostname; cat /etc/hosts; readlink /etc/resolv.conf; date +%s"
    )
    lines = said.splitlines()
    assert lines[:3] == [MACHINE_ID.decode(), "loom-1", "loom-1"]
    assert "127.0.0.1\tlocalhost" in lines and "127.0.1.1\tloom-1" in lines
    assert lines[-2] == "/nowhere"  # there was one: the image's stays
    assert abs(int(lines[-1]) - time.time()) < 30
    assert "UP" in running.run("ip link show lo")


def test_the_workload_has_its_own_namespaces(running: Running) -> None:
    mounts = running.run("cat /proc/mounts")
    assert {line.split()[2] for line in mounts.splitlines()} <= {
        "overlay",
        "proc",
        "sysfs",
        "tmpfs",
        "devpts",
        "devtmpfs",
    }
    assert "erofs" not in mounts and "/l/" not in mounts
    assert re.search(r"^sysfs /sys sysfs ro,", mounts, re.M)
    assert running.run("cat /proc/1/comm; ls /; ls /mod", code=1).splitlines()[0] == "init"
    assert running.run("ls /proc/1/root/", code=1).count("Permission denied") >= 1


def test_no_device_can_be_made_or_opened(running: Running) -> None:
    assert "Operation not permitted" in running.run("mknod /tmp/pmem0 b 259 0", code=1)
    for node in ("/raw", "/kmsg"):
        assert "Permission denied" in running.run(f"test -e {node} && cat {node}", code=1)
    status = running.run("cat /proc/self/status")
    bits = int(re.findall(r"^CapBnd:\s+(\w+)$", status, re.M)[0], 16)
    assert not bits >> 27 & 1 and not bits >> 21 & 1  # MKNOD, SYS_ADMIN
    for path in ("/proc/sysrq-trigger", "/proc/sys/kernel/core_pattern"):
        assert "Read-only file system" in running.run(f"echo b > {path}", code=1)


def test_randomness_was_seeded(running: Running) -> None:
    assert running.run("cat /proc/sys/kernel/random/entropy_avail") == "256"
    assert "sandloom-agent" not in running.guest.console


def test_a_terminal_in_the_guest(running: Running) -> None:
    assert running.run("tty; stty size", tty=True, rows=40, cols=90).splitlines() == ["/dev/pts/0", "40 90"]


def test_output_survives_a_new_host(running: Running) -> None:
    """hostd goes away in the middle of a stream and comes back: not a byte is lost or said twice."""
    link = running.link
    proc, running.next_proc = running.next_proc, running.next_proc + 1
    link.shell(proc, "seq 1 60000; exit 3", env=(b"PATH=/bin",))
    came = bytearray()
    for _again in range(3):
        running.link.wait(lambda: len(running.link.out(proc)) > 30_000 or proc in running.link.exits)
        came += link.out(proc)
        link = running.link = running.guest.connect(link.hang_up())
        link.send(link.session.follow(proc))
    assert link.exited(proc) == (3, 0)
    came += link.out(proc)
    assert bytes(came) == b"".join(b"%d\n" % n for n in range(1, 60_001))
    link.ask(link.session.forget(proc))


def test_much_output_flows(running: Running) -> None:
    link, proc = running.link, running.next_proc
    running.next_proc += 1
    begin = time.monotonic()
    link.shell(proc, "dd if=/dev/zero bs=64k count=256 2>/dev/null", env=(b"PATH=/bin",))
    assert link.exited(proc, 60) == (0, 0)
    assert len(link.out(proc)) == 16 << 20
    assert time.monotonic() - begin < 30
    link.ask(link.session.forget(proc))


def test_memory_that_is_plugged_is_movable_and_goes_again(running: Running) -> None:
    before = running.link.stats().mem_total_kib
    resize(running, 256)
    running.link.wait(lambda: running.link.stats().mem_total_kib >= before + (250 << 10))
    zones = running.run("cat /sys/devices/system/memory/memory*/valid_zones | sort | uniq -c")
    states = running.run(
        "cat /sys/devices/system/memory/auto_online_blocks; cat /sys/devices/system/memory/memory*/state"
    )
    assert int(re.findall(r"(\d+) Movable", zones)[0]) >= 2
    assert states.splitlines()[0] == "online_movable" and set(states.splitlines()[1:]) == {"online"}
    resize(running, 0)
    running.link.wait(lambda: running.link.stats().mem_total_kib <= before + 1024)


def resize(running: Running, mib: int) -> None:
    """Asks virtio-mem and waits until the guest followed."""
    running.guest.qmp("qom-set", path="/machine/peripheral/vmem0", property="requested-size", value=mib << 20)
    give_up = time.monotonic() + 30
    while running.guest.qmp("qom-get", path="/machine/peripheral/vmem0", property="size") != mib << 20:
        assert time.monotonic() < give_up, running.guest.console
        time.sleep(0.05)


def test_an_out_of_memory_kill_is_told_and_survived(running: Running) -> None:
    link, proc = running.link, running.next_proc
    running.next_proc += 1
    kills = link.stats().oom_kills
    link.shell(proc, "tail /dev/zero", env=(b"PATH=/bin",))
    link.wait(lambda: events(link, "oom_kill"), 60)
    told = dict(events(link, "oom_kill")[0].values)
    assert told["total"] == kills + told["new"] and told["new"] >= 1
    link.exited(proc, 60)
    link.ask(link.session.forget(proc))
    assert link.stats().oom_kills > kills
    assert told["total_kib"] > told["available_kib"]
    pressure = dict(events(link, "psi_memory")[0].values)
    assert pressure.keys() == {"some_us", "full_us", "available_kib", "total_kib", "gave_back_kib", "wants_kib"}
    assert pressure["wants_kib"] >= 64 << 10 and pressure["gave_back_kib"] == 0
    assert running.run("echo well") == "well"


def events(link: Link, name: str) -> list[GuestEvent]:
    return [event for event in link.events if isinstance(event, GuestEvent) and event.name == name]


def test_the_agent_stays_small(running: Running) -> None:
    stats = running.link.stats()
    assert 0 < stats.agent_rss_kib <= AGENT_RSS_KIB
    assert stats.cpus_online == 1 and stats.procs == 0
    print(f"\nagent {stats.agent_rss_kib} KiB resident, boot to answer {running.guest.elapsed_s:.1f} s with 104 layers")


def test_the_end_of_main_is_the_end_of_all_and_shutdown_powers_off(running: Running) -> None:
    link, proc = running.link, running.next_proc
    link.shell(proc, "trap '' TERM; sleep 1000", env=(b"PATH=/bin",))
    link.shell(1, "trap 'echo bye; exit 5' TERM; echo up; while :; do sleep 0.05; done", env=(b"PATH=/bin",))
    link.wait(lambda: link.out(1) == b"up\n")
    link.ask(link.session.shutdown(20_000))
    try:
        link.wait(lambda: {1, proc} <= set(link.exits))
    except ConnectionError:
        pass
    assert link.exited(1) == (5, 0) and link.out(1) == b"up\nbye\n"
    assert link.exited(proc) == (-1, signal.SIGKILL)
    assert OutputEnded(1, Stream.STDOUT, 7) in link.events
    assert running.guest.process.wait(20) == 0
    assert "Kernel panic" not in running.guest.console


def test_the_peer_and_what_goes_wrong(tmp_path: Path, image: Image) -> None:
    """The same blobs from virtio-blk are found and mounted, and cost the guest memory: so DAX is what saves it above.
    Before that: a layer that is nowhere, and a module that is none."""
    few = Image(image.folder, [image.layers[0], image.layers[1], image.layers[-1]])
    guest = Guest(tmp_path, few, layers_as="blk", extra_module="broken")
    try:
        link = guest.link
        nowhere = os.urandom(16)
        with pytest.raises(GuestRefused) as caught:
            link.ask(link.session.configure(guest.configuration(layers=(*few.uuids, nowhere), deadline_ms=300)))
        assert (caught.value.errno, nowhere.hex() in caught.value.message) == (errno.ENODEV, True)
        assert "cannot load broken.ko: Exec format error" in guest.console
        link.ask(link.session.configure(guest.configuration()))
        before = link.stats().cached_kib
        assert link.start(2, "sha256sum", "/big", env=(b"PATH=/bin",)) > 1
        assert link.exited(2, 60) == (0, 0)
        assert link.stats().cached_kib - before > 100 << 10
        link.ask(link.session.shutdown(0))
        assert guest.process.wait(20) == 0
    finally:
        guest.close()
