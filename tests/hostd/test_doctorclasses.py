"""What the doctor says of the classes."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from hostd import doctor, doctorclasses
from hostd.drivers.oci import probe


def test_each_class_says_what_it_protects_and_what_not(tmp_path: Path) -> None:
    checks = doctor.check_classes(tmp_path)
    assert [check.name for check in checks] == ["class guest-kernel", "class user-kernel", "class host-kernel"]
    for check in checks:
        assert "Protects" in check.detail
        assert "Not: " in check.detail
    assert "trusted work only" in checks[2].detail


def test_rootless_is_refused_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    for check in doctor.check_classes(tmp_path)[1:]:
        assert check.status == "warn"
        assert check.detail.startswith("needs root: EROFS, overlayfs and cgroups")


def test_what_was_tried_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(shutil, "which", lambda name: None if name == "crun" else f"/bin/{name}")
    monkeypatch.setattr(probe, "version_of", lambda binary: f"{binary} 1.0")
    assert "Here" not in doctorclasses.words(tmp_path)[1].detail
    path = probe.cache_path(tmp_path, "/bin/runsc 1.0")
    probe._keep(path, probe.Verdict(True, "ptrace", "", "a container ran on runsc/ptrace"))
    _, user, host = doctorclasses.words(tmp_path)
    assert user.detail.endswith("Here: a container ran on runsc/ptrace.")
    assert (host.missing, host.fix) == ("crun is not installed", "apt-get install crun")
    probe._keep(path, probe.Verdict(False, "", "", "no container runs here: x"))
    assert doctorclasses.words(tmp_path)[1].missing == "no container runs here: x"
