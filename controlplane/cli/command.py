"""What a command is: words, help, options as a frozen value, and an action. Parsing never acts, acting never parses."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from controlplane.cli.connection import Fabric, Target, open_fabric
from controlplane.cli.errors import EXIT_FAILED
from controlplane.cli.output import FORMATS, Printer

O = TypeVar("O")  # noqa: E741 - the options of a command
T = TypeVar("T")

DAEMON_ARGVS: Mapping[str, tuple[str, ...]] = {
    "controlplane": (sys.executable, "-m", "controlplane.server"),
    "hostd": (sys.executable, "-m", "hostd.server"),
}
"""How the daemons of `dev up` (and `doctor`) are called; what follows are their arguments."""


@dataclass(frozen=True)
class Stdio:
    """The three standard descriptors; tests bring pipes and terminals of their own."""

    stdin: int = 0
    stdout: int = 1
    stderr: int = 2


@dataclass(frozen=True)
class Shell:
    """What an action may use of the world around it."""

    target: Target
    printer: Printer = field(default_factory=Printer)
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)
    argvs: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: DAEMON_ARGVS)
    now_s: Callable[[], float] = time.time
    stdio: Stdio = Stdio()
    quiet: bool = False

    def say(self, text: str) -> None:
        """One line on stderr, unless --quiet."""
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)

    def over(self, body: Callable[[Fabric], Awaitable[T]]) -> T:
        """Runs `body` on a connection of its own, in an event loop of its own."""

        async def connected() -> T:
            async with open_fabric(self.target) as fabric:
                return await body(fabric)

        return asyncio.run(connected())


OPERANDS = ("", "live", "sandbox", "image", "pool", "checkpoint", "file")
"""What a command's words name, for completion: nothing, running sandboxes, all sandboxes, images, pools, checkpoints,
files."""


@dataclass(frozen=True)
class Command(Generic[O]):
    """One entry of the table in `cli.commands`.

    `takes_command` says that what follows `--` is a program's own words; `operand` is what completion offers
    (an entry of OPERANDS); `failed_code` is the exit status when sandloom itself fails.
    """

    words: tuple[str, ...]
    summary: str
    configure: Callable[[argparse.ArgumentParser], None]
    parse: Callable[[argparse.Namespace], O]
    act: Callable[[O, Shell], int]
    examples: tuple[str, ...] = ()
    description: str = ""
    takes_command: bool = False
    operand: str = ""
    failed_code: int = EXIT_FAILED


AnyCommand = Command[Any]


def add_output(parser: argparse.ArgumentParser, formats: tuple[str, ...] = FORMATS) -> None:
    """The option -o; its value is `form`."""
    parser.add_argument(
        "-o", "--output", dest="form", choices=formats, default=formats[0], help=f"one of {', '.join(formats)}"
    )
