"""An agent in memory: the guest's end of PROTOCOL.md without a guest, for tests of what talks to agents.

Sans-I/O like the host's end: `FakeAgent.receive(bytes) -> bytes`. It keeps the contract (sync, windows,
resumption after `hang_up`, exits, stats, shutdown) with processes that are scripts instead of programs, and
on demand breaks it in one of the ways of `Misbehaviour`. Deterministic: no clock, no randomness, no thread.
"""

from __future__ import annotations

import errno
import zlib
from collections.abc import Callable
from dataclasses import replace

from guestagent.errors import AgentError
from guestagent.fakeballoon import FakeBalloon
from guestagent.frames import (
    ANSWER_MAGIC,
    HEADER,
    MAX_PAYLOAD_BYTES,
    SYNC_BYTES,
    SYNC_MAGIC,
    Limits,
    decode_payload,
    encode_frame,
)
from guestagent.messages import (
    MAIN_PROC,
    PROTOCOL_VERSION,
    Configure,
    GuestState,
    GuestStats,
    Kind,
    Prepare,
    ProcState,
    Renew,
    StartProcess,
    Stream,
)
from guestagent.misbehaviour import Misbehaviour, spoil
from guestagent.script import (
    DEFAULT_STATS,
    OUTPUT_BYTES,
    SIGNAL_EXIT_CODE,
    WINDOW_BYTES,
    Script,
    ScriptedOutput,
    ScriptedProcess,
    default_script,
)
from guestagent.wire import (
    decode_configure,
    decode_prepare,
    decode_renew,
    decode_start,
    encode_guest_state,
    encode_stats,
)

__all__ = ["DEFAULT_STATS", "FakeAgent", "Misbehaviour", "Script", "default_script"]


class FakeAgent:
    """One guest's agent. It outlives connections: `hang_up` ends one, the next begins with SYNC.

    `scripts` says what each START runs. `misbehaviour` may be set at any time and begins after
    `honest_replies` more REPLYs (HELLO's is the first). `requests` are the kinds of the messages that came,
    `configured` is what CONFIGURE gave, `renewed` what RENEW gave, `powered_off` whether SHUTDOWN came.
    """

    def __init__(
        self,
        scripts: Callable[[StartProcess], Script] = default_script,
        misbehaviour: Misbehaviour = Misbehaviour.NONE,
        *,
        honest_replies: int = 0,
        boot_id: str = "6f9d1c2e-0000-4000-8000-000000000001",
        stats: GuestStats = DEFAULT_STATS,
    ) -> None:
        self.misbehaviour = misbehaviour
        self.honest_replies = honest_replies
        self.boot_id = boot_id
        self.stats = stats
        self.prepared: Prepare | None = None
        self.configured: Configure | None = None
        self.rehearsed: Configure | None = None
        self.renewed: Renew | None = None
        self.frozen = False
        self.powered_off = False
        self.balloon = FakeBalloon()
        self.requests: list[Kind] = []
        self._scripts = scripts
        self._procs: dict[int, ScriptedProcess] = {}
        self._buffer = bytearray()
        self._nonce: bytes | None = None
        self._greeted = False
        self._replies = 0
        self._out: list[bytes] = []
        self._dribble = bytearray()

    # The connection.

    def receive(self, data: bytes) -> bytes:
        """What the agent writes after reading `data` (of any cut)."""
        self._buffer += data
        while not self.powered_off and self._step():
            pass
        self._pump()
        return self._written()

    def more(self, max_bytes: int = 1) -> bytes:
        """The next bytes a dribbling agent holds back."""
        piece = bytes(self._dribble[:max_bytes])
        del self._dribble[:max_bytes]
        return piece

    def hang_up(self) -> None:
        """The host went away: processes run on, output is kept, what was half said is forgotten."""
        self._greeted = False
        self.balloon.done()
        self._out.clear()
        self._dribble.clear()

    def event(self, name: str, values: dict[str, int]) -> bytes:
        """The agent says EVENT of its own accord."""
        self._say([Kind.EVENT, 0, name, values])
        return self._written()

    def write(self, proc: int, data: bytes, stream: Stream = Stream.STDOUT) -> bytes:
        """The process writes `data`; gives what the agent sends of it now."""
        self._procs[proc].outputs[stream].waiting += data
        self._pump()
        return self._written()

    def exit(self, proc: int, code: int = 0, signal: int = 0) -> bytes:
        """The process ends; gives what the agent sends of it now."""
        self._end(self._procs[proc], code, signal)
        self._pump()
        return self._written()

    def _step(self) -> bool:
        """Takes one SYNC or frame off the buffer; False when more bytes are needed."""
        if len(self._buffer) < HEADER.size:
            return False
        length, crc = HEADER.unpack_from(self._buffer)
        if not 1 <= length <= MAX_PAYLOAD_BYTES or self._nonce is None:
            return self._hunt()
        if len(self._buffer) < HEADER.size + length:
            return False
        payload = bytes(self._buffer[HEADER.size : HEADER.size + length])
        if zlib.crc32(payload) != crc:
            return self._hunt()
        del self._buffer[: HEADER.size + length]
        self._handle(decode_payload(payload, Limits()))
        return True

    def _hunt(self) -> bool:
        at = self._buffer.find(SYNC_MAGIC)
        if at < 0:
            del self._buffer[: max(0, len(self._buffer) - len(SYNC_MAGIC) + 1)]
            return False
        del self._buffer[:at]
        if len(self._buffer) < SYNC_BYTES:
            return False
        nonce = bytes(self._buffer[len(SYNC_MAGIC) : SYNC_BYTES])
        del self._buffer[:SYNC_BYTES]
        if nonce != self._nonce:
            self._new_session(nonce)
        return True

    def _new_session(self, nonce: bytes) -> None:
        self.hang_up()
        self._nonce = nonce
        for process in self._procs.values():
            process.followed = process.exit_sent = False
            for output in process.outputs.values():
                output.sent, output.end_sent = output.base, False
        self._out.append(ANSWER_MAGIC + nonce)

    # Requests.

    def _handle(self, message: list[object]) -> None:
        kind = Kind(message[0])  # type: ignore[arg-type]
        self.requests.append(kind)
        handlers: dict[Kind, Callable[..., object]] = {
            Kind.HELLO: self._hello,
            Kind.CONFIGURE: self._configure,
            Kind.PREPARE: self._prepare,
            Kind.REHEARSE: self._rehearse,
            Kind.RENEW: self._renew,
            Kind.FREEZE: self._freeze,
            Kind.THAW: self._thaw,
            Kind.START: self._start,
            Kind.STDIN: self._stdin,
            Kind.ACK: self._ack,
            Kind.SIGNAL: self._signal,
            Kind.WINSIZE: self._winsize,
            Kind.STATS: lambda: encode_stats(replace(self.stats, balloon_kib=self.balloon.blocks << 11)),
            Kind.SHUTDOWN: self._shutdown,
            Kind.FORGET: self._forget,
            **self.balloon.handlers(),
        }
        try:
            code, body = 0, handlers[kind](*message[2:])
        except OSError as error:
            code, body = error.errno or errno.EIO, error.strerror
        except (AgentError, KeyError) as error:
            code, body = errno.EINVAL, str(error)
        if kind not in (Kind.STDIN, Kind.ACK):
            self._replies += 1
            self._say([Kind.REPLY, message[1], code, body])

    def _hello(self, version: int) -> object:
        if version != PROTOCOL_VERSION:
            raise OSError(errno.EPROTONOSUPPORT, f"version {version} is not spoken here")
        self._greeted = True
        procs = tuple(
            ProcState(
                proc,
                process.pid,
                process.exit is not None,
                process.stdin_offset,
                process.outputs[Stream.STDOUT].base,
                process.outputs[Stream.STDERR].base,
            )
            for proc, process in self._procs.items()
        )
        return encode_guest_state(GuestState(PROTOCOL_VERSION, "0.1.0", self.boot_id, bool(self.configured), procs))

    def _prepare(self, body: object) -> None:
        if self.configured is not None or self.prepared is not None:
            raise OSError(errno.EALREADY, "prepared or configured already")
        self.prepared = decode_prepare(body)

    def _rehearse(self, body: object) -> None:
        if self.prepared is None and self.configured is None:
            raise OSError(errno.EINVAL, "PREPARE comes first")
        self.rehearsed = self._identity(body)

    def _configure(self, body: object) -> None:
        self.configured = self._identity(body)

    def _identity(self, body: object) -> Configure:
        if self.configured is not None:
            raise OSError(errno.EALREADY, "configured already")
        if self.prepared is not None and self.prepared.layers != decode_configure(body).layers:
            raise OSError(errno.EINVAL, "other layers than these were prepared")
        if self.rehearsed is not None and self._procs:
            raise OSError(errno.EBUSY, "something of a rehearsal is left")
        return decode_configure(body)

    def _freeze(self, deadline_ms: int) -> None:
        if self.configured is None:
            raise OSError(errno.EAGAIN, "not configured yet")
        if self.frozen:
            raise OSError(errno.EALREADY, "the workload is frozen")
        self.frozen = True

    def _thaw(self) -> None:
        self.frozen = False

    def _renew(self, body: object) -> None:
        if not self.frozen:
            raise OSError(errno.EINVAL, "FREEZE comes first")
        self.renewed, self.frozen = decode_renew(body), False

    def _start(self, body: object) -> int:
        start = decode_start(body)
        if self.configured is None and self.rehearsed is None:
            raise OSError(errno.EAGAIN, "not configured yet")
        if self.configured is None and start.proc == MAIN_PROC:
            raise OSError(errno.EINVAL, "a rehearsal has no main process")
        if start.proc in self._procs:
            raise OSError(errno.EEXIST, f"process {start.proc} exists")
        script = self._scripts(start)
        if script.refuse:
            raise OSError(script.refuse, script.message)
        pid = 100 + len(self._procs)
        outputs = {stream: ScriptedOutput() for stream in Stream}
        outputs[Stream.STDOUT].waiting += script.stdout
        outputs[Stream.STDERR].waiting += script.stderr
        process = self._procs[start.proc] = ScriptedProcess(start, script, pid, outputs)
        if script.signal:
            self._end(process, SIGNAL_EXIT_CODE, script.signal)
        elif script.exit_code is not None:
            self._end(process, script.exit_code, 0)
        elif script.echo_stdin and not start.stdin:
            self._end(process, 0, 0)
        return pid

    def _end(self, process: ScriptedProcess, code: int, signal: int) -> None:
        if process.exit is not None:
            return
        process.exit = (SIGNAL_EXIT_CODE if signal else code, signal)
        for output in process.outputs.values():
            output.closed = True
        if process.start.proc == MAIN_PROC:
            for other in self._procs.values():
                self._end(other, SIGNAL_EXIT_CODE, 9)

    def _stdin(self, proc: int, offset: int, data: bytes, eof: bool) -> None:
        process = self._procs.get(proc)
        if process is None or offset > process.stdin_offset:
            return
        fresh = data[process.stdin_offset - offset :]
        process.stdin_offset += len(fresh)
        process.followed = True
        if process.script.echo_stdin and process.exit is None:
            process.outputs[Stream.STDOUT].waiting += fresh
        if fresh:
            self._say([Kind.STDIN_ACK, 0, proc, process.stdin_offset])
        if eof and process.script.echo_stdin:
            self._end(process, 0, 0)

    def _ack(self, proc: int, stream: int, offset: int) -> None:
        process = self._procs.get(proc)
        if process is None:
            return
        output = process.outputs[Stream(stream)]
        if output.base <= offset <= output.base + len(output.held):
            del output.held[: offset - output.base]
            output.base = offset
            output.sent = max(output.sent, offset)
        process.followed = True

    def _signal(self, proc: int, signo: int) -> None:
        process = self._procs.get(proc)
        if process is None or process.exit is not None:
            raise OSError(errno.ESRCH, "no such process")
        process.followed = True
        if signo in (1, 2, 3, 9, 15):
            self._end(process, SIGNAL_EXIT_CODE, signo)

    def _winsize(self, proc: int, rows: int, cols: int) -> None:
        if proc not in self._procs:
            raise OSError(errno.ESRCH, "no such process")
        self._procs[proc].followed = True

    def _shutdown(self, grace_ms: int) -> None:
        for process in self._procs.values():
            self._end(process, SIGNAL_EXIT_CODE, 15)
        self.powered_off = True

    def _forget(self, proc: int) -> None:
        process = self._procs.get(proc)
        if process is None:
            raise OSError(errno.ESRCH, "no such process")
        if process.exit is None:
            raise OSError(errno.EBUSY, "it has not exited")
        del self._procs[proc]

    # What the agent writes.

    def _say(self, message: list[object]) -> None:
        self._out.append(encode_frame(message))

    def _pump(self) -> None:
        """Sends what followed processes may send now, EXITED last."""
        if not self._greeted:
            return
        for proc, process in self._procs.items():
            if not process.followed:
                continue
            for stream, output in process.outputs.items():
                self._pump_stream(proc, stream, output)
            done = all(output.end_sent for output in process.outputs.values())
            if done and process.exit is not None and not process.exit_sent:
                process.exit_sent = True
                self._say([Kind.EXITED, 0, proc, *process.exit, False])

    def _pump_stream(self, proc: int, stream: Stream, output: ScriptedOutput) -> None:
        window_bytes = WINDOW_BYTES
        if self._now() is Misbehaviour.FLOOD_OUTPUT:
            window_bytes = 1 << 30
            output.waiting += bytes(2 * WINDOW_BYTES)
        output.refill(window_bytes)
        while output.sent < output.base + len(output.held):
            at = output.sent - output.base
            piece = bytes(output.held[at : at + OUTPUT_BYTES])
            self._say([Kind.OUTPUT, 0, proc, stream, output.sent, piece])
            output.sent += len(piece)
        if output.closed and not output.waiting and not output.end_sent:
            output.end_sent = True
            self._say([Kind.OUTPUT, 0, proc, stream, output.sent, b""])

    def _now(self) -> Misbehaviour:
        """The misbehaviour in force."""
        return Misbehaviour.NONE if self.honest_replies > 0 else self.misbehaviour

    def _written(self) -> bytes:
        """Everything said since the last call, as it goes out."""
        said = b"".join(self._out)
        self._out.clear()
        if self._now() is Misbehaviour.DRIBBLE:
            self._dribble += said
            return self.more()
        spoilt = spoil(self._now(), said, next(iter(self._procs), MAIN_PROC))
        self.honest_replies -= self._replies
        self._replies = 0
        return spoilt
