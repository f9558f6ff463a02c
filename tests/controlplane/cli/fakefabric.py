"""A small control plane in this process: the API's real stubs over real gRPC with real mutual TLS, scripted programs.

A program is a function of its FakeProcess: it reads `stdin`, prints with `out` and `err`, and returns its exit code.
Sandboxes start at once; what they print is kept and replayed as the API says.
"""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any, NoReturn

import grpc

from controlplane.api.channel import TlsFiles, server_credentials, server_options
from controlplane.api.identity import Identity, Role
from controlplane.api.status import DETAILS_TRAILER, Condition, Failure, to_status
from controlplane.api.v1 import (
    checkpoints_pb2_grpc,
    hosts_pb2,
    hosts_pb2_grpc,
    images_pb2,
    images_pb2_grpc,
    pools_pb2_grpc,
    sandboxes_pb2,
    sandboxes_pb2_grpc,
    tenants_pb2_grpc,
)
from controlplane.ca import Authority
from tests.controlplane.cli.fakecheckpoints import FakeCheckpoints
from tests.controlplane.cli.fakehosts import FakeHosts
from tests.controlplane.cli.fakepools import FakePools
from tests.controlplane.cli.fakeservices import FakeServices
from tests.controlplane.cli.faketenants import FakeTenants, acting_for

Output = sandboxes_pb2.StreamOutput
Program = Callable[["FakeProcess"], int]
ENDED = (sandboxes_pb2.EXITED, sandboxes_pb2.FAILED)
WAIT_S = 60.0


def issue_tls(folder: Path) -> TlsFiles:
    """A CA of its own below `folder`, the control plane's certificate (returned), and an operator's."""
    authority = Authority.create(folder / "ca")
    authority.issue_files(Identity(Role.OPERATOR, "admin"), folder)
    return authority.issue_files(Identity(Role.CONTROLPLANE, "local"), folder)


class FakeProcess:
    """One running program: its log, its input, and who follows it."""

    def __init__(self, asked: sandboxes_pb2.Process) -> None:
        self.asked = asked
        self.log: list[Output] = []
        self.exit: sandboxes_pb2.ExitStatus | None = None
        self.changed = threading.Condition()
        self.stdin: queue.Queue[bytes] = queue.Queue()  # b"" is its end
        self.signals: queue.Queue[int] = queue.Queue()
        self.windows: queue.Queue[tuple[int, int]] = queue.Queue()
        self.clock = itertools.count(1_700_000_000_000_000_000, 1_000_000)

    def out(self, data: bytes) -> None:
        self._add(Output(stdout=data, time_unix_ns=next(self.clock)))

    def err(self, data: bytes) -> None:
        self._add(Output(stderr=data, time_unix_ns=next(self.clock)))

    def _add(self, output: Output) -> None:
        with self.changed:
            self.log.append(output)
            self.changed.notify_all()

    def end(self, status: sandboxes_pb2.ExitStatus) -> None:
        with self.changed:
            self.exit = status
            self.changed.notify_all()

    def take(self, message: sandboxes_pb2.StreamInput) -> None:
        kind = message.WhichOneof("input")
        if kind == "stdin":
            self.stdin.put(message.stdin)
        elif kind == "stdin_eof":
            self.stdin.put(b"")
        elif kind == "signal":
            self.signals.put(message.signal)
        elif kind == "window":
            self.windows.put((message.window.rows, message.window.cols))

    def follow(self, position: int, stopped: Callable[[], bool]) -> Iterator[Output]:
        """Its log from `position` on, then its exit status."""
        while not stopped():
            with self.changed:
                if position == len(self.log) and self.exit is None:
                    self.changed.wait(0.05)
                    continue
                news, ended = self.log[position:], self.exit
            yield from news
            position += len(news)
            if ended is not None and position == len(self.log):
                yield Output(exit=ended)
                return


def fail(context: grpc.ServicerContext, condition: Condition, reason: str, message: str, **details: str) -> NoReturn:
    status = to_status(Failure(condition, reason, message, tuple(details.items())))
    context.set_trailing_metadata(((DETAILS_TRAILER, status.SerializeToString()),))
    context.abort(grpc.StatusCode[Failure(condition, reason, message).code.name], message)
    raise AssertionError("abort returned")


class FakeFabric(
    FakePools, FakeHosts, FakeTenants, FakeServices, sandboxes_pb2_grpc.SandboxesServicer,
    images_pb2_grpc.ImagesServicer, hosts_pb2_grpc.HostSyncServicer,
):  # fmt: skip
    """See the module. Tests read and set its public fields."""

    def __init__(self) -> None:
        super().__init__()
        self.checkpoints = FakeCheckpoints(self)
        self.programs: dict[str, Program] = {}
        self.sandboxes: dict[str, sandboxes_pb2.Sandbox] = {}
        self.usage: list[sandboxes_pb2.Usage] = []
        self.processes: dict[str, FakeProcess] = {}
        self.images: dict[str, images_pb2.Image] = {
            "debian": images_pb2.Image(name="debian", digest="sha256:" + "a" * 64)
        }
        self.events: list[sandboxes_pb2.Event] = []
        self.ledger = sandboxes_pb2.SharingLedger()
        self.explanation = sandboxes_pb2.Explanation()
        self.uploaded = b""
        self.import_start: images_pb2.ImportImageRequest.Start | None = None
        self.calls: list[tuple[str, Any]] = []
        self.break_after: int | None = None  # pieces an attach sends before it breaks
        self.break_with = (Condition.UNAVAILABLE, 1)  # with what, and how often
        self.failing: dict[str, Failure] = {}  # method name -> what its next call fails with
        self.unreachable_s = 0.0  # how long attaches and logs try to reach their host, in vain
        self.beginning = threading.Event()  # clear it, and attaches wait before the process has started
        self.beginning.set()
        self.closing = threading.Event()
        self._uids = itertools.count(0xA1B2C300)
        self._lock = threading.Lock()
        self._server: grpc.Server | None = None

    # Serving.

    def serve(self, tls: TlsFiles, listen: str = "127.0.0.1:0") -> str:
        server = grpc.server(futures.ThreadPoolExecutor(32), options=server_options())
        sandboxes_pb2_grpc.add_SandboxesServicer_to_server(self, server)
        images_pb2_grpc.add_ImagesServicer_to_server(self, server)
        hosts_pb2_grpc.add_HostsServicer_to_server(self, server)
        hosts_pb2_grpc.add_HostSyncServicer_to_server(self, server)
        pools_pb2_grpc.add_PoolsServicer_to_server(self, server)
        tenants_pb2_grpc.add_TenantsServicer_to_server(self, server)
        checkpoints_pb2_grpc.add_CheckpointsServicer_to_server(self.checkpoints, server)
        port = server.add_secure_port(listen, server_credentials(tls))
        server.start()
        self._server = server
        return f"127.0.0.1:{port}"

    def stop(self) -> None:
        for process in self.processes.values():
            process.stdin.put(b"")
            process.signals.put(15)
        if self._server is not None:
            self._server.stop(0).wait(WAIT_S)

    def _called(self, name: str, request: Any, context: grpc.ServicerContext) -> None:
        self.calls.append((name, request))
        failure = self.failing.pop(name, None)
        if failure is not None:
            status = to_status(failure)
            context.set_trailing_metadata(((DETAILS_TRAILER, status.SerializeToString()),))
            context.abort(failure.code, failure.message)

    def find(self, name: str, context: grpc.ServicerContext) -> sandboxes_pb2.Sandbox:
        found = [box for box in self.sandboxes.values() if name in (box.name, box.uid)]
        if not found:
            fail(context, Condition.NOT_FOUND, "SandboxNotFound", f"there is no sandbox {name}")
        return found[-1]

    # Sandboxes.

    def add(self, name: str, phase: int = sandboxes_pb2.RUNNING, **status: Any) -> sandboxes_pb2.Sandbox:
        """A sandbox without a program, for listings."""
        sandbox = sandboxes_pb2.Sandbox(name=name, uid=f"{next(self._uids):08x}")
        sandbox.spec.image = "debian"
        sandbox.spec.resources.memory_min_mib, sandbox.spec.resources.memory_max_mib = 256, 1024
        sandbox.spec.resources.cpu_milli = 1000
        sandbox.assignment.host = "loom"
        sandbox.status.MergeFrom(sandboxes_pb2.SandboxStatus(phase=phase, **status))  # type: ignore[arg-type]
        self.sandboxes[sandbox.uid] = sandbox
        return sandbox

    def CreateSandbox(self, request: Any, context: Any) -> sandboxes_pb2.Sandbox:
        self._called("CreateSandbox", request, context)
        if request.spec.image not in self.images:
            fail(context, Condition.NOT_FOUND, "ImageNotFound", f"there is no image {request.spec.image}")
        name = request.name or f"made-up-{len(self.sandboxes)}"
        if any(box.name == name for box in self.sandboxes.values()):
            fail(context, Condition.ALREADY_EXISTS, "NameTaken", f"there is a sandbox {name} already")
        sandbox = self.add(name, sandboxes_pb2.SCHEDULED)
        sandbox.spec.CopyFrom(request.spec)
        sandbox.created_at.GetCurrentTime()
        process = FakeProcess(request.spec.process)
        self.processes[sandbox.uid] = process
        threading.Thread(target=self._run, args=(sandbox, process), daemon=True).start()
        return sandbox

    def _run(self, sandbox: sandboxes_pb2.Sandbox, process: FakeProcess) -> None:
        argv0 = (list(process.asked.argv) or ["default"])[0]
        status = sandboxes_pb2.ExitStatus(code=127, message=f"{argv0}: not found")
        if argv0 == "never-starts":
            sandbox.status.reason, sandbox.status.message = "KernelPanic", "the guest's kernel did not boot"
            sandbox.status.phase = sandboxes_pb2.FAILED
            process.end(sandboxes_pb2.ExitStatus())
            return
        if argv0 in self.programs:
            sandbox.status.started_at.GetCurrentTime()
            sandbox.status.phase = sandboxes_pb2.RUNNING
            status = sandboxes_pb2.ExitStatus(code=self.programs[argv0](process))
        sandbox.status.exit_code, sandbox.status.has_exit_code = status.code, True
        sandbox.status.message = status.message
        sandbox.status.finished_at.GetCurrentTime()
        sandbox.status.phase = sandboxes_pb2.EXITED
        process.end(status)

    def CreateSandboxes(self, request: Any, context: Any) -> sandboxes_pb2.CreateSandboxesResponse:
        """Each as CreateSandbox makes it; the first that is refused refuses the call: no command asks for many."""
        outcomes = [sandboxes_pb2.CreateOutcome(sandbox=self.CreateSandbox(one, context)) for one in request.requests]
        return sandboxes_pb2.CreateSandboxesResponse(outcomes=outcomes)

    def GetSandbox(self, request: Any, context: Any) -> sandboxes_pb2.Sandbox:
        self._called("GetSandbox", request, context)
        return self.find(request.name, context)

    def ListSandboxes(self, request: Any, context: Any) -> sandboxes_pb2.ListSandboxesResponse:
        """Pages of two, so that paging is used."""
        rows = sorted(self.sandboxes.values(), key=lambda box: box.name)
        rows = [box for box in rows if (box.tenant or "default") == acting_for(context)]
        rows = [box for box in rows if request.ended or box.status.phase not in ENDED]
        at = int(request.page_token or 0)
        token = str(at + 2) if at + 2 < len(rows) else ""
        return sandboxes_pb2.ListSandboxesResponse(sandboxes=rows[at : at + 2], next_page_token=token)

    def ListUsage(self, request: Any, context: Any) -> sandboxes_pb2.ListUsageResponse:
        """Pages of two, so that paging is used."""
        at = int(request.page_token or 0)
        token = str(at + 2) if at + 2 < len(self.usage) else ""
        return sandboxes_pb2.ListUsageResponse(usage=self.usage[at : at + 2], next_page_token=token)

    refuse = staticmethod(fail)

    def ResizeSandbox(self, request: Any, context: Any) -> sandboxes_pb2.Sandbox:
        self._called("ResizeSandbox", request, context)
        sandbox = self.find(request.name, context)
        resources = sandbox.spec.resources
        if request.memory_mib > resources.memory_max_mib:
            message = f"{request.memory_mib} MiB is above the ceiling of {resources.memory_max_mib} MiB"
            fail(context, Condition.PRECONDITION, "AboveCeiling", message)
        resources.memory_mib = request.memory_mib or resources.memory_mib
        resources.memory_min_mib = request.memory_min_mib or resources.memory_min_mib
        resources.cpu_milli = request.cpu_milli or resources.cpu_milli
        return sandbox

    def ParkSandbox(self, request: Any, context: Any) -> sandboxes_pb2.Sandbox:
        self._called("ParkSandbox", request, context)
        sandbox = self.find(request.name, context)
        if sandbox.status.phase != sandboxes_pb2.RUNNING:
            fail(context, Condition.PRECONDITION, "SandboxNotRunning", f"sandbox {sandbox.name} is not running")
        sandbox.status.phase, sandbox.status.reason = sandboxes_pb2.PARKED, "Parked"
        return sandbox

    def UnparkSandbox(self, request: Any, context: Any) -> sandboxes_pb2.Sandbox:
        self._called("UnparkSandbox", request, context)
        sandbox = self.find(request.name, context)
        sandbox.status.phase, sandbox.status.reason = sandboxes_pb2.RUNNING, ""
        return sandbox

    def StopSandbox(self, request: Any, context: Any) -> sandboxes_pb2.Sandbox:
        self._called("StopSandbox", request, context)
        sandbox = self.find(request.name, context)
        sandbox.desired_state = sandboxes_pb2.DESIRED_STOPPED
        process = self.processes.get(sandbox.uid)
        if process is not None:
            process.signals.put(15)
            process.stdin.put(b"")
        else:
            sandbox.status.phase = sandboxes_pb2.EXITED
        return sandbox

    def DeleteSandbox(self, request: Any, context: Any) -> sandboxes_pb2.DeleteSandboxResponse:
        self._called("DeleteSandbox", request, context)
        if request.allow_missing and not any(request.name in (b.name, b.uid) for b in self.sandboxes.values()):
            return sandboxes_pb2.DeleteSandboxResponse()
        sandbox = self.find(request.name, context)
        if sandbox.status.phase not in ENDED and not request.force:
            fail(context, Condition.PRECONDITION, "StillLive", f"sandbox {sandbox.name} is running")
        del self.sandboxes[sandbox.uid]
        return sandboxes_pb2.DeleteSandboxResponse()

    def _reach(self, context: Any) -> None:
        if self.unreachable_s:
            give_up_s = time.monotonic() + self.unreachable_s
            while time.monotonic() < give_up_s and context.is_active():
                self.closing.wait(0.02)
            fail(context, Condition.UNAVAILABLE, "HostUnreachable", "host loom does not answer at 127.0.0.1:1")

    def AttachSandbox(self, request_iterator: Any, context: Any) -> Iterator[Output]:
        start = next(request_iterator).start
        self._called("AttachSandbox", start, context)
        sandbox = self.find(start.name, context)
        self._reach(context)
        process = self.processes[sandbox.uid]
        threading.Thread(target=self._feed, args=(process, request_iterator), daemon=True).start()
        position = 0 if start.from_start else len(process.log)
        while not self.beginning.wait(0.02):
            if not context.is_active():
                return
        yield Output(started=True)
        for sent, output in enumerate(process.follow(position, lambda: not context.is_active())):
            if output.WhichOneof("output") == "exit" and sandbox.status.phase == sandboxes_pb2.FAILED:
                fail(context, Condition.INTERNAL, sandbox.status.reason, sandbox.status.message)
            if self.break_after is not None and sent >= self.break_after:
                self._break(context)
            yield output
        if sandbox.spec.remove_on_exit:
            self.sandboxes.pop(sandbox.uid, None)

    def _break(self, context: Any) -> NoReturn:
        condition, times = self.break_with
        self.break_with = (condition, times - 1)
        if times == 1:
            self.break_after = None
        fail(context, condition, "HostAway", "the host's hostd went away")

    def _feed(self, process: FakeProcess, inputs: Any) -> None:
        try:
            for message in inputs:
                process.take(message)
        except grpc.RpcError:
            return
        except Exception:  # the call ended while it was read from
            return

    def ExecSandbox(self, request_iterator: Any, context: Any) -> Iterator[Output]:
        start = next(request_iterator).start
        self._called("ExecSandbox", start, context)
        self.find(start.name, context)
        process = FakeProcess(start.exec)
        argv0 = start.exec.argv[0]
        if argv0 not in self.programs:
            yield Output(exit=sandboxes_pb2.ExitStatus(code=127, message=f"{argv0}: not found"))
            return
        yield Output(started=True)
        threading.Thread(target=self._feed, args=(process, request_iterator), daemon=True).start()

        def run() -> None:
            process.end(sandboxes_pb2.ExitStatus(code=self.programs[argv0](process)))

        threading.Thread(target=run, daemon=True).start()
        yield from process.follow(0, lambda: not context.is_active())

    def GetLogs(self, request: Any, context: Any) -> Iterator[Output]:
        self._called("GetLogs", request, context)
        sandbox = self.find(request.name, context)
        self._reach(context)
        process = self.processes[sandbox.uid]
        if not request.follow:
            yield from process.log[-request.tail_lines :]
            return
        for sent, output in enumerate(process.follow(0, lambda: not context.is_active())):
            if self.break_after is not None and sent >= self.break_after:
                self._break(context)
            if output.WhichOneof("output") != "exit":
                yield output

    def GetSharingLedger(self, request: Any, context: Any) -> sandboxes_pb2.SharingLedger:
        return self.ledger

    def ExplainSandbox(self, request: Any, context: Any) -> sandboxes_pb2.Explanation:
        self._called("ExplainSandbox", request, context)
        return self.explanation

    def WatchEvents(self, request: Any, context: Any) -> Iterator[sandboxes_pb2.Event]:
        self._called("WatchEvents", request, context)
        yield from (event for event in self.events if request.subject in ("", event.subject))
        while request.follow and context.is_active():
            self.closing.wait(0.02)

    def WatchSandboxes(self, request: Any, context: Any) -> Iterator[sandboxes_pb2.SandboxEvent]:
        yield from ()

    # Images.

    def ImportImage(self, request_iterator: Any, context: Any) -> Iterator[images_pb2.ImportImageResponse]:
        self.import_start = next(request_iterator).start
        self._called("ImportImage", self.import_start, context)
        self.uploaded = b"".join(message.chunk for message in request_iterator)
        if self.uploaded.startswith(b"bad"):
            fail(context, Condition.INVALID, "BadArchive", "the archive is no tar: it begins with 'bad'")
        progress = images_pb2.ImportImageResponse.Progress(step="convert", done_bytes=1, total_bytes=2)
        yield images_pb2.ImportImageResponse(progress=progress)
        image = images_pb2.Image(
            name=self.import_start.name, digest="sha256:" + "b" * 64, size_bytes=4 << 20, format="rootfs",
            layers=[images_pb2.Layer(digest="sha256:" + "c" * 64)],
        )  # fmt: skip
        self.images[image.name] = image
        yield images_pb2.ImportImageResponse(image=image)

    def GetImage(self, request: Any, context: Any) -> images_pb2.Image:
        if request.name not in self.images:
            fail(context, Condition.NOT_FOUND, "ImageNotFound", f"there is no image {request.name}")
        return self.images[request.name]

    def ListImages(self, request: Any, context: Any) -> images_pb2.ListImagesResponse:
        return images_pb2.ListImagesResponse(images=sorted(self.images.values(), key=lambda image: image.name))

    def DeleteImage(self, request: Any, context: Any) -> images_pb2.DeleteImageResponse:
        self._called("DeleteImage", request, context)
        if self.images.pop(request.name, None) is None and not request.allow_missing:
            fail(context, Condition.NOT_FOUND, "ImageNotFound", f"there is no image {request.name}")
        return images_pb2.DeleteImageResponse()

    # Hosts.

    def ReportHost(self, request: Any, context: Any) -> hosts_pb2.ReportHostResponse:
        request.host.state = hosts_pb2.READY
        self.hosts[request.host.name] = request.host
        return hosts_pb2.ReportHostResponse(lease_s=30)

    def LocateImage(self, request: Any, context: Any) -> hosts_pb2.LocateImageResponse:
        return hosts_pb2.LocateImageResponse()

    def ReportImage(self, request: Any, context: Any) -> hosts_pb2.ReportImageResponse:
        return hosts_pb2.ReportImageResponse()

    def PullImage(self, request: Any, context: Any) -> Iterator[images_pb2.ImportImageResponse]:
        self.calls.append(("PullImage", request))
        progress = images_pb2.ImportImageResponse.Progress(step="receive", done_bytes=5)
        yield images_pb2.ImportImageResponse(progress=progress)
        yield images_pb2.ImportImageResponse(image=images_pb2.Image(name=request.name, digest="sha256:" + "a" * 64))

    def WatchAssignments(self, request: Any, context: Any) -> Iterator[sandboxes_pb2.SandboxEvent]:
        yield from ()

    def ReportSandbox(self, request: Any, context: Any) -> hosts_pb2.ReportSandboxResponse:
        return hosts_pb2.ReportSandboxResponse()

    def RecordEvent(self, request: Any, context: Any) -> hosts_pb2.RecordEventResponse:
        return hosts_pb2.RecordEventResponse()


def until(condition: Callable[[], bool], deadline_s: float = WAIT_S) -> None:
    """Returns once `condition` holds; fails after the deadline."""
    give_up_s = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < give_up_s, "not so in time"
        time.sleep(0.01)
