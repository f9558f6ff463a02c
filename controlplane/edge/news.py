"""Between sandloom.v1's events (of watches, of the event log) and usage records, and values. Pure."""

from __future__ import annotations

from collections.abc import Callable

from controlplane.api.v1 import sandboxes_pb2
from controlplane.edge.enums import CLASSES, seconds, timestamp
from controlplane.edge.sandboxes import MAX_STATUS_CHARS, render_assignment, render_resources, render_sandbox
from controlplane.errors import Invalid
from controlplane.model import Event, Sandbox
from controlplane.usageledger import Usage
from controlplane.watching import Gone, Put, Told


def parse_event(message: sandboxes_pb2.Event, *, host: str, tenant: str) -> Event:
    """A host's event; `host` and `tenant` are what the control plane knows of it, whatever the message says."""
    if message.kind not in ("sandbox", "image", "host", "pool"):
        raise Invalid("event.kind", f"{message.kind!r} is none of sandbox, image, host, pool")
    if not message.subject or len(message.subject) > 256:
        raise Invalid("event.subject", "it must have 1 to 256 characters")
    text = message.message[:MAX_STATUS_CHARS]
    return Event(
        seconds(message.time), message.kind, message.subject, message.reason[:128], text, host=host, tenant=tenant
    )


def render_event(event: Event) -> sandboxes_pb2.Event:
    """An entry of the event log."""
    return sandboxes_pb2.Event(
        resource_version=event.revision,
        time=timestamp(event.time_s),
        kind=event.kind,
        subject=event.subject,
        reason=event.reason,
        message=event.message,
        host=event.host,
    )


def render_usage(usage: Usage) -> sandboxes_pb2.Usage:
    """An entry of the usage ledger."""
    message = sandboxes_pb2.Usage(
        name=usage.name, uid=usage.uid, tenant=usage.tenant, image=usage.image,
        resources=render_resources(usage.resources), created_at=timestamp(usage.created_at_s),
        started_at=timestamp(usage.started_at_s), ended_at=timestamp(usage.ended_at_s),
    )  # fmt: skip
    setattr(message, "class", CLASSES[usage.sandbox_class])
    return message


def render_told(told: Told) -> sandboxes_pb2.SandboxEvent:
    """A watch's item, for users."""
    return _render_told(told, render_sandbox)


def render_told_host(told: Told) -> sandboxes_pb2.SandboxEvent:
    """A watch's item, for the host."""
    return _render_told(told, render_assignment)


def _render_told(told: Told, render: Callable[[Sandbox], sandboxes_pb2.Sandbox]) -> sandboxes_pb2.SandboxEvent:
    event = sandboxes_pb2.SandboxEvent(resource_version=told.revision)
    if isinstance(told, Put):
        event.kind = sandboxes_pb2.SandboxEvent.PUT
        event.sandbox.CopyFrom(render(told.sandbox))
    elif isinstance(told, Gone):
        event.kind = sandboxes_pb2.SandboxEvent.DELETE
        event.sandbox.CopyFrom(sandboxes_pb2.Sandbox(name=told.name, uid=told.uid, tenant=told.tenant))
    else:
        event.kind = sandboxes_pb2.SandboxEvent.BOOKMARK
    return event
