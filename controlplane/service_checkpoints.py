"""Checkpoints: parse, call, render. See checkpoints.proto for every method's contract."""

from __future__ import annotations

from controlplane.api.v1 import checkpoints_pb2, checkpoints_pb2_grpc, sandboxes_pb2
from controlplane.checkpoints import Checkpoints
from controlplane.edge import checkpoints as edge
from controlplane.edge.sandboxes import parse_name, render_sandbox
from controlplane.gate import Context, Gate


class CheckpointsService(checkpoints_pb2_grpc.CheckpointsServicer):
    """See the module."""

    def __init__(self, gate: Gate, checkpoints: Checkpoints) -> None:
        self._gate, self._checkpoints = gate, checkpoints

    async def CreateCheckpoint(
        self, request: checkpoints_pb2.CreateCheckpointRequest, context: Context
    ) -> checkpoints_pb2.Checkpoint:
        """See checkpoints.proto."""
        async with self._gate.admit(context) as caller:
            name = parse_name(request.name) if request.name else ""
            sandbox, request_id = parse_name(request.sandbox, "sandbox"), edge.parse_request_id(request.request_id)
            return edge.render_checkpoint(await self._checkpoints.create(caller.tenant, sandbox, name, request_id))

    async def ListCheckpoints(
        self, request: checkpoints_pb2.ListCheckpointsRequest, context: Context
    ) -> checkpoints_pb2.ListCheckpointsResponse:
        """See checkpoints.proto."""
        async with self._gate.admit(context) as caller:
            listed = await self._checkpoints.listed(caller.tenant)
            return checkpoints_pb2.ListCheckpointsResponse(
                checkpoints=[edge.render_checkpoint(each) for each in listed.checkpoints],
                silent_hosts=listed.silent if caller.is_operator else (),
                silent=len(listed.silent),
            )

    async def DeleteCheckpoint(
        self, request: checkpoints_pb2.DeleteCheckpointRequest, context: Context
    ) -> checkpoints_pb2.DeleteCheckpointResponse:
        """See checkpoints.proto."""
        async with self._gate.admit(context) as caller:
            name = parse_name(request.name)
            await self._checkpoints.delete(caller.tenant, name, allow_missing=request.allow_missing)
            return checkpoints_pb2.DeleteCheckpointResponse()

    async def RestoreCheckpoint(
        self, request: checkpoints_pb2.RestoreCheckpointRequest, context: Context
    ) -> sandboxes_pb2.Sandbox:
        """See checkpoints.proto."""
        async with self._gate.admit(context) as caller:
            return render_sandbox(await self._checkpoints.restore(caller.tenant, edge.parse_restoration(request)))

    async def ForkSandbox(
        self, request: checkpoints_pb2.ForkSandboxRequest, context: Context
    ) -> checkpoints_pb2.ForkSandboxResponse:
        """See checkpoints.proto."""
        async with self._gate.admit(context) as caller:
            forked = await self._checkpoints.fork(caller.tenant, edge.parse_forking(request))
            return checkpoints_pb2.ForkSandboxResponse(
                sandboxes=[render_sandbox(each) for each in forked.sandboxes], pause_s=forked.pause_s
            )
