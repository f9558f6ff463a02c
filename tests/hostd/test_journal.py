"""The journal: a crash at any moment leaves the record before or the record after, and damage is named."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostd.errors import JournalError
from hostd.journal import Handle, Journal, Outcome, Record, decode, encode
from hostd.lifecycle import Phase
from hostd.spec import Allowed, Command, DesiredState, Network, ProcessSpec, Resources, SandboxSpec

SPEC = SandboxSpec(
    "u-1", "web", "acme", "sha256:1", "web", Resources(256, 512, 300, 1500),
    ProcessSpec(argv=("a", "b"), env=(("K", "v=1"),), tty=True), epoch=7, desired=DesiredState.STOPPED,
    network=Network(True, (Allowed("192.0.2.0/24", "tcp", 80, 90), Allowed("198.51.100.7/32"))),
)  # fmt: skip
FULL = Record(
    SPEC, Phase.STOPPING, Command(("a",), (("K", "v"),), "/", "", False, True, 24, 80),
    Outcome(Phase.EXITED, "Completed", "", 3), "why", "what", 3, Handle(12, 34, 200_001, "tcg", 148, 364, 2),
    vm_uid=200_001, started_at_s=1.5, finished_at_s=2.5, start_phases=(("vmm", 0.25),), adoptions=2,
)  # fmt: skip


@pytest.mark.parametrize("record", [Record(SPEC), FULL])
def test_what_is_written_is_read(record: Record) -> None:
    assert decode(encode(record), "here") == record


@given(st.text(), st.text())
def test_any_text_survives(word: str, value: str) -> None:
    record = Record(replace(SPEC, process=ProcessSpec(argv=(word,), env=((word, value),))), message=value)
    assert decode(encode(record), "here") == record


@pytest.mark.parametrize(
    "damage",
    [
        b"", b"{", b"[]", b"7", b"null", b"\xff", b'{"schema": 2, "record": {}}', b'{"schema": 1, "record": []}',
        encode(FULL)[:-10],
        encode(FULL).replace(b'"phase": "stopping"', b'"phase": "dancing"'),
        encode(FULL).replace(b'"memory_min_mib": 256', b'"memory_min_mib": 999'),
        encode(FULL).replace(b'"adoptions"', b'"options"'),
        encode(FULL).replace(b'"uid": "u-1"', b'"uid": "../1"'),
    ],
)  # fmt: skip
def test_an_unreadable_record_names_its_file_and_what_to_do(tmp_path: Path, damage: bytes) -> None:
    journal = Journal(tmp_path)
    journal.write(FULL)
    path = journal.folder("u-1") / "record.json"
    path.write_bytes(damage)
    with pytest.raises(JournalError, match="move it away") as error:
        list(journal.records())
    assert str(path) in str(error.value)


def test_a_crash_before_the_rename_leaves_the_record_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(tmp_path)
    journal.write(Record(SPEC))

    def crash(self: Path, target: Path) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "rename", crash)
    with pytest.raises(KeyboardInterrupt):
        journal.write(FULL)
    monkeypatch.undo()
    assert list(Journal(tmp_path).records()) == [Record(SPEC)]


def test_bytes_are_on_disk_before_the_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def note_fsync(descriptor: int) -> None:
        steps.append("sync " + Path(f"/proc/self/fd/{descriptor}").readlink().name)
        fsync(descriptor)

    def note_rename(self: Path, target: Path) -> Path:
        steps.append(f"rename {self.name}")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(Path, "rename", note_rename)
    Journal(tmp_path).write(FULL)
    assert steps == ["sync sandboxes", "sync record.tmp", "rename record.tmp", "sync u-1"]


def test_removal_takes_the_record_last_and_can_be_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(tmp_path)
    journal.write(FULL)
    (journal.folder("u-1") / "log").write_bytes(b"x")
    unlinked: list[str] = []
    unlink = Path.unlink

    def note(self: Path, missing_ok: bool = False) -> None:
        unlinked.append(self.name)
        unlink(self, missing_ok)

    monkeypatch.setattr(Path, "unlink", note)
    journal.remove("u-1")
    assert unlinked[-1] == "record.json"
    journal.remove("u-1")  # idempotent
    assert list(tmp_path.rglob("u-1*")) == []


def test_a_folder_without_a_record_is_swept_and_stray_files_are_left(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    (journal.root / "u-2").mkdir()
    (journal.root / "u-2" / "record.tmp").write_bytes(b"{")
    (journal.root / "README").write_text("an operator's note")
    journal.write(FULL)
    assert [record.spec.uid for record in journal.records()] == ["u-1"]
    assert sorted(path.name for path in journal.root.iterdir()) == ["README", "u-1"]


def test_records_are_for_root_alone(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.write(FULL)
    assert journal.root.stat().st_mode & 0o777 == 0o700
    assert journal.folder("u-1").stat().st_mode & 0o777 == 0o700


def test_the_form_is_plain_json(tmp_path: Path) -> None:
    values = json.loads(encode(FULL))
    assert values["schema"] == 1
    assert values["record"]["outcome"] == {"phase": "exited", "reason": "Completed", "message": "", "exit_code": 3}
