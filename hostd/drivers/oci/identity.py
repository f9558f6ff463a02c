"""A sandbox's own files in its root: who it is, and that it knows no other host. Written past any link in the image."""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path

from controlplane.api.services import GATEWAY, Answerer, ServicePolicy
from hostd.drivers.oci.users import open_in_root
from hostd.errors import StartFailed


def machine_id(uid: str) -> str:
    """The same for a sandbox after any restart, and no other's: 32 hex digits (machine-id(5))."""
    return hashlib.sha256(b"sandloom machine-id " + uid.encode()).hexdigest()[:32]


NO_RESOLVER = "# No name server is given to this sandbox.\n"
RESOLVER = f"nameserver {GATEWAY}\noptions timeout:3 attempts:2\n"
"""As the agent writes it in a guest (guestagent/src/identity.c)."""


def resolver_of(policy: ServicePolicy) -> str:
    """What a sandbox's resolv.conf says. Pure."""
    return RESOLVER if policy.dns is Answerer.TOOL else NO_RESOLVER


def files(uid: str, hostname: str, resolver: str = NO_RESOLVER) -> dict[str, str]:
    """Name in /etc and text. Pure."""
    return {
        "hostname": f"{hostname}\n",
        "hosts": f"127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n127.0.1.1\t{hostname}\n",
        "machine-id": f"{machine_id(uid)}\n",
        "resolv.conf": resolver,
    }


def write(root: Path, uid: str, hostname: str, resolver: str = NO_RESOLVER) -> None:
    """Puts them into the root filesystem mounted at `root`. An image without a usable /etc gets none. Blocks."""
    try:
        folder = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            _write_below(folder, files(uid, hostname, resolver))
        finally:
            os.close(folder)
    except OSError as error:
        raise StartFailed(f"the sandbox's files in /etc cannot be written: {error}", reason="MountFailed") from error


def _write_below(root: int, texts: dict[str, str]) -> None:
    with contextlib.suppress(FileExistsError):
        os.mkdir("etc", 0o755, dir_fd=root)
    try:
        etc = open_in_root(root, "etc", os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return  # its /etc is no folder, or a link to nowhere: the image's own affair
    try:
        for name, text in texts.items():
            _replace(etc, name, text.encode())
    finally:
        os.close(etc)


def _replace(folder: int, name: str, data: bytes) -> None:
    """Makes a new file in place of whatever has the name; a folder of that name stays."""
    try:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=folder)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(name, flags, 0o644, dir_fd=folder)
    except (IsADirectoryError, FileExistsError, PermissionError):
        return
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        os.fchmod(file.fileno(), 0o644)
