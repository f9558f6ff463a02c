"""Path rules for tar members: pure.

Leading slashes and `.` components are dropped (as docker and GNU tar do), so `/etc/x`, `./etc/x` and
`etc/x` are one path. A `..` component is refused wherever it stands. Names are bytes: any
but `/` and NUL.
"""

from __future__ import annotations

from sharedcache.errors import BadArchive, LimitExceeded
from sharedcache.limits import Limits

WHITEOUT_PREFIX = b".wh."
OPAQUE_MARKER = b".wh..wh..opq"


def split_path(raw: bytes, limits: Limits) -> list[bytes]:
    """Components of a member's path; empty for the root itself. BadArchive or LimitExceeded."""
    if len(raw) > limits.path_bytes:
        raise LimitExceeded("path_bytes", allowed=limits.path_bytes, where=raw)
    parts = [part for part in raw.split(b"/") if part and part != b"."]
    if b".." in parts:
        raise BadArchive(
            "the path has a '..' component",
            where=raw,
            remedy="an image holds paths below its root only: do not trust this archive",
        )
    if len(parts) > limits.path_depth:
        raise LimitExceeded("path_depth", allowed=limits.path_depth, where=raw)
    for part in parts:
        if len(part) > limits.name_bytes:
            raise LimitExceeded("name_bytes", allowed=limits.name_bytes, where=raw)
    return parts
