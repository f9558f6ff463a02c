"""Which driver a sandbox gets, and what is said of what a class or a host lacks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from hostd.drivers.byclass import ByClass, class_of, lacking
from hostd.drivers.contract import Engine, StartPlan
from hostd.errors import HostdError, InvalidSpec
from hostd.journal import Handle
from hostd.spec import SandboxClass
from tests.contract.driver_suite import spec_of

GUEST, USER, HOST = SandboxClass.GUEST_KERNEL, SandboxClass.USER_KERNEL, SandboxClass.HOST_KERNEL
FOLDER = Path("/nonexistent/box")


class Told(Exception):
    """Which driver was asked for what."""


class Telling:
    """A driver that only tells."""

    warming = None

    def __init__(self, name: str, asked: list[str]) -> None:
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


def test_a_lacking_feature_names_who_has_it() -> None:
    error = lacking("checkpoints", HOST, (GUEST,))
    assert str(error) == "class host-kernel has no checkpoints; classes that have it: guest-kernel"
    assert "none on this host" in str(lacking("x", HOST, ()))
