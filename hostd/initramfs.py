"""The guest's initramfs, built from values: the agent as /init and the kernel modules it loads, in order. Pure.

Format: cpio "newc" (Documentation/driver-api/early-userspace/buffer-format.rst), uncompressed, since the agent is
small, modules are few, and decompressing is guest time. Deterministic: no times, no inode numbers of the host.
"""

from __future__ import annotations

import lzma
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

import zstandard

from hostd.errors import KernelMissing

WANTED = (
    "virtio_pci", "virtio_console", "virtio_pmem", "nd_pmem", "erofs", "overlay", "virtio_mem", "tun", "fuse",
    "virtio_blk",
)  # fmt: skip
"""What a guest needs beyond what Debian's cloud kernel has built in; tun is for `sockets: tool`, fuse for files that
somebody else than the kernel answers for, virtio_blk serves the benchmark's peer."""

CRYPTO_PROVIDERS = {"libcrc32c": ("crc32c_generic",), "crc32c": ("crc32c_generic",)}
"""A module that asks the crypto API for an algorithm by name: nobody is there in the guest to modprobe it."""

_DIRECTORY, _FILE = 0o040755, 0o100644


def module_name(path: str) -> str:
    """`nd_pmem` for `kernel/drivers/nvdimm/nd_pmem.ko.xz` (dashes are underscores to the kernel)."""
    return PurePosixPath(path).name.split(".ko")[0].replace("-", "_")


def decompress(path: str, data: bytes) -> bytes:
    """A module's ELF image, whatever its package compressed it with (Debian 12: none; 13: xz)."""
    if path.endswith(".xz"):
        return lzma.decompress(data)
    if path.endswith(".zst"):
        return zstandard.ZstdDecompressor().decompressobj().decompress(data)
    return data


@dataclass(frozen=True)
class Needs:
    """What a module has to have loaded before it: `hard` or it cannot be loaded, `soft` if it is there."""

    hard: tuple[str, ...] = ()
    soft: tuple[str, ...] = ()


def dependencies(elf: bytes) -> Needs:
    """What a module's .modinfo says (`depends=a,b`, `softdep=pre: a b post: c`; see modinfo(8), modprobe.d(5))."""
    hard = _modinfo(elf, b"depends=").replace(",", " ").split()
    soft = _modinfo(elf, b"softdep=pre: ").partition("post:")[0].split()
    return Needs(tuple(name.replace("-", "_") for name in hard), tuple(name.replace("-", "_") for name in soft))


def _modinfo(elf: bytes, field: bytes) -> str:
    start = elf.find(b"\0" + field)
    if start < 0:
        return ""
    start += 1 + len(field)
    return elf[start : elf.index(b"\0", start)].decode("ascii", "replace")


def load_order(wanted: Iterable[str], modules: Mapping[str, bytes], built_in: frozenset[str]) -> list[str]:
    """Names in the order to load them, dependencies first. KernelMissing names one that is nowhere."""
    order: list[str] = []

    def visit(name: str, asked_by: str, soft: bool = False) -> None:
        if name in order or name in built_in:
            return
        if name not in modules:
            if soft:
                return
            raise KernelMissing(f"the kernel package has no module {name} (needed by {asked_by}): use another one")
        needs = dependencies(modules[name])
        for need in needs.hard:
            visit(need, name)
        for need in (*needs.soft, *CRYPTO_PROVIDERS.get(name, ())):
            visit(need, name, soft=True)
        order.append(name)

    for name in wanted:
        visit(name, "sandloom")
    return order


def initramfs(agent: bytes, modules: Mapping[str, bytes], order: Iterable[str]) -> bytes:
    """The archive: /init, /mod/order, /mod/*.ko and the empty folders that the agent mounts on."""
    names = list(order)
    entries: list[tuple[str, int, bytes]] = [
        (folder, _DIRECTORY, b"") for folder in ("dev", "proc", "sys", "mod", "run", "l", "o")
    ]
    entries.append(("init", _FILE | 0o111, agent))
    entries.append(("mod/order", _FILE, "".join(f"{name}.ko\n" for name in names).encode()))
    entries += [(f"mod/{name}.ko", _FILE, modules[name]) for name in names]
    archive = b"".join(_member(index, *entry) for index, entry in enumerate(entries, 1))
    archive += _member(0, "TRAILER!!!", 0, b"")
    return archive + b"\0" * (-len(archive) % 512)


def _member(inode: int, name: str, mode: int, data: bytes) -> bytes:
    encoded = name.encode() + b"\0"
    fields = (inode, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(encoded), 0)
    head = b"070701" + b"".join(b"%08X" % value for value in fields) + encoded
    head += b"\0" * (-len(head) % 4)
    return head + data + b"\0" * (-len(data) % 4)
