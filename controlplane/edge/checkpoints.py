"""Between sandloom.v1's checkpoint messages and values: parse once, strictly, and render. Pure."""

from __future__ import annotations

import re
from dataclasses import replace

from controlplane.api.v1 import checkpoints_pb2, images_pb2
from controlplane.edge.enums import seconds, timestamp
from controlplane.edge.sandboxes import REQUEST_ID, parse_name, parse_spec, render_spec
from controlplane.errors import Invalid
from controlplane.model import Checkpoint, LayerSize
from controlplane.requests import Forking, Restoration

MOST_FORKS = 100
MOST_PREFIX_CHARS = 59
"""A name has at most 63 characters, and a prefix gets up to 4 more."""

_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


def parse_checkpoint(message: checkpoints_pb2.Checkpoint, host: str) -> Checkpoint:
    """What host `host` told of one that it has."""
    if not _ID.fullmatch(message.id):
        raise Invalid("checkpoint.id", f"host {host} tells of {message.id!r}, which is no checkpoint's id")
    spec = parse_spec(message.spec)
    return Checkpoint(
        id=message.id,
        name=parse_name(message.name, "checkpoint.name"),
        tenant=message.tenant,
        host=host,
        sandbox=message.sandbox,
        sandbox_uid=message.sandbox_uid,
        spec=replace(spec, image_digest=message.spec.image_digest, checkpoint=message.id),
        layers=tuple(LayerSize(layer.digest, layer.size_bytes) for layer in message.layers),
        size_bytes=message.size_bytes,
        pause_s=message.pause_s,
        created_at_s=seconds(message.created_at),
        ephemeral=message.ephemeral,
    )


def render_checkpoint(checkpoint: Checkpoint) -> checkpoints_pb2.Checkpoint:
    """A checkpoint as users see it."""
    return checkpoints_pb2.Checkpoint(
        id=checkpoint.id,
        name=checkpoint.name,
        tenant=checkpoint.tenant,
        host=checkpoint.host,
        sandbox=checkpoint.sandbox,
        sandbox_uid=checkpoint.sandbox_uid,
        spec=render_spec(checkpoint.spec),
        layers=[images_pb2.Layer(digest=layer.digest, size_bytes=layer.size_bytes) for layer in checkpoint.layers],
        size_bytes=checkpoint.size_bytes,
        pause_s=checkpoint.pause_s,
        created_at=timestamp(checkpoint.created_at_s),
        ephemeral=checkpoint.ephemeral,
    )


def parse_restoration(request: checkpoints_pb2.RestoreCheckpointRequest) -> Restoration:
    """What RestoreCheckpoint asks for."""
    if request.name:
        parse_name(request.name)
    parse_request_id(request.request_id)
    checkpoint = parse_name(request.checkpoint, "checkpoint")
    return Restoration(checkpoint, request.name, request.remove_on_exit, request.request_id)


def parse_forking(request: checkpoints_pb2.ForkSandboxRequest) -> Forking:
    """What ForkSandbox asks for."""
    if not 1 <= request.count <= MOST_FORKS:
        raise Invalid("count", f"{request.count} forks: 1 to {MOST_FORKS} at once")
    if request.prefix:
        parse_name(request.prefix, "prefix")
        if len(request.prefix) > MOST_PREFIX_CHARS:
            raise Invalid("prefix", f"{len(request.prefix)} characters, {MOST_PREFIX_CHARS} is the most")
    return Forking(parse_name(request.sandbox, "sandbox"), request.count, request.prefix, request.remove_on_exit)


def parse_request_id(request_id: str) -> str:
    """An id that a repeat of the same request has, too; empty when there is none."""
    if request_id and not REQUEST_ID.fullmatch(request_id):
        raise Invalid("request_id", f"it must match {REQUEST_ID.pattern}")
    return request_id
