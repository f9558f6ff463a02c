"""What of this host's kernel sandboxes and their hostd may use: found by looking, never by a version's number."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from sharedcache.objects import StoredObject

FILES = (
    ("psi", "proc/pressure/memory"),
    ("cgroup-v2", "sys/fs/cgroup/cgroup.controllers"),
    ("cgroup-pressure", "sys/fs/cgroup/cgroup.pressure"),
    ("kvm", "dev/kvm"),
    ("vhost-vsock", "dev/vhost-vsock"),
    ("userfaultfd", "dev/userfaultfd"),
    ("tun", "dev/net/tun"),
    ("kpageflags", "proc/kpageflags"),
    ("loop", "dev/loop-control"),
)
WORDS = (
    ("erofs", "proc/filesystems", "erofs"),
    ("overlayfs", "proc/filesystems", "overlay"),
    ("seccomp-user-notify", "proc/sys/kernel/seccomp/actions_avail", "user_notif"),
    ("huge-shmem", "sys/kernel/mm/transparent_hugepage/shmem_enabled", "always"),
)


def kernel_features(root: Path = Path("/")) -> list[str]:
    """Names of what is there, sorted. A device that opens may still not work: `accel` says whether KVM does."""
    found = [name for name, path in FILES if (root / path).exists()]
    found += [name for name, path, word in WORDS if word in _words(root / path)]
    return sorted(found)


def _words(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii", errors="replace").split()
    except OSError:
        return []


def resident(objects: Callable[[], Iterable[StoredObject]]) -> list[tuple[str, int, int]]:
    """(kind, how many, bytes) of what a store holds, by kind. No digest: whose they are is nobody's business."""
    kinds: dict[str, tuple[int, int]] = {}
    for item in objects():
        count, size_bytes = kinds.get(str(item.kind), (0, 0))
        kinds[str(item.kind)] = (count + 1, size_bytes + item.size_bytes)
    return [(kind, *sums) for kind, sums in sorted(kinds.items())]
