"""What a sandbox is on this host, and what follows from that for its container."""

from __future__ import annotations

import os
import resource
from dataclasses import dataclass, replace
from pathlib import Path

from controlplane.api.services import ALL_KERNEL, ServicePolicy
from guestagent.errors import BadRequest
from guestagent.messages import StartProcess
from hostd.cgroups import Hierarchy
from hostd.drivers.oci.bundle import OPEN_FILES, BundleShape, Notify
from hostd.drivers.oci.monitor import MONITOR
from hostd.drivers.oci.runtime import Runtime
from hostd.errors import InvalidSpec
from hostd.services.notified import notified_calls
from hostd.services.sockets import needed
from hostd.spec import Command

AGENT_SOCKET, SERVICES_SOCKET, RUNTIME_SOCKET = "serve.sock", "services.sock", "notify.sock"
"""Of a sandbox's supervisor: the agent protocol, the services port, and where the runtime brings its filters."""


@dataclass(frozen=True)
class Place:
    """What a sandbox is on this host."""

    uid: str
    hostname: str
    folder: Path
    runtime: Runtime
    cgroups: Hierarchy
    netns: Path | None = None  # None: a new one with lo only
    services: ServicePolicy = ALL_KERNEL
    warm: bool = False  # its container was there before it: main is one more process of that

    @property
    def rootfs(self) -> Path:
        """Its root filesystem, mounted."""
        return self.folder / "rootfs"


def asked_of(command: Command, proc: int) -> StartProcess:
    """The command as the protocol has it, its user apart. InvalidSpec for what no engine or runtime could serve."""
    try:
        return StartProcess(
            proc=proc,
            argv=tuple(word.encode() for word in command.argv),
            env=tuple(f"{key}={value}".encode() for key, value in command.env),
            cwd=(command.workdir or "/").encode(),
            tty=command.tty,
            rows=command.rows,
            cols=command.cols,
            stdin=command.stdin,
        )
    except BadRequest as error:
        raise InvalidSpec(f"{command.argv[0] if command.argv else 'command'}: {error}") from error
    except UnicodeEncodeError as error:
        raise InvalidSpec("an OCI runtime reads its configuration as JSON: arguments and env must be UTF-8") from error


def bundle_shape(place: Place) -> BundleShape:
    """What its container is. StartFailed."""
    shape = BundleShape(place.rootfs, place.hostname, netns=place.netns, open_files=open_files())
    if place.runtime.name != "crun":
        return shape
    shape = replace(shape, init=place.runtime.init, machine=os.uname().machine, root_hook=MONITOR)
    if not needed(place.services):
        return shape
    calls = notified_calls(place.services)
    return replace(shape, notify=Notify(place.folder / RUNTIME_SOCKET, calls, place.runtime.notify_flags))


def open_files() -> int:
    """How many descriptors a process gets: no more than hostd could have itself."""
    return min(OPEN_FILES, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
