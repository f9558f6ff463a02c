"""Which accelerator: the verdict is kept per boot, guest kernel and QEMU, and never trusted when it is damaged."""

from __future__ import annotations

from pathlib import Path

import pytest

from hostd.drivers.qemu import accel
from hostd.drivers.qemu.accel import Verdict, cache_path, cached, decide, keep
from hostd.drivers.qemu.command import GuestShape
from hostd.spec import MemoryShape

SHAPE = GuestShape("probe", Path("/nonexistent"), Path("/k"), Path("/i"), "kvm", 1, MemoryShape(128, 0))


@pytest.fixture
def probes(monkeypatch: pytest.MonkeyPatch) -> list[GuestShape]:
    """Counts the guests that are booted to find out."""
    asked: list[GuestShape] = []

    async def probe(shape: GuestShape) -> Verdict:
        asked.append(shape)
        return Verdict("tcg", "no guest came up")

    monkeypatch.setattr(accel, "probe_kvm", probe)
    monkeypatch.setattr(accel, "qemu_version", lambda: "QEMU emulator version 7.2")
    return asked


async def test_auto_probes_once_for_a_kernel(tmp_path: Path, probes: list[GuestShape]) -> None:
    for _ in range(3):
        assert await decide("auto", SHAPE, "6.1.0-1", tmp_path) == Verdict("tcg", "no guest came up")
    assert len(probes) == 1
    await decide("auto", SHAPE, "6.1.0-2", tmp_path)
    assert len(probes) == 2


async def test_configured_is_not_probed(tmp_path: Path, probes: list[GuestShape]) -> None:
    assert await decide("kvm", SHAPE, "6.1.0-1", tmp_path) == Verdict("kvm", "configured")
    assert probes == []


@pytest.mark.parametrize("damage", ["", "{", "[]", "{}", '{"accel": "warp", "why": "x"}', '{"accel": 7, "why": "x"}'])
async def test_a_damaged_verdict_is_found_out_anew(tmp_path: Path, probes: list[GuestShape], damage: str) -> None:
    path = cache_path(tmp_path, "6.1.0-1")
    keep(path, Verdict("kvm", "it was so"))
    assert cached(path) == Verdict("kvm", "it was so")
    path.write_text(damage)
    assert cached(path) is None
    assert (await decide("auto", SHAPE, "6.1.0-1", tmp_path)).accel == "tcg"
    assert len(probes) == 1
    assert [each.name for each in path.parent.iterdir()] == [path.name]  # no temporary file stays


async def test_without_the_device_there_is_nothing_to_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert (await accel.probe_kvm(SHAPE)).accel == "tcg"


async def test_a_vmm_that_ends_at_once_is_tcg_with_its_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: True)
    monkeypatch.setattr(accel, "qemu_argv", lambda shape: ["sh", "-c", "echo no luck >&2; exit 1"])
    verdict = await accel.probe_kvm(SHAPE)
    assert verdict.accel == "tcg"
    assert "no luck" in verdict.why


async def test_a_guest_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: True)
    monkeypatch.setattr(accel, "qemu_argv", lambda shape: ["sleep", "1000"])
    verdict = await accel.probe_kvm(SHAPE, deadline_s=0.1)
    assert verdict.accel == "tcg"
    assert "did not come up" in verdict.why
