"""A layer tar into an EROFS blob: one pass, nothing unpacked on the host.

File data goes from the input window straight to its place in the blob; names and attributes stay in memory
(bounded by `Limits`) and follow at the end, the superblock last: an interrupted blob is no file system. The
caller owns `out` and throws it away on any error.

The same tar gives the same bytes on every host. The volume's uuid is the first 16 bytes of SHA-256 over a
format label and the tar's digest, with the version and variant bits of RFC 9562's UUIDv8.
"""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Callable
from typing import BinaryIO

from sharedcache.blob import BlobWriter, BlockAllocator
from sharedcache.entry import DIRECTORY, REGULAR, SYMLINK
from sharedcache.erofs import write_metadata
from sharedcache.erofs_layout import BLOCK_BITS, HUGE_BYTES, NO_BLOCK
from sharedcache.errors import LimitExceeded, OutOfSpace
from sharedcache.layer import LayerMeta
from sharedcache.limits import Limits
from sharedcache.node import NO_DATA, FileData
from sharedcache.sparse import SparseMap
from sharedcache.stream import HashingInput
from sharedcache.tar import TarReader
from sharedcache.tree import Tree

_UUID_LABEL = b"sandloom erofs layer 1\0"
_MAX_CHUNKS = 65_536
_GROWTH_FROM_BYTES = 1 << 30


def convert_layer(
    source: BinaryIO,
    out: BinaryIO,
    *,
    limits: Limits,
    end_mark: bool = True,
    progress: Callable[[int], None] | None = None,
) -> LayerMeta:
    """Read an uncompressed tar from `source` to its end and write its EROFS image to `out`.

    `out` is a seekable file opened for writing; what it held is dropped. Without `end_mark` a tar may end after
    an entry's data (umoci writes such layers): only for a caller that checks the digest, and so sees a tar that
    was cut. `progress` gets the bytes read so far, about once in 2 MiB. Raises BadArchive (not a usable tar;
    names the entry), LimitExceeded (names limit and entry), OutOfSpace; other OSErrors pass. After an error
    `out` holds no mountable image.
    """
    try:
        return _convert(source, out, limits, end_mark, progress)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutOfSpace("no space for the layer's image: free some or collect garbage, then retry") from error
        raise


def _convert(
    source: BinaryIO, out: BinaryIO, limits: Limits, end_mark: bool, progress: Callable[[int], None] | None
) -> LayerMeta:
    with HashingInput(source, limit_bytes=limits.total_bytes, progress=progress) as stream:
        tree = Tree(limits)
        writer = BlobWriter(out)
        allocator = BlockAllocator(limits.total_bytes)
        data_bytes = _take_members(TarReader(stream, limits, end_mark), stream, tree, writer, allocator)
        stream.drain()
    digest = stream.digest()
    uuid = volume_uuid(digest)
    blob_bytes = write_metadata(tree, writer, allocator.end, uuid)
    inodes = tree.inodes
    return LayerMeta(
        source_digest=f"sha256:{digest.hex()}",
        volume_uuid=uuid,
        blob_bytes=blob_bytes,
        files=inodes[REGULAR],
        directories=inodes[DIRECTORY],
        symlinks=inodes[SYMLINK],
        others=sum(inodes) - inodes[REGULAR] - inodes[DIRECTORY] - inodes[SYMLINK],
        hardlinks=tree.hardlinks,
        data_bytes=data_bytes,
    )


def _take_members(
    reader: TarReader, stream: HashingInput, tree: Tree, writer: BlobWriter, allocator: BlockAllocator
) -> int:
    """Every member into the tree, its data into the blob. Returns the bytes of data."""
    limits = reader.limits
    data_bytes = 0
    add = tree.add
    for entry in reader:
        if entry.kind != REGULAR:
            add(entry)
        elif entry.sparse is not None:
            data_bytes += entry.size
            add(entry, _store_sparse(reader, writer, allocator, entry.sparse))
            if allocator.end << BLOCK_BITS > max(_GROWTH_FROM_BYTES, limits.blob_growth * stream.total):
                raise LimitExceeded("blob_growth", allowed=limits.blob_growth, where=entry.path)
        elif entry.size:
            data_bytes += entry.size
            block = allocator.reserve(entry.size)
            _copy(reader, writer, block << BLOCK_BITS, entry.size)
            add(entry, FileData(block, entry.size))
        else:
            add(entry)
    return data_bytes


def volume_uuid(source_digest: bytes) -> bytes:
    """The 16-byte volume uuid for a tar's 32-byte SHA-256."""
    raw = bytearray(hashlib.sha256(_UUID_LABEL + source_digest).digest()[:16])
    raw[6] = raw[6] & 0x0F | 0x80
    raw[8] = raw[8] & 0x3F | 0x80
    return bytes(raw)


def _copy(reader: TarReader, writer: BlobWriter, offset: int, n_bytes: int) -> None:
    while n_bytes:
        view = reader.chunk(n_bytes)
        writer.write(offset, view)
        offset += len(view)
        n_bytes -= len(view)


def _store_sparse(reader: TarReader, writer: BlobWriter, allocator: BlockAllocator, holes: SparseMap) -> FileData:
    """Flat with holes in the blob's file when that costs less than 2 MiB of address space, else in chunks.

    Flat is better where it can be had: only flat files are mapped with DAX.
    """
    if not holes.size:
        return NO_DATA
    stored = sum(length for _, length in holes.extents)
    if holes.size - stored < HUGE_BYTES:
        block = allocator.reserve(holes.size)
        for offset, length in holes.extents:
            _copy(reader, writer, (block << BLOCK_BITS) + offset, length)
        return FileData(block, holes.size)
    return _store_chunks(reader, writer, allocator, holes)


def _store_chunks(reader: TarReader, writer: BlobWriter, allocator: BlockAllocator, holes: SparseMap) -> FileData:
    """Chunks that hold data get blocks, the others the null address. At most 65,536 of them: the smallest
    power of two ≥ 4 KiB that allows it is the chunk size."""
    bits = BLOCK_BITS
    while holes.size > _MAX_CHUNKS << bits:
        bits += 1
    addresses = bytearray(b"\xff\xff\xff\xff" * -(-holes.size >> bits))
    last_chunk = (holes.size - 1) >> bits
    for offset, length in holes.extents:
        while length:
            chunk = offset >> bits
            at = 4 * chunk
            block = int.from_bytes(addresses[at : at + 4], "little")
            if block == NO_BLOCK:
                chunk_bytes = holes.size - (chunk << bits) if chunk == last_chunk else 1 << bits
                block = allocator.reserve(chunk_bytes)
                addresses[at : at + 4] = block.to_bytes(4, "little")
            inside = offset - (chunk << bits)
            step = min(length, (1 << bits) - inside)
            _copy(reader, writer, (block << BLOCK_BITS) + inside, step)
            offset += step
            length -= step
    return FileData(0, holes.size, bits - BLOCK_BITS, bytes(addresses))
