"""The life of one connection to an agent: its states and the one table of how they follow each other."""

from __future__ import annotations

from enum import Enum, auto


class SessionState(Enum):
    """Where a connection stands."""

    UNSYNCED = auto()
    SYNCED = auto()
    HELLO_SENT = auto()
    READY = auto()
    CLOSED = auto()
    FAILED = auto()


class Trigger(Enum):
    """What moves a session on."""

    SYNC_ANSWERED = auto()
    HELLO = auto()
    HELLO_ANSWERED = auto()
    CLOSE = auto()
    BREACH = auto()


_S, _T = SessionState, Trigger
TRANSITIONS: dict[tuple[SessionState, Trigger], SessionState] = {
    (_S.UNSYNCED, _T.SYNC_ANSWERED): _S.SYNCED,
    (_S.SYNCED, _T.HELLO): _S.HELLO_SENT,
    (_S.HELLO_SENT, _T.HELLO_ANSWERED): _S.READY,
    **{(state, _T.BREACH): _S.FAILED for state in (_S.UNSYNCED, _S.SYNCED, _S.HELLO_SENT, _S.READY)},
    **{(state, _T.CLOSE): _S.CLOSED for state in (_S.UNSYNCED, _S.SYNCED, _S.HELLO_SENT, _S.READY, _S.CLOSED)},
    (_S.FAILED, _T.CLOSE): _S.FAILED,
}
