"""Frozen values about one layer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LayerMeta:
    """What `convert_layer` learned. All sizes in bytes, all counts after duplicates were resolved.

    source_digest   "sha256:<hex>" of the whole uncompressed tar (OCI calls it the diff_id)
    volume_uuid     16 bytes, derived from source_digest: how a guest finds the volume
    blob_bytes      size of the EROFS image, a multiple of 2 MiB
    files, directories, symlinks, others   inodes by type ("others": devices, fifos, whiteouts)
    hardlinks       names beyond an inode's first
    data_bytes      stored file content, without holes and padding
    """

    source_digest: str
    volume_uuid: bytes
    blob_bytes: int
    files: int
    directories: int
    symlinks: int
    others: int
    hardlinks: int
    data_bytes: int

    def __post_init__(self) -> None:
        if len(self.volume_uuid) != 16:
            raise ValueError(f"volume_uuid has 16 bytes, not {len(self.volume_uuid)}")
        if not self.source_digest.startswith("sha256:"):
            raise ValueError(f"source_digest starts with sha256:, not {self.source_digest!r}")
