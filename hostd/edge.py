"""Between sandloom.v1 messages and hostd's values: the only place that knows both. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from google.protobuf.timestamp_pb2 import Timestamp

from controlplane.api.errors import PolicyError
from controlplane.api.policies import parse_policy, require_servable
from controlplane.api.services import ServicePolicy
from controlplane.api.v1 import images_pb2, sandboxes_pb2
from hostd.errors import InvalidSpec
from hostd.ledger import MemoryRow
from hostd.lifecycle import Phase
from hostd.resize import ResizeProgress, ResizeState
from hostd.sandboxes import Report
from hostd.services.account import ServiceUsage
from hostd.spec import Allowed, DesiredState, Network, ProcessSpec, Resources, SandboxClass, SandboxSpec
from sharedcache.images import ImageRecord

PHASES = {
    Phase.ASSIGNED: sandboxes_pb2.SCHEDULED,
    Phase.STARTING: sandboxes_pb2.STARTING,
    Phase.RUNNING: sandboxes_pb2.RUNNING,
    Phase.STOPPING: sandboxes_pb2.STOPPING,
    Phase.PARKED: sandboxes_pb2.PARKED,
    Phase.EXITED: sandboxes_pb2.EXITED,
    Phase.FAILED: sandboxes_pb2.FAILED,
}
DESIRED = {
    sandboxes_pb2.DESIRED_RUNNING: DesiredState.RUNNING,
    sandboxes_pb2.DESIRED_STOPPED: DesiredState.STOPPED,
    sandboxes_pb2.DESIRED_REMOVED: DesiredState.REMOVED,
}
CLASSES = {
    sandboxes_pb2.SANDBOX_CLASS_UNSPECIFIED: SandboxClass.GUEST_KERNEL,
    sandboxes_pb2.GUEST_KERNEL: SandboxClass.GUEST_KERNEL,
    sandboxes_pb2.USER_KERNEL: SandboxClass.USER_KERNEL,
    sandboxes_pb2.HOST_KERNEL: SandboxClass.HOST_KERNEL,
}
RESIZES = {
    ResizeState.DONE: sandboxes_pb2.RESIZE_DONE,
    ResizeState.IN_PROGRESS: sandboxes_pb2.RESIZE_IN_PROGRESS,
    ResizeState.DEFERRED: sandboxes_pb2.RESIZE_DEFERRED,
    ResizeState.INFEASIBLE: sandboxes_pb2.RESIZE_INFEASIBLE,
    ResizeState.ERROR: sandboxes_pb2.RESIZE_ERROR,
}


DEFAULT_WEIGHT = 100


def parse_process(process: sandboxes_pb2.Process) -> ProcessSpec:
    """A program to run."""
    return ProcessSpec(
        argv=tuple(process.argv),
        env=tuple(sorted(process.env.items())),
        workdir=process.workdir,
        user=process.user,
        tty=process.tty,
        stdin=process.stdin,
        rows=process.tty_rows or 24,
        cols=process.tty_cols or 80,
    )


def parse_sandbox(sandbox: sandboxes_pb2.Sandbox) -> SandboxSpec:
    """An assignment. InvalidSpec names what is wrong."""
    spec, asked = sandbox.spec, sandbox.spec.resources
    if sandbox.desired_state not in DESIRED:
        raise InvalidSpec(f"sandbox {sandbox.name}: desired state {sandbox.desired_state} is unknown to this hostd")
    sandbox_class = CLASSES.get(getattr(spec, "class"))
    if sandbox_class is None:
        raise InvalidSpec(f"sandbox {sandbox.name}: class {getattr(spec, 'class')} is unknown to this hostd")
    resources = Resources(
        memory_min_mib=asked.memory_min_mib,
        memory_max_mib=asked.memory_max_mib,
        memory_mib=asked.memory_mib or asked.memory_min_mib,
        cpu_milli=asked.cpu_milli or 1000,
    )
    return SandboxSpec(
        uid=sandbox.uid,
        name=sandbox.name,
        tenant=sandbox.tenant,
        image_digest=spec.image_digest,
        hostname=spec.hostname or sandbox.name,
        resources=resources,
        process=parse_process(spec.process),
        epoch=sandbox.assignment.epoch,
        desired=DESIRED[sandbox.desired_state],
        stop_grace_s=float(sandbox.stop_grace_s),
        remove_on_exit=spec.remove_on_exit,
        cold=spec.cold,
        checkpoint=spec.checkpoint,
        sandbox_class=sandbox_class,
        network=parse_network(spec.network),
        services=parse_services(spec, sandbox.name, sandbox_class),
        priority=spec.priority,
        weight=spec.weight or DEFAULT_WEIGHT,
    )


def parse_network(network: sandboxes_pb2.Network) -> Network:
    """What it may talk to. InvalidSpec."""
    rules = (Allowed(rule.cidr, rule.protocol, rule.first_port, rule.last_port) for rule in network.allow)
    return Network(network.mode == sandboxes_pb2.NETWORK_VETH, tuple(rules))


def parse_services(spec: sandboxes_pb2.SandboxSpec, name: str, sandbox_class: SandboxClass) -> ServicePolicy:
    """Who answers sandbox `name`. InvalidSpec, also for what a sandbox of its class cannot have answered so."""
    try:
        policy = parse_policy(spec.services)
        require_servable(sandbox_class.value, policy, veth=spec.network.mode == sandboxes_pb2.NETWORK_VETH)
        return policy
    except PolicyError as error:
        raise InvalidSpec(f"sandbox {name}: services: {error}", reason="ServicePolicyInvalid") from error


def render_classes(classes: Iterable[SandboxClass]) -> list[sandboxes_pb2.SandboxClass.ValueType]:
    """What kinds of sandboxes this host runs."""
    numbers = {known: number for number, known in CLASSES.items()}  # the named one: it comes after "unspecified"
    return [numbers[one] for one in classes]


def timestamp(seconds: float) -> Timestamp:
    """Seconds since 1970 as the API says them."""
    whole = int(seconds)
    return Timestamp(seconds=whole, nanos=round((seconds - whole) * 1e9) % 1_000_000_000)


def render_status(report: Report) -> sandboxes_pb2.SandboxStatus:
    """What this host observed."""
    record = report.record
    status = sandboxes_pb2.SandboxStatus(
        phase=PHASES.get(record.phase, sandboxes_pb2.EXITED),
        reason=record.reason,
        message=record.message,
        exit_code=record.exit_code or 0,
        has_exit_code=record.exit_code is not None,
        accel=record.handle.accel if record.handle else "",
        host_pid=record.handle.pid if record.handle else 0,
        address=record.handle.address if record.handle else "",
        vcpus=record.handle.vcpus if record.handle else 0,
        vcpus_max=record.handle.ceiling_vcpus if record.handle else 0,
        observed_epoch=record.spec.epoch,
        restarts_of_host=record.adoptions,
        origin=record.origin,
        start_phases=[sandboxes_pb2.StartPhase(name=name, seconds=seconds) for name, seconds in record.start_phases],
    )
    status.uncooperative = record.uncooperative
    if record.started_at_s is not None:
        status.started_at.CopyFrom(timestamp(record.started_at_s))
    if record.finished_at_s is not None:
        status.finished_at.CopyFrom(timestamp(record.finished_at_s))
    if report.resize is not None:
        status.resize.CopyFrom(render_resize(report.resize))
    return status


def render_refusal(error: InvalidSpec, epoch: int) -> sandboxes_pb2.SandboxStatus:
    """The status of an assignment that can never run here."""
    return sandboxes_pb2.SandboxStatus(
        phase=sandboxes_pb2.FAILED, reason=error.reason, message=str(error), observed_epoch=epoch
    )


def render_service_usage(usage: ServiceUsage) -> sandboxes_pb2.ServiceUsage:
    """What a sandbox's services did."""
    return sandboxes_pb2.ServiceUsage(
        bytes_out=usage.bytes_out,
        bytes_in=usage.bytes_in,
        connections=usage.connections,
        open_connections=usage.open_connections,
        datagrams=usage.datagrams,
        decisions=dict(usage.decisions),
        published=usage.published,
    )


def render_resize(progress: ResizeProgress) -> sandboxes_pb2.ResizeStatus:
    """The contract's sizes."""
    message = sandboxes_pb2.ResizeStatus(
        state=RESIZES[progress.state],
        desired_memory_mib=progress.desired_mib,
        allocated_memory_mib=progress.allocated_mib,
        actual_memory_mib=progress.actual_mib,
        cpu_milli=progress.cpu_milli,
        message=progress.message,
        desired_cpu_milli=progress.desired_cpu_milli,
        shortfall_mib=progress.shortfall_mib,
        cause=progress.cause.value,
        attempts=progress.attempts,
    )
    if progress.deadline_s:
        message.deadline.CopyFrom(timestamp(progress.deadline_s))
    return message


def render_memory(row: MemoryRow, name: str, host: str) -> sandboxes_pb2.SandboxMemory:
    """One row of the ledger."""
    return sandboxes_pb2.SandboxMemory(
        name=name,
        uid=row.uid,
        host=host,
        resident_bytes=row.resident_bytes,
        private_bytes=row.private_bytes,
        proportional_bytes=row.proportional_bytes,
        saved_bytes=row.saved_bytes,
        shared=[sandboxes_pb2.SharedSlice(holders=n, bytes=size) for n, size in row.shared],
        guest_ram_bytes=row.ram_bytes,
        layer_bytes=row.layer_bytes,
        vmm_bytes=row.vmm_bytes,
    )


def render_image(image: ImageRecord, tenant: str, host: str) -> images_pb2.Image:
    """An imported image. Its name is bound by the control plane."""
    config = image.config
    return images_pb2.Image(
        digest=image.digest,
        layers=[
            images_pb2.Layer(
                digest=layer.digest,
                size_bytes=layer.size_bytes,
                source_digest=layer.source_digest,
                volume_uuid=layer.volume_uuid.hex(),
            )
            for layer in image.layers
        ],
        config=images_pb2.ImageConfig(
            entrypoint=config.entrypoint,
            cmd=config.cmd,
            env=dict(config.env),
            workdir=config.workdir,
            user=config.user,
        ),
        size_bytes=image.size_bytes,
        created_at=timestamp(image.created_at_s),
        hosts=[host],
        tenant=tenant,
        format=image.format,
    )
