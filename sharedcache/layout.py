"""The store's tree on disk: names and modes. See `sharedcache.store` for what each part means."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from sharedcache import durable

# VM uids must reach a blob whose path they were told, and must not be able to list what else is there.
_TRAVERSE = 0o711
_PRIVATE = 0o700
BLOB_MODE = 0o440
BLOB_NAME = "blob"
META_NAME = "meta.json"


@dataclass(frozen=True)
class Layout:
    """Paths below one root."""

    root: Path

    @property
    def lock(self) -> Path:
        return self.root / "lock"

    @property
    def domains(self) -> Path:
        return self.root / "domains"

    @property
    def objects(self) -> Path:
        return self.root / "objects"

    @property
    def staging(self) -> Path:
        return self.root / "staging"

    @property
    def quarantine(self) -> Path:
        return self.root / "quarantine"

    @property
    def pins(self) -> Path:
        return self.root / "pins"

    @property
    def images(self) -> Path:
        return self.root / "images"

    def object(self, key: str) -> Path:
        """The folder of an object: blob and meta.json."""
        return self.objects / key[:2] / key

    def pin(self, owner: str) -> Path:
        """The record of `owner`, whatever characters its name has."""
        return self.pins / f"{quote(owner, safe='')}.json"

    def image(self, key: str) -> Path:
        """The record of the image whose digest has `key` in its domain."""
        return self.images / f"{key}.json"

    def create(self) -> None:
        """Makes what is missing and sets every mode."""
        self.root.parent.mkdir(parents=True, exist_ok=True)
        for folder in (self.root, self.objects):
            durable.make_dir(folder, _TRAVERSE)
        for folder in (self.domains, self.staging, self.quarantine, self.pins, self.images):
            durable.make_dir(folder, _PRIVATE)

    def create_shelf(self, key: str) -> None:
        """Makes the folder that `object(key)` goes into."""
        durable.make_dir(self.objects / key[:2], _TRAVERSE)
