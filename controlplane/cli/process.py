"""The options of a program to run, as `run` and `exec` share them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from controlplane.api.v1 import sandboxes_pb2
from controlplane.cli import sizes
from controlplane.cli.errors import UsageError


@dataclass(frozen=True)
class ProcessOptions:
    """What to run and how. `program` is what stood after `--`."""

    program: tuple[str, ...] = ()
    env: dict[str, str] = field(default_factory=dict)
    workdir: str = ""
    user: str = ""
    stdin: bool = False
    tty: bool = False


def add_process_options(parser: argparse.ArgumentParser) -> None:
    """-i, -t, --env, --env-file, --workdir, --user."""
    parser.add_argument("-i", "--interactive", action="store_true", help="pass standard input on")
    parser.add_argument("-t", "--tty", action="store_true", help="give it a terminal")
    parser.add_argument("-e", "--env", action="append", default=[], metavar="K=V", help="a variable; may be repeated")
    parser.add_argument("--env-file", action="append", default=[], type=Path, metavar="FILE", help="K=V lines")
    parser.add_argument("-w", "--workdir", default="", metavar="FOLDER", help="where it runs; as the image says")
    parser.add_argument("-u", "--user", default="", metavar="USER", help="uid[:gid] or a name in the image")


def parse_process(namespace: argparse.Namespace) -> ProcessOptions:
    """The options. UsageError names a wrong variable, and an --env-file with its line."""
    env: dict[str, str] = {}
    for path in namespace.env_file:
        env.update(read_env_file(path))
    env.update(sizes.parse_pairs(namespace.env, "--env"))
    return ProcessOptions(
        namespace.program, env, namespace.workdir, namespace.user, namespace.interactive, namespace.tty
    )


def read_env_file(path: Path) -> dict[str, str]:
    """K=V lines; blank lines and those that begin with # are passed over. UsageError names the line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UsageError("an --env-file cannot be read", f"{path} ({why})") from error
    return env_of(lines, str(path))


def env_of(lines: Sequence[str], source: str) -> dict[str, str]:
    """The variables of an --env-file's lines."""
    env: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        if line.strip() and not line.lstrip().startswith("#"):
            env.update(sizes.parse_pairs([line.lstrip()], f"{source}:{number}"))
    return env


def message_of(options: ProcessOptions, size: tuple[int, int] | None) -> sandboxes_pb2.Process:
    """The API's form; `size` is (rows, columns)."""
    rows, columns = size or (0, 0)
    return sandboxes_pb2.Process(
        argv=options.program, env=options.env, workdir=options.workdir, user=options.user,
        tty=options.tty, stdin=options.stdin, tty_rows=rows, tty_cols=columns,
    )  # fmt: skip
