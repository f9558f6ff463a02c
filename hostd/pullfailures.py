"""What skopeo says when it fails, as an error that says what failed, on what, and what to do. Pure.

The texts are those of containers/image and docker/distribution (`registry/api/errcode`, `registry/api/v2/errors.go`)
and of Go's net and crypto/x509; the first row that is in skopeo's output counts. What no row knows is told as its last
message, without the log line around it. skopeo never prints credentials.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from hostd.errors import HostdError, ImageMissing, NotAdmitted, RegistryUnavailable

MESSAGE = re.compile(r'msg="((?:[^"\\]|\\.)*)"')
MOST_CHARS = 300


def failure_of(said: str, reference: str, tenant: str, *, known: bool) -> HostdError:
    """`said` is skopeo's output; `known`: it had credentials of the tenant's."""
    registry = reference.partition("/")[0]
    text = said.lower()
    for words, tell in ROWS:
        if any(word in text for word in words):
            return tell(reference, registry, tenant, known)
    return HostdError(f"{reference} could not be fetched: {last_message(said)}", reason="PullFailed")


def last_message(said: str) -> str:
    """The message in the last line of a log of skopeo's."""
    lines = said.strip().splitlines()
    if not lines:
        return "skopeo ended without a word: look at the host's log"
    found = MESSAGE.search(lines[-1])
    text = re.sub(r"\\(.)", r"\1", found.group(1)) if found else lines[-1]
    return text if len(text) <= MOST_CHARS else f"{text[:MOST_CHARS]}..."


def _refused(reference: str, registry: str, tenant: str, known: bool) -> HostdError:
    why = "does not let the credentials that this host has" if known else "does not let somebody without credentials"
    remedy = f"`skopeo login --authfile DIR/{tenant}.json {registry}`, DIR being registry_auth_dir in hostd.toml"
    text = f"{registry} {why} have {reference}, or there is no such image: check the name, or have the operator run"
    return NotAdmitted(f"{text} {remedy}", reason="RegistryDenied")


def _unknown(reference: str, registry: str, tenant: str, known: bool) -> HostdError:
    text = f"{registry} has no image {reference}: check repository and tag"
    return ImageMissing(text, reason="NotInRegistry")


def _other_machine(reference: str, registry: str, tenant: str, known: bool) -> HostdError:
    text = f"{reference} has no image for this host's architecture: choose another tag, or a host of that architecture"
    return ImageMissing(text, reason="NotInRegistry")


def _too_often(reference: str, registry: str, tenant: str, known: bool) -> HostdError:
    text = f"{registry} has been asked too often: wait, or give it credentials (registry_auth_dir in hostd.toml)"
    return RegistryUnavailable(text)


def _plain(reference: str, registry: str, tenant: str, known: bool) -> HostdError:
    text = f"{registry} does not speak TLS: name it in plain_registries in hostd.toml if that is right"
    return RegistryUnavailable(text, reason="RegistryPlain")


def _stranger(reference: str, registry: str, tenant: str, known: bool) -> HostdError:
    text = (
        f"the certificate of {registry} cannot be verified on this host: put its CA into /etc/containers/certs.d/"
        f"{registry}/ca.crt there, or name it in plain_registries in hostd.toml"
    )
    return RegistryUnavailable(text, reason="RegistryUntrusted")


def _away(reference: str, registry: str, tenant: str, known: bool) -> HostdError:
    text = f"{registry} cannot be reached from this host: check its name and port, and the way there, then try again"
    return RegistryUnavailable(text)


def _full(reference: str, registry: str, tenant: str, known: bool) -> HostdError:
    return HostdError("this host's disk is full: remove images that nobody needs", reason="PullFailed")


Tell = Callable[[str, str, str, bool], HostdError]
ROWS: tuple[tuple[tuple[str, ...], Tell], ...] = (
    (("toomanyrequests", "too many requests"), _too_often),
    (("server gave http response to https client",), _plain),
    (("x509:", "tls: failed to verify", "tls: handshake failure"), _stranger),
    (("no space left on device",), _full),
    (("no image found in manifest list", "no image found in image index"), _other_machine),
    (("manifest unknown", "name unknown", "repository name not known", "not found: manifest"), _unknown),
    (
        (
            "unauthorized", "authentication required", "access to the resource is denied", "invalid username/password",
            "denied:", "403 (forbidden)",
        ),
        _refused,
    ),
    (
        (
            "connection refused", "no such host", "i/o timeout", "network is unreachable", "no route to host",
            "connection reset", "context deadline exceeded", "server misbehaving", "bad gateway",
            "service unavailable",
        ),
        _away,
    ),
)  # fmt: skip
