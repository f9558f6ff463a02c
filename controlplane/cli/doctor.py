"""`sandloom doctor`: is this machine fit for sandboxes? The host's daemon knows; this asks it and passes on."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass

from controlplane.cli.command import Command, Shell, add_output
from controlplane.cli.daemons import environment
from controlplane.cli.errors import CliError
from controlplane.cli.output import render_yaml, safe

PROBE_S, LOOK_S = 400.0, 60.0


@dataclass(frozen=True)
class DoctorOptions:
    """`probe`: boot a guest to see which accelerator works."""

    probe: bool


def act(options: DoctorOptions, shell: Shell) -> int:
    form = shell.printer.form
    argv = [*shell.argvs["hostd"], "doctor", *(["--probe"] if options.probe else [])]
    argv += [] if form in ("table", "wide") else ["--json"]
    if options.probe:
        shell.say("booting a guest to see which accelerator works: this can take some minutes")
    try:
        done = subprocess.run(
            argv, stdout=subprocess.PIPE, text=True, errors="replace", timeout=PROBE_S if options.probe else LOOK_S,
            env=environment(shell.environ), stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise CliError(
            "the doctor did not come to an end", f"{error.timeout:.0f} s", "run it with --probe alone"
        ) from error
    shell.printer.write(done.stdout if form in ("table", "wide", "json") else _rendered(done.stdout, form))
    return done.returncode if done.returncode >= 0 else 128 - done.returncode


def _rendered(text: str, form: str) -> str:
    try:
        report = json.loads(text)
        names = [str(check["name"]) for check in report["checks"]]
    except (ValueError, KeyError, TypeError) as error:
        raise CliError(
            "the doctor's report cannot be read", repr(text[:80]), f"run {sys.executable} -m hostd.server doctor"
        ) from error
    return render_yaml(report) if form == "yaml" else "".join(f"{safe(name)}\n" for name in names)


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--probe", action="store_true", help="boot a guest to see which accelerator works")
    add_output(parser)


COMMAND = Command(
    words=("doctor",),
    summary="check whether this machine is fit for sandboxes; exit status 1 when it is not",
    configure=configure,
    parse=lambda ns: DoctorOptions(ns.probe),
    act=act,
    examples=("sandloom doctor", "sandloom doctor --probe", "sandloom doctor -o json"),
)
