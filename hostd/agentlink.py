"""The I/O around the agent protocol: one unix socket, one reader task, futures for replies, queues for output.

Promise: nothing a guest says can do more than end its own link. Memory is bounded: by the protocol's windows for what
the guest sends, and for what it does not read by reading no more of it either. Every wait has a deadline.
Owns: the socket and its tasks, from connect() to close(). `lost` resolves, with why, when the link is dead.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from guestagent.elastic import ElasticRequest, SetClock
from guestagent.errors import AgentError, BadRequest, GuestRefused, ProtocolError, WindowFull
from guestagent.messages import (
    AgentEvent,
    Configure,
    GuestEvent,
    GuestState,
    GuestStats,
    HelloReceived,
    Output,
    Prepare,
    Renew,
    ReplyBody,
    ReplyReceived,
    Services,
    StartProcess,
    Stream,
    Synced,
)
from guestagent.protocol import AgentSession, SessionCarry
from hostd.agentprocess import AgentProcess
from hostd.errors import (
    AgentLost,
    CommandFailed,
    HostdError,
    InvalidSpec,
    NotRunning,
    ShortOfResources,
    StartFailed,
)
from hostd.tasks import OwnedTasks

REPLY_DEADLINE_S = 30.0
READ_BYTES = 65536
EXIT_LAG_S = 0.5


class AgentLink:
    """A connected, greeted agent."""

    def __init__(self, session: AgentSession, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._session, self._reader, self._writer = session, reader, writer
        self._loop = asyncio.get_running_loop()
        self._replies: dict[int, asyncio.Future[ReplyBody]] = {}
        self._processes: dict[int, AgentProcess] = {}
        self._next_proc = 2  # 1 is main
        self._hello: asyncio.Future[GuestState] = self._loop.create_future()
        self._task: asyncio.Task[None] | None = None
        self._leftovers = OwnedTasks()
        self.lost: asyncio.Future[str] = self._loop.create_future()
        self.on_event: Callable[[GuestEvent], None] = lambda event: None

    @classmethod
    async def connect(
        cls,
        path: Path,
        *,
        deadline_s: float,
        gone: asyncio.Future[str],
        carry: SessionCarry | None = None,
        at_boundary: bool = False,
    ) -> AgentLink:
        """Connects and greets; returns when the guest's agent answered. StartFailed when the VMM goes first
        (`gone` resolves), AgentLost after the deadline or on a breach. `at_boundary`: see AgentSession.open."""
        try:
            async with asyncio.timeout(deadline_s):
                reader, writer = await asyncio.open_unix_connection(str(path), limit=READ_BYTES)
                link = cls(AgentSession(os.urandom(8), carry=carry), reader, writer)
                try:
                    link._task = asyncio.create_task(link._run(at_boundary), name=f"agent {path.parent.name}")
                    waited: set[asyncio.Future[Any]] = {link._hello, link.lost, gone}
                    await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
                    if link._hello.done():
                        return link
                    if not gone.done():  # the port closes a moment before the process is seen to end
                        await asyncio.wait({gone}, timeout=EXIT_LAG_S)
                    if gone.done():
                        raise StartFailed(f"the VMM is gone: {gone.result()}", reason="VmmExited")
                    raise AgentLost(link.lost.result())
                except BaseException:
                    await link.close()
                    raise
        except TimeoutError:
            raise AgentLost(
                f"the guest's agent did not answer within {deadline_s:.0f} s", reason="BootTimeout"
            ) from None
        except OSError as error:
            raise AgentLost(f"{path}: {error}") from error

    @property
    def guest(self) -> GuestState:
        """What the guest said of itself at HELLO."""
        return self._hello.result()

    async def _run(self, at_boundary: bool) -> None:
        why = "the agent closed its port"
        try:
            self._writer.write(self._session.open(at_boundary=at_boundary))
            while data := await self._reader.read(READ_BYTES):
                self._receive(data)
                await self._writer.drain()  # who does not read what we say is not listened to either
        except ProtocolError as error:
            why = str(error)
        except (AgentError, OSError) as error:
            why = f"the link to the agent failed: {error}"
        except asyncio.CancelledError:
            why = "hostd let go of it"
            raise
        finally:
            self._end(why)

    def _receive(self, data: bytes) -> None:
        try:
            events = self._session.receive(data, self._loop.time())
        except ProtocolError as error:
            for event in error.events:
                self._dispatch(event)
            raise
        for event in events:
            self._dispatch(event)

    def _dispatch(self, event: AgentEvent) -> None:
        if isinstance(event, Synced):
            self._writer.write(self._session.hello())
        elif isinstance(event, HelloReceived):
            self._next_proc = max([self._next_proc, *(state.proc + 1 for state in event.state.procs)])
            if not self._hello.done():
                self._hello.set_result(event.state)
        elif isinstance(event, ReplyReceived):
            future = self._replies.pop(event.request_id, None)
            if future is not None and not future.done():
                if event.refused is not None:
                    future.set_exception(event.refused)
                else:
                    future.set_result(event.body)
        elif isinstance(event, GuestEvent):
            self.on_event(event)
        elif event.proc in self._processes:
            self._processes[event.proc].deliver(event)
        elif isinstance(event, Output):  # nobody listens any more: let it flow, so that the process can end
            self.acknowledge(event.proc, event.stream, event.offset + len(event.data))

    def _end(self, why: str) -> None:
        self._session.close()
        self._writer.transport.abort()  # close() would wait for a guest that does not read
        if not self.lost.done():
            self.lost.set_result(why)
        for future in self._replies.values():
            if not future.done():
                future.set_exception(AgentLost(why))
        self._replies.clear()
        for process in self._processes.values():
            process.fail(why)

    async def request(
        self, build: Callable[[AgentSession], tuple[int, bytes]], deadline_s: float = REPLY_DEADLINE_S
    ) -> ReplyBody:
        """Sends a request and waits for its reply. GuestRefused with the guest's errno; InvalidSpec when it was not
        fit to be sent, ShortOfResources when too much is in flight, AgentLost otherwise."""
        try:
            request_id, data = build(self._session)
        except BadRequest as error:
            raise InvalidSpec(str(error)) from error
        except WindowFull as error:
            raise ShortOfResources(f"the agent is busy: {error}; try again", reason="AgentBusy") from error
        except AgentError as error:
            raise AgentLost(f"the agent cannot be asked: {error}") from error
        future: asyncio.Future[ReplyBody] = self._loop.create_future()
        self._replies[request_id] = future
        self._writer.write(data)
        try:
            async with asyncio.timeout(deadline_s):
                return await future
        except TimeoutError:
            raise AgentLost(f"the agent did not answer a request within {deadline_s:.0f} s") from None
        finally:
            self._replies.pop(request_id, None)

    async def elastic(self, request: ElasticRequest, deadline_s: float) -> ReplyBody:
        """Asks about balloon or vCPUs. GuestRefused with the guest's errno; AgentLost, also when there is no answer."""
        return await self.request(lambda session: session.elastic(request), deadline_s)

    async def prepare(self, prepare: Prepare) -> None:
        """Has the guest mount an image, for a template. StartFailed with the guest's words when it cannot."""
        try:
            await self.request(lambda session: session.prepare(prepare), prepare.deadline_ms / 1000 + 10)
        except GuestRefused as refusal:
            raise StartFailed(f"the image could not be mounted: {refusal}", reason="ConfigureFailed") from refusal

    async def configure(self, configure: Configure) -> None:
        """Makes the guest one sandbox. StartFailed with the guest's words when it cannot."""
        try:
            await self.request(lambda session: session.configure(configure), configure.deadline_ms / 1000 + 10)
        except GuestRefused as refusal:
            raise StartFailed(f"the guest could not be set up: {refusal}", reason="ConfigureFailed") from refusal

    async def rehearse(self, configure: Configure) -> None:
        """Gives a prepared guest an identity to throw away. StartFailed with the guest's words when it cannot, also
        when anything of the last rehearsal still lives in it."""
        try:
            await self.request(lambda session: session.rehearse(configure), configure.deadline_ms / 1000 + 10)
        except GuestRefused as refusal:
            raise StartFailed(f"the guest cannot be rehearsed: {refusal}", reason="RehearsalFailed") from refusal

    async def services(self, services: Services) -> None:
        """Tells the agent who answers, and has it begin a session on the services port. StartFailed."""
        try:
            await self.request(lambda session: session.services(services))
        except GuestRefused as refusal:
            raise StartFailed(f"the services cannot be set up: {refusal}", reason="ServicesFailed") from refusal

    async def freeze(self, deadline_s: float) -> None:
        """Has the workload stand still, and returns when it does. NotRunning with the guest's words when it cannot;
        then it goes on."""
        try:
            await self.request(lambda session: session.freeze(int(deadline_s * 1000)), deadline_s + 10)
        except GuestRefused as refusal:
            raise NotRunning(f"the workload cannot be frozen: {refusal}", reason="CannotFreeze") from refusal

    async def thaw(self) -> None:
        """Lets a frozen workload go on; nothing happens when it is not frozen, or the agent knows of no freezing."""
        try:
            await self.request(lambda session: session.thaw())
        except GuestRefused as refusal:
            if refusal.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise AgentLost(str(refusal), reason="AgentRefused") from refusal

    async def renew(self, renew: Renew) -> None:
        """Makes a frozen copy of a guest a sandbox of its own and lets its workload go on. StartFailed."""
        try:
            await self.request(lambda session: session.renew(renew))
        except GuestRefused as refusal:
            raise StartFailed(f"the copy could not be made its own: {refusal}", reason="RenewFailed") from refusal

    async def clock(self, time_unix_ns: int) -> None:
        """Sets the guest's clock, for what runs in it, too. AgentLost, also when the guest refuses."""
        try:
            await self.elastic(SetClock(time_unix_ns), REPLY_DEADLINE_S)
        except GuestRefused as refusal:
            raise AgentLost(f"the clock cannot be set: {refusal}", reason="AgentRefused") from refusal

    async def spawn(self, start: StartProcess) -> AgentProcess:
        """Starts a process. CommandFailed (127 not found, 126 cannot be run) with the guest's words. Cancelled, or
        without an answer: the process is killed in case the guest started it after all."""
        process = self._processes[start.proc] = AgentProcess(self, start.proc, stdin=start.stdin)
        try:
            await self.request(lambda session: session.start(start))
        except GuestRefused as refusal:
            self.drop(start.proc)
            name = start.argv[0].decode(errors="replace")
            code = 127 if refusal.errno == errno.ENOENT else 126
            raise CommandFailed(f"{name}: {refusal.message or os.strerror(refusal.errno)}", code) from refusal
        except BaseException:
            self.abandon(process)
            raise
        return process

    def abandon(self, process: AgentProcess) -> None:
        """Kills a process that nobody wants any more and frees what the guest keeps for it, in the background."""
        if not self.lost.done():
            self._leftovers.spawn(_put_away(process, self.drop), name=f"put away process {process.proc}")

    def new_proc(self) -> int:
        """A process number that this guest has not seen."""
        self._next_proc += 1
        return self._next_proc - 1

    def follow(self, proc: int) -> AgentProcess:
        """Goes on with a process that HELLO told of."""
        process = self._processes[proc] = AgentProcess(self, proc)
        try:
            self._writer.write(self._session.follow(proc))
        except AgentError as error:
            raise AgentLost(f"process {proc} cannot be followed: {error}") from error
        return process

    async def stats(self) -> GuestStats:
        """The guest's counters. AgentLost when it does not answer."""
        try:
            answer = await self.request(lambda session: session.stats())
        except GuestRefused as refusal:
            raise AgentLost(str(refusal)) from refusal
        assert isinstance(answer, GuestStats)
        return answer

    async def shutdown(self, grace_s: float) -> None:
        """Asks the guest to end itself; it answers before it begins."""
        try:
            await self.request(lambda session: session.shutdown(int(grace_s * 1000)))
        except GuestRefused as refusal:
            raise AgentLost(str(refusal)) from refusal

    def acknowledge(self, proc: int, stream: Stream, offset: int) -> None:
        """The host holds the stream's bytes before `offset`. Of a process that is put away nothing is said."""
        if not self.lost.done():
            with contextlib.suppress(BadRequest):
                self._writer.write(self._session.ack(proc, stream, offset))

    def stdin_room(self, proc: int) -> int:
        """Bytes that may be sent now; 0 when the link is dead or the process put away."""
        if self.lost.done():
            return 0
        try:
            return self._session.stdin_room(proc)
        except BadRequest:
            return 0

    def send_stdin(self, proc: int, data: bytes, *, eof: bool = False) -> None:
        """Sends at most `stdin_room` bytes. The end of a stdin that has ended is not told again."""
        if not self.lost.done():
            with contextlib.suppress(BadRequest):
                self._writer.write(self._session.stdin(proc, data, eof))

    def drop(self, proc: int) -> None:
        """Nobody listens to this process any more."""
        self._processes.pop(proc, None)

    async def close(self) -> None:
        """Lets go of the guest, which keeps running. Idempotent."""
        await self._leftovers.aclose()
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
        self._end("hostd let go of it")


async def _put_away(process: AgentProcess, drop: Callable[[int], None]) -> None:
    try:
        async with asyncio.timeout(REPLY_DEADLINE_S):
            await process.signal(signal.SIGKILL)
            async for _ in process.output():
                pass
            await process.release()
    except (HostdError, TimeoutError):
        pass  # it was never started, or the link's owner learns of its end by `lost`
    finally:
        drop(process.proc)
