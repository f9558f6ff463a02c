"""Between sandloom.v1's sandbox messages and values: parse once, strictly, and render. Pure.

Invalid names the field by its path in the request (`spec.resources.memory_min_mib`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from controlplane import lifecycle, transitions
from controlplane.api.errors import PolicyError
from controlplane.api.identity import NAME_PATTERN
from controlplane.api.policies import parse_change, parse_policy, render_policy, require_servable
from controlplane.api.services import ALL_KERNEL, ServicePolicy
from controlplane.api.v1 import hosts_pb2, sandboxes_pb2
from controlplane.edge.enums import (
    CLASSES,
    DESIRED,
    PHASES,
    RESIZES,
    RESTARTS,
    parse_class,
    parse_phase,
    parse_resize_state,
    parse_restart,
    timestamp,
)
from controlplane.edge.enums import seconds as seconds_of
from controlplane.edge.network import parse_network, render_network
from controlplane.edge.rules import parse_rules, render_rules
from controlplane.errors import Invalid
from controlplane.model import (
    DesiredState,
    Process,
    Resize,
    Resources,
    Sandbox,
    SandboxClass,
    SandboxSpec,
    SandboxStatus,
)
from controlplane.requests import Creation, Report, ResizeWish, ServiceWish
from controlplane.rules import NO_RULES

MAX_MEMORY_MIB = 1 << 30
MAX_CPU_MILLI = 64_000
DEFAULT_CPU_MILLI = 1000
MAX_WORDS, MAX_WORDS_BYTES = 1024, 128 << 10
"""Of a command, and of an environment: Linux gives 128 KiB to one string (MAX_ARG_STRLEN) and 2 MiB to all."""
MAX_LABELS = 64
MOST_AT_ONCE = 256
MAX_PRIORITY, MAX_WEIGHT, DEFAULT_WEIGHT = 1000, 10_000, 100
MAX_STATUS_CHARS = 4096
DEFAULT_GRACE_S, MAX_GRACE_S = 10, 86_400
REQUEST_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")
ENV_NAME = re.compile(r"[^=\0]+")


def parse_name(name: str, field: str = "name") -> str:
    """A sandbox's name or uid, given to find one."""
    if not NAME_PATTERN.fullmatch(name):
        raise Invalid(field, f"{name!r} is no name: it must match {NAME_PATTERN.pattern}")
    return name


def parse_creation(request: sandboxes_pb2.CreateSandboxRequest, services: ServicePolicy = ALL_KERNEL) -> Creation:
    """What CreateSandbox asks for; `services` is the tenant's default."""
    if request.name:
        parse_name(request.name)
    if request.request_id and not REQUEST_ID.fullmatch(request.request_id):
        raise Invalid("request_id", f"it must match {REQUEST_ID.pattern}")
    return Creation(request.name, parse_spec(request.spec, services), request.request_id, request.validate_only)


def require_few(requests: int) -> None:
    """Whether so many may be created by one call."""
    if not 0 < requests <= MOST_AT_ONCE:
        raise Invalid("requests", f"{requests} requests: 1 to {MOST_AT_ONCE} may come in one call")


def parse_spec(spec: sandboxes_pb2.SandboxSpec, services: ServicePolicy = ALL_KERNEL) -> SandboxSpec:
    """A spec as a user may give it; what is output only is not looked at. `services` is where it leaves them open."""
    if not spec.image:
        raise Invalid("spec.image", "name the image to run")
    if spec.hostname and not NAME_PATTERN.fullmatch(spec.hostname):
        raise Invalid("spec.hostname", f"it must match {NAME_PATTERN.pattern}")
    if len(spec.labels) > MAX_LABELS:
        raise Invalid("spec.labels", f"{len(spec.labels)} labels, {MAX_LABELS} is the most")
    sandbox_class = parse_class(getattr(spec, "class"), "spec.class")
    return SandboxSpec(
        image=spec.image,
        resources=parse_resources(spec.resources),
        process=parse_process(spec.process, "spec.process"),
        sandbox_class=sandbox_class,
        services=parse_services(
            spec.services, sandbox_class, services, veth=spec.network.mode == sandboxes_pb2.NETWORK_VETH
        ),
        remove_on_exit=spec.remove_on_exit,
        cold=spec.cold,
        priority=_priority(spec.priority),
        weight=_weight(spec.weight),
        labels=_words("spec.labels", spec.labels),
        hostname=spec.hostname,
        restart=parse_restart(spec.restart, "spec.restart"),
        rules=parse_rules(spec.rules),
        network=parse_network(spec.network, sandbox_class, "spec.network"),
    )


def parse_services(
    message: sandboxes_pb2.ServicePolicy, sandbox_class: SandboxClass, default: ServicePolicy, *, veth: bool = False
) -> ServicePolicy:
    """Who answers; what the class cannot have answered so is refused by name."""
    try:
        policy = replace(parse_policy(message, default), withdrawn=())
        require_servable(sandbox_class.value, policy, veth=veth)
    except PolicyError as error:
        raise Invalid("spec.services", str(error), reason="ServicePolicyInvalid") from error
    return policy


def _priority(asked: int) -> int:
    if abs(asked) > MAX_PRIORITY:
        raise Invalid("spec.priority", f"{asked} is outside {-MAX_PRIORITY}..{MAX_PRIORITY}")
    return asked


def _weight(asked: int) -> int:
    if asked > MAX_WEIGHT:
        raise Invalid("spec.weight", f"{asked} is above {MAX_WEIGHT}")
    return asked or DEFAULT_WEIGHT


def parse_resources(asked: sandboxes_pb2.Resources) -> Resources:
    """0 < min <= memory <= max; memory 0 is min, max 0 is min, CPU 0 is one."""
    low = asked.memory_min_mib
    if low == 0:
        raise Invalid("spec.resources.memory_min_mib", "how much memory is guaranteed must be said")
    high = asked.memory_max_mib or low
    if high > MAX_MEMORY_MIB:
        raise Invalid("spec.resources.memory_max_mib", f"{high} MiB is above {MAX_MEMORY_MIB}")
    if low > high:
        raise Invalid("spec.resources.memory_max_mib", f"{high} MiB is below the minimum of {low} MiB")
    now = asked.memory_mib or low
    if not low <= now <= high:
        raise Invalid("spec.resources.memory_mib", f"{now} MiB is not between {low} and {high}")
    cpu = asked.cpu_milli or DEFAULT_CPU_MILLI
    if cpu > MAX_CPU_MILLI:
        raise Invalid(
            "spec.resources.cpu_milli", f"{cpu / 1000:g} CPUs are above {MAX_CPU_MILLI / 1000:g}, the most there are"
        )
    return Resources(low, high, now, cpu)


def parse_process(process: sandboxes_pb2.Process, field: str) -> Process:
    """A program to run. No string of it may hold a NUL byte."""
    _bounded(f"{field}.argv", process.argv)
    for text, part in ((process.workdir, "workdir"), (process.user, "user")):
        _bounded(f"{field}.{part}", [text])
    if process.tty_rows > 0xFFFF or process.tty_cols > 0xFFFF:
        raise Invalid(f"{field}.tty_rows", "a terminal has at most 65535 rows and columns")
    env = _words(f"{field}.env", process.env)
    for key, _ in env:
        if not ENV_NAME.fullmatch(key):
            raise Invalid(f"{field}.env", f"{key!r} is no name of a variable")
    return Process(
        tuple(process.argv), env, process.workdir, process.user, process.tty, process.stdin,
        process.tty_rows, process.tty_cols,
    )  # fmt: skip


def _words(field: str, words: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    _bounded(field, [*words.keys(), *words.values()])
    return tuple(sorted(words.items()))


def _bounded(field: str, texts: Sequence[str]) -> None:
    if len(texts) > MAX_WORDS:
        raise Invalid(field, f"{len(texts)} strings, {MAX_WORDS} is the most")
    size_bytes = sum(len(text.encode()) for text in texts)
    if size_bytes > MAX_WORDS_BYTES:
        raise Invalid(field, f"{size_bytes} bytes, {MAX_WORDS_BYTES} is the most")
    if any("\0" in text for text in texts):
        raise Invalid(field, "a NUL byte cannot be passed to a program")


def parse_resize(request: sandboxes_pb2.ResizeSandboxRequest) -> ResizeWish:
    """What ResizeSandbox asks for."""
    if not (request.memory_mib or request.memory_min_mib or request.cpu_milli):
        raise Invalid("memory_mib", "nothing to change: give memory_mib, memory_min_mib or cpu_milli")
    return ResizeWish(request.memory_mib, request.memory_min_mib, request.cpu_milli, request.etag)


def parse_service_wish(request: sandboxes_pb2.SetServicesRequest) -> ServiceWish:
    """What SetServices asks for."""
    try:
        change = parse_change(request.services, replace_allow=request.replace_allow)
    except PolicyError as error:
        raise Invalid("services", str(error), reason="ServicePolicyInvalid") from error
    if not change.answerers and change.allow is None:
        raise Invalid("services", "nothing to change: name a service, or rules with replace_allow")
    return ServiceWish(change, request.etag)


def parse_grace_s(request: sandboxes_pb2.StopSandboxRequest) -> int:
    """Whole seconds, rounded up; 10 when unset."""
    if not request.HasField("grace"):
        return DEFAULT_GRACE_S
    grace_s = -(-request.grace.ToNanoseconds() // 1_000_000_000)
    if not 0 <= grace_s <= MAX_GRACE_S:
        raise Invalid("grace", f"it must be between 0 and {MAX_GRACE_S} s")
    return grace_s


def parse_report(request: hosts_pb2.ReportSandboxRequest) -> Report:
    """What a host observed. Texts are cut to what the store bears."""
    status = request.status
    resize = None
    if status.HasField("resize"):
        resize = Resize(
            parse_resize_state(status.resize.state, "status.resize.state"),
            status.resize.desired_memory_mib,
            status.resize.allocated_memory_mib,
            status.resize.actual_memory_mib,
            status.resize.cpu_milli,
            status.resize.message[:MAX_STATUS_CHARS],
            status.resize.desired_cpu_milli,
            status.resize.shortfall_mib,
            status.resize.cause[:64],
            seconds_of(status.resize.deadline) if status.resize.HasField("deadline") else None,
            status.resize.attempts,
        )
    observed = SandboxStatus(
        phase=parse_phase(status.phase, "status.phase"),
        reason=status.reason[:128],
        message=status.message[:MAX_STATUS_CHARS],
        exit_code=status.exit_code if status.has_exit_code else None,
        resize=resize,
        started_at_s=seconds_of(status.started_at) if status.HasField("started_at") else None,
        finished_at_s=seconds_of(status.finished_at) if status.HasField("finished_at") else None,
        start_phases=tuple((part.name[:64], part.seconds) for part in status.start_phases[:32]),
        accel=status.accel[:32],
        origin=status.origin[:512],
        address=status.address[:64],
        vcpus=status.vcpus,
        vcpus_max=status.vcpus_max,
        host_pid=status.host_pid,
        observed_epoch=request.epoch,
        restarts_of_host=status.restarts_of_host,
        uncooperative=status.uncooperative,
    )
    return Report(request.uid, request.host, request.epoch, observed, request.removed)


def render_sandbox(sandbox: Sandbox) -> sandboxes_pb2.Sandbox:
    """A sandbox as users see it."""
    message = sandboxes_pb2.Sandbox(
        name=sandbox.name,
        uid=sandbox.uid,
        tenant=sandbox.tenant,
        spec=render_spec(sandbox.spec),
        desired_state=DESIRED[sandbox.desired],
        status=render_status(sandbox.status),
        created_at=timestamp(sandbox.created_at_s),
        resource_version=sandbox.revision,
        etag=transitions.etag(sandbox),
        stop_grace_s=sandbox.stop_grace_s,
    )
    if sandbox.host or sandbox.epoch:
        message.assignment.CopyFrom(sandboxes_pb2.Assignment(host=sandbox.host, epoch=sandbox.epoch))
    return message


def render_assignment(sandbox: Sandbox) -> sandboxes_pb2.Sandbox:
    """A sandbox as its host sees it: a host that lost its own records must not start an ended one again."""
    message = render_sandbox(sandbox)
    if sandbox.status.phase in lifecycle.ENDED and sandbox.desired is DesiredState.RUNNING:
        message.desired_state = sandboxes_pb2.DESIRED_STOPPED
    return message


def render_process(process: Process) -> sandboxes_pb2.Process:
    """A program to run."""
    return sandboxes_pb2.Process(
        argv=process.argv,
        env=dict(process.env),
        workdir=process.workdir,
        user=process.user,
        tty=process.tty,
        stdin=process.stdin,
        tty_rows=process.tty_rows,
        tty_cols=process.tty_cols,
    )


def render_resources(resources: Resources) -> sandboxes_pb2.Resources:
    """Its sizes."""
    return sandboxes_pb2.Resources(
        memory_min_mib=resources.memory_min_mib,
        memory_max_mib=resources.memory_max_mib,
        memory_mib=resources.memory_mib,
        cpu_milli=resources.cpu_milli,
    )


def render_spec(spec: SandboxSpec) -> sandboxes_pb2.SandboxSpec:
    """What was asked for."""
    message = sandboxes_pb2.SandboxSpec(
        image=spec.image,
        image_digest=spec.image_digest,
        resources=render_resources(spec.resources),
        process=render_process(spec.process),
        remove_on_exit=spec.remove_on_exit,
        cold=spec.cold,
        priority=spec.priority,
        weight=spec.weight,
        labels=dict(spec.labels),
        hostname=spec.hostname,
        checkpoint=spec.checkpoint,
        restart=RESTARTS[spec.restart],
        services=render_policy(spec.services),
    )
    if spec.network.veth:
        message.network.CopyFrom(render_network(spec.network))
    setattr(message, "class", CLASSES[spec.sandbox_class])
    if spec.rules != NO_RULES:
        message.rules.CopyFrom(render_rules(spec.rules))
    return message


def render_status(status: SandboxStatus) -> sandboxes_pb2.SandboxStatus:
    """What is."""
    message = sandboxes_pb2.SandboxStatus(
        phase=PHASES[status.phase],
        reason=status.reason,
        message=status.message,
        exit_code=status.exit_code or 0,
        has_exit_code=status.exit_code is not None,
        start_phases=[sandboxes_pb2.StartPhase(name=name, seconds=took) for name, took in status.start_phases],
        accel=status.accel,
        origin=status.origin,
        address=status.address,
        vcpus=status.vcpus,
        vcpus_max=status.vcpus_max,
        host_pid=status.host_pid,
        observed_epoch=status.observed_epoch,
        restarts_of_host=status.restarts_of_host,
        uncooperative=status.uncooperative,
    )
    if status.started_at_s is not None:
        message.started_at.CopyFrom(timestamp(status.started_at_s))
    if status.finished_at_s is not None:
        message.finished_at.CopyFrom(timestamp(status.finished_at_s))
    if status.resize is not None:
        message.resize.CopyFrom(render_resize(status.resize))
    return message


def render_resize(resize: Resize) -> sandboxes_pb2.ResizeStatus:
    """The contract's sizes."""
    message = sandboxes_pb2.ResizeStatus(
        state=RESIZES[resize.state],
        desired_memory_mib=resize.desired_memory_mib,
        allocated_memory_mib=resize.allocated_memory_mib,
        actual_memory_mib=resize.actual_memory_mib,
        cpu_milli=resize.cpu_milli,
        message=resize.message,
        desired_cpu_milli=resize.desired_cpu_milli,
        shortfall_mib=resize.shortfall_mib,
        cause=resize.cause,
        attempts=resize.attempts,
    )
    if resize.deadline_s is not None:
        message.deadline.CopyFrom(timestamp(resize.deadline_s))
    return message
