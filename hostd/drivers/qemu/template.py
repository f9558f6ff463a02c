"""Which template a guest can be cloned from, and which templates are worth having. Pure: values in, decisions out.

A template is a guest that was booted once up to "agent ready" and frozen. A generic one has no layers: a clone gets
its image by hot-plug. An image template has one image's layers mounted already, so that a clone starts faster still.

    key = sha256 over everything that must be the same in template and clone: the command line's shape (devices,
          addresses, sizes), kernel, initramfs (so the agent), QEMU, the CPU that the guest sees, the sharing domain,
          and the image's layers, if any

Sizes are rounded up to buckets, so that a few templates fit every request: what a guest may use beyond its own ceiling
is held back by never asking virtio-mem for it, and by the cgroup's hard limit.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum

SMALLEST_BUCKET_MIB = 512
LAYERS_BUCKET_MIB = 512
HOT_STARTS = 3
"""An image started this often within HOT_WINDOW_S gets a template of its own."""

HOT_WINDOW_S = 600.0
IDLE_S = 1800.0
"""A template that nobody cloned for this long may go."""


class Origin(Enum):
    """How a guest came up."""

    COLD = "cold boot"
    GENERIC = "clone of a generic template"
    IMAGE = "clone of an image template"
    WARM = "warm claim"


@dataclass(frozen=True)
class GuestIdentity:
    """What a guest's inside depends on besides its devices."""

    kernel_digest: str
    initrd_digest: str
    qemu: str  # the version as QEMU prints it
    cpu: str  # what the guest's CPU is made from: "tcg max", or KVM's host CPU with its flags


def ceiling_bucket_mib(memory_max_mib: int) -> int:
    """The power of two, from 512 MiB up, that holds a ceiling."""
    return max(SMALLEST_BUCKET_MIB, 1 << (memory_max_mib - 1).bit_length())


def layers_bucket_mib(layers_bytes: int) -> int:
    """Room for layers' page structs is reserved in steps of 512 MiB of layers."""
    mib = -(-layers_bytes >> 20)
    return max(LAYERS_BUCKET_MIB, -(-mib // LAYERS_BUCKET_MIB) * LAYERS_BUCKET_MIB)


def template_key(
    argv_shape: Iterable[str], identity: GuestIdentity, domain: str, layer_digests: Iterable[str] = ()
) -> str:
    """64 hex digits; equal exactly when a clone of one can be made from the other."""
    parts = {
        "argv": list(argv_shape),
        "kernel": identity.kernel_digest,
        "initrd": identity.initrd_digest,
        "qemu": identity.qemu,
        "cpu": identity.cpu,
        "domain": domain,
        "layers": list(layer_digests),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Candidates:
    """The templates that would fit one request: keys, "" when there can be none; `lacking` says why no generic one."""

    image_key: str
    generic_key: str
    lacking: str = ""


@dataclass(frozen=True)
class Choice:
    """What to start from, and why not from something better.

    `awaits`: a template that is being made. Waiting for it costs no more than a cold boot, which is the same work,
    and a herd of starts then makes one template and clones instead of booting side by side."""

    origin: Origin
    key: str = ""
    reason: str = ""
    awaits: str = ""


def choose(candidates: Candidates, ready: Mapping[str, bool], *, cold: bool) -> Choice:
    """The best that is there. `ready` says of each known key whether it can be cloned now (else it is being made)."""
    if cold:
        return Choice(Origin.COLD, reason="asked for with --cold")
    if candidates.image_key and ready.get(candidates.image_key):
        return Choice(Origin.IMAGE, candidates.image_key)
    if candidates.generic_key and ready.get(candidates.generic_key):
        return Choice(Origin.GENERIC, candidates.generic_key)
    if not candidates.generic_key:
        return Choice(Origin.COLD, reason=candidates.lacking)
    if candidates.generic_key in ready:
        return Choice(Origin.COLD, reason="its template is being made", awaits=candidates.generic_key)
    return Choice(Origin.COLD, reason="its template could not be made a moment ago")


def is_hot(starts_s: Iterable[float], now_s: float) -> bool:
    """Whether an image that was started at these times deserves a template of its own."""
    return sum(1 for at_s in starts_s if now_s - at_s <= HOT_WINDOW_S) >= HOT_STARTS


@dataclass(frozen=True)
class TemplateUse:
    """What is known of a loaded template: its memory, who needs it, when it was cloned last."""

    key: str
    resident_bytes: int
    live_clones: int
    pooled: bool
    last_used_s: float


def evictable(templates: Iterable[TemplateUse], now_s: float, *, pressed: bool) -> list[str]:
    """Keys whose memory may be given back, least recently used first.

    A template with live clones frees nothing by being dropped (they map its pages), so it stays. Under memory
    pressure the idle time does not count."""
    idle = [
        use
        for use in templates
        if use.live_clones == 0 and not use.pooled and (pressed or now_s - use.last_used_s >= IDLE_S)
    ]
    return [use.key for use in sorted(idle, key=lambda use: (use.last_used_s, use.key))]
