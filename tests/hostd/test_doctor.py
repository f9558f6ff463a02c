"""The doctor's word on what isolates here, and the one that hostd refuses to start on."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hostd import doctor
from hostd.drivers.qemu.accel import Verdict, cache_path, keep
from hostd.errors import ConfigError, KernelMissing

VERSION = "6.1.0-1-cloud-amd64"


@pytest.fixture
def kvm(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with a /dev/kvm that opens, and a known guest kernel."""
    monkeypatch.setattr(os, "access", lambda *_: True)
    monkeypatch.setattr(doctor, "package_name", lambda: f"linux-image-{VERSION}")


def test_a_kvm_that_was_found_broken_is_not_called_fine(kvm: None, tmp_path: Path) -> None:
    assert "--probe" in doctor.check_accel(False, tmp_path).detail
    keep(cache_path(tmp_path, VERSION), Verdict("tcg", "QEMU ended on /dev/kvm: error\nAssertion failed"))
    check = doctor.check_accel(False, tmp_path)
    assert (check.status, check.fix) == ("warn", "run where KVM works")
    assert check.detail.startswith("tcg: QEMU ended on /dev/kvm: error Assertion failed. QEMU promises no isolation")
    assert "\n" not in check.detail


def test_a_kvm_that_was_found_good_is_said_to_be(kvm: None, tmp_path: Path) -> None:
    keep(cache_path(tmp_path, VERSION), Verdict("kvm", "a guest booted on /dev/kvm"))
    check = doctor.check_accel(False, tmp_path)
    assert (check.status, check.detail) == ("ok", "kvm: a guest booted on it")


def test_without_a_known_kernel_there_is_no_kept_verdict(
    kvm: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown() -> str:
        raise KernelMissing("apt knows none", reason="KernelMissing")

    monkeypatch.setattr(doctor, "package_name", unknown)
    assert "--probe" in doctor.check_accel(False, tmp_path).detail


@pytest.mark.parametrize(("value", "refused"), [("1\n", True), ("0\n", False), ("2\n", False)])
def test_ksm_is_refused_while_it_runs(tmp_path: Path, value: str, refused: bool) -> None:
    (tmp_path / "run").write_text(value)
    if refused:
        with pytest.raises(ConfigError, match=r"KSM is on.*echo 2"):
            doctor.require_no_ksm(tmp_path / "run")
    else:
        doctor.require_no_ksm(tmp_path / "run")
    doctor.require_no_ksm(tmp_path / "no-ksm-in-this-kernel")
