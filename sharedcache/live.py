"""Who needs what: pins, images, and imports under way. The store's half that garbage collection asks.

Promise: a reference count is derived from records that exist, never kept as a number; a record is only made
while what it needs is in the store, under the same lock that removal takes.

Owns `pins/` (sharedcache.pins) and `images/` (sharedcache.imagebook).
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from sharedcache.domains import Domain, DomainBook
from sharedcache.errors import CacheError, NotFound
from sharedcache.imagebook import ImageBook
from sharedcache.images import ImageRecord
from sharedcache.layout import Layout
from sharedcache.pins import PinBook
from sharedcache.shelf import Shelf


class LiveRecords:
    """The base of `Store`: its live records and the lock they share with publication and removal."""

    def __init__(self, layout: Layout, domains: DomainBook, shelf: Shelf) -> None:
        self._layout = layout
        self._domains = domains
        self._shelf = shelf
        self._lock = threading.RLock()
        self._closed = False
        self._pins = PinBook(layout)
        self._images = ImageBook(layout, domains)
        self._holds: dict[str, set[str]] = {}

    def pin(self, owner: str, keys: Iterable[str]) -> None:
        """Adds `keys` to what `owner` ("sandbox/<uid>") needs; durable when this returns. Idempotent.

        NotFound when one of them is not in the store (nothing is pinned then). ValueError for a bad owner
        name.
        """
        wanted = frozenset(keys)
        with self._locked():
            missing = sorted(key for key in wanted if self._shelf.find(key) is None)
            if missing:
                raise NotFound(f"{owner} needs {len(missing)} objects that are not in the store: {missing[0]} …")
            self._pins.add(owner, wanted)

    def unpin(self, owner: str) -> None:
        """Forgets what `owner` needs; durable when this returns. Idempotent."""
        with self._locked():
            self._pins.drop(owner)

    def pins(self) -> Mapping[str, frozenset[str]]:
        """Who needs what, now: the records of `pin`, the images, and imports under way."""
        with self._locked():
            held = dict(self._pins.all())
            held.update((image.owner, image.keys) for image in self._images.all())
            held.update((owner, frozenset(keys)) for owner, keys in self._holds.items())
            return held

    @contextmanager
    def hold(self) -> Iterator[str]:
        """An owner for what is published with it, until the block ends: time to pin it or put the image."""
        owner = f"hold/{secrets.token_hex(8)}"
        with self._locked():
            self._holds[owner] = set()
        try:
            yield owner
        finally:
            with self._lock:
                del self._holds[owner]

    def put_image(self, image: ImageRecord) -> ImageRecord:
        """Keeps `image` and pins its layers.

        Durable when this returns. Idempotent. NotFound: a layer is missing.
        """
        with self._locked():
            for layer in image.layers:
                item = self._shelf.find(layer.key)
                if item is None or item.domain != image.domain or item.digest != layer.digest:
                    raise NotFound(f"image {image.digest}: its layer {layer.digest} is not in {image.domain}")
            known = self._images.find(image.domain, image.digest)
            if known is None:
                self._images.put(image)
            return known or image

    def get_image(self, domain: Domain, digest: str) -> ImageRecord:
        """The image; `get` each layer before using it. NotFound."""
        with self._locked():
            image = self._images.find(domain, digest)
        if image is None:
            raise NotFound(f"image {digest} is not in {domain}; import it there")
        return image

    def images(self) -> list[ImageRecord]:
        """All images, in order of domain and digest."""
        with self._locked():
            return list(self._images.all())

    def forget_image(self, domain: Domain, digest: str) -> None:
        """Removes the image.

        Its layers stay until `collect` finds that nobody else needs them. Idempotent.
        """
        with self._locked():
            self._images.drop(domain, digest)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with self._lock:
            if self._closed:
                raise CacheError(f"{self._layout.root}: the store is closed")
            yield
