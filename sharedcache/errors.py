"""The error root of `sharedcache`. A leaf says what the caller can do about it, not which module failed."""

from __future__ import annotations

_SHOWN = 200
_TOLD = 500


def printable(name: str | bytes, at_most: int = _SHOWN) -> str:
    """A name for messages: never control characters, never much longer than `at_most` characters."""
    text = name if isinstance(name, str) else name[: 4 * at_most].decode("utf-8", "backslashreplace")
    safe = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:at_most])
    return safe[:at_most] + "…" if len(text) > at_most or len(safe) > at_most else safe


class CacheError(Exception):
    """Root of every error this package raises on purpose."""


class BadArchive(CacheError):
    """The input is not an archive that can become a layer. Retrying is of no use: the archive must change.

    `what` says what is wrong, `where` names the entry (bytes: a raw path; or the byte offset when no entry is
    known) and `remedy` says what to do next. `str()` joins the three.
    """

    def __init__(self, what: str, *, where: str | bytes = "", remedy: str = "") -> None:
        self.what = what = printable(what, _TOLD)
        self.where = where = printable(where)
        self.remedy = remedy or "make the archive again with a current tar, docker save or buildah"
        super().__init__(f"{where}: {what}; {self.remedy}" if where else f"{what}; {self.remedy}")


class LimitExceeded(CacheError):
    """The input is well formed but larger than a configured limit: raise the limit or shrink the input.

    `limit` is the field's name in `sharedcache.limits.Limits`, `allowed` its value (in the unit its name
    says), `where` the entry that went over it.
    """

    def __init__(self, limit: str, *, allowed: int, where: str | bytes = "", remedy: str = "") -> None:
        where = printable(where)
        self.limit = limit
        self.allowed = allowed
        self.where = where
        self.remedy = remedy or f"shrink the archive or raise the limit {limit}"
        prefix = f"{where}: " if where else ""
        super().__init__(f"{prefix}over the limit {limit} = {allowed}; {self.remedy}")


class NotFound(CacheError):
    """No such object or image in this sharing domain: import it there first."""


class CorruptObject(CacheError):
    """A stored object failed its digest and was quarantined: import it again."""


class StoreBusy(CacheError):
    """Another process holds the store, or the object is in use: wait for it, or stop the other process."""


class OutOfSpace(CacheError):
    """The store's file system is too full for this write: free space or collect garbage, then retry."""


class NotAllowed(CacheError):
    """Only the operator may do this (publishing into the public domain): have it signed, or use another domain."""
