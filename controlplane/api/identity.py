"""Who a peer is: the one URI SAN of its certificate, `spiffe://sandloom/role/<role>/<name>`.

A certificate with no such SAN, or with two, is nobody. Servers are also known by a DNS SAN that follows from
their role, so that a client checks *who* answers and not *where*: addresses may change, names may not.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache

from cryptography import x509

from controlplane.api.errors import IdentityError

TRUST_DOMAIN = "sandloom"
CONTROLPLANE_SERVER_NAME = "controlplane.sandloom"
"""The DNS SAN of every control plane's certificate."""

TENANT_HEADER = "sandloom-tenant"
"""The metadata by which an operator says for which tenant a call is."""

NAME_PATTERN = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
"""A DNS label (RFC 1123): host, tenant, operator and sandbox names."""


class Role(Enum):
    """What a peer may be. `Role.CONTROLPLANE` is the only one a host's HostRuntime listens to."""

    OPERATOR = "operator"
    TENANT = "tenant"
    HOST = "host"
    CONTROLPLANE = "controlplane"


@dataclass(frozen=True)
class Identity:
    """A role and a name in it. IdentityError when the name is not a DNS label."""

    role: Role
    name: str

    def __post_init__(self) -> None:
        if not NAME_PATTERN.fullmatch(self.name):
            raise IdentityError(f"{self.role.value} name {self.name!r} must match {NAME_PATTERN.pattern}")

    @property
    def uri(self) -> str:
        """The URI SAN that says so."""
        return f"spiffe://{TRUST_DOMAIN}/role/{self.role.value}/{self.name}"

    def __str__(self) -> str:
        return f"{self.role.value} {self.name}"

    @staticmethod
    def parse(uri: str) -> Identity:
        """The identity a URI SAN states. IdentityError when it is not one of ours."""
        prefix = f"spiffe://{TRUST_DOMAIN}/role/"
        role, _, name = uri.removeprefix(prefix).partition("/")
        if not uri.startswith(prefix) or role not in {known.value for known in Role}:
            raise IdentityError(f"{uri!r} is not {prefix}<{'|'.join(known.value for known in Role)}>/<name>")
        return Identity(Role(role), name)


def host_server_name(host: str) -> str:
    """The DNS SAN by which a host's HostRuntime is known."""
    return f"{Identity(Role.HOST, host).name}.host.{TRUST_DOMAIN}"


@lru_cache(maxsize=256)
def identity_of_certificate(pem: bytes) -> Identity:
    """The identity of a PEM certificate whose chain TLS has already verified. IdentityError when it has none."""
    try:
        certificate = x509.load_pem_x509_certificate(pem)
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (ValueError, x509.ExtensionNotFound) as error:
        raise IdentityError(f"the peer's certificate has no readable SAN: {error}") from error
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    if len(uris) != 1:
        raise IdentityError(f"the peer's certificate has {len(uris)} URI SANs; exactly one says who it is")
    return Identity.parse(uris[0])


@lru_cache(maxsize=256)
def serial_of_certificate(pem: bytes) -> str:
    """The serial number of a PEM certificate, lower-case hex. IdentityError when it is none."""
    try:
        return f"{x509.load_pem_x509_certificate(pem).serial_number:x}"
    except ValueError as error:
        raise IdentityError(f"the peer's certificate cannot be read: {error}") from error


def peer_serial(auth_context: Mapping[str, Iterable[bytes]]) -> str:
    """The serial number of the caller's certificate, which peer_identity has accepted."""
    (pem,) = auth_context.get("x509_pem_cert", ())
    return serial_of_certificate(pem)


def peer_identity(auth_context: Mapping[str, Iterable[bytes]]) -> Identity:
    """Who calls, from grpc's `context.auth_context()`. IdentityError when the peer showed no certificate of ours."""
    pems = list(auth_context.get("x509_pem_cert", ()))
    if len(pems) != 1:
        raise IdentityError("the peer showed no certificate: connect with TLS and a certificate of this fabric's CA")
    return identity_of_certificate(pems[0])
