"""HostCheckpoints: checkpoints of this host's sandboxes, for the control plane. The edge, as hostd/service.py."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import grpc.aio

from controlplane.api.policies import render_policy
from controlplane.api.v1 import checkpoints_pb2, checkpoints_pb2_grpc, images_pb2, sandboxes_pb2
from hostd.checkpoint import Wanted
from hostd.checkpoints import StoredCheckpoint
from hostd.edge import timestamp
from hostd.sandboxes import Sandboxes
from hostd.spec import SandboxClass, SandboxSpec
from hostd.translation import translated

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[Any, Any]

CLASSES = {
    SandboxClass.GUEST_KERNEL: sandboxes_pb2.GUEST_KERNEL,
    SandboxClass.USER_KERNEL: sandboxes_pb2.USER_KERNEL,
    SandboxClass.HOST_KERNEL: sandboxes_pb2.HOST_KERNEL,
}


class HostCheckpoints(checkpoints_pb2_grpc.HostCheckpointsServicer):
    """See checkpoints.proto."""

    def __init__(self, sandboxes: Sandboxes, host: str) -> None:
        self._sandboxes, self._host = sandboxes, host

    async def Take(
        self, request: checkpoints_pb2.TakeCheckpointRequest, context: Context
    ) -> checkpoints_pb2.Checkpoint:
        """See checkpoints.proto."""
        async with translated(context):
            wanted = Wanted(request.id, request.name, request.image, request.ephemeral)
            return render(await self._sandboxes.find(request.uid).checkpoint(wanted), self._host)

    async def List(
        self, request: checkpoints_pb2.ListCheckpointsRequest, context: Context
    ) -> checkpoints_pb2.ListCheckpointsResponse:
        """See checkpoints.proto."""
        async with translated(context):
            found = [render(each, self._host) for each in self._sandboxes.checkpoints.all()]
            return checkpoints_pb2.ListCheckpointsResponse(checkpoints=found)

    async def Remove(
        self, request: checkpoints_pb2.RemoveCheckpointRequest, context: Context
    ) -> checkpoints_pb2.RemoveCheckpointResponse:
        """See checkpoints.proto."""
        async with translated(context):
            await self._sandboxes.checkpoints.remove(request.id)
            return checkpoints_pb2.RemoveCheckpointResponse()


def render(checkpoint: StoredCheckpoint, host: str) -> checkpoints_pb2.Checkpoint:
    """A checkpoint as the API says it. Pure."""
    about = checkpoint.about
    return checkpoints_pb2.Checkpoint(
        id=about.id,
        name=about.name,
        tenant=about.spec.tenant,
        host=host,
        sandbox=about.spec.name,
        sandbox_uid=about.spec.uid,
        spec=_render_spec(about.spec, about.image),
        layers=[
            images_pb2.Layer(digest=layer.digest, size_bytes=layer.size_bytes, volume_uuid=layer.volume_uuid)
            for layer in about.layers
        ],
        size_bytes=checkpoint.size_bytes,
        pause_s=about.pause_s,
        created_at=timestamp(about.created_at_s),
        ephemeral=about.ephemeral,
    )


def _render_spec(spec: SandboxSpec, image: str) -> sandboxes_pb2.SandboxSpec:
    resources, process = spec.resources, spec.process
    message = sandboxes_pb2.SandboxSpec(
        image=image,
        image_digest=spec.image_digest,
        resources=sandboxes_pb2.Resources(
            memory_min_mib=resources.memory_min_mib,
            memory_max_mib=resources.memory_max_mib,
            memory_mib=resources.memory_mib,
            cpu_milli=resources.cpu_milli,
        ),
        process=sandboxes_pb2.Process(
            argv=process.argv,
            env=dict(process.env),
            workdir=process.workdir,
            user=process.user,
            tty=process.tty,
            stdin=process.stdin,
            tty_rows=process.rows,
            tty_cols=process.cols,
        ),
        services=render_policy(spec.services),
        priority=spec.priority,
        weight=spec.weight,
    )
    setattr(message, "class", CLASSES[spec.sandbox_class])
    return message
