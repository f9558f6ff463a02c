"""What a workload can see and do, in both classes."""

from __future__ import annotations

import asyncio
import contextlib
import os
from pathlib import Path

import pytest

from hostd.drivers.oci.mounts import mounted
from hostd.errors import CommandFailed, StartFailed
from tests.contract.driver_suite import command
from tests.hostd.busybox import busybox, rootfs_tar
from tests.hostd.drivers.oci.rig import OciRig, layer_of, run, sh
from tests.sharedcache.tarkit import header, make_tar

pytestmark = pytest.mark.slow


async def test_a_minimal_world(each: OciRig) -> None:
    async with each.box("world") as (engine, _):
        out, err, code = await run(
            engine,
            sh(
                "hostname; id -u; cat /etc/hostname; grep -c . /etc/machine-id; ls /sys/class/net; ls /dev;"
                " mknod /tmp/disk b 7 0 && head -c 1 /tmp/disk && echo device;"
                " mount -t tmpfs none /tmp && echo mounted;"
                " echo 1 > /proc/sys/kernel/sysrq && echo sysctl; touch /sys/x && echo sys; echo done"
            ),
        )
        words = out.split()
        assert words[:4] == ["world", "0", "world", "1"], err
        assert not {"device", "mounted", "sysctl", "sys"} & set(words)
        assert {"null", "zero", "urandom", "tty", "pts", "shm"} <= set(words)
        assert not {"kmsg", "kvm", "mem", "loop0", "vda", "sda"} & set(words)
        assert words[-1] == "done"
        assert code == 0


async def test_no_network_but_its_own_loopback(each: OciRig) -> None:
    async with each.box("net") as (engine, _):
        out, _, _ = await run(engine, sh("tail -n +3 /proc/net/dev; grep -c . /etc/resolv.conf"))
        devices = [line.split(":")[0].strip() for line in out.splitlines() if ":" in line]
        assert devices == ["lo"]


async def test_it_sees_no_process_of_the_host(each: OciRig) -> None:
    async with each.box("pids") as (engine, _):
        out, _, _ = await run(engine, sh("ls -d /proc/[0-9]* | wc -l"))
        assert int(out) < 10


async def test_privileges_are_what_was_said(each: OciRig) -> None:
    async with each.box("caps") as (engine, _):
        out, _, _ = await run(engine, sh("grep -E '^(CapEff|CapBnd|NoNewPrivs|Seccomp):' /proc/self/status"))
        status = dict(line.split(":\t") for line in out.splitlines())
        assert int(status["CapBnd"], 16) & (1 << 27 | 1 << 21 | 1 << 16) == 0  # MKNOD, SYS_ADMIN, SYS_MODULE
        expected = 0xA80425FB & ~(1 << 27)  # docker's, less MKNOD
        if each.runtime.name == "runsc":
            expected &= ~(1 << 13)  # it keeps NET_RAW to itself
        assert int(status["CapEff"], 16) == int(status["CapBnd"], 16) == expected
        if each.runtime.name == "crun":
            assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
        out, _, _ = await run(engine, sh("grep CapEff /proc/self/status; id -u; id -g"), user="nobody")
        assert out.split() == ["CapEff:", "0" * 16, "65534", "65534"]


async def test_masked_paths_and_refused_calls_from_inside(each: OciRig) -> None:
    """What the default profile takes away: the host's memory, keys, interrupts and knobs, and calls that reach them."""
    async with each.box("masked") as (engine, _):
        script = (
            "for path in /proc/kcore /proc/keys /proc/timer_list /proc/interrupts /sys/firmware/dmi; do"
            ' [ -n "$(head -c 9 $path 2>/dev/null)" ] && echo shown $path; done;'
            " ls /sys/firmware 2>/dev/null | grep . && echo firmware;"
            " for path in /proc/sys/vm/drop_caches /proc/sysrq-trigger /proc/irq/default_smp_affinity; do"
            " (echo 1 > $path) 2>/dev/null && echo wrote $path; done;"
            " unshare -r true 2>/dev/null && echo unshared; swapoff -a 2>/dev/null && echo swap;"
            " hostname other 2>/dev/null && echo renamed;"
            " date -s 2001-01-01 >/dev/null 2>&1; [ $(date +%Y) = 2001 ] && echo clock;"
            " chroot / true && echo chroot; reboot -f 2>/dev/null && echo reboot; echo done"
        )
        out, err, _ = await run(engine, sh(script))
        hidden = [word for word in out.split() if each.runtime.name == "crun" or word in ("swap", "clock", "firmware")]
        assert hidden == (["chroot", "done"] if each.runtime.name == "crun" else []), (out, err)
        assert out.endswith("done\n")


async def test_users_come_from_the_image_as_it_is_now(each: OciRig) -> None:
    async with each.box("users") as (engine, _):
        with pytest.raises(CommandFailed, match="'late' is not in the image's /etc/passwd"):
            await run(engine, ("id",), user="late")
        await run(engine, sh("echo 'late:x:700:701::/:/bin/sh' >> /etc/passwd"))
        assert (await run(engine, sh("id -u; id -g"), user="late"))[0] == "700\n701\n"


async def test_a_workload_that_relinks_passwd_learns_nothing(each: OciRig) -> None:
    async with each.box("relink") as (engine, _):
        await run(engine, sh("rm /etc/passwd; ln -s /../../../../../../../../etc/passwd /etc/passwd"))
        with pytest.raises(Exception, match=r"cannot be opened|is not in the image's"):
            await run(engine, ("id",), user="daemon")  # the host's passwd has one


async def test_hostile_images_do_not_reach_the_host(each: OciRig, tmp_path: Path) -> None:
    """Identity files that are links to the host's, a device of the host's, a setuid shell."""
    program = busybox()
    assert program is not None
    outside = tmp_path / "outside"
    outside.mkdir()
    link = {"kind": b"2"}
    base = layer_of(rootfs_tar(program), tmp_path / "base.blob")
    evil = layer_of(
        make_tar(
            header("etc", kind=b"5"),
            header("etc/hosts", linkname=str(outside / "hosts"), **link),
            header("etc/passwd", linkname="/../../../../../../../../etc/passwd", **link),
            header("disk", kind=b"4", devmajor=7, devminor=0, mode=0o666),
            (header("bin/busybox-suid", mode=0o4755), program.read_bytes()),
        ),
        tmp_path / "evil.blob",
    )
    async with each.box("evil", layers=(base, evil)) as (engine, _):
        out, _, _ = await run(engine, sh("cat /etc/hosts; head -c 1 /disk && echo read"))
        assert "localhost" in out
        assert "read" not in out
        out, _, _ = await run(engine, ("/bin/busybox-suid", "id", "-u"), user="65534")
        assert out == "65534\n"
    assert os.listdir(outside) == []  # noqa: PTH208


async def test_a_mount_point_that_is_a_link_does_not_reach_the_host(each: OciRig, tmp_path: Path) -> None:
    """Refused (crun) or resolved inside of the root (runsc); nothing is mounted or made outside."""
    program = busybox()
    assert program is not None
    outside = tmp_path / "outside"
    outside.mkdir()
    base = layer_of(rootfs_tar(program), tmp_path / "base.blob")
    evil = layer_of(
        make_tar(header(".wh.proc"), header("proc", linkname=f"../../../../../../../..{outside}", kind=b"2")),
        tmp_path / "evil.blob",
    )
    with contextlib.suppress(StartFailed):
        async with each.box("linked", layers=(base, evil)) as (engine, _):
            await run(engine, ("true",))
    assert os.listdir(outside) == []  # noqa: PTH208
    assert [one.at for one in mounted() if one.at.startswith(str(outside))] == []


async def test_writes_are_bounded_and_its_own(each: OciRig) -> None:
    async with each.box("writes") as (engine, _):
        _, err, code = await run(engine, sh("dd if=/dev/zero of=/big bs=1M count=800"))
        assert code != 0
        assert "No space left" in err
        await run(engine, sh("rm /big; echo mine > /mine"))
    async with each.box("writes") as (engine, _):
        assert (await run(engine, ("cat", "/mine")))[2] == 1


async def test_processes_are_bounded(each: OciRig) -> None:
    """A fork bomb, let loose where 100 processes may be, meets the bound in its own cgroup and leaves nothing."""
    async with each.box("bomb") as (engine, _):
        uid = engine.place.uid  # type: ignore[attr-defined]
        group = next(one for one in each.around.cgroups.folders(uid) if (one / "pids.max").exists())
        (group / "pids.max").write_text("100")
        bomb = await engine.spawn(command(sh("while :; do sleep 1000 & done 2>/dev/null")), main=False)
        most = 0
        async with asyncio.timeout(60):
            while not refused(group):
                most = max(most, tasks(group))
                await asyncio.sleep(0.01)
        most = max(most, tasks(group))
        assert 1 < most <= 100
        await bomb.signal(9)
    assert each.around.cgroups.pids(uid) == set()


def tasks(group: Path) -> int:
    """How many tasks are in a cgroup now."""
    return int((group / "pids.current").read_text())


def refused(group: Path) -> int:
    """How often its bound was met."""
    return int((group / "pids.events").read_text().split()[1])
