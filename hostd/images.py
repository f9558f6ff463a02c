"""hostd's view of the store: an image's layers as files a VM may read, pinned for as long as a sandbox lives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hostd.drivers.contract import LayerFile
from hostd.errors import HostdError, ImageMissing, InvalidSpec
from hostd.spec import SandboxSpec
from sharedcache.domains import Domain
from sharedcache.errors import CacheError, NotFound
from sharedcache.images import ImageConfig
from sharedcache.store import Store

DEFAULT_TENANT = "default"


@dataclass(frozen=True)
class ReadyImage:
    """An image whose layers are here, verified and pinned."""

    layers: tuple[LayerFile, ...]  # lowest first
    config: ImageConfig


def domain_of(tenant: str) -> Domain:
    """Where a tenant's own images live unless somebody says otherwise. "" is `default`. InvalidSpec."""
    try:
        return Domain.tenant(tenant or DEFAULT_TENANT)
    except ValueError as error:
        raise InvalidSpec(f"tenant {tenant!r}: {error}") from error


def take(store: Store, spec: SandboxSpec) -> ReadyImage:
    """Pins and verifies the layers of the sandbox's image. Blocks; ImageMissing when it is not here whole."""
    domain = domain_of(spec.tenant)
    try:
        image = store.get_image(domain, spec.image_digest)
        store.pin(pin_owner(spec.uid), [layer.key for layer in image.layers])
        objects = [store.get(domain, layer.digest) for layer in image.layers]
    except NotFound as error:
        release(store, spec.uid)
        raise ImageMissing(f"image {spec.image_digest}: {error}; import it again") from error
    except CacheError as error:
        release(store, spec.uid)
        raise HostdError(f"image {spec.image_digest}: {error}", reason="ImageUnusable") from error
    gid = store.domain_gid(domain)
    layers = tuple(
        LayerFile(stored.path, stored.size_bytes, layer.volume_uuid, gid)
        for stored, layer in zip(objects, image.layers, strict=True)
    )
    return ReadyImage(layers, image.config)


def take_layers(store: Store, spec: SandboxSpec, digests: Sequence[tuple[str, str]]) -> tuple[LayerFile, ...]:
    """Pins and verifies layers, (digest, volume uuid) each, for a sandbox that needs no image's record: it was copied
    from one that had them. Blocks; ImageMissing."""
    domain = domain_of(spec.tenant)
    try:
        with store.hold() as hold:
            objects = [store.get(domain, digest, hold=hold) for digest, _ in digests]
            store.pin(pin_owner(spec.uid), [stored.key for stored in objects])
    except NotFound as error:
        raise ImageMissing(f"a layer of the checkpoint: {error}") from error
    except CacheError as error:
        raise HostdError(f"a layer of the checkpoint: {error}", reason="ImageUnusable") from error
    gid = store.domain_gid(domain)
    return tuple(
        LayerFile(stored.path, stored.size_bytes, bytes.fromhex(uuid), gid)
        for stored, (_, uuid) in zip(objects, digests, strict=True)
    )


def release(store: Store, uid: str) -> None:
    """Lets the store collect what nothing but this sandbox used."""
    store.unpin(pin_owner(uid))


def pin_owner(uid: str) -> str:
    """The name under which a sandbox's pins are recorded."""
    return f"sandbox/{uid}"
