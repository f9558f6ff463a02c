"""Sessions brought to where a test begins: the host's end over a fake agent, or over frames made by hand."""

from __future__ import annotations

from dataclasses import dataclass, field

from guestagent.fake import FakeAgent
from guestagent.flow import ProcCarry
from guestagent.frames import ANSWER_MAGIC, FrameReader, Limits, decode_payload, encode_frame
from guestagent.messages import AgentEvent, Configure, GuestState, ProcState, StartProcess
from guestagent.protocol import AgentSession, SessionCarry
from guestagent.wire import encode_guest_state

NONCE = b"8 bytes!"
CONFIGURE = Configure(b"web-1", (b"a" * 16,), 64, b"e" * 32, b"0123456789abcdef" * 2, 1, 5000)
MAIN = StartProcess(1, (b"cat",), stdin=True)


def frame(*message: object) -> bytes:
    return encode_frame(list(message))


def unframed(data: bytes) -> list[list[object]]:
    """The messages of whole frames, as the guest reads them."""
    return [decode_payload(payload, Limits()) for payload in FrameReader().feed(data)]


def hello_reply(*procs: ProcState, boot_id: str = "boot-1", request_id: int = 1) -> bytes:
    return frame(64, request_id, 0, encode_guest_state(GuestState(1, "0.1.0", boot_id, True, procs)))


def ready(
    *procs: ProcState,
    carry: SessionCarry | None = None,
    limits: Limits | None = None,
    boot_id: str = "boot-1",
) -> AgentSession:
    """A READY session whose guest told of `procs`."""
    session = AgentSession(NONCE, limits, carry)
    session.open()
    session.receive(ANSWER_MAGIC + NONCE, 0.0)
    session.hello()
    session.receive(hello_reply(*procs, boot_id=boot_id), 0.0)
    return session


def started(limits: Limits | None = None) -> AgentSession:
    """A READY session whose process 1 (with stdin) runs."""
    session = ready(limits=limits)
    request_id, _sent = session.start(MAIN)
    session.receive(frame(64, request_id, 0, 100), 0.0)
    return session


def resumed(state: ProcState, known: ProcCarry | None = None) -> tuple[AgentSession, list[list[object]]]:
    """A session that follows one process of an earlier one, and what `follow` said."""
    carry = SessionCarry("boot-1", (known,) if known else ())
    session = ready(state, carry=carry)
    return session, unframed(session.follow(state.proc))


@dataclass
class Link:
    """A session joined to a fake agent; `events` are all that came, in order."""

    agent: FakeAgent
    session: AgentSession
    events: list[AgentEvent] = field(default_factory=list)

    @classmethod
    def connect(cls, agent: FakeAgent, carry: SessionCarry | None = None, nonce: bytes = NONCE) -> Link:
        """Connected and READY."""
        link = cls(agent, AgentSession(nonce, carry=carry))
        link.send(link.session.open())
        link.send(link.session.hello())
        return link

    def send(self, data: bytes) -> list[AgentEvent]:
        """What comes back for `data`."""
        return self.take(self.agent.receive(data))

    def take(self, data: bytes) -> list[AgentEvent]:
        got = self.session.receive(data, 0.0)
        self.events += got
        return got
