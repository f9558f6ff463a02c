"""Which driver a sandbox gets, and what is said of what a class or a host lacks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hostd.drivers.byclass import ByClass, class_of, lacking
from hostd.drivers.contract import Checkpointing, Engine, StartPlan, TakenCheckpoint, Warming
from hostd.errors import CheckpointUnusable, HostdError, InvalidSpec
from hostd.journal import Handle
from hostd.spec import SandboxClass
from tests.contract.driver_suite import spec_of

GUEST, USER, HOST = SandboxClass.GUEST_KERNEL, SandboxClass.USER_KERNEL, SandboxClass.HOST_KERNEL
FOLDER = Path("/nonexistent/box")


class Told(Exception):
    """Which driver was asked for what."""


class Telling:
    """A driver that only tells."""

    warming: Warming | None = None

    def __init__(self, name: str, asked: list[str], checkpointing: Checkpointing | None = None) -> None:
        self.checkpointing = checkpointing
        self.name, self.asked = name, asked

    async def start(self, plan: StartPlan, made: Callable[[Handle], None]) -> Engine:
        raise Told(f"{self.name} start {plan.spec.uid}")

    async def adopt(self, plan: StartPlan, handle: Handle, offsets: dict[int, int]) -> Engine | None:
        self.asked.append(f"{self.name} adopt")
        return None

    async def destroy(self, uid: str, folder: Path, handle: Handle | None) -> None:
        self.asked.append(f"{self.name} destroy {uid}")


@pytest.fixture
def asked() -> list[str]:
    return []


@pytest.fixture
def driver(asked: list[str]) -> ByClass:
    return ByClass({GUEST: Telling("qemu", asked), HOST: Telling("crun", asked)}, {USER: "runsc is not installed"})


class Copying:
    """Checkpoints that only tell."""

    def __init__(self, one: SandboxClass = GUEST) -> None:
        self.classes = (one,)

    def recognises(self, path: Path) -> bool:
        return self.classes[0].value in path.name

    async def checkpoint(
        self, engine: Engine, offsets: Callable[[], dict[int, int]], *, go_on: bool = True
    ) -> TakenCheckpoint:
        raise Told("checkpoint")

    async def go_on(self, engine: Engine) -> None:
        raise Told("go on")

    def read_about(self, path: Path) -> bytes:
        return self.classes[0].value.encode()

    def load_of(self, path: Path, pid: int) -> object:
        return f"{path} of {pid}"

    def load(self, path: Path) -> Any:
        return str(path)

    async def restore(
        self,
        plan: StartPlan,
        memory: Any,
        form: Mapping[str, object],
        offsets: Mapping[int, int],
        made: Callable[[Handle], None],
    ) -> Engine:
        raise Told("restore")


def plan(sandbox_class: SandboxClass) -> StartPlan:
    return StartPlan(replace(spec_of("box"), sandbox_class=sandbox_class), (), 0, FOLDER)


def handle(accel: str) -> Handle:
    return Handle(1, 2, 0, accel, 0, 64, 1)


@pytest.mark.parametrize(("wanted", "name"), [(GUEST, "qemu"), (HOST, "crun")])
async def test_the_class_decides_at_the_start(driver: ByClass, wanted: SandboxClass, name: str) -> None:
    with pytest.raises(Told, match=f"{name} start box"):
        await driver.start(plan(wanted), lambda _: None)


async def test_a_class_that_is_not_here_is_refused_with_those_that_are(driver: ByClass) -> None:
    with pytest.raises(
        InvalidSpec, match="no user-kernel sandboxes: runsc is not installed; it runs: guest-kernel, host"
    ):
        await driver.start(plan(USER), lambda _: None)


async def test_what_runs_is_found_by_what_it_runs_on(driver: ByClass, asked: list[str]) -> None:
    await driver.adopt(plan(GUEST), handle("crun"), {})
    await driver.destroy("box", FOLDER, handle("tcg"))
    assert asked == ["crun adopt", "qemu destroy box"]
    with pytest.raises(HostdError, match="runs on runsc/ptrace, which is gone"):
        await driver.destroy("box", FOLDER, handle("runsc/ptrace"))


async def test_what_nobody_knows_is_cleaned_up_by_all_mounts_first(driver: ByClass, asked: list[str]) -> None:
    await driver.destroy("box", FOLDER, None)
    assert asked == ["crun destroy box", "qemu destroy box"]


def test_engines_by_name() -> None:
    assert [class_of(name) for name in ("crun", "runsc/systrap", "kvm", "tcg", "fake")] == [HOST, USER, *[GUEST] * 3]


async def test_checkpoints_are_of_the_classes_that_have_them(asked: list[str]) -> None:
    drivers = {GUEST: Telling("qemu", asked, Copying()), USER: Telling("runsc", asked, Copying(USER))}
    checkpointing = ByClass({**drivers, HOST: Telling("crun", asked)}, {}).checkpointing
    assert checkpointing is not None
    assert checkpointing.classes == (GUEST, USER)
    for one in (GUEST, USER):  # whose a file is stands in it
        path = Path(f"/a-{one.value}")
        assert checkpointing.recognises(path)
        assert (checkpointing.read_about(path), checkpointing.load(path)) == (one.value.encode(), str(path))
        assert checkpointing.load_of(path, 5) == f"{path} of 5"
    with pytest.raises(CheckpointUnusable, match="of no class that this host can restore"):
        checkpointing.load(FOLDER)
    with pytest.raises(Told, match="restore"):
        await checkpointing.restore(plan(GUEST), None, {}, {}, lambda _: None)
    with pytest.raises(InvalidSpec, match="host-kernel has no checkpoints; classes that have it: guest-kernel, user"):
        await checkpointing.restore(plan(HOST), None, {}, {}, lambda _: None)
    assert ByClass({HOST: Telling("crun", asked)}, {}).checkpointing is None


def test_a_lacking_feature_names_who_has_it() -> None:
    error = lacking("checkpoints", HOST, (GUEST,))
    assert str(error) == "class host-kernel has no checkpoints; classes that have it: guest-kernel"
    assert "none on this host" in str(lacking("x", HOST, ()))
