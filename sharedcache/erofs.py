"""From a finished tree to EROFS metadata: folder blocks, inodes, superblock.

Regular files are flat and uncompressed, which is what Linux 6.1 maps with DAX (fs/erofs/inode.c: only
FLAT_PLAIN regular files). Mostly-hole files are chunk-based with null chunks. Folder tails and link
targets are inline behind their inode: they are never mapped, and a block each would cost 4 KiB. Every inode
has the extended form: it alone has an mtime, a 32-bit owner and a 64-bit size.

A link's inline target ends in the block in which its inode ends, attributes included: older kernels take anything
else for corruption (fs/erofs/inode.c, erofs_fill_symlink; relaxed in 6.12 and in late 6.1.y). Folders' tails, which
go through another path, may lie one block further.

Metadata area: 64 unused bytes (so that no inode is number 0, and the root's number fits 16 bits), then the
root, the other nodes breadth-first, then `Tree.table` as it stands.
"""

from __future__ import annotations

from dataclasses import dataclass

from sharedcache.blob import BlobWriter
from sharedcache.entry import DIRECTORY, SYMLINK
from sharedcache.erofs_layout import (
    BLOCK_BITS,
    BLOCK_BYTES,
    CHUNK_BASED,
    DIRENT,
    FLAT_INLINE,
    FLAT_PLAIN,
    HUGE_BYTES,
    INCOMPAT_CHUNKED_FILE,
    INODE,
    INODE_BYTES,
    SLOT_BYTES,
    inode_format,
    pack_dirents,
    pack_superblock,
    split_names,
    xattr_slots,
)
from sharedcache.node import S_IFMT, Node
from sharedcache.tree import Tree

_ROOT_OFFSET = 64
_PIECE_BYTES = 1 << 20


@dataclass(slots=True)
class _Placed:
    """A node's place: `offset` in the metadata area; for a folder its sorted names and block counts."""

    node: Node
    offset: int
    names: list[bytes]
    counts: list[int]
    tail_bytes: int  # inline behind the inode
    first_block: int  # of a folder's own blocks, relative to the folder area


class _Layout:
    """Assigns places. Sizes only depend on names, so numbers are known before anything is packed."""

    def __init__(self, tree: Tree) -> None:
        self.placed: list[_Placed] = []
        self.folder_blocks = 0
        self._end = _ROOT_OFFSET
        self._place_all(tree.root)
        self.table_offset = -(-self._end // SLOT_BYTES) * SLOT_BYTES
        self.size_bytes = self.table_offset + len(tree.table)

    def _place_all(self, root: Node) -> None:
        queue = [root]
        for folder in queue:  # grows while it is walked: breadth first, each node once
            if folder.nid:
                continue
            placed = self._place(folder)
            for name in placed.names:
                child = folder.entries.get(name)
                if isinstance(child, Node) and not child.nid:
                    if child.kind == DIRECTORY:
                        queue.append(child)
                    else:
                        self._place(child)

    def _place(self, node: Node) -> _Placed:
        names: list[bytes] = []
        counts: list[int] = []
        tail = len(node.payload)
        first_block = self.folder_blocks
        if node.kind == DIRECTORY:
            names = sorted([*node.entries, b".", b".."])
            counts = split_names(names)
            last = names[len(names) - counts[-1] :]
            tail = DIRENT.size * len(last) + sum(map(len, last))
            node.size = (len(counts) - 1) * BLOCK_BYTES + tail
            node.layout = FLAT_INLINE
            node.nlink = 2 + sum(1 for ref in node.entries.values() if isinstance(ref, Node) and ref.kind == DIRECTORY)
            self.folder_blocks += len(counts) - 1
        xattr_bytes = len(node.packed_xattrs())
        offset = -(-self._end // SLOT_BYTES) * SLOT_BYTES
        if node.layout == FLAT_INLINE and not _fits_inline(node.kind, offset, xattr_bytes, tail):
            offset += -offset % BLOCK_BYTES  # try from the next block
            if not _fits_inline(node.kind, offset, xattr_bytes, tail):
                node.layout = FLAT_PLAIN
                self.folder_blocks += 1
        inline = 0 if node.layout == FLAT_PLAIN else tail
        self._end = offset + INODE_BYTES + xattr_bytes + inline
        node.nid = offset // SLOT_BYTES
        placed = _Placed(node, offset, names, counts, inline, first_block)
        self.placed.append(placed)
        return placed


def _fits_inline(kind: int, offset: int, xattr_bytes: int, tail: int) -> bool:
    """Whether `tail` bytes may stand inline behind an inode at `offset`: never across a block's end."""
    if kind == SYMLINK:
        inode_end = (offset + INODE_BYTES - 1) % BLOCK_BYTES + 1
        return inode_end + xattr_bytes + tail <= BLOCK_BYTES
    return (offset + INODE_BYTES + xattr_bytes) % BLOCK_BYTES + tail <= BLOCK_BYTES


def write_metadata(tree: Tree, writer: BlobWriter, first_block: int, uuid: bytes) -> int:
    """Write all but file data behind `first_block`, the superblock last. Returns the blob's bytes."""
    layout = _Layout(tree)
    meta_block = first_block + layout.folder_blocks
    table_nid = layout.table_offset // SLOT_BYTES
    chunked = False
    area = bytearray()  # of the metadata area, what was not written yet
    area_offset = meta_block << BLOCK_BITS
    for placed in layout.placed:
        node = placed.node
        payload = _pack_folder(placed, table_nid) if node.kind == DIRECTORY else node.payload
        chunked = chunked or node.layout == CHUNK_BASED
        inline_at = len(payload) - placed.tail_bytes
        if inline_at:
            writer.write((first_block + placed.first_block) << BLOCK_BITS, memoryview(payload)[:inline_at])
        xattrs = node.packed_xattrs()
        area += bytes((meta_block << BLOCK_BITS) + placed.offset - area_offset - len(area))
        area += _pack_node(placed, xattr_slots(xattrs), first_block) + xattrs + payload[inline_at:]
        if len(area) >= _PIECE_BYTES:
            writer.write(area_offset, memoryview(area))
            area_offset += len(area)
            area = bytearray()
    area += bytes((meta_block << BLOCK_BITS) + layout.table_offset - area_offset - len(area))
    writer.write(area_offset, memoryview(area))
    offset = area_offset + len(area)
    for at in range(0, len(tree.table), _PIECE_BYTES):
        writer.write(offset + at, memoryview(tree.table)[at : at + _PIECE_BYTES])
    size_bytes = -(-(offset + len(tree.table)) // HUGE_BYTES) * HUGE_BYTES
    writer.finish(size_bytes)
    superblock = pack_superblock(
        root_nid=_ROOT_OFFSET // SLOT_BYTES,
        inodes=sum(tree.inodes),
        blocks=size_bytes >> BLOCK_BITS,
        meta_block=meta_block,
        uuid=uuid,
        incompat=INCOMPAT_CHUNKED_FILE if chunked else 0,
    )
    writer.write(0, memoryview(superblock))
    writer.finish(size_bytes)
    return size_bytes


def _pack_folder(placed: _Placed, table_nid: int) -> bytes:
    """A folder's whole content: full blocks padded with zeros, then the last one unpadded."""
    node = placed.node
    blocks = []
    start = 0
    entries = node.entries
    for count in placed.counts:
        names = placed.names[start : start + count]
        start += count
        nids = []
        types = []
        for name in names:
            ref = entries.get(name)
            if isinstance(ref, int):
                nids.append(table_nid + ((ref >> 3) << 1))
                types.append(ref & 7)
                continue
            if ref is None:  # "." and ".."
                ref = node.parent if name == b".." and node.parent is not None else node
            nids.append(ref.nid)
            types.append(ref.kind)
        blocks.append(pack_dirents(names, nids, types))
    return b"".join([block.ljust(BLOCK_BYTES, b"\0") for block in blocks[:-1]]) + blocks[-1]


def _pack_node(placed: _Placed, xattr_slots: int, first_block: int) -> bytes:
    node = placed.node
    union = node.device_or_block
    if node.kind in (DIRECTORY, SYMLINK):
        union = first_block + placed.first_block
    return INODE.pack(
        inode_format(node.layout), xattr_slots, S_IFMT[node.kind] | node.mode, 0, node.size,
        union, node.nid, node.uid, node.gid, node.mtime_s, node.mtime_ns, node.nlink,
    )  # fmt: skip
