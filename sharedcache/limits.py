"""What one layer may cost. Every bound is checked while the stream is read, before it is spent."""

from __future__ import annotations

from dataclasses import dataclass, fields

_MIB = 1 << 20
_GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Limits:
    """Upper bounds for one conversion. All are positive ints; the unit is in the name.

    entries         tar members plus the folders they imply
    name_bytes      one path component (EROFS and Linux allow 255)
    path_bytes      a whole path, or a symbolic link's target is bounded by the same
    path_depth      components in a path
    xattr_bytes     all extended attributes of one entry, names and values
    extension_bytes one pax header, GNU long name, or sparse map
    sparse_extents  data runs of one sparse file
    metadata_bytes  everything kept in memory: names, link targets, attributes, maps
    file_bytes      apparent size of one file (a sparse file's holes included)
    total_bytes     the uncompressed stream, and apart from it the blob
    blob_growth     blob bytes per byte of the tar, looked at when a sparse file takes the blob over 1 GiB: holes
                    cost no disk, but every byte of a blob is hashed
    expansion       uncompressed bytes per compressed byte, looked at once 256 MiB came out
    """

    entries: int = 1_048_576
    name_bytes: int = 255
    path_bytes: int = 4095
    path_depth: int = 256
    xattr_bytes: int = 65_536
    extension_bytes: int = 1 * _MIB
    sparse_extents: int = 65_536
    metadata_bytes: int = 512 * _MIB
    file_bytes: int = 1024 * _GIB
    total_bytes: int = 64 * _GIB
    blob_growth: int = 8
    expansion: int = 2_000

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value <= 0:
                raise ValueError(f"Limits.{field.name} must be positive, not {value}")
        if self.name_bytes > 255:
            raise ValueError(f"Limits.name_bytes is at most 255 (EROFS), not {self.name_bytes}")
        if self.path_bytes > 4095:
            raise ValueError(f"Limits.path_bytes is at most 4095 (PATH_MAX), not {self.path_bytes}")
        if self.xattr_bytes > 131_072:
            raise ValueError(f"Limits.xattr_bytes is at most 131072 (EROFS inode), not {self.xattr_bytes}")
