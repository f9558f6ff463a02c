"""The API's enums and ours, both ways. A number that this version does not know is Invalid. Pure."""

from __future__ import annotations

from google.protobuf.timestamp_pb2 import Timestamp

from controlplane.api.v1 import sandboxes_pb2
from controlplane.errors import Invalid
from controlplane.model import DesiredState, Phase, ResizeState, RestartPolicy, SandboxClass

PHASES = {
    Phase.PENDING: sandboxes_pb2.PENDING,
    Phase.SCHEDULED: sandboxes_pb2.SCHEDULED,
    Phase.STARTING: sandboxes_pb2.STARTING,
    Phase.RUNNING: sandboxes_pb2.RUNNING,
    Phase.STOPPING: sandboxes_pb2.STOPPING,
    Phase.EXITED: sandboxes_pb2.EXITED,
    Phase.FAILED: sandboxes_pb2.FAILED,
    Phase.PARKED: sandboxes_pb2.PARKED,
}
DESIRED = {
    DesiredState.RUNNING: sandboxes_pb2.DESIRED_RUNNING,
    DesiredState.STOPPED: sandboxes_pb2.DESIRED_STOPPED,
    DesiredState.REMOVED: sandboxes_pb2.DESIRED_REMOVED,
}
CLASSES = {
    SandboxClass.GUEST_KERNEL: sandboxes_pb2.GUEST_KERNEL,
    SandboxClass.USER_KERNEL: sandboxes_pb2.USER_KERNEL,
    SandboxClass.HOST_KERNEL: sandboxes_pb2.HOST_KERNEL,
}
RESIZES = {
    ResizeState.DONE: sandboxes_pb2.RESIZE_DONE,
    ResizeState.IN_PROGRESS: sandboxes_pb2.RESIZE_IN_PROGRESS,
    ResizeState.DEFERRED: sandboxes_pb2.RESIZE_DEFERRED,
    ResizeState.INFEASIBLE: sandboxes_pb2.RESIZE_INFEASIBLE,
    ResizeState.ERROR: sandboxes_pb2.RESIZE_ERROR,
}
RESTARTS = {
    RestartPolicy.NEVER: sandboxes_pb2.RESTART_NEVER,
    RestartPolicy.ON_HOST_LOSS: sandboxes_pb2.RESTART_ON_HOST_LOSS,
}
_RESTARTS_IN = {number: policy for policy, number in RESTARTS.items()}
_PHASES_IN = {number: phase for phase, number in PHASES.items()}
_RESIZES_IN = {number: state for state, number in RESIZES.items()}
_CLASSES_IN = {number: kind for kind, number in CLASSES.items()}


def parse_phase(number: int, field: str) -> Phase:
    """A phase. Invalid names `field`."""
    for known, phase in _PHASES_IN.items():
        if known == number:
            return phase
    raise Invalid(field, f"{number} is no phase that this control plane knows")


def parse_resize_state(number: int, field: str) -> ResizeState:
    """A resize state. Invalid names `field`."""
    for known, state in _RESIZES_IN.items():
        if known == number:
            return state
    raise Invalid(field, f"{number} is no resize state that this control plane knows")


def parse_class(number: int, field: str) -> SandboxClass:
    """A class; unspecified is GUEST_KERNEL. Invalid names `field`."""
    if number == sandboxes_pb2.SANDBOX_CLASS_UNSPECIFIED:
        return SandboxClass.GUEST_KERNEL
    for known, kind in _CLASSES_IN.items():
        if known == number:
            return kind
    raise Invalid(field, f"{number} is no class: use GUEST_KERNEL, USER_KERNEL or HOST_KERNEL")


def timestamp(seconds: float) -> Timestamp:
    """Seconds since 1970 as the API says them."""
    whole = int(seconds)
    return Timestamp(seconds=whole, nanos=int((seconds - whole) * 1e9))


def seconds(moment: Timestamp) -> float:
    """The other way round."""
    return float(moment.seconds) + moment.nanos / 1e9


def parse_restart(number: int, field: str) -> RestartPolicy:
    """A restart policy; unspecified is never."""
    if number == sandboxes_pb2.RESTART_POLICY_UNSPECIFIED:
        return RestartPolicy.NEVER
    if number not in _RESTARTS_IN:
        raise Invalid(field, f"restart policy {number} is unknown to this version")
    return _RESTARTS_IN[sandboxes_pb2.RestartPolicy.ValueType(number)]
