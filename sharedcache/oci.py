"""Imports an image: an OCI layout (folder or tar), a docker archive, or a plain root filesystem tar.

Promise: nothing of the archive is unpacked on the host; every digest that the archive states is checked, and
every layer is converted and checked, before the first one is published; then all are published and the image
is put last. An error or a kill anywhere leaves no image, and nothing that `collect` would not remove.

Steps, as `progress(step, done_bytes, total_bytes)` sees them: `receive` (a compressed outer archive goes,
decompressed, to the store's staging), `verify` (digests of the layers as stored in the archive), `convert`
(layers into EROFS), `publish`.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from sharedcache import archive, imageplan
from sharedcache.convert import convert_layer
from sharedcache.decompress import open_stream
from sharedcache.domains import Domain, require_operator
from sharedcache.errors import BadArchive, CorruptObject, LimitExceeded, NotFound
from sharedcache.imageplan import ImagePlan, PlannedLayer
from sharedcache.images import ImageConfig, ImageRecord, StoredLayer, image_digest
from sharedcache.layer import LayerMeta
from sharedcache.limits import Limits
from sharedcache.objects import ObjectKind, StoredObject
from sharedcache.sources import FolderSource, Source, TarSource, window
from sharedcache.staging import Staging
from sharedcache.store import Store

Progress = Callable[[str, int, int], None]

_MIB = 1 << 20
_LIMITS = Limits()
_WHOLE = ""  # the member name that means the archive itself


def import_archive(
    store: Store,
    path: Path,
    *,
    domain: Domain,
    limits: Limits = _LIMITS,
    cmd: tuple[str, ...] = (),
    progress: Progress | None = None,
    operator_signed: bool = False,
) -> ImageRecord:
    """Imports the image at `path` into `domain`; idempotent, safe from several threads at once.

    `cmd`, when given, replaces the image's own Cmd (a plain root filesystem has none). `progress` may be called
    from another thread. BadArchive names the member and entry; LimitExceeded; OutOfSpace; NotAllowed for the
    public domain without `operator_signed`; OSError when `path` cannot be opened.
    """
    require_operator(domain, operator_signed)
    report = progress or (lambda step, done_bytes, total_bytes: None)
    with ExitStack() as stack:
        run = _Import(store, domain, limits, report, operator_signed, stack.enter_context(store.hold()), stack)
        source, plan = run.receive(path)
        if cmd:
            plan = replace(plan, config=replace(plan.config, cmd=cmd))
        plan = run.verify(source, plan)
        layers = run.publish(plan, run.convert(source, plan))
        digest = image_digest(tuple(layer.digest for layer in layers), plan.config)
        return store.put_image(ImageRecord(digest, domain, layers, plan.config, plan.format, store.now_s()))


@dataclass(frozen=True)
class _Converted:
    """A layer that waits in staging."""

    staging: Staging
    meta: LayerMeta


_Made = dict[PlannedLayer, _Converted | StoredObject]


class _Meter:
    """Adds up the bytes of one step for the progress callback."""

    def __init__(self, report: Progress, step: str, total_bytes: int) -> None:
        self._report = report
        self._step = step
        self._total_bytes = total_bytes
        self._done_bytes = 0
        report(step, 0, total_bytes)

    def add(self, n_bytes: int) -> None:
        self._done_bytes += n_bytes
        self._report(self._step, self._done_bytes, self._total_bytes)


@dataclass(frozen=True)
class _Import:
    """One import under way; `stack` closes what it opened and drops what it staged."""

    store: Store
    domain: Domain
    limits: Limits
    report: Progress
    operator_signed: bool
    hold: str
    stack: ExitStack

    def receive(self, path: Path) -> tuple[Source, ImagePlan]:
        """Opens the archive, decompressed when need be, and reads what it says."""
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        self.stack.callback(os.close, fd)
        status = os.fstat(fd)
        if stat.S_ISDIR(status.st_mode):
            folder = FolderSource(path)
            self.stack.callback(folder.close)
            plan = imageplan.read(folder)
            if plan is None:
                raise BadArchive("is a folder, but no OCI layout: it has no oci-layout and index.json", where=str(path))
            return folder, plan
        if not stat.S_ISREG(status.st_mode) or not status.st_size:
            raise BadArchive("is empty, or no regular file", where=str(path))
        size_bytes = status.st_size
        if _is_compressed(os.pread(fd, 6, 0)):
            fd, size_bytes = self._spool(fd, size_bytes)
        found = archive.scan(fd, size_bytes, self.limits.extension_bytes)
        source = TarSource(fd, found, size_bytes)
        plan = None if found.is_rootfs else imageplan.read(source)
        if plan is not None and found.odd:
            raise BadArchive("a name that is absolute or has .. in it", where=found.odd)
        return source, plan or ImagePlan("rootfs", (PlannedLayer(_WHOLE, size_bytes),), ImageConfig())

    def _spool(self, fd: int, size_bytes: int) -> tuple[int, int]:
        """The decompressed archive in staging: its descriptor and size. LimitExceeded for a bomb."""
        meter = _Meter(self.report, "receive", size_bytes)
        staging = self.stack.enter_context(self.store.stage(size_bytes))
        with window(fd, archive.Span(0, size_bytes), meter.add) as raw:
            plain = open_stream(raw, self.limits)
            while piece := plain.read(_MIB):
                staging.file.write(piece)
        staging.file.flush()
        return staging.file.fileno(), staging.file.tell()

    def verify(self, source: Source, plan: ImagePlan) -> ImagePlan:
        """Checks the digests of the layers as they are stored; a root filesystem's diff_id is found here."""
        layers = {layer.name: layer for layer in plan.layers if layer.blob_digest or not layer.diff_id}
        meter = _Meter(self.report, "verify", sum(layer.size_bytes for layer in layers.values()))
        for layer in layers.values():
            with source.open(layer.name, meter.add) as file:
                digest = _digest(file)
            if not layer.diff_id:
                return replace(plan, layers=(replace(layer, diff_id=digest),))
            if digest != layer.blob_digest:
                raise BadArchive(f"its bytes have the digest {digest}, not the one in its name", where=layer.name)
        return plan

    def convert(self, source: Source, plan: ImagePlan) -> _Made:
        """Every distinct layer: in staging, or found in the store and checked against the archive."""
        layers = dict.fromkeys(plan.layers)
        meter = _Meter(self.report, "convert", sum(layer.size_bytes for layer in layers))
        made: _Made = {}
        for layer in layers:
            try:
                made[layer] = self._known(source, layer, meter) or self._convert(source, layer, meter)
            except BadArchive as error:
                raise BadArchive(error.what, where=_where(layer, error.where), remedy=error.remedy) from error
            except LimitExceeded as error:
                where = _where(layer, error.where)
                raise LimitExceeded(error.limit, allowed=error.allowed, where=where, remedy=error.remedy) from error
        return made

    def _known(self, source: Source, layer: PlannedLayer, meter: _Meter) -> StoredObject | None:
        """The published layer of the same tar, when this domain has it and the archive truly holds that tar."""
        for item in self.store.objects():
            same_kind = item.domain == self.domain and item.kind is ObjectKind.LAYER
            if not same_kind or item.layer.source_digest != layer.diff_id:
                continue
            try:
                known = self.store.get(self.domain, item.digest, hold=self.hold)
            except (CorruptObject, NotFound):
                return None
            _require_diff_id(layer, self._source_digest(source, layer, meter))
            return known
        return None

    def _source_digest(self, source: Source, layer: PlannedLayer, meter: _Meter) -> str:
        with source.open(layer.name, meter.add) as raw:
            return _digest(open_stream(raw, self.limits))

    def _convert(self, source: Source, layer: PlannedLayer, meter: _Meter) -> _Converted:
        staging = self.stack.enter_context(self.store.stage(layer.size_bytes))
        with source.open(layer.name, meter.add) as raw:
            plain, has_digest = open_stream(raw, self.limits), layer.name != _WHOLE
            meta = convert_layer(plain, staging.file, limits=self.limits, end_mark=not has_digest)
        _require_diff_id(layer, meta.source_digest)
        return _Converted(staging, meta)

    def publish(self, plan: ImagePlan, made: _Made) -> tuple[StoredLayer, ...]:
        """Publishes what is in staging. Returns the image's layers, lowest first, repeats included."""
        waiting = [item for item in made.values() if isinstance(item, _Converted)]
        meter = _Meter(self.report, "publish", sum(item.meta.blob_bytes for item in waiting))
        stored: dict[PlannedLayer, StoredLayer] = {}
        for layer, item in made.items():
            if isinstance(item, StoredObject):
                stored[layer] = StoredLayer.of(item)
                continue
            published = self.store.publish(
                item.staging,
                domain=self.domain,
                kind=ObjectKind.LAYER,
                meta=item.meta,
                operator_signed=self.operator_signed,
                hold=self.hold,
            )
            stored[layer] = StoredLayer.of(published)
            meter.add(published.size_bytes)
        return tuple(stored[layer] for layer in plan.layers)


def _is_compressed(head: bytes) -> bool:
    """gzip, xz, zstd (also a skippable frame), bzip2: the formats that `open_stream` knows."""
    return head.startswith((b"\x1f\x8b", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"BZh")) or head[1:4] == b"\x2a\x4d\x18"


def _digest(stream: BinaryIO) -> str:
    sha256 = hashlib.sha256()
    while piece := stream.read(_MIB):
        sha256.update(piece)
    return f"sha256:{sha256.hexdigest()}"


def _require_diff_id(layer: PlannedLayer, source_digest: str) -> None:
    if source_digest != layer.diff_id:
        raise BadArchive(f"its tar has the digest {source_digest}, the config's diff_id is {layer.diff_id}")


def _where(layer: PlannedLayer, entry: str) -> str:
    return ": ".join(part for part in (layer.name, entry) if part)
