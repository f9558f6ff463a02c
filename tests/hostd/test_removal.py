"""What is removed, and above all what is not."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from hostd.errors import HostdError
from hostd.removal import remove_folder


@pytest.mark.parametrize("path", ["", ".", "relative", "./x", "/", "/var", "/var/tmp", "/var/tmp/x/../../../etc"])
def test_a_path_that_is_none_of_ours_is_refused(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("shutil.rmtree", lambda path: pytest.fail(f"{path} would have been removed"))
    with pytest.raises(HostdError, match="not removed"):
        remove_folder(Path(path))


def test_a_folder_goes_with_all_that_is_in_it_and_no_further(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "kept").write_text("x")
    folder = tmp_path / "run" / "u-1"
    folder.mkdir(parents=True)
    (folder / "link").symlink_to(tmp_path / "outside")
    (folder / "below").mkdir()
    remove_folder(folder)
    remove_folder(folder)  # idempotent
    assert not folder.exists()
    assert (tmp_path / "outside" / "kept").exists()


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("x")
    with pytest.raises(HostdError, match="cannot be removed"):
        remove_folder(path)
    assert path.exists()


def test_nothing_is_removed_through_a_mount(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root to mount")
    folder, mounted = tmp_path / "run", tmp_path / "run" / "a b" / "mounted"
    mounted.mkdir(parents=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "none", str(mounted)], capture_output=True, timeout=20)
    if done.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {done.stderr.decode()}")
    try:
        (mounted / "kept").write_text("x")
        with pytest.raises(HostdError, match="unmount it first"):
            remove_folder(folder)
        assert (mounted / "kept").exists()
    finally:
        subprocess.run(["umount", str(mounted)], check=True, timeout=20)
