"""`sandloom`: reads the command line, acts, and turns every way it can end into one line and an exit status.

    0 done    1 failed    2 wrong command line    125 run, exec: sandloom itself failed    130 Ctrl-C    141 SIGPIPE

SANDLOOM_DEBUG=1 prints the traceback of a failure besides.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from controlplane.api.errors import ControlPlaneError
from controlplane.cli import contexts, parser
from controlplane.cli.command import Shell
from controlplane.cli.commands import TABLE
from controlplane.cli.connection import Target
from controlplane.cli.errors import (
    EXIT_BROKEN_PIPE,
    EXIT_INTERRUPTED,
    CliError,
    DaemonFailed,
    UsageError,
)
from controlplane.cli.home import Home, default_home
from controlplane.cli.output import Printer, safe

DEBUG_VARIABLE = "SANDLOOM_DEBUG"


@dataclass(frozen=True)
class Ended:
    """A command's exit status, and the signal that ended this program itself, if one did."""

    code: int
    by: signal.Signals | None = None


def shell_for(shared: parser.Globals, environ: Mapping[str, str]) -> Shell:
    """The Shell that the global options ask for."""
    home = Home(shared.home) if shared.home else default_home(environ, root=os.geteuid() == 0)
    context = contexts.chosen(shared.context, home_named=shared.home is not None, environ=environ)
    target = Target(home, shared.address, shared.tls_dir, context, shared.tenant)
    return Shell(target, Printer(shared.form), environ, quiet=shared.quiet)


def main(
    argv: Sequence[str],
    environ: Mapping[str, str] | None = None,
    shell: Callable[[parser.Globals, Mapping[str, str]], Shell] = shell_for,
) -> Ended:
    """Runs one command to its end. Raises only what no code foresaw, and that only under SANDLOOM_DEBUG."""
    environ = os.environ if environ is None else environ
    argv = ["version", *argv[1:]] if list(argv[:1]) == ["--version"] else argv
    code = parser.failed_code(argv, TABLE)
    try:
        invocation = parser.parse(argv, TABLE)
        code = invocation.command.failed_code
        return Ended(invocation.command.act(invocation.options, shell(invocation.globals, environ)))
    except parser.HelpWanted as help_:
        return _printed(help_.text)
    except UsageError as error:
        return _fail(error, environ, parser.failed_code(argv, TABLE))
    except ControlPlaneError as error:
        return _fail(error, environ, code)
    except BrokenPipeError:
        return Ended(EXIT_BROKEN_PIPE, signal.SIGPIPE)
    except KeyboardInterrupt:
        return Ended(EXIT_INTERRUPTED, signal.SIGINT)
    except OSError as error:
        on = f"{error.filename} ({error.strerror})" if error.filename else str(error.strerror or error)
        return _fail(CliError("the machine refused", on), environ, code)
    except Exception as error:
        if environ.get(DEBUG_VARIABLE):
            raise
        return _fail(CliError("a defect of sandloom", repr(error), f"set {DEBUG_VARIABLE}=1 to see where"), {}, code)


def _printed(text: str) -> Ended:
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        return Ended(EXIT_BROKEN_PIPE, signal.SIGPIPE)
    return Ended(0)


def _fail(error: ControlPlaneError, environ: Mapping[str, str], code: int) -> Ended:
    if environ.get(DEBUG_VARIABLE):
        traceback.print_exception(error)
    lines = [f"sandloom: {safe(' '.join(str(error).splitlines()))}"]
    if isinstance(error, DaemonFailed):
        lines += [f"  | {safe(line)}" for line in error.log_tail]
    with contextlib.suppress(BrokenPipeError):
        print("\n".join(lines), file=sys.stderr, flush=True)
    return Ended(code)


def entry() -> None:
    """Console script. A command that SIGINT or SIGPIPE ended dies of that signal, so that its caller sees it."""
    ended = main(sys.argv[1:])
    if ended.by is not None:
        _die_of(ended.by)
    sys.exit(ended.code)


def _die_of(number: signal.Signals) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # nothing more is to be written there at exit
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


if __name__ == "__main__":
    entry()
