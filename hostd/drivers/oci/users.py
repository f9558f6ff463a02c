"""Who a command runs as: names resolved in the image's own /etc/passwd and /etc/group, which are a tenant's files.

Promise: nothing outside of the root filesystem is ever read, whatever links it holds (openat2(2) with RESOLVE_IN_ROOT
walks it as if it were /), nothing but a regular file is read, and of that at most MAX_FILE_BYTES.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hostd.errors import CommandFailed, HostdError

MAX_FILE_BYTES = 1 << 20
MAX_ID = 2**32 - 2  # -1 means "leave it" to setresuid(2)
MAX_GROUPS = 1024
SYS_OPENAT2 = 437  # one number on every architecture (asm-generic/unistd.h)
RESOLVE_NO_MAGICLINKS, RESOLVE_IN_ROOT = 0x02, 0x10  # linux/openat2.h
CANNOT_RUN = 126

_libc = ctypes.CDLL(None, use_errno=True)


class _OpenHow(ctypes.Structure):
    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


@dataclass(frozen=True)
class Identity:
    """Numeric, as a process has them."""

    uid: int
    gid: int
    groups: tuple[int, ...] = ()


ROOT = Identity(0, 0)
ROOT_NAMES = ("", "0", "0:0")


def open_in_root(root: int, path: str, flags: int, mode: int = 0) -> int:
    """A descriptor of `path` with every link in it resolved below the directory descriptor `root`. OSError."""
    how = _OpenHow(flags | os.O_CLOEXEC, mode, RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS)
    while True:
        descriptor = int(
            _libc.syscall(
                SYS_OPENAT2, root, path.encode(errors="surrogateescape"), ctypes.byref(how), ctypes.sizeof(how)
            )
        )
        if descriptor >= 0:
            return descriptor
        error = ctypes.get_errno()
        if error not in (errno.EAGAIN, errno.EINTR):  # EAGAIN: something was renamed meanwhile
            raise OSError(error, os.strerror(error), path)


def read_in_root(root: Path, path: str) -> str:
    """The text of a regular file of the image; "" when there is none. HostdError when it is too long or no file."""
    folder = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        descriptor = open_in_root(folder, path, os.O_RDONLY | os.O_NONBLOCK)
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except OSError as error:
        if error.errno == errno.ELOOP:  # a link to itself, once all is resolved in the image: as good as none
            return ""
        raise HostdError(f"the image's {path} cannot be opened: {error.strerror}", reason="BadImage") from error
    finally:
        os.close(folder)
    with os.fdopen(descriptor, "rb") as file:
        info = os.fstat(file.fileno())
        if not stat.S_ISREG(info.st_mode) or info.st_size > MAX_FILE_BYTES:
            raise HostdError(f"the image's {path} is no file of at most {MAX_FILE_BYTES >> 20} MiB", reason="BadImage")
        return file.read(MAX_FILE_BYTES).decode(errors="replace")


def _fields(text: str, count: int) -> Iterator[list[str]]:
    for line in text.splitlines():
        fields = line.strip().split(":")
        if len(fields) >= count and fields[0] and not line.startswith("#"):
            yield fields


def _number(text: str) -> int | None:
    if text.isascii() and text.isdigit() and len(text) <= 10 and int(text) <= MAX_ID:
        return int(text)
    return None


def resolve(user: str, passwd: str, group: str) -> Identity:
    """`user` is "", NAME, UID, or either with :GROUP or :GID, as docker has it. Pure. ValueError says who is unknown.

    A numeric user that passwd does not know has gid 0; a name's further groups come with it unless :GROUP is given."""
    name, _, wanted_group = user.partition(":")
    uid, gid, groups, login = _find_user(name or "0", passwd)
    if wanted_group:
        return Identity(uid, _find_group(wanted_group, group))
    for fields in _fields(group, 4):
        more = _number(fields[2])
        if login and more is not None and more != gid and login in fields[3].split(",") and len(groups) < MAX_GROUPS:
            groups.append(more)
    return Identity(uid, gid, tuple(groups))


def _find_user(name: str, passwd: str) -> tuple[int, int, list[int], str]:
    number = _number(name)
    for fields in _fields(passwd, 4):
        uid, gid = _number(fields[2]), _number(fields[3])
        if uid is not None and gid is not None and (fields[0] == name or (number is not None and uid == number)):
            return uid, gid, [], fields[0]
    if number is None:
        raise ValueError(f"user {name!r} is not in the image's /etc/passwd")
    return number, 0, [], ""


def _find_group(name: str, group: str) -> int:
    for fields in _fields(group, 3):
        gid = _number(fields[2])
        if fields[0] == name and gid is not None:
            return gid
    number = _number(name)
    if number is None:
        raise ValueError(f"group {name!r} is not in the image's /etc/group")
    return number


def identity_of(user: str, root: Path) -> Identity:
    """`user` of the image mounted at `root`. CommandFailed (126) names who is not there. Blocks."""
    if user in ROOT_NAMES:
        return ROOT
    try:
        return resolve(user, read_in_root(root, "/etc/passwd"), read_in_root(root, "/etc/group"))
    except ValueError as error:
        raise CommandFailed(str(error), CANNOT_RUN) from error
