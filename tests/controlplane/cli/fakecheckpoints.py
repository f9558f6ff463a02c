"""The fake control plane's checkpoints: what `checkpoint`, `restore` and `fork` ask of it."""

from __future__ import annotations

from typing import Any

import grpc

from controlplane.api.v1 import checkpoints_pb2, checkpoints_pb2_grpc, sandboxes_pb2


class FakeCheckpoints(checkpoints_pb2_grpc.CheckpointsServicer):
    """See the module. `fabric` is the fake control plane that it belongs to."""

    def __init__(self, fabric: Any) -> None:
        self._fabric = fabric
        self.kept: dict[str, checkpoints_pb2.Checkpoint] = {}
        self.silent: list[str] = []
        self.phase = sandboxes_pb2.RUNNING  # of what is restored

    def CreateCheckpoint(self, request: Any, context: Any) -> checkpoints_pb2.Checkpoint:
        source = self._fabric.find(request.sandbox, context)
        name = request.name or "made-up"
        self.kept[name] = checkpoints_pb2.Checkpoint(
            id="c0ffee",
            name=name,
            sandbox=source.name,
            spec=source.spec,
            size_bytes=64 << 20,
            pause_s=0.25,
            host="loom",
        )
        return self.kept[name]

    def ListCheckpoints(self, request: Any, context: Any) -> checkpoints_pb2.ListCheckpointsResponse:
        return checkpoints_pb2.ListCheckpointsResponse(
            checkpoints=self.kept.values(), silent_hosts=self.silent, silent=len(self.silent)
        )

    def _find(self, name: str, context: Any) -> checkpoints_pb2.Checkpoint:
        if name not in self.kept:
            context.abort(grpc.StatusCode.NOT_FOUND, f"there is no checkpoint {name}")
        return self.kept[name]

    def DeleteCheckpoint(self, request: Any, context: Any) -> checkpoints_pb2.DeleteCheckpointResponse:
        if not request.allow_missing:
            self._find(request.name, context)
        self.kept.pop(request.name, None)
        return checkpoints_pb2.DeleteCheckpointResponse()

    def RestoreCheckpoint(self, request: Any, context: Any) -> sandboxes_pb2.Sandbox:
        self._find(request.checkpoint, context)
        made: sandboxes_pb2.Sandbox = self._fabric.add(request.name or "made-up", self.phase, message="why not")
        return made

    def ForkSandbox(self, request: Any, context: Any) -> checkpoints_pb2.ForkSandboxResponse:
        self._fabric.find(request.sandbox, context)
        names = [f"{request.prefix or 'made-up'}-{number}" for number in range(1, request.count + 1)]
        made = [self._fabric.add(name, self.phase) for name in names]
        return checkpoints_pb2.ForkSandboxResponse(sandboxes=made, pause_s=0.5)
