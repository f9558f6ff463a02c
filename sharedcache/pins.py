"""Who needs which object: durable live records. Reference counts are derived from them, never kept.

Owns `DIR/<quoted owner>.json`: {"version": 1, "owner": "sandbox/<uid>", "keys": ["<64 hex>", …sorted]}
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from sharedcache import durable
from sharedcache.errors import CacheError
from sharedcache.layout import Layout

_OWNER = re.compile(r"[a-z][a-z-]{0,31}/[A-Za-z0-9._:/-]{1,160}")
_RESERVED = ("image/", "hold/")


class PinBook:
    """The pin records of one store. Not thread safe: the store calls it under its lock."""

    def __init__(self, layout: Layout) -> None:
        """Reads all records.

        CacheError when one is damaged: guessing could let a used object be collected.
        """
        self._layout = layout
        self._pins: dict[str, frozenset[str]] = {}
        durable.sweep_parts(layout.pins)
        for path in sorted(layout.pins.glob("*.json")):
            match durable.read_json(path):
                case {"version": 1, "owner": str(owner), "keys": list(keys), **rest} if not rest and all(
                    isinstance(key, str) for key in keys
                ):
                    self._pins[owner] = frozenset(keys)
                case _:
                    raise CacheError(f"{path}: the pin record is damaged; remove it once its owner is gone")

    def all(self) -> Mapping[str, frozenset[str]]:
        """A copy of owner → keys."""
        return dict(self._pins)

    def add(self, owner: str, keys: frozenset[str]) -> None:
        """Adds `keys` to what `owner` holds. ValueError for a bad or reserved owner name."""
        if not _OWNER.fullmatch(owner) or owner.startswith(_RESERVED):
            raise ValueError(f"{owner!r} is no pin owner: use KIND/NAME; image/ and hold/ are the store's own")
        held = self._pins.get(owner)
        if held is not None and keys <= held:
            return
        together = keys | (held or frozenset())
        body = {"version": 1, "owner": owner, "keys": sorted(together)}
        durable.write_json(self._layout.pin(owner), body)
        self._pins[owner] = together

    def drop(self, owner: str) -> None:
        """Removes the record of `owner`; fine when there is none."""
        if owner in self._pins:
            durable.remove_file(self._layout.pin(owner))
            del self._pins[owner]
