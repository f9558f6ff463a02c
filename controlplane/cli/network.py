"""`run --network` and `--allow`: what a sandbox may talk to, as it is typed. Pure."""

from __future__ import annotations

import argparse
import re

from controlplane.api.v1 import sandboxes_pb2
from controlplane.cli.errors import UsageError
from controlplane.cli.services import is_service_rule

MODES = {"none": sandboxes_pb2.NETWORK_NONE, "veth": sandboxes_pb2.NETWORK_VETH}
_RULE = re.compile(r"([0-9./]+)(?::([0-9]{1,5})(?:-([0-9]{1,5}))?)?(?:/(tcp|udp))?", re.ASCII)


def add_options(parser: argparse.ArgumentParser) -> None:
    """--network and --allow."""
    parser.add_argument(
        "--network", choices=tuple(MODES), help="none (unless given), or veth: a link to its host, which drops all but"
        " what --allow says; user-kernel and host-kernel only",
    )  # fmt: skip
    parser.add_argument(
        "--allow", action="append", default=[], metavar="RULE",
        help="whom it may talk to: over veth CIDR[:PORT[-PORT]][/tcp|udp], 192.0.2.0/24:443 say; with sockets=tool"
        " (which these imply) tcp:10.0.0.0/8:443, udp:1.1.1.1:53, tcp:*.example.org:80-90; may be given again",
    )  # fmt: skip


def parse(namespace: argparse.Namespace) -> sandboxes_pb2.Network:
    """The API's form of the options. UsageError names a rule that is none."""
    mode = MODES.get(namespace.network, sandboxes_pb2.NETWORK_MODE_UNSPECIFIED)
    rules = [text for text in namespace.allow if not is_service_rule(text)]
    if rules and mode != sandboxes_pb2.NETWORK_VETH:
        raise UsageError("--allow", "there is no network to allow something on", "give --network veth, too")
    return sandboxes_pb2.Network(mode=mode, allow=[parse_rule(text) for text in rules])


def parse_rule(text: str) -> sandboxes_pb2.NetworkRule:
    """`192.0.2.0/24`, `192.0.2.1:443`, `192.0.2.0/24:8000-8100/udp`; ports without a protocol are TCP's."""
    match = _RULE.fullmatch(text)
    if match is None:
        raise UsageError("--allow", repr(text), "write it as CIDR[:PORT[-PORT]][/tcp|udp], 192.0.2.0/24:443/tcp say")
    cidr, first, last, protocol = match.groups()
    return sandboxes_pb2.NetworkRule(
        cidr=cidr, protocol=protocol or ("tcp" if first else ""), first_port=int(first or 0),
        last_port=int(last or first or 0),
    )  # fmt: skip
