"""The host's end of the agent protocol, sans-I/O: bytes in, events out; calls in, bytes out.

One AgentSession is one connection. It owns the request ids, the offsets and windows of all streams, and the
state. The shell around it owns the socket and every deadline:

    session = AgentSession(nonce=os.urandom(8), carry=...)
    write(session.open())                 # the SYNC flush, and nothing else until
    Synced        → write(session.hello())
    HelloReceived → write(session.follow(proc)) for each process of `state.procs` to go on with
    then requests, and `write(session.ack(...))` once output is held safely

Everything from a guest is hostile. A breach raises ProtocolError from `receive`, and the session is FAILED.
Memory is bounded by one frame, what `receive` returns, and 64 KiB of stdin a process.
"""

from __future__ import annotations

from dataclasses import dataclass

from guestagent.elastic import ElasticRequest
from guestagent.errors import BadRequest, GuestRefused, ProtocolError, SessionClosed, WindowFull
from guestagent.flow import EventBudget, ProcCarry, ProcLedger, SessionCarry
from guestagent.frames import SYNC_BYTES, FrameReader, Limits, SyncHunter, decode_payload, encode_frame, sync_flush
from guestagent.lifecycle import TRANSITIONS, SessionState, Trigger
from guestagent.messages import (
    MAX_SIGNAL,
    PROTOCOL_VERSION,
    U16_MAX,
    U32_MAX,
    AgentEvent,
    Configure,
    Exited,
    GuestEvent,
    GuestState,
    GuestStats,
    HelloReceived,
    Kind,
    Output,
    OutputEnded,
    Prepare,
    ProcState,
    Renew,
    Reply,
    ReplyReceived,
    Services,
    StartProcess,
    StdinAcked,
    Stream,
    Synced,
    require_uint,
)
from guestagent.wire import (
    AgentMessage,
    decode_agent_message,
    decode_balloon,
    decode_hello,
    decode_nil,
    decode_pid,
    decode_refusal,
    decode_stats,
    decode_vcpus,
    encode_configure,
    encode_prepare,
    encode_renew,
    encode_services,
    encode_start,
)

__all__ = [
    "AgentEvent",
    "AgentSession",
    "Configure",
    "Exited",
    "GuestEvent",
    "GuestState",
    "GuestStats",
    "HelloReceived",
    "Kind",
    "Limits",
    "Output",
    "OutputEnded",
    "ProcCarry",
    "ProcState",
    "ReplyReceived",
    "SessionCarry",
    "SessionState",
    "StartProcess",
    "StdinAcked",
    "Stream",
    "Synced",
    "Trigger",
]


@dataclass(frozen=True)
class _Pending:
    """A request without its reply; `proc` is the process it is about, 0 for none."""

    kind: Kind
    proc: int = 0


class AgentSession:
    """One connection to an agent. `nonce` is 8 random bytes, new for each connection; see the module."""

    def __init__(self, nonce: bytes, limits: Limits | None = None, carry: SessionCarry | None = None) -> None:
        self._limits = limits or Limits()
        self._flush = sync_flush(nonce)
        self._carry = carry or SessionCarry()
        self._state = SessionState.UNSYNCED
        self._hunter = SyncHunter(nonce, self._limits.max_sync_discard_bytes)
        self._reader = FrameReader(self._limits.max_payload_bytes)
        self._budget = EventBudget(self._limits.event_rate_per_s, self._limits.event_burst)
        self._pending: dict[int, _Pending] = {}
        self._procs: dict[int, ProcLedger] = {}
        self._last_id = 0
        self._failure = ""
        self.guest: GuestState | None = None
        self.events_dropped = 0

    # What a session tells of itself.

    @property
    def state(self) -> SessionState:
        return self._state

    @property
    def outstanding(self) -> tuple[int, ...]:
        """Ids of the requests without a reply, oldest first."""
        return tuple(self._pending)

    @property
    def procs(self) -> tuple[int, ...]:
        """Numbers of the processes this session knows (started here, or told by HELLO)."""
        return tuple(self._procs)

    @property
    def held_bytes(self) -> int:
        """Bytes held of what came and of stdin not acknowledged."""
        return self._reader.held_bytes + sum(len(ledger.stdin.unacked) for ledger in self._procs.values())

    def carry(self) -> SessionCarry:
        """What the next connection to this guest needs. Output not acknowledged will come again there."""
        if self.guest is None:
            return self._carry
        return SessionCarry(self.guest.boot_id, tuple(ledger.carry() for ledger in self._procs.values()))

    def _move(self, trigger: Trigger) -> None:
        self._state = TRANSITIONS[self._state, trigger]

    def close(self) -> None:
        """The connection ended. Idempotent; `carry` and `outstanding` stay readable."""
        self._move(Trigger.CLOSE)

    # Opening.

    def open(self, *, at_boundary: bool = False) -> bytes:
        """The SYNC flush. Nothing else may be written before Synced comes.

        `at_boundary`: the caller knows that the agent stands between frames and has had all that was ever written
        to it (a clone of a guest that was frozen so). A single SYNC is heard then."""
        self._require(SessionState.UNSYNCED)
        return self._flush[:SYNC_BYTES] if at_boundary else self._flush

    def hello(self) -> bytes:
        """HELLO, once, after Synced. Its answer comes as HelloReceived."""
        self._require(SessionState.SYNCED)
        self._move(Trigger.HELLO)
        return self._request(Kind.HELLO, PROTOCOL_VERSION)[1]

    def follow(self, proc: int) -> bytes:
        """Goes on with a process that HelloReceived told of: acknowledges what the host has, sends
        unacknowledged stdin again. Its output, and its end, come from now on.
        """
        ledger = self._known(proc)
        if ledger.followed:
            raise BadRequest(f"process {proc} is followed already")
        ledger.followed = True
        parts = [encode_frame([Kind.ACK, 0, proc, stream, output.acked]) for stream, output in ledger.outputs.items()]
        stdin = ledger.stdin
        again = bytes(stdin.unacked[ledger.resend_from - stdin.acked :])
        if again or stdin.eof:
            parts.append(self._stdin_frames(proc, ledger.resend_from, again, stdin.eof))
        return b"".join(parts)

    # Requests: each gives its id and the bytes to write; the answer comes as ReplyReceived with that id.

    def prepare(self, prepare: Prepare) -> tuple[int, bytes]:
        return self._request(Kind.PREPARE, encode_prepare(prepare))

    def configure(self, configure: Configure) -> tuple[int, bytes]:
        return self._request(Kind.CONFIGURE, encode_configure(configure))

    def rehearse(self, configure: Configure) -> tuple[int, bytes]:
        """Prepared guests only. EBUSY while anything of an earlier rehearsal is left."""
        return self._request(Kind.REHEARSE, encode_configure(configure))

    def freeze(self, deadline_ms: int) -> tuple[int, bytes]:
        """Answered when the workload stands still; ETIMEDOUT, and it goes on, when it does not by the deadline."""
        require_uint(deadline_ms, "deadline_ms", U32_MAX, 1)
        return self._request(Kind.FREEZE, deadline_ms)

    def thaw(self) -> tuple[int, bytes]:
        return self._request(Kind.THAW)

    def renew(self, renew: Renew) -> tuple[int, bytes]:
        """Also thaws."""
        return self._request(Kind.RENEW, encode_renew(renew))

    def elastic(self, request: ElasticRequest) -> tuple[int, bytes]:
        """The reply's body is as `request` says."""
        return self._request(request.kind, *request.fields())

    def services(self, services: Services) -> tuple[int, bytes]:
        """EBUSY when processes run under other answerers already."""
        return self._request(Kind.SERVICES, encode_services(services))

    def start(self, start: StartProcess) -> tuple[int, bytes]:
        """The reply's body is the guest's pid. Refused: ENOENT, EACCES, ENOEXEC, EINVAL (see PROTOCOL.md)."""
        if start.proc in self._procs:
            raise BadRequest(f"process {start.proc} exists already")
        sent = self._request(Kind.START, encode_start(start), proc=start.proc)
        ledger = ProcLedger(start.proc, followed=True)
        ledger.stdin.open = start.stdin
        self._procs[start.proc] = ledger
        return sent

    def signal(self, proc: int, signo: int) -> tuple[int, bytes]:
        self._followed(proc)
        require_uint(signo, "signo", MAX_SIGNAL, 1)
        return self._request(Kind.SIGNAL, proc, signo, proc=proc)

    def winsize(self, proc: int, rows: int, cols: int) -> tuple[int, bytes]:
        self._followed(proc)
        require_uint(rows, "rows", U16_MAX)
        require_uint(cols, "cols", U16_MAX)
        return self._request(Kind.WINSIZE, proc, rows, cols, proc=proc)

    def stats(self) -> tuple[int, bytes]:
        """The reply's body is GuestStats."""
        return self._request(Kind.STATS)

    def shutdown(self, grace_ms: int) -> tuple[int, bytes]:
        require_uint(grace_ms, "grace_ms", U32_MAX)
        return self._request(Kind.SHUTDOWN, grace_ms)

    def forget(self, proc: int) -> tuple[int, bytes]:
        """Frees an exited process's record in the guest and, with the reply, here."""
        self._followed(proc)
        return self._request(Kind.FORGET, proc, proc=proc)

    # Notices: no reply.

    def stdin_room(self, proc: int) -> int:
        """Bytes of stdin the process's window takes now; 0 after end of file."""
        return self._followed(proc).stdin.room(self._limits)

    def stdin(self, proc: int, data: bytes, eof: bool = False) -> bytes:
        """Raises WindowFull beyond `stdin_room`, BadRequest after end of file or without stdin."""
        offset = self._followed(proc).stdin.put(proc, data, eof, self._limits)
        return self._stdin_frames(proc, offset, data, eof)

    def ack(self, proc: int, stream: Stream, offset: int) -> bytes:
        """The host holds all bytes of the stream before `offset`: the guest may forget them."""
        self._followed(proc).outputs[stream].ack(offset)
        return encode_frame([Kind.ACK, 0, proc, stream, offset])

    def _stdin_frames(self, proc: int, offset: int, data: bytes, eof: bool) -> bytes:
        step = self._limits.max_output_bytes
        parts = [
            [Kind.STDIN, 0, proc, offset + at, data[at : at + step], eof and at + step >= len(data)]
            for at in range(0, max(len(data), 1), step)
        ]
        return b"".join(encode_frame(part) for part in parts if part[4] or part[5])

    def _require(self, state: SessionState) -> None:
        if self._state in (SessionState.CLOSED, SessionState.FAILED):
            raise SessionClosed(f"the agent session is {self._state.name}{self._failure}")
        if self._state is not state:
            raise BadRequest(f"the agent session is {self._state.name}, this needs {state.name}")

    def _known(self, proc: int) -> ProcLedger:
        self._require(SessionState.READY)
        if proc not in self._procs:
            raise BadRequest(f"process {proc} is not known to this session")
        return self._procs[proc]

    def _followed(self, proc: int) -> ProcLedger:
        ledger = self._known(proc)
        if not ledger.followed:
            raise BadRequest(f"process {proc} is not followed: follow it before any request")
        return ledger

    def _request(self, kind: Kind, *values: object, proc: int = 0) -> tuple[int, bytes]:
        """A request's id and frame; it is outstanding from now on. `proc` is the process it is about."""
        if kind is not Kind.HELLO:
            self._require(SessionState.READY)
        if len(self._pending) >= self._limits.max_outstanding:
            raise WindowFull(f"{len(self._pending)} requests have no reply yet")
        request_id = self._last_id + 1
        if request_id > U32_MAX:
            raise SessionClosed("the request ids of this session are used up: connect again")
        frame = encode_frame([kind, request_id, *values])
        self._last_id = request_id
        self._pending[request_id] = _Pending(kind, proc)
        return request_id, frame

    # What the guest says.

    def receive(self, data: bytes, now_s: float) -> list[AgentEvent]:
        """The events that `data` completes. `now_s` is a monotonic clock's, for the rate of guest events.

        Raises ProtocolError at a breach (its `events` are those before it) and SessionClosed after the end.
        """
        if self._state in (SessionState.CLOSED, SessionState.FAILED):
            raise SessionClosed(f"the agent session is {self._state.name}{self._failure}")
        events: list[AgentEvent] = []
        try:
            self._receive(data, now_s, events)
        except ProtocolError as error:
            self._move(Trigger.BREACH)
            self._failure = f": {error.what}"
            error.events = tuple(events)
            raise
        return events

    def _receive(self, data: bytes, now_s: float, events: list[AgentEvent]) -> None:
        if self._state is SessionState.UNSYNCED:
            rest = self._hunter.feed(data)
            if rest is None:
                return
            self._move(Trigger.SYNC_ANSWERED)
            events.append(Synced())
            data = rest
        for payload in self._reader.feed(data):
            message = decode_agent_message(decode_payload(payload, self._limits), self._limits.max_text_chars)
            event = self._take(message, now_s)
            if event is not None:
                events.append(event)

    def _take(self, message: AgentMessage, now_s: float) -> AgentEvent | None:
        if isinstance(message, Reply):
            return self._take_reply(message)
        if isinstance(message, GuestEvent):
            if self._budget.spend(now_s):
                return message
            self.events_dropped += 1
            return None
        ledger = self._procs.get(message.proc)
        if ledger is None:
            raise ProtocolError(f"{type(message).__name__} of process {message.proc}, not started by the host")
        if isinstance(message, StdinAcked):
            ledger.stdin.take_ack(message.proc, message.offset)
            return message
        ledger.may_tell(message)
        if isinstance(message, Exited):
            ledger.exited = message
            return message
        fresh = ledger.outputs[message.stream].take(message, self._limits)
        if fresh is None or fresh.data:
            return fresh
        return OutputEnded(fresh.proc, fresh.stream, fresh.offset)

    def _take_reply(self, reply: Reply) -> AgentEvent:
        pending = self._pending.pop(reply.request_id, None)
        if pending is None:
            raise ProtocolError(f"REPLY to {reply.request_id}, which is not outstanding")
        if reply.errno:
            text = decode_refusal(reply.body, self._limits.max_text_chars)
            if pending.kind is Kind.HELLO:
                raise ProtocolError(f"agent refused HELLO: {text or reply.errno}")
            if pending.kind is Kind.START:
                self._procs.pop(pending.proc, None)
            refused = GuestRefused(reply.errno, text, request=pending.kind.name)
            return ReplyReceived(reply.request_id, pending.kind, refused=refused)
        if pending.kind is Kind.HELLO:
            return self._greeted(decode_hello(reply.body, self._limits.max_text_chars))
        if pending.kind is Kind.START:
            return ReplyReceived(reply.request_id, pending.kind, decode_pid(reply.body))
        if pending.kind is Kind.STATS:
            return ReplyReceived(reply.request_id, pending.kind, decode_stats(reply.body))
        if pending.kind in (Kind.BALLOON, Kind.BALLOON_RUNS):
            return ReplyReceived(reply.request_id, pending.kind, decode_balloon(reply.body))
        if pending.kind is Kind.CPUS:
            return ReplyReceived(reply.request_id, pending.kind, decode_vcpus(reply.body))
        decode_nil(reply.body, pending.kind.name)
        if pending.kind is Kind.FORGET:
            self._procs.pop(pending.proc, None)
        return ReplyReceived(reply.request_id, pending.kind)

    def _greeted(self, state: GuestState) -> HelloReceived:
        rebooted = bool(self._carry.boot_id) and self._carry.boot_id != state.boot_id
        carried = {} if rebooted else {item.proc: item for item in self._carry.procs}
        self._procs = {
            item.proc: ProcLedger.resumed(item, carried.get(item.proc), self._limits) for item in state.procs
        }
        self.guest = state
        self._move(Trigger.HELLO_ANSWERED)
        return HelloReceived(state, rebooted)
