"""The options of `run` that say who answers a sandbox: --service, --allow, -p, --time-offset."""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Callable
from typing import TypeVar

from controlplane.api.errors import PolicyError
from controlplane.api.policies import ANSWERERS
from controlplane.api.services import (
    SERVICE_NAMES,
    Transport,
    parse_allow,
    parse_answerer,
    parse_publish,
    parse_time_offset,
)
from controlplane.api.v1 import sandboxes_pb2
from controlplane.cli.errors import UsageError

T = TypeVar("T")
_NEGATIVE = re.compile(r"-[0-9][0-9a-z.]*\Z")


def is_service_rule(text: str) -> bool:
    """Whether a rule of --allow is for `sockets: tool`; the others are for a network's link."""
    return text.partition(":")[0] in (Transport.TCP.value, Transport.UDP.value)


def add_service_options(parser: argparse.ArgumentParser) -> None:
    """--service and --publish; --allow is the network's, too (controlplane/cli/network.py)."""
    parser.add_argument(
        "--service", action="append", default=[], metavar="NAME=WHO",
        help="who answers a service: kernel, tool or deny, as in sockets=tool; may be given again",
    )  # fmt: skip
    parser.add_argument(
        "--time-offset", metavar="OFFSET",
        help="its clock is so far from the host's: -1d, +3h30m, or begins at 2027-01-01T00:00:00Z; implies time=tool",
    )  # fmt: skip
    parser._negative_number_matcher = _NEGATIVE  # -1d is a value: argparse would take it for an option
    parser.add_argument(
        "-p", "--publish", action="append", default=[], metavar="[ADDR:]HOST:PORT",
        help="listen on the host for a port of the sandbox, 8080:80 or 5353:53/udp; implies sockets=tool",
    )  # fmt: skip


def parse_services(namespace: argparse.Namespace) -> sandboxes_pb2.ServicePolicy:
    """What was given; what was not stays open, for the tenant's default. UsageError."""
    message = sandboxes_pb2.ServicePolicy()
    rules = [_parsed("--allow", text, parse_allow) for text in namespace.allow if is_service_rule(text)]
    message.allow.extend(map(str, rules))
    message.publish.extend(str(_parsed("--publish", text, parse_publish)) for text in namespace.publish)
    if rules or message.publish:
        message.sockets = sandboxes_pb2.ANSWER_TOOL
    if any(rule.name for rule in rules):
        message.dns = sandboxes_pb2.ANSWER_TOOL
    if namespace.time_offset is not None:
        message.time = sandboxes_pb2.ANSWER_TOOL
        message.time_offset_ms = _parsed("--time-offset", namespace.time_offset, _offset_ms)
    for text in namespace.service:
        name, _, who = text.partition("=")
        if name not in SERVICE_NAMES:
            raise UsageError("no such service", repr(name), f"the services are {', '.join(SERVICE_NAMES)}")
        setattr(message, name, ANSWERERS[_parsed("--service", who, parse_answerer)])
    return message


def _offset_ms(text: str) -> int:
    return parse_time_offset(text, time.time())


def _parsed(option: str, text: str, parse: Callable[[str], T]) -> T:
    try:
        return parse(text)
    except PolicyError as error:
        raise UsageError(f"{option} cannot be read", str(error)) from error
