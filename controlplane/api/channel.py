"""TLS on both ends of this fabric: credentials from three files, and channels that check who answers.

Every connection is mutually authenticated. A client verifies the server by a name that follows from its role
(see identity.py), never by its address.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import grpc

from controlplane.api.errors import TlsError
from controlplane.api.identity import CONTROLPLANE_SERVER_NAME, TENANT_HEADER

KEEPALIVE_S = 10
"""A peer that is silent this long is asked whether it is still there, also while a stream is idle."""

KEEPALIVE_ANSWER_S = 10
"""... and is given up when it does not answer in this time."""

MAX_MESSAGE_BYTES = 4 << 20

_KEEPALIVE = [
    ("grpc.keepalive_time_ms", KEEPALIVE_S * 1000),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_ANSWER_S * 1000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
]


@dataclass(frozen=True)
class TlsFiles:
    """Paths of PEM files: the CA's certificate, one's own certificate and its key."""

    ca: Path
    cert: Path
    key: Path

    def read(self) -> tuple[bytes, bytes, bytes]:
        """(ca, cert, key) as bytes. TlsError names the file that cannot be read."""
        return _read(self.ca), _read(self.cert), _read(self.key)


def _read(path: Path) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise TlsError(
            f"TLS file {path} cannot be read: {error.strerror}; `sandloom dev up` makes one's own"
        ) from error
    if b"-----BEGIN" not in content:
        raise TlsError(f"TLS file {path} is not PEM")
    return content


def connect(
    address: str, tls: TlsFiles, *, server_name: str = CONTROLPLANE_SERVER_NAME, tenant: str = ""
) -> grpc.aio.Channel:
    """A channel to `address` (host:port) that only talks to `server_name`; an operator's calls are for `tenant`. Owns
    nothing until used; close it (`async with`). TlsError when a file cannot be read."""
    ca, cert, key = tls.read()
    credentials = grpc.ssl_channel_credentials(root_certificates=ca, private_key=key, certificate_chain=cert)
    if tenant:
        credentials = grpc.composite_channel_credentials(
            credentials, grpc.metadata_call_credentials(_ActingFor(tenant), name="tenant")
        )
    options = [*_KEEPALIVE, ("grpc.ssl_target_name_override", server_name), ("grpc.enable_retries", 0)]
    return grpc.aio.secure_channel(address, credentials, options=options)


class _ActingFor(grpc.AuthMetadataPlugin):
    """Says with each call for which tenant it is."""

    def __init__(self, tenant: str) -> None:
        self._metadata = ((TENANT_HEADER, tenant),)

    def __call__(self, context: grpc.AuthMetadataContext, callback: grpc.AuthMetadataPluginCallback) -> None:
        """Called by grpc for each call."""
        callback(self._metadata, None)


def server_credentials(tls: TlsFiles) -> grpc.ServerCredentials:
    """Credentials of a server that demands a certificate of the same CA from every client."""
    ca, cert, key = tls.read()
    return grpc.ssl_server_credentials([(key, cert)], root_certificates=ca, require_client_auth=True)


def server_options() -> list[tuple[str, int]]:
    """Options of a server that bears its clients' keepalive pings, and pings them itself."""
    return [
        *_KEEPALIVE,
        ("grpc.http2.min_ping_interval_without_data_ms", KEEPALIVE_S * 1000 // 2),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.so_reuseport", 0),
    ]
