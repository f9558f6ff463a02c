"""The command line as a value: which command, its options, and what holds for all of them. Pure; prints only help.

    sandloom [--home D] [--context C] [--tenant T] [--address A] [--tls-dir D] [-q] NOUN [VERB] [options]
             [-- PROGRAM ARGS]

The global options may also stand after the command. What follows `--` belongs to the program that is run and is
never looked at.
"""

from __future__ import annotations

import argparse
import difflib
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from controlplane.cli.command import AnyCommand
from controlplane.cli.errors import EXIT_USAGE, CliError, UsageError

PROGRAM = "sandloom"
GLOBALS_WITH_VALUE = ("--home", "--address", "--tls-dir", "--context", "--tenant")
GLOBALS = (*GLOBALS_WITH_VALUE, "-q", "--quiet", "-h", "--help")
Table = Mapping[tuple[str, ...], AnyCommand]


class HelpWanted(CliError):
    """Only help was asked for: print `text`, do nothing."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text


@dataclass(frozen=True)
class Globals:
    """What every command takes. `home` is None without --home."""

    home: Path | None = None
    address: str = ""
    tls_dir: Path | None = None
    quiet: bool = False
    form: str = "table"
    context: str = ""
    tenant: str = ""


@dataclass(frozen=True)
class Invocation:
    """A command line that is right: act on it with `command.act(options, shell)`."""

    command: AnyCommand
    options: Any
    globals: Globals


class _Parser(argparse.ArgumentParser):
    """Raises where argparse would print and exit. `takes_command`: a program may follow `--`."""

    takes_command = False

    def error(self, message: str) -> NoReturn:
        unknown = message.removeprefix("unrecognized arguments: ")
        hint = f"see `{self.prog} --help`"
        if unknown != message:
            if not unknown.startswith("-"):
                program = f"a program to run stands after --: `{self.prog} … -- {unknown}`"
                raise UsageError("too many words", unknown, program if self.takes_command else hint)
            near = difflib.get_close_matches(unknown.split()[0], list(self._option_string_actions), 1)
            raise UsageError("unknown option", unknown, f"did you mean {near[0]}?" if near else hint)
        raise UsageError(message, "", hint)

    def print_help(self, file: object = None) -> NoReturn:
        raise HelpWanted(self.format_help())


def words_of(argv: Sequence[str], table: Table) -> tuple[str, ...]:
    """The words of the command meant. HelpWanted without any; UsageError suggests the nearest to a wrong one.

    A noun with verbs may be a command itself: then it is meant when the next word is none of its verbs."""
    found: list[str] = []
    names = iter(argv)
    for word in names:
        if word in GLOBALS_WITH_VALUE:
            next(names, None)
        elif word in ("-h", "--help") or word == "--":
            break
        elif not word.startswith("-"):
            found.append(word)
            longer = [key for key in table if key[: len(found)] == tuple(found) and len(key) > len(found)]
            if tuple(found) in table and not longer:
                return tuple(found)
            if tuple(found) not in table and not longer:
                if tuple(found[:-1]) in table:
                    return tuple(found[:-1])
                raise _unknown(found, table)
        elif word.partition("=")[0] not in GLOBALS and tuple(found) not in table:
            raise UsageError("unknown option", word, f"`{PROGRAM} --help` lists the commands and options")
    if tuple(found) in table:
        return tuple(found)
    raise HelpWanted(overview(table, tuple(found)))


def _unknown(found: Sequence[str], table: Table) -> UsageError:
    before, wrong = tuple(found[:-1]), found[-1]
    known = sorted({key[len(before)] for key in table if key[: len(before)] == before and len(key) > len(before)})
    near = difflib.get_close_matches(wrong, known, 1)
    verbs = [" ".join(key) for key in table if len(key) > 1 and key[-1] == wrong]
    suggestion = " ".join([PROGRAM, *before, near[0]]) if near else f"{PROGRAM} {verbs[0]}" if verbs else ""
    hint = f"did you mean `{suggestion}`?" if suggestion else f"`{PROGRAM} --help` lists them"
    return UsageError("unknown command", " ".join(found), hint)


def overview(table: Table, prefix: tuple[str, ...] = ()) -> str:
    """The help of the whole program, or of a noun with verbs."""
    shown = [command for words, command in table.items() if words[: len(prefix)] == prefix and command.summary]
    width = max(len(" ".join(command.words)) for command in shown) + 2
    lines = [f"usage: {' '.join([PROGRAM, *prefix])} COMMAND [options]", ""]
    if not prefix:
        lines += ["Sandboxes that share below a clear boundary.", ""]
    lines += ["commands:"]
    lines += [f"  {' '.join(command.words):{width}}{command.summary}" for command in shown]
    lines += ["", "options of every command:", "  --home DIR       where `dev up` keeps its fabric ($SANDLOOM_HOME)"]
    lines += ["  --context NAME   the fabric to talk to (`sandloom context ls`)"]
    lines += ["  --tenant NAME    act for this tenant (operators only)"]
    lines += [
        "  --address H:P    the control plane to talk to",
        "  --tls-dir DIR    ca.crt, operator.crt, operator.key",
    ]
    lines += ["  -q, --quiet      no progress and no notes"]
    lines += [] if prefix else ["", "  --version        the same as `sandloom version`"]
    lines += [""]
    lines += [f"`{PROGRAM} COMMAND --help` has examples. Begin with `{PROGRAM} doctor`, then `{PROGRAM} dev up`."]
    return "\n".join(lines) + "\n"


def build(command: AnyCommand) -> argparse.ArgumentParser:
    """The parser of one command, with its help and the global options."""
    epilog = "examples:\n" + "\n".join(f"  {line}" for line in command.examples) if command.examples else None
    parser = _Parser(
        prog=" ".join([PROGRAM, *command.words]),
        description=textwrap.fill(command.description or f"{command.summary[:1].upper()}{command.summary[1:]}.", 100),
        epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    command.configure(parser)
    if command.takes_command:
        parser.takes_command = True
        parser.usage = parser.format_usage().removeprefix("usage: ").rstrip() + " -- PROGRAM [ARG ...]"
    group = parser.add_argument_group("options of every command")
    group.add_argument("--home", type=Path, metavar="DIR", help="where `dev up` keeps its fabric ($SANDLOOM_HOME)")
    group.add_argument("--context", default="", metavar="NAME", help="the fabric to talk to ($SANDLOOM_CONTEXT)")
    group.add_argument("--tenant", default="", metavar="NAME", help="act for this tenant (operators only)")
    group.add_argument("--address", default="", metavar="HOST:PORT", help="the control plane to talk to")
    group.add_argument("--tls-dir", type=Path, metavar="DIR", help="holds ca.crt, operator.crt, operator.key")
    group.add_argument("-q", "--quiet", action="store_true", help="no progress and no notes")
    return parser


def parse(argv: Sequence[str], table: Table) -> Invocation:
    """The command line as an Invocation. UsageError: what is wrong with it; HelpWanted: only help was asked for."""
    words = words_of(argv, table)
    command = table[words]
    ours, program = split_program(argv) if command.takes_command else (list(argv), ())
    namespace = build(command).parse_args(_without(ours, words))
    namespace.program = program
    shared = Globals(
        namespace.home.absolute() if namespace.home else None, namespace.address, namespace.tls_dir, namespace.quiet,
        getattr(namespace, "form", "table"), namespace.context, namespace.tenant,
    )  # fmt: skip
    return Invocation(command, command.parse(namespace), shared)


def split_program(argv: Sequence[str]) -> tuple[list[str], tuple[str, ...]]:
    """What stands before the first `--`, and what after it."""
    if "--" not in argv:
        return list(argv), ()
    at = list(argv).index("--")
    return list(argv[:at]), tuple(argv[at + 1 :])


def _without(argv: Sequence[str], words: Sequence[str]) -> list[str]:
    """`argv` without the command's own words, which words_of found before any of its options."""
    left, waiting, skip = [], list(words), False
    for word in argv:
        if waiting and not skip and word == waiting[0]:
            waiting.pop(0)
            continue
        skip = bool(waiting) and word in GLOBALS_WITH_VALUE and not skip
        left.append(word)
    return left


def failed_code(argv: Sequence[str], table: Table) -> int:
    """The exit status of a wrong command line: 2, or what the command itself fails with where that is special."""
    try:
        command = table[words_of(argv, table)]
    except (UsageError, HelpWanted):
        return EXIT_USAGE
    return max(EXIT_USAGE, command.failed_code)
