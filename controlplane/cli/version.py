"""`sandloom version`."""

from __future__ import annotations

import platform
from importlib import metadata

import grpc

from controlplane.cli.command import Command, Shell, add_output
from controlplane.cli.output import render_json, render_yaml

API = "sandloom.v1"


def act(options: None, shell: Shell) -> int:
    try:
        version = metadata.version("sandloom")
    except metadata.PackageNotFoundError:
        version = "not installed"
    values = {"sandloom": version, "api": API, "python": platform.python_version(), "grpc": grpc.__version__}
    if shell.printer.form in ("json", "yaml"):
        shell.printer.write((render_json if shell.printer.form == "json" else render_yaml)(values))
    else:
        shell.printer.write(" ".join(f"{name} {value}" for name, value in values.items()) + "\n")
    return 0


COMMAND = Command(
    words=("version",),
    summary="show the version of this command and of its API",
    configure=lambda parser: add_output(parser, ("table", "json", "yaml")),
    parse=lambda ns: None,
    act=act,
)
