"""Tiny daemons for `dev up`: `controlplane` serves the fake fabric, `hostd` reports itself to it and holds on.

    python -m tests.controlplane.cli.fakedaemons controlplane|hostd|broken --config FILE

They read the very files that `dev up` writes, print the ready line, and end on SIGTERM.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tomllib
from pathlib import Path
from typing import Any

import grpc

from controlplane.api.channel import TlsFiles
from controlplane.api.identity import CONTROLPLANE_SERVER_NAME
from controlplane.api.v1 import hosts_pb2, hosts_pb2_grpc
from tests.controlplane.cli.fakefabric import FakeFabric

CONTROLPLANE_KEYS = {"listen", "store", "tls_ca", "tls_cert", "tls_key", "ca_dir", "join_listen"}


def tls_of(config: dict[str, Any]) -> TlsFiles:
    return TlsFiles(Path(config["tls_ca"]), Path(config["tls_cert"]), Path(config["tls_key"]))


def controlplane(config: dict[str, Any]) -> str:
    assert set(config) == CONTROLPLANE_KEYS, config
    fabric = FakeFabric()
    fabric.add("left-over")
    for name in ("theirs-1", "theirs-2"):
        fabric.add(name).tenant = "acme"
    fabric.tenants = ["acme"]
    return fabric.serve(tls_of(config), config["listen"])


def hostd(config: dict[str, Any]) -> str:
    """Where it "serves" is its pid, so that each one has another port."""
    ca, cert, key = tls_of(config).read()
    credentials = grpc.ssl_channel_credentials(ca, key, cert)
    options = [("grpc.ssl_target_name_override", CONTROLPLANE_SERVER_NAME)]
    address = f"127.0.0.1:{os.getpid()}"
    with grpc.secure_channel(config["controlplane"], credentials, options) as channel:
        host = hosts_pb2.Host(name=config["host"], accel=config["accel"], runtime_address=address)
        hosts_pb2_grpc.HostSyncStub(channel).ReportHost(hosts_pb2.ReportHostRequest(host=host), timeout=10)
    return address


def main(role: str, path: Path) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    config = tomllib.loads(path.read_text())
    if role == "broken":
        sys.exit("hostd: no cgroups here: mount them")
    address = controlplane(config) if role == "controlplane" else hostd(config)
    print(json.dumps({"ready": True, "address": address}), flush=True)
    signal.sigwait({signal.SIGTERM})
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[3]))
