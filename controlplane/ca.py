"""The fabric's own certificate authority: one folder, ECDSA P-256, SAN as identity.

    <folder>/ca.crt, ca.key      the authority; its key never leaves the folder
    <where>/<stem>.crt, .key     what it issued; keys are 0600, written to a new file and renamed

A certificate carries exactly one URI SAN (who it is) and, for servers, DNS and IP SANs (see api/identity.py).
Operators and tenants may only be TLS clients; hosts and control planes are both ends.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from controlplane.api.channel import TlsFiles
from controlplane.api.identity import CONTROLPLANE_SERVER_NAME, TRUST_DOMAIN, Identity, Role, host_server_name
from controlplane.errors import TlsError

CA_DAYS = 3650
LEAF_DAYS = 365
CURVES = (ec.SECP256R1, ec.SECP384R1, ec.SECP521R1)
CLOCK_SKEW = datetime.timedelta(minutes=5)
SERVERS = (Role.HOST, Role.CONTROLPLANE)


@dataclass(frozen=True)
class Issued:
    """A certificate and its key, PEM."""

    cert_pem: bytes
    key_pem: bytes


@dataclass(frozen=True)
class Signed:
    """A certificate for somebody else's key, PEM, and its serial number in hex."""

    cert_pem: bytes
    serial: str


@dataclass(frozen=True)
class Request:
    """A new key, which stays where it is made, and the request that a CA signs. Both PEM."""

    key_pem: bytes
    csr_pem: bytes


def new_request(name: str) -> Request:
    """A key of one's own and a signing request for it; `name` is for people."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:64])])
    request = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
    return Request(_key_pem(key), request.public_bytes(serialization.Encoding.PEM))


class Authority:
    """A CA that is open for issuing. Build it with `create`, `load` or `ensure`."""

    def __init__(self, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
        self._certificate, self._key = certificate, key

    @property
    def cert_pem(self) -> bytes:
        """The CA's own certificate."""
        return self._certificate.public_bytes(serialization.Encoding.PEM)

    @staticmethod
    def create(folder: Path, *, now: datetime.datetime | None = None) -> Authority:
        """A new CA in `folder`. TlsError when there is one already or the folder cannot be written."""
        if (folder / "ca.key").exists():
            raise TlsError(f"{folder} already holds a CA: use it, or remove the folder to start afresh")
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{TRUST_DOMAIN} CA")])
        builder = _builder(name, name, key.public_key(), now or _utc(), CA_DAYS)
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        builder = builder.add_extension(_key_usage(ca=True), critical=True)
        authority = Authority(builder.sign(key, hashes.SHA256()), key)
        write_file(folder / "ca.key", _key_pem(key), 0o600)
        write_file(folder / "ca.crt", authority.cert_pem, 0o644)
        return authority

    @staticmethod
    def load(folder: Path) -> Authority:
        """The CA in `folder`. TlsError when there is none or it is damaged."""
        try:
            certificate = x509.load_pem_x509_certificate((folder / "ca.crt").read_bytes())
            key = serialization.load_pem_private_key((folder / "ca.key").read_bytes(), None)
        except OSError as error:
            raise TlsError(f"no CA in {folder}: {error.filename}: {error.strerror}") from error
        except ValueError as error:
            raise TlsError(f"the CA in {folder} cannot be read: {error}") from error
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
            raise TlsError(f"the CA's key in {folder} does not belong to its certificate")
        return Authority(certificate, key)

    @staticmethod
    def ensure(folder: Path) -> Authority:
        """The CA in `folder`, made when there is none."""
        return Authority.load(folder) if (folder / "ca.key").exists() else Authority.create(folder)

    def issue(
        self,
        identity: Identity,
        *,
        dns_names: Iterable[str] = (),
        ip_addresses: Iterable[str] = (),
        days: int = LEAF_DAYS,
        now: datetime.datetime | None = None,
    ) -> Issued:
        """A certificate for `identity`; servers get their role's DNS SAN besides those given."""
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = self._certify(identity, key.public_key(), dns_names, ip_addresses, days, now or _utc())
        return Issued(certificate.public_bytes(serialization.Encoding.PEM), _key_pem(key))

    def sign(self, request_pem: bytes, identity: Identity, *, days: int = LEAF_DAYS) -> Signed:
        """A certificate of `identity` for the key of a signing request, of which nothing else counts: neither its
        subject nor what names it asks for. TlsError when it is none, is not signed by its own key, or has another
        kind of key."""
        try:
            request = x509.load_pem_x509_csr(request_pem)
            sound = request.is_signature_valid
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise TlsError(f"the signing request cannot be read: {error}") from error
        key = request.public_key()
        if not sound:
            raise TlsError("the signing request is not signed by its own key")
        if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, CURVES):
            raise TlsError("the signing request's key must be on the curve P-256, P-384 or P-521")
        certificate = self._certify(identity, key, (), (), days, _utc())
        return Signed(certificate.public_bytes(serialization.Encoding.PEM), f"{certificate.serial_number:x}")

    def _certify(
        self, identity: Identity, key: ec.EllipticCurvePublicKey, dns_names: Iterable[str],
        ip_addresses: Iterable[str], days: int, now: datetime.datetime,
    ) -> x509.Certificate:  # fmt: skip
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, str(identity)[:64])])
        builder = _builder(subject, self._certificate.subject, key, now, days)
        sans: list[x509.GeneralName] = [x509.UniformResourceIdentifier(identity.uri)]
        sans += [x509.DNSName(name) for name in [*_own_names(identity), *dns_names]]
        sans += [x509.IPAddress(ipaddress.ip_address(address)) for address in ip_addresses]
        uses = [ExtendedKeyUsageOID.CLIENT_AUTH]
        if identity.role in SERVERS:
            uses.append(ExtendedKeyUsageOID.SERVER_AUTH)
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        builder = (
            builder.add_extension(x509.SubjectAlternativeName(sans), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(ca=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage(uses), critical=False)
            .add_extension(issuer, critical=False)
        )
        return builder.sign(self._key, hashes.SHA256())

    def issue_files(
        self,
        identity: Identity,
        folder: Path,
        *,
        stem: str = "",
        dns_names: Iterable[str] = (),
        ip_addresses: Iterable[str] = (),
        days: int = LEAF_DAYS,
    ) -> TlsFiles:
        """Issues into `folder`: ca.crt, <stem>.crt and <stem>.key (stem: the role, unless given)."""
        issued = self.issue(identity, dns_names=dns_names, ip_addresses=ip_addresses, days=days)
        stem = stem or identity.role.value
        files = TlsFiles(folder / "ca.crt", folder / f"{stem}.crt", folder / f"{stem}.key")
        write_file(files.ca, self.cert_pem, 0o644)
        write_file(files.key, issued.key_pem, 0o600)
        write_file(files.cert, issued.cert_pem, 0o644)
        return files


def _own_names(identity: Identity) -> list[str]:
    if identity.role is Role.CONTROLPLANE:
        return [CONTROLPLANE_SERVER_NAME]
    if identity.role is Role.HOST:
        return [host_server_name(identity.name)]
    return []


def _utc() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def _builder(
    subject: x509.Name, issuer: x509.Name, public_key: ec.EllipticCurvePublicKey, now: datetime.datetime, days: int
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
    )


def _key_usage(*, ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=ca,
        crl_sign=ca,
        encipher_only=False,
        decipher_only=False,
    )


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    pkcs8, plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    return key.private_bytes(serialization.Encoding.PEM, pkcs8, plain)


def write_file(path: Path, content: bytes, mode: int) -> None:
    """Whole or not at all: a new file, then a rename. The mode is set before any byte is in it."""
    staging = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        staging.unlink(missing_ok=True)
        descriptor = os.open(staging, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(descriptor, mode)
            file.write(content)
            file.flush()
            os.fsync(descriptor)
        staging.rename(path)
    except OSError as error:
        staging.unlink(missing_ok=True)
        raise TlsError(f"{path} cannot be written: {error.strerror}") from error
