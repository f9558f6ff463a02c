"""The guest kernel of this host in the store: fetched once, published like any other object, initramfs beside it.

    STATE/kernel.json     {"version", "package", "agent_sha256", "modules", "vmlinuz", "initrd"}
                          the last two are digests of the two objects

Rebuilt when the package, the agent or the wanted modules change; the pin `kernel/current` keeps both objects, and
only them, alive.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from guestagent.binary import binary_path
from hostd import kernel
from hostd.drivers.qemu.plan import GuestKernel
from hostd.initramfs import WANTED
from sharedcache.domains import Domain
from sharedcache.errors import CacheError
from sharedcache.objects import FileMeta, ObjectKind, StoredObject
from sharedcache.store import Store

PIN_OWNER = "kernel/current"


def prepare(store: Store, state_dir: Path, cache_dir: Path) -> GuestKernel:
    """The kernel to boot guests with. Blocks for seconds the first time; run it in a thread. KernelMissing."""
    agent = binary_path().read_bytes()
    deb = kernel.fetch(cache_dir)
    index = state_dir / "kernel.json"
    wanted = {"package": deb.name, "agent_sha256": hashlib.sha256(agent).hexdigest(), "modules": " ".join(WANTED)}
    kept = _kept(store, index, wanted)
    if kept is not None:
        return kept
    files = kernel.extract(deb)
    image = _publish(store, ObjectKind.KERNEL, "vmlinuz", files.version, files.vmlinuz)
    initrd = _publish(store, ObjectKind.INITRAMFS, "initrd", files.version, files.initramfs(agent))
    _pin_only(store, image, initrd)
    values = {**wanted, "version": files.version, "vmlinuz": image.digest, "initrd": initrd.digest}
    temporary = index.with_suffix(".tmp")
    temporary.write_text(json.dumps(values))
    temporary.rename(index)
    return _guest_kernel(store, files.version, image, initrd)


def _kept(store: Store, index: Path, wanted: dict[str, str]) -> GuestKernel | None:
    """What a former run published, when it is still what is wanted and still whole."""
    try:
        values = json.loads(index.read_text())
        if any(values[key] != value for key, value in wanted.items()):
            return None
        image = store.get(Domain.public(), values["vmlinuz"])
        initrd = store.get(Domain.public(), values["initrd"])
    except (OSError, ValueError, KeyError, CacheError):
        return None
    _pin_only(store, image, initrd)
    return _guest_kernel(store, str(values["version"]), image, initrd)


def _pin_only(store: Store, image: StoredObject, initrd: StoredObject) -> None:
    store.unpin(PIN_OWNER)  # what was just read or published is safe for the store's grace
    store.pin(PIN_OWNER, [image.key, initrd.key])


def _publish(store: Store, kind: ObjectKind, name: str, release: str, data: bytes) -> StoredObject:
    # apt verified the package with the operator's own keyring: that is the operator's signature.
    meta = FileMeta(name, release)
    return store.publish_bytes(data, domain=Domain.public(), kind=kind, meta=meta, operator_signed=True)


def _guest_kernel(store: Store, version: str, image: StoredObject, initrd: StoredObject) -> GuestKernel:
    return GuestKernel(version, image.digest, initrd.digest, image.path, initrd.path, store.domain_gid(Domain.public()))
