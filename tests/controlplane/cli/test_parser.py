"""Command lines as values, and what wrong ones are told. No connection, no action."""

from __future__ import annotations

from pathlib import Path

import pytest

from controlplane.api.v1 import sandboxes_pb2
from controlplane.cli import archive, process, sizes
from controlplane.cli.commands import TABLE
from controlplane.cli.dev import DownOptions, UpOptions
from controlplane.cli.errors import UsageError
from controlplane.cli.exec import ExecOptions
from controlplane.cli.images import ImportOptions
from controlplane.cli.logs import LogsOptions
from controlplane.cli.parser import Globals, HelpWanted, build, parse
from controlplane.cli.process import ProcessOptions
from controlplane.cli.resize import ResizeOptions
from controlplane.cli.run import RunOptions
from controlplane.cli.sandboxes import NamesOptions, PsOptions
from controlplane.cli.sizes import MemoryRange

CASES: list[tuple[str, object]] = [
    ("ps -a -o wide", PsOptions(ended=True)),
    ("stop -t 1.5 a b", NamesOptions(("a", "b"), grace_s=1.5)),
    ("rm -f a", NamesOptions(("a",), force=True)),
    ("logs -f --tail 3 --timestamps web", LogsOptions("web", True, 3, True)),
    ("resize a --memory 1G --min 256M --cpus 1.5 --wait --timeout 2m", ResizeOptions("a", 1024, 256, 1500, True, 120)),
    ("dev up --host-name loom --accel kvm --memory-reserve 2G", UpOptions("loom", "kvm", 2048)),
    ("dev down --purge -t 0", DownOptions(purge=True, grace_s=0.0)),
    ("image import x.tar --name n --cmd sh", ImportOptions(Path("x.tar"), "n", ("sh",))),
    ("exec -it web -- sh -c -- x", ExecOptions("web", ProcessOptions(("sh", "-c", "--", "x"), stdin=True, tty=True))),
    ("run debian", RunOptions("debian", ProcessOptions())),
    (
        "run --rm -d --memory 128M:512M --cpus 0.5 --class host-kernel --label a=b debian -- ls --help",
        RunOptions(
            "debian", ProcessOptions(("ls", "--help")), sandboxes_pb2.HOST_KERNEL, "", MemoryRange(128, 512), 500,
            labels={"a": "b"}, detach=True, remove=True,
        ),
    ),
]  # fmt: skip


@pytest.mark.parametrize(("line", "options"), CASES, ids=[line for line, _ in CASES])
def test_a_right_line(line: str, options: object) -> None:
    assert parse(line.split(), TABLE).options == options


@pytest.mark.parametrize(
    "line", ["--home h -q --address a:1 --tls-dir t ps -o json", "ps --tls-dir t --address a:1 -q --home h -o json"]
)
def test_global_options_stand_before_or_after(line: str) -> None:
    shared = parse(line.split(), TABLE).globals
    assert shared == Globals(Path("h").absolute(), "a:1", Path("t"), True, "json")


def test_a_value_that_is_a_command_word_is_no_command() -> None:
    found = parse(["--home", "ps", "ps", "-a"], TABLE)
    assert (found.globals.home, found.options) == (Path("ps").absolute(), PsOptions(ended=True))


WRONG = [
    ("pss", "unknown command: pss: did you mean `sandloom ps`?"),
    ("import x", "unknown command: import: did you mean `sandloom image import`?"),
    ("image lss", "unknown command: image lss: did you mean `sandloom image ls`?"),
    ("frobnicate", "unknown command: frobnicate: `sandloom --help` lists them"),
    ("ps --al", "unknown option: --al: did you mean --all?"),
    ("--hoem x ps", "unknown option: --hoem: `sandloom --help` lists the commands and options"),
    ("run -it debian ls /", "too many words: ls /: a program to run stands after --: `sandloom run … -- ls /`"),
    ("ps debian", "too many words: debian: see `sandloom ps --help`"),
    ("run --memory 1G:256M x", "the minimum is above the maximum: '1G:256M': try 256M:1G"),
    ("run --memory 512 x", "a size needs a unit: '512': write a size as 512M, 1G or 64MiB (binary, whole MiB)"),
    ("run --cpus 0 x", "CPUs must be more than 0: '0': write it as 1, 0.5 or 2.25"),
    ("run -e A x", "--env takes KEY=VALUE: 'A': keys are letters, digits and _ . -"),
    ("resize web", "nothing to resize: give --memory, --min or --cpus"),
    ("logs --tail x web", "--tail takes a number of lines: 'x': write it as 10"),
    ("dev down --keep --purge", "--keep and --purge do not go together: what is kept needs its data"),
    ("image import -", "an image from standard input needs a name: give it with --name"),
    ("exec web", "what to run is missing: write it after --: sandloom exec web -- ls /"),
]


@pytest.mark.parametrize(("line", "message"), WRONG, ids=[line for line, _ in WRONG])
def test_a_wrong_line_is_told_what_to_type(line: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(line.split(), TABLE)
    assert str(caught.value) == message


@pytest.mark.parametrize("line", ["", "--help", "image", "image --help", "run --help", "-q"])
def test_help(line: str) -> None:
    with pytest.raises(HelpWanted) as caught:
        parse(line.split(), TABLE)
    assert caught.value.text.startswith("usage: sandloom")


@pytest.mark.parametrize("words", TABLE, ids=" ".join)
def test_every_command_has_help_with_examples_that_are_right(words: tuple[str, ...]) -> None:
    command = TABLE[words]
    assert command.summary
    build(command).format_help()
    for example in command.examples:
        if example.startswith("sandloom ") and not set(example) & set("|$<>'"):
            assert parse(example.split()[1:], TABLE).command is command


def test_an_env_file_names_its_wrong_line() -> None:
    assert process.env_of(["# note", "", "A=1", " B=x=y"], "f") == {"A": "1", "B": "x=y"}
    with pytest.raises(UsageError, match=r"f:2 takes KEY=VALUE: 'no'"):
        process.env_of(["A=1", "no"], "f")


def test_an_env_file_is_overruled_by_env(tmp_path: Path) -> None:
    file = tmp_path / "env"
    file.write_text("A=1\nB=2\n")
    options = parse(["run", "--env-file", str(file), "-e", "A=3", "x"], TABLE).options
    assert options.process.env == {"A": "3", "B": "2"}
    with pytest.raises(UsageError, match="No such file"):
        parse(["run", "--env-file", str(tmp_path / "none"), "x"], TABLE)


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("Debian_12.tar", "debian_12"),
        ("a.tar.gz", "a"),
        ("b.tgz", "b"),
        ("c.oci.zst", "c"),
        ("d v1.2", "d-v1.2"),
        ("-", ""),
    ],
)
def test_an_image_is_named_after_its_file(file: str, name: str) -> None:
    assert archive.image_name(Path(file)) == name


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "0.98 KiB"), (1536, "1.50 KiB"), (10 << 20, "10.0 MiB"), (1 << 50, "1.00 PiB")],
)
def test_sizes_are_read_with_three_digits(size: int, text: str) -> None:
    assert sizes.format_bytes(size) == text


@pytest.mark.parametrize(
    ("text", "seconds"), [("10", 10.0), ("1.5", 1.5), ("90s", 90.0), ("2m", 120.0), ("1h", 3600.0), ("7d", 604_800.0)]
)
def test_times(text: str, seconds: float) -> None:
    assert sizes.parse_duration_s(text) == seconds


@pytest.mark.parametrize("text", ["", "-1", "1w", "x", "1e3", "٣"])
def test_times_that_are_none(text: str) -> None:
    with pytest.raises(UsageError):
        sizes.parse_duration_s(text)


@pytest.mark.parametrize("text", ["", "M", "0M", "-1M", "1.5G", "1K", "1Gx", "9999999T", "1 G"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(UsageError):
        sizes.parse_size_mib(text)
