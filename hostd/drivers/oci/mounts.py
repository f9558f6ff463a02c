"""Mounting image layers once a host, and root filesystems over them.

    MOUNTS/g<gid>/         what the group of one sharing domain may see, as with its blobs
        <name>.erofs       a layer: its EROFS blob, read-only; one mount for all sandboxes that use it
        <name>.pieces/<n>  for guests that run on it, too: which bytes of the blob are which file (pieces.py)
    RUN/<uid>/upper        tmpfs of the sandbox's own, size-limited: what it writes
    RUN/<uid>/rootfs       overlayfs of the two: the container's root

Promise: a layer's bytes are in the page cache once, however many sandboxes read it. Each mount(2) of a blob makes a
superblock and so a page cache of its own, hence the one mount; and the blob file must not be cached beside it, hence
direct I/O beneath. Measured on Linux 6.18, reading a file of 200 MiB from a blob:

    file-backed, directio    200 MiB of page cache, 0.16 s       <- used where the kernel has it (6.14 on)
    loop, direct I/O         200 MiB, 0.19 s                     <- else
    file-backed              400 MiB (blob and files), 0.36 s
    loop                     400 MiB, 0.30 s

A guest's virtio-pmem maps the blob file itself, whose page cache no file system's files share without DAX. So a guest
is given the mount's files instead, each in its place (hostd/drivers/onecopy.py).

Who uses a layer is not counted: overlays are read off /proc/self/mountinfo, and a mount whose files guests map is busy
to the kernel, and stays. After any crash that is the truth. Owns: the mounts below MOUNTS and below each sandbox's
folder.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import os
import re
import subprocess
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hostd.drivers import pieces
from hostd.drivers.contract import LayerFile
from hostd.errors import ConfigError, HostdError, StartFailed
from hostd.removal import remove_folder, require_own
from sharedcache.residency import file_residency

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REMOUNT = 1, 2, 4, 32  # linux/mount.h
MNT_DETACH, UMOUNT_NOFOLLOW = 2, 8
OPTIONS_BYTES = 4000
"""mount(2) takes a page of options."""

LOSETUP_DEADLINE_S = 20.0
READ_SHARE = 0.25
SYS_MOVE_MOUNT, SYS_FSOPEN, SYS_FSCONFIG, SYS_FSMOUNT = 429, 430, 431, 432  # asm-generic/unistd.h
FSCONFIG_SET_STRING, FSCONFIG_CMD_CREATE = 1, 6  # linux/mount.h
MOVE_MOUNT_F_EMPTY_PATH = 4
MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV = 2, 4

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Mounted:
    """A line of /proc/self/mountinfo (proc(5)): where, which type, from what, the file system's options, its device."""

    at: str
    kind: str
    source: str
    options: str
    device: tuple[int, int]


def parse_mountinfo(text: str) -> list[Mounted]:
    """All mounts, oldest first. Pure."""
    found: list[Mounted] = []
    for line in text.splitlines():
        before, _, after = line.partition(" - ")
        fields, rest = before.split(" "), after.split(" ")
        major, _, minor = fields[2].partition(":")
        found.append(Mounted(_plain(fields[4]), rest[0], _plain(rest[1]), _plain(rest[2]), (int(major), int(minor))))
    return found


def _plain(escaped: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), escaped)


def mounted() -> list[Mounted]:
    """What is mounted now."""
    return parse_mountinfo(Path("/proc/self/mountinfo").read_text())


def unused_layers(mounts: Iterable[Mounted], below: Path) -> list[str]:
    """Layers' mount points in the folders of `below` that no overlay has as a lower layer. Pure."""
    mounts = list(mounts)
    used: set[str] = set()
    for one in mounts:
        if one.kind == "overlay":
            for option in one.options.split(","):
                key, _, value = option.partition("=")
                if key in ("lowerdir", "lowerdir+"):
                    used.update(value.split(":"))
    return [one.at for one in mounts if Path(one.at).parent.parent == below and one.at not in used]


def points_below(root: Path) -> frozenset[Path]:
    """Where layers are mounted now by a hostd whose MOUNTS is `root`."""
    return frozenset(Path(one.at) for one in mounted() if Path(one.at).parent.parent == root)


def _mount(source: str, at: Path, kind: str, flags: int, options: str) -> None:
    done = _libc.mount(source.encode(), os.fsencode(at), kind.encode(), flags, options.encode())
    if done != 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error), str(at))


def unmount(at: str | Path) -> None:
    """Unmounts; a busy mount is detached and goes with its last user. Nothing happens when nothing is mounted there."""
    for flags in (UMOUNT_NOFOLLOW, UMOUNT_NOFOLLOW | MNT_DETACH):
        if _libc.umount2(os.fsencode(at), flags) == 0:
            return
        error = ctypes.get_errno()
        if error in (errno.EINVAL, errno.ENOENT):
            return
        if error != errno.EBUSY:
            raise HostdError(f"{at} cannot be unmounted: {os.strerror(error)}")


def unmount_below(folder: Path) -> None:
    """Everything mounted at or below `folder`, newest first. HostdError for a path that is no sandbox's: unmounting
    what is below / would be the host's end."""
    require_own(folder, "nothing is unmounted")
    prefix = f"{folder}/"
    for one in reversed(mounted()):
        if one.at == str(folder) or one.at.startswith(prefix):
            unmount(one.at)


def resize_upper(folder: Path, upper_mib: int) -> None:
    """Sets how much the sandbox in `folder` may write. Less than it has written is not taken: it keeps what it has."""
    try:
        _mount("tmpfs", folder / "upper", "tmpfs", MS_REMOUNT | MS_NOSUID | MS_NODEV, f"size={upper_mib}m")
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise HostdError(f"{folder}/upper cannot be resized: {error.strerror}") from error


def _overlay(at: Path, lower: Sequence[str], upper: Path) -> None:
    """Joins `lower` (topmost first) under `upper`/upper. Many layers need a kernel with lowerdir+ (6.7 on)."""
    own = f"upperdir={upper}/upper,workdir={upper}/work"
    options = f"lowerdir={':'.join(lower)},{own}"
    if len(options) <= OPTIONS_BYTES:
        _mount("overlay", at, "overlay", MS_NOSUID | MS_NODEV, options)
        return
    settings = [("source", "overlay"), *(("lowerdir+", one) for one in lower)]
    settings += [("upperdir", f"{upper}/upper"), ("workdir", f"{upper}/work")]
    context = _call(SYS_FSOPEN, b"overlay", 1)
    try:
        for key, value in settings:
            _call(SYS_FSCONFIG, context, FSCONFIG_SET_STRING, key.encode(), value.encode(), 0)
        _call(SYS_FSCONFIG, context, FSCONFIG_CMD_CREATE, None, None, 0)
        made = _call(SYS_FSMOUNT, context, 1, MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV)
    finally:
        os.close(context)
    try:
        _call(SYS_MOVE_MOUNT, made, b"", -100, os.fsencode(at), MOVE_MOUNT_F_EMPTY_PATH)
    finally:
        os.close(made)


def _call(number: int, *arguments: object) -> int:
    done = int(_libc.syscall(number, *arguments))
    if done < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return done


def _mount_file_direct(blob: Path, at: Path) -> None:
    _mount(str(blob), at, "erofs", MS_RDONLY | MS_NOSUID | MS_NODEV, "directio")


def _mount_loop_direct(blob: Path, at: Path) -> None:
    """A loop device that goes with the mount (autoclear)."""
    argv = ["losetup", "--find", "--show", "--read-only", "--direct-io=on", str(blob)]
    try:
        made = subprocess.run(argv, capture_output=True, text=True, timeout=LOSETUP_DEADLINE_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise StartFailed(f"losetup: {error}", reason="MountFailed") from error
    if made.returncode:
        raise StartFailed(f"losetup {blob}: {made.stderr.strip()}", reason="MountFailed")
    device = made.stdout.strip()
    try:
        _mount(device, at, "erofs", MS_RDONLY | MS_NOSUID | MS_NODEV, "")
    finally:
        subprocess.run(["losetup", "--detach", device], capture_output=True, timeout=LOSETUP_DEADLINE_S)


def _drop_cache(blob: Path) -> None:
    """Lets go of the blob file's pages that nobody maps: what is read from now on is cached as the layer's files."""
    descriptor = os.open(blob, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _drop_cache_if_read(blob: Path) -> None:
    """The same for a blob that somebody has read as a whole since it was mounted, to verify it: its metadata, which
    mounts and guests read there, are far less."""
    with blob.open("rb") as file:
        if file_residency(file.fileno(), blob.stat().st_size).cached_share > READ_SHARE:
            _drop_cache(blob)


WAYS = {"file": _mount_file_direct, "loop": _mount_loop_direct}
"""How a blob is mounted, best first."""


class Layers:
    """The layer mounts of one hostd, below `root`. Its calls block for milliseconds and may come from any thread."""

    def __init__(self, root: Path, ways: Sequence[str] = tuple(WAYS)) -> None:
        if re.search(r"[,:\\]", str(root)):
            raise ConfigError(f"{root}: overlayfs cannot take a path with a comma, colon or backslash in it")
        self.root, self._ways = root, tuple(ways)
        self._lock = threading.Lock()
        root.mkdir(parents=True, exist_ok=True)
        root.chmod(0o711)  # a guest's QEMU passes through to what its group may see

    def point(self, layer: LayerFile) -> Path:
        """Where a layer is mounted. A blob's path is its domain's own, so no two domains share a mount."""
        return self.point_of(layer.path, layer.gid)

    def point_of(self, blob: Path, gid: int) -> Path:
        """The same, of a blob by its path and group."""
        return self.root / f"g{gid}" / f"{hashlib.sha256(os.fsencode(blob)).hexdigest()[:16]}.erofs"

    def mount_rootfs(
        self,
        folder: Path,
        layers: Sequence[LayerFile],
        upper_mib: int,
        fill: Callable[[Path], None] = lambda upper: None,
    ) -> None:
        """Makes `folder`/rootfs of `layers` (lowest first). `fill` puts into the writable layer what shall be
        in it from the start. StartFailed; then nothing of it is mounted."""
        points = list(dict.fromkeys(str(self.point(layer)) for layer in reversed(layers)))
        with self._lock:
            try:
                for layer in layers:
                    self._ensure(layer)
                self._mount_writable(folder, points, upper_mib, fill)
            except HostdError:
                unmount_below(folder)
                self._release()
                raise
            except OSError as error:
                unmount_below(folder)
                self._release()
                raise StartFailed(
                    f"a root of {len(points)} layers cannot be mounted: {error.strerror} ({error.filename})",
                    reason="MountFailed",
                ) from error

    def _mount_writable(self, folder: Path, points: list[str], upper_mib: int, fill: Callable[[Path], None]) -> None:
        upper, rootfs = folder / "upper", folder / "rootfs"
        upper.mkdir()
        rootfs.mkdir()
        _mount("tmpfs", upper, "tmpfs", MS_NOSUID | MS_NODEV, f"size={upper_mib}m,mode=0700")
        (upper / "upper").mkdir(mode=0o755)
        (upper / "work").mkdir()
        (upper / "upper").chmod(0o755)
        fill(upper / "upper")
        _overlay(rootfs, points, upper)

    def _ensure(self, layer: LayerFile) -> None:
        at = self.point(layer)
        at.parent.mkdir(exist_ok=True, mode=0o700)
        os.chown(at.parent, 0, layer.gid)
        at.parent.chmod(0o750)
        at.mkdir(exist_ok=True, mode=0o700)
        if os.path.ismount(at):
            _drop_cache_if_read(layer.path)
            return
        first: OSError | None = None
        for way in self._ways:
            try:
                WAYS[way](layer.path, at)
            except OSError as error:
                first = first or error
                continue
            _drop_cache(layer.path)
            return
        assert first is not None
        raise first

    def unmount_rootfs(self, folder: Path) -> None:
        """Unmounts what the sandbox has, then the layers that nobody has any more. Idempotent. HostdError."""
        with self._lock:
            unmount_below(folder)
            self._release()

    def release(self) -> list[str]:
        """Unmounts the layers that nobody has any more; those that are busy still. HostdError."""
        with self._lock:
            return self._release()

    def _release(self) -> list[str]:
        """Never detaches: a mount that was out of sight, but in use, would be a second copy beside the next one."""
        busy: list[str] = []
        for at in unused_layers(mounted(), self.root):
            if not _unmount_idle(at):
                busy.append(at)
                continue
            point = Path(at)
            remove_folder(point.with_suffix(".pieces"))
            point.rmdir()
            with contextlib.suppress(OSError):
                point.parent.rmdir()
        return busy

    def points(self) -> frozenset[Path]:
        """Where layers are mounted now."""
        return points_below(self.root)

    def tables(self, blob: Path) -> list[Path]:
        """The tables of a layer that is mounted, made when they are not there yet; [] when it is not mounted. Blocks
        for some 20 µs a file of it. One call at a time. OSError."""
        info = blob.stat()
        point = self.point_of(blob, info.st_gid)
        folder = point.with_suffix(".pieces")
        if not os.path.ismount(point):
            return []
        if not folder.exists():
            made = point.with_suffix(".new")
            remove_folder(made)
            made.mkdir()
            for n, table in enumerate(
                pieces.tables((info.st_dev, info.st_ino), point, pieces.chosen(pieces.find(point)))
            ):
                (made / f"{n:04}").write_bytes(table)
                (made / f"{n:04}").chmod(0o444)
            made.chmod(0o755)  # beyond the group's folder nobody else gets
            made.rename(folder)
        return sorted(folder.iterdir())


def _unmount_idle(at: str) -> bool:
    """Unmounts unless somebody uses it. HostdError."""
    if _libc.umount2(os.fsencode(at), UMOUNT_NOFOLLOW) == 0:
        return True
    error = ctypes.get_errno()
    if error == errno.EBUSY:
        return False
    raise HostdError(f"{at} cannot be unmounted: {os.strerror(error)}")
