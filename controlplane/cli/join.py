"""`sandloom host join`: makes this machine a host of a fabric, by a one-time token.

    HOME/tls/ca.crt host.crt host.key     the key is made here and never leaves; the certificate is the fabric's answer
    HOME/hostd.toml                       what sandloom-hostd is started with

Nothing of it is written before the fabric has signed. hostd is started by systemd (deploy/sandloom-hostd.service) or by
hand: `sandloom-hostd --config HOME/hostd.toml`.
"""

from __future__ import annotations

import argparse
import asyncio
import platform
import socket
from dataclasses import dataclass
from pathlib import Path

import grpc
import grpc.aio

from controlplane import ca, jointokens
from controlplane.api.identity import CONTROLPLANE_SERVER_NAME, NAME_PATTERN, Role
from controlplane.api.status import Condition
from controlplane.api.v1 import hosts_pb2, hosts_pb2_grpc
from controlplane.cli import devfiles, sizes
from controlplane.cli.command import Command, Shell
from controlplane.cli.connection import calling
from controlplane.cli.devfiles import HostSettings
from controlplane.cli.errors import CliError, UsageError
from controlplane.jointokens import Ticket

JOIN_S = 30.0
DEFAULT_PORT = 7421


@dataclass(frozen=True)
class JoinOptions:
    """`word` is the token. An empty `listen` is chosen: the address by which this machine reaches the fabric."""

    word: str
    settings: HostSettings
    listen: str = ""
    controlplane: str = ""
    force: bool = False


def act(options: JoinOptions, shell: Shell) -> int:
    home, settings = shell.target.home, options.settings
    ticket = jointokens.decode(_word(options.word))
    devfiles.check_length(home)
    devfiles.require_room(settings.memory_reserve_mib)
    config = devfiles.hostd_config(home)
    if config.exists() and not options.force:
        raise CliError("this HOME is a host already", str(config), "choose another --home, or --force to join anew")
    listen = options.listen or f"{_own_address(ticket.address)}:{DEFAULT_PORT}"
    request = ca.new_request(settings.name)
    answer = asyncio.run(_join(ticket, settings.name, request.csr_pem))
    home.prepare()
    tls = devfiles.tls_files(home, Role.HOST)
    for path, content, mode in (
        (tls.key, request.key_pem, 0o600), (tls.cert, answer.cert_pem, 0o644), (tls.ca, answer.ca_pem, 0o644),
    ):  # fmt: skip
        ca.write_file(path, content, mode)
    controlplane = options.controlplane or answer.controlplane
    devfiles.write_config(config, devfiles.hostd_toml(home, settings, controlplane, listen))
    shell.printer.write(f"{settings.name}\n")
    shell.say(f"joined the fabric at {controlplane}; start it: sandloom-hostd --config {config}")
    return 0


def _word(given: str) -> str:
    """The token, from its file where one is named."""
    if not given.startswith("@"):
        return given
    try:
        return Path(given[1:]).read_text(encoding="ascii")
    except (OSError, ValueError) as error:
        raise CliError("the token's file cannot be read", f"{given[1:]} ({error})", "give the token itself") from error


async def _join(ticket: Ticket, name: str, csr_pem: bytes) -> hosts_pb2.JoinHostResponse:
    credentials = grpc.ssl_channel_credentials(root_certificates=ticket.ca_pem.encode())
    options = [("grpc.ssl_target_name_override", CONTROLPLANE_SERVER_NAME)]
    remedies = {
        Condition.DENIED: "",  # it says so itself
        Condition.UNAVAILABLE: f"is {ticket.address} reached from here? the token names it",
        Condition.ALREADY_EXISTS: "choose another --name",
    }
    async with grpc.aio.secure_channel(ticket.address, credentials, options=options) as channel:
        request = hosts_pb2.JoinHostRequest(id=ticket.id, secret=ticket.secret, name=name, csr_pem=csr_pem)
        with calling(f"{name} cannot join", remedies):
            stub: hosts_pb2_grpc.HostJoinAsyncStub = hosts_pb2_grpc.HostJoinStub(channel)
            return await stub.JoinHost(request, timeout=JOIN_S)


def _own_address(peer: str) -> str:
    """The address by which this machine reaches `peer` (HOST:PORT). Nothing is sent."""
    host, _, port = peer.rpartition(":")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)
            own = str(probe.getsockname()[0])
    except OSError as error:
        raise CliError(
            "the fabric's address is no use", f"{peer} ({error.strerror})", "give --listen HOST:PORT"
        ) from error
    return f"[{own}]" if ":" in own else own


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("token", metavar="TOKEN", help="what `sandloom hosts token` printed, or @FILE with it")
    parser.add_argument("--name", default="", help="this host's name in the fabric; the machine's")
    parser.add_argument(
        "--listen", default="", metavar="H:P", help="where the fabric reaches it; port 7421 unless given"
    )
    parser.add_argument("--controlplane", default="", metavar="H:P", help="where it reaches the fabric, if not as told")
    parser.add_argument("--accel", choices=devfiles.ACCELS, default="auto", help="kvm, tcg, or auto")
    parser.add_argument(
        "--memory-reserve", default="512M", metavar="SIZE", help="memory never given to sandboxes; 512M"
    )
    parser.add_argument("--force", action="store_true", help="even where this HOME is a host already")


def parse(namespace: argparse.Namespace) -> JoinOptions:
    name = namespace.name or devfiles.default_host_name(platform.node())
    if not NAME_PATTERN.fullmatch(name):
        raise UsageError("not a host name", repr(name), "use small letters, digits and -, at most 63")
    reserve_mib = sizes.parse_size_mib(namespace.memory_reserve)
    return JoinOptions(
        namespace.token,
        HostSettings(name, namespace.accel, reserve_mib),
        namespace.listen,
        namespace.controlplane,
        namespace.force,
    )


COMMAND = Command(
    words=("host", "join"),
    summary="make this machine a host of a fabric, by a one-time token",
    description="Makes a key here, has the fabric sign it, and writes hostd's configuration into HOME. The token works"
    " once. Start the host afterwards: sandloom-hostd --config HOME/hostd.toml.",
    configure=configure,
    parse=parse,
    act=act,
    examples=("sandloom host join sandloom-join-... --name h2", "sandloom host join @token.txt --listen 10.0.0.2:7421"),
)
