"""Where hosts join: one call, served to callers without a certificate, on a listener that serves nothing else."""

from __future__ import annotations

import asyncio
import logging

import grpc
import grpc.aio

from controlplane.api.channel import TlsFiles, server_options
from controlplane.api.errors import ControlPlaneError
from controlplane.api.status import Condition, Failure, abort
from controlplane.api.v1 import hosts_pb2, hosts_pb2_grpc
from controlplane.edge.sandboxes import parse_name
from controlplane.errors import ConfigError, Invalid
from controlplane.gate import Context, failure_of
from controlplane.joining import Joining

log = logging.getLogger("sandloom.controlplane.join")

JOIN_DEADLINE_S = 20.0
MAX_CSR_BYTES = 16 << 10
MOST_AT_ONCE = 8
"""Anybody may call: the rest wait."""


class HostJoinService(hosts_pb2_grpc.HostJoinServicer):
    """See the module. `controlplane` is where hosts reach the fabric afterwards."""

    def __init__(self, joining: Joining, controlplane: str) -> None:
        self._joining, self._controlplane = joining, controlplane
        self._slots = asyncio.Semaphore(MOST_AT_ONCE)

    async def JoinHost(self, request: hosts_pb2.JoinHostRequest, context: Context) -> hosts_pb2.JoinHostResponse:
        """See hosts.proto."""
        try:
            async with asyncio.timeout(JOIN_DEADLINE_S), self._slots:
                return await self._join(request)
        except ControlPlaneError as error:
            log.warning("a host that would be %r is not let in: %s", request.name[:64], error)
            await abort(context, failure_of(error))
        except TimeoutError:
            text = "it took longer than it may: have a new token made"
            await abort(context, Failure(Condition.DEADLINE, "DeadlineExceeded", text))

    async def _join(self, request: hosts_pb2.JoinHostRequest) -> hosts_pb2.JoinHostResponse:
        name = parse_name(request.name)
        if len(request.csr_pem) > MAX_CSR_BYTES:
            raise Invalid("csr_pem", f"{len(request.csr_pem)} bytes, {MAX_CSR_BYTES} is the most")
        if not request.id.isalnum() or len(request.id) > 64:
            raise Invalid("id", "it is no token's id")
        joined = await self._joining.join(request.id, request.secret[:256], name, request.csr_pem)
        return hosts_pb2.JoinHostResponse(
            cert_pem=joined.cert_pem, ca_pem=joined.ca_pem, controlplane=self._controlplane
        )


def join_server(service: HostJoinService, listen: str, tls: TlsFiles) -> tuple[grpc.aio.Server, int]:
    """A server for it alone, not started, and its port. It shows the control plane's certificate and asks for none."""
    _, cert, key = tls.read()
    server = grpc.aio.server(options=server_options(), maximum_concurrent_rpcs=64)
    hosts_pb2_grpc.add_HostJoinServicer_to_server(service, server)
    try:
        port = server.add_secure_port(listen, grpc.ssl_server_credentials([(key, cert)]))
    except RuntimeError as error:
        raise ConfigError(f"cannot listen on {listen} for hosts that join: {error}") from error
    return server, port
