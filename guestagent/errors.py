"""The error root of `guestagent`. A leaf says what the caller can do about it, not which module failed."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from guestagent.messages import AgentEvent


class AgentError(Exception):
    """Root of every error this package raises on purpose."""


class ProtocolError(AgentError):
    """The guest broke the contract of PROTOCOL.md: end this session and its sandbox, touch no other one.

    `what` names the breach. `events` are those that arrived whole in the same `receive` call before it, so
    that what is delivered does not depend on how the stream was cut into reads.
    """

    def __init__(self, what: str) -> None:
        super().__init__(f"agent broke the protocol: {what}")
        self.what = what
        self.events: tuple[AgentEvent, ...] = ()


class GuestRefused(AgentError):
    """The guest answered a request with an errno (Linux's numbers). The session goes on.

    `errno` is kept for the caller to act on (ENOENT of START means the host's exit code 127, say);
    `message` is the guest's own text, already made safe to show.
    """

    def __init__(self, code: int, message: str, *, request: str = "request") -> None:
        self.errno = code
        self.message = message
        name = errno.errorcode.get(code, f"errno {code}")
        super().__init__(f"the guest refused {request}: {name}{': ' + message if message else ''}")


class BadRequest(AgentError):
    """The host's own value or call is wrong (bad field, unknown process, too early): mend the call.

    Nothing was sent and the session is as it was.
    """


class WindowFull(AgentError):
    """Too much is in flight: wait for an acknowledgement or a reply, then call again. Nothing was sent."""


class SessionClosed(AgentError):
    """This session has ended, so the request was not made: connect again (with the carry) and retry."""


class AgentMissing(AgentError):
    """The in-guest program is not built: `make setup` builds it."""
