"""Flow control: where each stream of a guest's processes stands, what carries over, how often it may speak.

Promise: pure bookkeeping over offsets. Output is taken at exactly the next offset and within the window past
the last acknowledgement; stdin is kept until acknowledged, so that it can be sent again. A guest's breach is
a ProtocolError, the host's own misuse a BadRequest or WindowFull.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from guestagent.errors import BadRequest, ProtocolError, WindowFull
from guestagent.frames import Limits
from guestagent.messages import Exited, Output, ProcState, Stream


@dataclass(frozen=True)
class ProcCarry:
    """What the host knows of a process when it connects (again). None means unknown: take the guest's word.

    `out_offset` and `err_offset`: the host holds all bytes before it. `stdin_offset`: acknowledged before it;
    `stdin_unacked` are the bytes from there on that were sent already, `stdin_eof` whether the end was.
    """

    proc: int
    out_offset: int | None = None
    err_offset: int | None = None
    stdin_offset: int | None = None
    stdin_unacked: bytes = b""
    stdin_eof: bool = False
    stdin_open: bool = True


@dataclass(frozen=True)
class SessionCarry:
    """What outlives a connection. Make it of a journal's records, or take `AgentSession.carry()`.

    `boot_id` empty means unknown. When the guest turns out to be in another boot, `procs` are void.
    """

    boot_id: str = ""
    procs: tuple[ProcCarry, ...] = ()


@dataclass
class OutputLedger:
    """One output stream: bytes before `expected` came, the host said it holds those before `acked`.

    After a reconnect the agent may begin with bytes that it held still and the host has: from its `oldest`
    on, until it has read the host's ACK. They are checked like all others and dropped.
    """

    expected: int = 0
    acked: int = 0
    oldest: int | None = None
    ended: bool = False

    def take(self, output: Output, limits: Limits) -> Output | None:
        """What is new of `output`, None when nothing is."""
        where = f"OUTPUT of process {output.proc} {output.stream.name.lower()}"
        if self.ended:
            raise ProtocolError(f"{where} after its end")
        again = self.oldest is not None and output.offset == self.oldest < self.expected and bool(output.data)
        if output.offset != self.expected and not again:
            raise ProtocolError(f"{where} at offset {output.offset}, {self.expected} is next")
        if len(output.data) > limits.max_output_bytes:
            raise ProtocolError(f"{where} has {len(output.data)} bytes, at most {limits.max_output_bytes}")
        after = output.offset + len(output.data)
        if after - self.acked > limits.window_bytes:
            raise ProtocolError(f"{where} goes over the window of {limits.window_bytes} bytes")
        self.oldest = after if again else None
        if after <= self.expected and output.data:
            return None
        fresh = output.data[self.expected - output.offset :]
        start, self.expected = self.expected, after
        self.ended = not output.data
        return Output(output.proc, output.stream, start, fresh)

    def ack(self, offset: int) -> None:
        if not self.acked <= offset <= self.expected:
            raise BadRequest(f"ACK {offset} is outside {self.acked} … {self.expected}")
        self.acked = offset


@dataclass
class StdinLedger:
    """Stdin of one process: `unacked` are the bytes from `acked` on that were sent.

    A host that lost its records takes the guest's offset for `acked`, while the agent may still be writing
    bytes before it: acknowledgements from `floor` on are taken, and change nothing below `acked`.
    """

    acked: int = 0
    floor: int = 0
    unacked: bytearray = field(default_factory=bytearray)
    eof: bool = False
    open: bool = True

    @property
    def sent(self) -> int:
        return self.acked + len(self.unacked)

    def room(self, limits: Limits) -> int:
        return 0 if self.eof or not self.open else limits.window_bytes - len(self.unacked)

    def put(self, proc: int, data: bytes, eof: bool, limits: Limits) -> int:
        """Takes `data` to be sent; gives the offset it goes to."""
        if not self.open:
            raise BadRequest(f"process {proc} was started without stdin")
        if self.eof:
            raise BadRequest(f"stdin of process {proc} was ended before")
        if len(data) > self.room(limits):
            raise WindowFull(f"stdin of process {proc} has room for {self.room(limits)} bytes, not {len(data)}")
        offset = self.sent
        self.unacked += data
        self.eof = eof
        return offset

    def take_ack(self, proc: int, offset: int) -> None:
        if not self.floor <= offset <= self.sent:
            raise ProtocolError(f"STDIN_ACK of process {proc} at {offset}, outside {self.floor} … {self.sent}")
        self.floor = offset
        if offset > self.acked:
            del self.unacked[: offset - self.acked]
            self.acked = offset


@dataclass
class ProcLedger:
    """One process. The guest may tell of it only once it is `followed` (started or followed here)."""

    proc: int
    followed: bool = False
    stdin: StdinLedger = field(default_factory=StdinLedger)
    resend_from: int = 0
    exited: Exited | None = None
    outputs: dict[Stream, OutputLedger] = field(default_factory=lambda: {stream: OutputLedger() for stream in Stream})

    @classmethod
    def resumed(cls, state: ProcState, carry: ProcCarry | None, limits: Limits) -> ProcLedger:
        """The guest's claims joined with what the host knows; ProtocolError when they cannot both be."""
        known = carry or ProcCarry(state.proc)
        ledger = cls(state.proc)
        held = {Stream.STDOUT: (state.out_offset, known.out_offset)}
        held[Stream.STDERR] = (state.err_offset, known.err_offset)
        for stream, (oldest, offset) in held.items():
            start = oldest if offset is None else offset
            if oldest > start:
                raise ProtocolError(
                    f"process {state.proc} {stream.name.lower()} lost bytes {start} … {oldest} unacknowledged"
                )
            if start - oldest > limits.window_bytes:
                raise ProtocolError(
                    f"process {state.proc} {stream.name.lower()} is held from {oldest} on, {start} is next"
                )
            ledger.outputs[stream] = OutputLedger(expected=start, acked=start, oldest=oldest)
        acked = state.stdin_offset if known.stdin_offset is None else known.stdin_offset
        unacked = b"" if known.stdin_offset is None else known.stdin_unacked
        if not acked <= state.stdin_offset <= acked + len(unacked):
            raise ProtocolError(
                f"stdin of process {state.proc} stands at {state.stdin_offset}, "
                f"outside {acked} … {acked + len(unacked)}"
            )
        floor = acked if known.stdin_offset is not None else max(0, acked - limits.window_bytes)
        ledger.stdin = StdinLedger(acked, floor, bytearray(unacked), known.stdin_eof, known.stdin_open)
        ledger.resend_from = state.stdin_offset
        return ledger

    def may_tell(self, message: Output | Exited) -> None:
        """ProtocolError when it is too early or too late for OUTPUT or EXITED of this process."""
        what = f"{type(message).__name__} of process {self.proc}"
        if not self.followed:
            raise ProtocolError(f"{what} before the host followed it")
        if self.exited is not None:
            raise ProtocolError(f"{what} after its EXITED")

    def carry(self) -> ProcCarry:
        """What the next connection needs."""
        return ProcCarry(
            self.proc,
            self.outputs[Stream.STDOUT].acked,
            self.outputs[Stream.STDERR].acked,
            self.stdin.acked,
            bytes(self.stdin.unacked),
            self.stdin.eof,
            self.stdin.open,
        )


class EventBudget:
    """A token bucket: `rate_per_s` on average, `burst` at once. A clock that steps back adds nothing."""

    def __init__(self, rate_per_s: float, burst: int) -> None:
        self._rate_per_s = rate_per_s
        self._burst = float(burst)
        self._tokens = float(burst)
        self._last_s: float | None = None

    def spend(self, now_s: float) -> bool:
        """Whether one more event fits at `now_s` (any monotonic clock)."""
        if self._last_s is not None and now_s > self._last_s:
            self._tokens = min(self._burst, self._tokens + (now_s - self._last_s) * self._rate_per_s)
        self._last_s = now_s if self._last_s is None else max(now_s, self._last_s)
        if self._tokens < 1.0:
            return False
        self._tokens -= 1.0
        return True
