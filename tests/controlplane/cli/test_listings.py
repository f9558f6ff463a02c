"""Tables to the letter, and the other forms, over a real connection."""

from __future__ import annotations

import json

import pytest
import yaml

from controlplane.api.v1 import hosts_pb2, images_pb2, sandboxes_pb2
from controlplane.cli.output import Column, render_table, safe, wants_colour
from tests.controlplane.cli.conftest import NOW_S, Cli
from tests.controlplane.cli.fakefabric import FakeFabric

MIB = 1 << 20


def at(message: object, seconds_ago: float) -> None:
    message.FromNanoseconds(int((NOW_S - seconds_ago) * 1e9))  # type: ignore[attr-defined]


def fill(fabric: FakeFabric) -> None:
    web = fabric.add("web", host_pid=77, accel="tcg")
    at(web.status.started_at, 300)
    at(web.created_at, 310)
    web.spec.labels["a"] = "b"
    web.spec.process.argv.extend(["sleep", "9"])
    job = fabric.add("job", sandboxes_pb2.EXITED, exit_code=3, has_exit_code=True)
    at(job.status.finished_at, 7300)
    at(job.created_at, 8000)
    bad = fabric.add("bad", sandboxes_pb2.FAILED, reason="VmmExited")
    at(bad.created_at, 5)
    new = fabric.add("new", sandboxes_pb2.PENDING)
    at(new.created_at, 1)


def test_ps_lists_what_lives(fabric: FakeFabric, cli: Cli) -> None:
    fill(fabric)
    assert cli.ok("ps") == (
        "NAME  IMAGE   STATUS       MEMORY  CPUS  HOST  AGE\n"
        "new   debian  pending     256M/1G     1  loom   1s\n"
        "web   debian  running 5m  256M/1G     1  loom   5m\n"
    )


def test_ps_all_and_other_forms(fabric: FakeFabric, cli: Cli) -> None:
    fill(fabric)
    statuses = [line[14:].split("  ")[0] for line in cli.ok("ps", "-a").splitlines()[1:]]
    assert statuses == ["failed (VmmExited)", "exited (3) 2h ago", "pending", "running 5m"]
    assert cli.ok("ps", "-a", "-o", "name").split() == ["bad", "job", "new", "web"]
    rows = json.loads(cli.ok("ps", "-o", "json"))
    assert [(row["name"], row["status"]["phase"]) for row in rows] == [("new", "PENDING"), ("web", "RUNNING")]
    assert yaml.safe_load(cli.ok("ps", "-o", "yaml")) == rows
    wide = cli.ok("ps", "-o", "wide").splitlines()
    assert wide[0].split()[-6:] == ["CLASS", "PRIORITY", "ACCEL", "PID", "LABELS", "COMMAND"]
    assert wide[2].endswith("tcg     77  a=b     sleep 9")


def test_an_empty_listing_says_what_to_do(fabric: FakeFabric, cli: Cli) -> None:
    done = cli("ps")
    assert done.out == "NAME  IMAGE  STATUS  MEMORY  CPUS  HOST  AGE\n"
    assert "sandloom ps -a" in done.err
    assert cli("ps", "-q").err == ""


def test_inspect_gives_one_object_or_a_list(fabric: FakeFabric, cli: Cli) -> None:
    fill(fabric)
    web = json.loads(cli.ok("inspect", "web"))
    assert (web["status"]["host_pid"], web["status"]["phase"], web["spec"]["labels"]) == (77, "RUNNING", {"a": "b"})
    assert [row["name"] for row in json.loads(cli.ok("inspect", "web", "job"))] == ["web", "job"]
    assert yaml.safe_load(cli.ok("inspect", "web", "-o", "yaml")) == web
    done = cli("inspect", "none")
    assert (done.code, done.out) == (1, "")
    assert done.err == "sandloom: no sandbox none: there is no sandbox none: `sandloom ps -a` lists those there are\n"


def test_stop_and_rm(fabric: FakeFabric, cli: Cli) -> None:
    fill(fabric)
    done = cli("rm", "web")
    assert (done.code, "use `sandloom rm -f web`" in done.err) == (1, True)
    assert cli.ok("stop", "web", "-t", "0") == "web\n"
    assert cli.ok("rm", "web", "job") == "web\njob\n"
    assert cli.ok("rm", "-f", "new") == "new\n"
    assert [box.name for box in fabric.sandboxes.values()] == ["bad"]


def test_park_and_unpark(fabric: FakeFabric, cli: Cli) -> None:
    fill(fabric)
    assert cli.ok("park", "web") == "web\n"
    assert "parked (Parked)" in cli.ok("ps")
    assert cli.ok("unpark", "web") == "web\n"
    done = cli("park", "job")
    assert (done.code, "cannot park job" in done.err, "`sandloom inspect` shows its state" in done.err) == (
        1,
        True,
        True,
    )


def test_ps_wide_tells_allocated_actual_and_why_a_resize_waits(fabric: FakeFabric, cli: Cli) -> None:
    box = fabric.add("box")
    box.spec.priority, box.status.uncooperative = -5, True
    box.status.resize.MergeFrom(
        sandboxes_pb2.ResizeStatus(
            state=sandboxes_pb2.RESIZE_DEFERRED, desired_memory_mib=768, allocated_memory_mib=512,
            actual_memory_mib=256, cause="host-room",
        )
    )  # fmt: skip
    head, row = cli.ok("ps", "-o", "wide").splitlines()
    for title, text in (("ALLOCATED", "512M"), ("ACTUAL", "256M"), ("RESIZE", "deferred (host-room), uncooperative")):
        assert title in head and text in row
    assert "-5" in row.split()


def test_resize_shows_desired_allocated_and_actual(fabric: FakeFabric, cli: Cli) -> None:
    box = fabric.add("box")
    assert cli.ok("resize", "box", "--memory", "768M").splitlines() == [
        "NAME  STATE  DESIRED  ALLOCATED  ACTUAL  CPUS  MESSAGE",
        "box   asked     768M          -       -     1  -",
    ]
    box.status.resize.MergeFrom(
        sandboxes_pb2.ResizeStatus(
            state=sandboxes_pb2.RESIZE_DONE, desired_memory_mib=768, allocated_memory_mib=768, actual_memory_mib=768,
            cpu_milli=1000,
        )
    )  # fmt: skip
    assert cli.ok("resize", "box", "--memory", "768M", "--wait").splitlines()[1].split() == [
        "box", "done", "768M", "768M", "768M", "1", "-",
    ]  # fmt: skip


def test_a_resize_that_is_not_reached_is_exit_1(fabric: FakeFabric, cli: Cli) -> None:
    box = fabric.add("box")
    box.status.resize.MergeFrom(
        sandboxes_pb2.ResizeStatus(
            state=sandboxes_pb2.RESIZE_DEFERRED, desired_memory_mib=768, allocated_memory_mib=768,
            actual_memory_mib=512, cpu_milli=1000, message="256 MiB are missing",
        )
    )  # fmt: skip
    done = cli("resize", "box", "--memory", "768M", "--wait", "--timeout", "0.2")
    assert done.code == 1
    assert done.out.splitlines()[1].split(maxsplit=6)[1:] == [
        "deferred",
        "768M",
        "768M",
        "512M",
        "1",
        "256 MiB are missing",
    ]
    assert cli("resize", "box", "--memory", "768M").code == 0
    box.status.resize.state = sandboxes_pb2.RESIZE_INFEASIBLE
    assert cli("resize", "box", "--memory", "768M", "--wait").code == 1
    above = cli("resize", "box", "--memory", "2G", "--wait")
    assert above.code == 1
    assert "2048 MiB is above the ceiling of 1024 MiB" in above.err
    assert above.err.endswith(": `sandloom ps -a` shows its state and the MIN/MAX and CPUs it was started with\n")


def ledger() -> sandboxes_pb2.SharingLedger:
    def memory(name: str, private_mib: int) -> sandboxes_pb2.SandboxMemory:
        return sandboxes_pb2.SandboxMemory(
            name=name, host="loom", resident_bytes=(private_mib + 100) * MIB, private_bytes=private_mib * MIB,
            proportional_bytes=(private_mib + 50) * MIB, saved_bytes=50 * MIB, guest_ram_bytes=60 * MIB,
            layer_bytes=100 * MIB, vmm_bytes=private_mib * MIB - 60 * MIB,
            shared=[sandboxes_pb2.SharedSlice(holders=2, bytes=100 * MIB)],
        )  # fmt: skip

    host = sandboxes_pb2.HostMemory(
        host="loom", distinct_bytes=300 * MIB, mem_total_bytes=8192 * MIB, mem_available_bytes=6144 * MIB,
        layer_cache_bytes=120 * MIB,
    )  # fmt: skip
    return sandboxes_pb2.SharingLedger(sandboxes=[memory("two", 120), memory("one", 80)], hosts=[host])


def test_share_is_read_by_a_newcomer(fabric: FakeFabric, cli: Cli) -> None:
    fabric.ledger = ledger()
    assert cli.ok("share") == SHARE
    assert json.loads(cli.ok("share", "-o", "json"))["hosts"][0]["distinct_bytes"] == 300 * MIB
    assert cli.ok("share", "-o", "name") == "one\ntwo\n"


def test_share_says_what_is_not_in_it(fabric: FakeFabric, cli: Cli) -> None:
    fabric.ledger = sandboxes_pb2.SharingLedger(lost_hosts=["loom"])
    done = cli("share")
    assert (done.code, done.out) == (1, "") and "nothing can be measured: LOST: loom" in done.err
    fabric.ledger.hosts.add(host="weft", mem_total_bytes=MIB)
    done = cli("share")
    assert done.code == 0 and "not in it, for they are LOST: loom" in done.err


SHARE = """\
SANDBOX  RESIDENT   PRIVATE   SHARED  WITH     SAVED  HOST
one       180 MiB  80.0 MiB  100 MiB     1  50.0 MiB  loom
two       220 MiB   120 MiB  100 MiB     1  50.0 MiB  loom
TOTAL     400 MiB   200 MiB  200 MiB     -   100 MiB  -

host loom: 2 sandboxes hold 400 MiB, in 300 MiB of memory: 100 MiB (25%) saved; image layers cached 120 MiB; \
6.00 GiB of 8.00 GiB available
resident: what its page tables hold; private: held by it alone; shared: held by others too; \
saved: resident less its fair part of what is shared
"""


def test_hosts(fabric: FakeFabric, cli: Cli) -> None:
    host = hosts_pb2.Host(name="loom", state=hosts_pb2.READY, accel="tcg", sandboxes=2)
    host.capacity.memory_mib, host.capacity.memory_available_mib, host.capacity.cpu_milli = 8192, 6144, 2000
    at(host.last_seen, 3)
    fabric.hosts["loom"] = host
    assert cli.ok("hosts") == (
        "NAME  STATE  ACCEL  SANDBOXES    MEMORY  AVAILABLE  RESERVED  CPUS  SEEN\n"
        "loom  ready  tcg            2  8.00 GiB   6.00 GiB       0 B     2    3s\n"
    )


def test_images(fabric: FakeFabric, cli: Cli) -> None:
    image = images_pb2.Image(name="debian", digest="sha256:" + "a1" * 32, size_bytes=120 * MIB, format="rootfs")
    image.layers.add(digest="sha256:1")
    at(image.created_at, 86400 * 3)
    fabric.images["debian"] = image
    assert cli.ok("image", "ls") == (
        "NAME    DIGEST               FORMAT  LAYERS     SIZE  AGE\n"
        "debian  sha256:a1a1a1a1a1a1  rootfs       1  120 MiB   3d\n"
    )
    assert json.loads(cli.ok("image", "inspect", "debian"))["size_bytes"] == 120 * MIB
    assert cli.ok("image", "rm", "debian") == "debian\n"
    assert cli("image", "rm", "debian").code == 1
    assert cli("image", "rm", "-f", "debian").code == 0


def test_events(fabric: FakeFabric, cli: Cli) -> None:
    for number, subject in enumerate(("web", "job"), 1):
        event = sandboxes_pb2.Event(
            resource_version=number, kind="sandbox", subject=subject, reason="Started", message="it \x1b[31mruns"
        )
        event.time.FromSeconds(1_700_000_000)
        fabric.events.append(event)
    assert cli.ok("events", "--subject", "web") == (
        "TIME                  KIND     SUBJECT  REASON   MESSAGE\n"
        "2023-11-14T22:13:20Z  sandbox  web      Started  it \\x1b[31mruns\n"
    )
    assert [event["subject"] for event in json.loads(cli.ok("events", "-o", "json"))] == ["web", "job"]


def test_a_guests_text_never_reaches_the_terminal_raw() -> None:
    assert safe("a\x1b]0;t\x07\u202eb\n") == "a\\x1b]0;t\\x07\\u202eb\\n"
    columns = [Column[str]("H", str), Column[str]("X", str, colour=lambda _: "red")]
    assert render_table(columns, ["a\tb"], wide=False, colour=False) == "H     X\na\\tb  a\\tb\n"
    tinted = render_table(columns, ["a\tb"], wide=False, colour=True).splitlines()
    assert tinted == ["\x1b[1mH\x1b[0m     \x1b[1mX\x1b[0m", "a\\tb  \x1b[31ma\\tb\x1b[0m"]


@pytest.mark.parametrize(("environ", "wanted"), [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)])
def test_colour_only_where_it_is_wanted(environ: dict[str, str], wanted: bool) -> None:
    class Tty:
        def isatty(self) -> bool:
            return True

    assert wants_colour(Tty(), environ) is wanted  # type: ignore[arg-type]
