"""The image records of one store. An image's record is also what pins its layers.

Owns `images/<key>.json` (form: `sharedcache.images`), key = the image digest's key in its domain.
"""

from __future__ import annotations

from collections.abc import Iterable

from sharedcache import durable, images
from sharedcache.domains import Domain, DomainBook
from sharedcache.errors import CacheError
from sharedcache.images import ImageRecord
from sharedcache.layout import Layout


class ImageBook:
    """All images, by domain and digest. Not thread safe: the store calls it under its lock."""

    def __init__(self, layout: Layout, domains: DomainBook) -> None:
        """Reads all records. CacheError when one is damaged: guessing could let a used layer be collected."""
        self._layout = layout
        self._domains = domains
        self._images: dict[tuple[Domain, str], ImageRecord] = {}
        durable.sweep_parts(layout.images)
        for path in sorted(layout.images.glob("*.json")):
            try:
                image = images.decode(durable.read_json(path))
            except ValueError as error:
                raise CacheError(f"{path}: {error}; remove it and import the image again") from error
            self._images[image.domain, image.digest] = image

    def all(self) -> Iterable[ImageRecord]:
        """Every image, in order of domain and digest."""
        return [self._images[name] for name in sorted(self._images)]

    def find(self, domain: Domain, digest: str) -> ImageRecord | None:
        """The image, or None."""
        return self._images.get((domain, digest))

    def put(self, image: ImageRecord) -> None:
        """Writes the record; durable when this returns."""
        key = self._domains.ensure(image.domain).key(image.digest)
        durable.write_json(self._layout.image(key), images.encode(image))
        self._images[image.domain, image.digest] = image

    def drop(self, domain: Domain, digest: str) -> None:
        """Removes the record; fine when there is none."""
        if self._images.pop((domain, digest), None) is not None:
            key = self._domains.ensure(domain).key(digest)
            durable.remove_file(self._layout.image(key))
