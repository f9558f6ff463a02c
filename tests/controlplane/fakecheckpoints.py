"""A fake host's checkpoints: it keeps what it is told to, and copies nothing."""

from __future__ import annotations

import asyncio
from typing import Any

from controlplane.api.status import Condition, Failure, abort
from controlplane.api.v1 import checkpoints_pb2, checkpoints_pb2_grpc, images_pb2, sandboxes_pb2


class FakeHostCheckpoints(checkpoints_pb2_grpc.HostCheckpointsServicer):
    """`specs` are the host's sandboxes by uid, with their tenants; tests fill it."""

    def __init__(self) -> None:
        self.sandboxes: dict[str, sandboxes_pb2.Sandbox] = {}
        self.kept: dict[str, checkpoints_pb2.Checkpoint] = {}
        self.failure: Failure | None = None
        self.silent = False

    async def Take(self, request: checkpoints_pb2.TakeCheckpointRequest, context: Any) -> checkpoints_pb2.Checkpoint:
        if self.failure is not None:
            await abort(context, self.failure)
        if request.id in self.kept:
            return self.kept[request.id]
        source = self.sandboxes[request.uid]
        spec = sandboxes_pb2.SandboxSpec()
        spec.CopyFrom(source.spec)
        spec.image = request.image
        made = checkpoints_pb2.Checkpoint(
            id=request.id,
            name=request.name,
            tenant=source.tenant,
            host="not-for-it-to-say",
            sandbox=source.name,
            sandbox_uid=source.uid,
            spec=spec,
            layers=[images_pb2.Layer(digest="sha256:" + "b" * 64, size_bytes=64 << 20, volume_uuid="00" * 16)],
            size_bytes=1 << 20,
            pause_s=0.25,
            ephemeral=request.ephemeral,
        )
        made.created_at.FromSeconds(1_700_000_000 + len(self.kept))
        self.kept[request.id] = made
        return made

    async def List(
        self, request: checkpoints_pb2.ListCheckpointsRequest, context: Any
    ) -> checkpoints_pb2.ListCheckpointsResponse:
        if self.silent:
            await abort(context, Failure(Condition.INTERNAL, "Broken", "the disk is on fire"))
        await asyncio.sleep(0)
        return checkpoints_pb2.ListCheckpointsResponse(checkpoints=self.kept.values())

    async def Remove(
        self, request: checkpoints_pb2.RemoveCheckpointRequest, context: Any
    ) -> checkpoints_pb2.RemoveCheckpointResponse:
        self.kept.pop(request.id, None)
        return checkpoints_pb2.RemoveCheckpointResponse()
