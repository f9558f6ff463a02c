"""`image import`: what is uploaded, from files, pipes and OCI layout folders, and what refuses it."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from controlplane.cli import archive
from controlplane.cli.errors import CliError
from controlplane.cli.progress import Progress
from tests.controlplane.cli.conftest import Cli
from tests.controlplane.cli.fakefabric import FakeFabric


def layout(folder: Path) -> Path:
    """An OCI layout with one blob that is larger than a chunk, and things that do not belong to it."""
    (folder / "blobs/sha256").mkdir(parents=True)
    (folder / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    (folder / "index.json").write_text("{}")
    (folder / "blobs/sha256/aa").write_bytes(bytes(range(256)) * 5000)
    (folder / "blobs/sha256/bb").write_bytes(b"x" * 512)
    (folder / "notes.txt").write_text("not of the layout")
    return folder


def test_a_file_is_uploaded_whole_under_its_name(fabric: FakeFabric, cli: Cli, tmp_path: Path) -> None:
    data = bytes(range(256)) * 12_000
    (tmp_path / "Base.tar").write_bytes(data)
    done = cli("image", "import", str(tmp_path / "Base.tar"), "--cmd", "python3 -c 'print(1)'")
    assert done.code == 0
    assert done.out == f"base sha256:{'b' * 64}: 1 layer, 4.00 MiB\n"
    assert fabric.uploaded == data
    start = fabric.import_start
    assert start is not None
    assert (start.name, start.total_bytes, list(start.cmd)) == ("base", len(data), ["python3", "-c", "print(1)"])
    assert "sending base" in done.err
    assert cli("image", "import", str(tmp_path / "Base.tar"), "-q", "-o", "name") == type(done)(0, "base\n", "")


def test_standard_input_is_uploaded(fabric: FakeFabric, cli: Cli) -> None:
    data = b"tar" * 200_000
    assert cli.ok("image", "import", "-", "--name", "piped", "-o", "name", stdin=data) == "piped\n"
    assert fabric.uploaded == data


def test_a_layout_folder_is_one_tar_of_known_size(fabric: FakeFabric, cli: Cli, tmp_path: Path) -> None:
    folder = layout(tmp_path / "image")
    assert cli("image", "import", str(folder)).code == 0
    assert fabric.import_start is not None
    assert fabric.import_start.total_bytes == len(fabric.uploaded)
    with tarfile.open(fileobj=io.BytesIO(fabric.uploaded)) as tar:
        names = tar.getnames()
        large = tar.extractfile("blobs/sha256/aa")
        assert large is not None
        assert large.read() == bytes(range(256)) * 5000
    assert names == ["oci-layout", "index.json", "blobs/sha256/aa", "blobs/sha256/bb"]


def test_every_chunk_fits_a_message(tmp_path: Path) -> None:
    upload = archive.plan(layout(tmp_path / "image"), "")
    assert max(map(len, archive.chunks(upload))) <= archive.CHUNK_BYTES


def test_a_file_that_shrinks_is_told(tmp_path: Path) -> None:
    folder = layout(tmp_path / "image")
    pieces = archive.chunks(archive.plan(folder, ""))
    for _ in range(7):  # headers, contents and padding of the two small files, and the blob's header
        next(pieces)
    (folder / "blobs/sha256/aa").write_bytes(b"")
    with pytest.raises(CliError, match="became shorter"):
        list(pieces)


def test_what_is_no_archive_is_refused_in_one_line(fabric: FakeFabric, cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(b"bad")
    done = cli("image", "import", str(tmp_path / "x.tar"), "-q")
    assert (done.code, done.out) == (1, "")
    assert done.err == f"sandloom: cannot import {tmp_path}/x.tar: the archive is no tar: it begins with 'bad'\n"


def test_a_folder_that_is_no_layout_is_told_how(fabric: FakeFabric, cli: Cli, tmp_path: Path) -> None:
    done = cli("image", "import", str(tmp_path))
    assert done.code == 1
    assert f"tar -C {tmp_path} -c . | sandloom image import - --name NAME" in done.err
    assert "No such file" in cli("image", "import", str(tmp_path / "none.tar")).err


class Screen(io.StringIO):
    def __init__(self, tty: bool) -> None:
        super().__init__()
        self.tty = tty

    def isatty(self) -> bool:
        return self.tty


def test_progress_is_one_redrawn_line_on_a_terminal_and_a_line_a_step_elsewhere() -> None:
    seen = {}
    for tty in (True, False):
        screen, now = Screen(tty), [0.0]
        with Progress(quiet=False, stream=screen, clock=lambda now=now: now[0]) as progress:  # type: ignore[misc]
            progress.update("sending", 10, 100)
            now[0] = 0.01
            progress.update("sending", 20, 100)  # too soon to be drawn
            progress.update("converting")
        seen[tty] = screen.getvalue()
    redrawn = seen[True].split("\r\x1b[K")
    assert [text.split()[:1] for text in redrawn] == [[], ["sending"], ["converting"], []]
    assert "10 B of 100 B" in redrawn[1]
    assert [line.split()[0] for line in seen[False].splitlines()] == ["sending", "converting"]
    quiet = Screen(True)
    with Progress(quiet=True, stream=quiet) as progress:
        progress.update("sending")
    assert quiet.getvalue() == ""
