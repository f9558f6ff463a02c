"""A resolver's answers, as pure functions over DNS messages (RFC 1035, RFC 3596): one question, A or AAAA, no more.

What is not understood is answered with FORMERR or NOTIMP; other types of a known name have no records here. Messages
come from a guest: every length is checked, compression in a question is refused.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from controlplane.api.services import IPAddress

HEADER = struct.Struct("!HHHHHH")
TYPE_A, TYPE_AAAA, CLASS_IN = 1, 28, 1
NO_ERROR, FORMAT_ERROR, SERVER_FAILURE, NAME_ERROR, NOT_IMPLEMENTED, REFUSED = range(6)
TTL_S = 60
MAX_ANSWERS = 16
"""Few enough that an answer always fits into 512 bytes beside the longest name, so that nobody has to ask by TCP."""

_RESPONSE, _RECURSION_WANTED, _RECURSION_HAD, _OPCODE = 0x8000, 0x0100, 0x0080, 0x7800


@dataclass(frozen=True)
class Question:
    """What was asked. `name` is lower case without its last dot; `raw` is the question as it came."""

    id: int
    flags: int
    name: str
    type: int
    raw: bytes


def parse(message: bytes) -> Question | None:
    """The question; None when there is nothing that could be answered."""
    if len(message) < HEADER.size:
        return None
    ident, flags, questions, _, _, _ = HEADER.unpack_from(message)
    if flags & _RESPONSE:
        return None
    labels, at, total = [], HEADER.size, 0
    while at < len(message) and message[at]:
        size = message[at]
        total += size + 1
        label = message[at + 1 : at + 1 + size]
        if size > 63 or total > 254 or len(label) < size:
            return Question(ident, flags, "", 0, b"")
        labels.append(label)
        at += size + 1
    end = at + 5
    if questions != 1 or len(message) < end or not all(label.isascii() for label in labels):
        return Question(ident, flags, "", 0, b"")
    kind, klass = struct.unpack_from("!HH", message, at + 1)
    name = b".".join(labels).decode("ascii").lower()
    return Question(ident, flags, name if klass == CLASS_IN else "", kind, message[HEADER.size : end])


def understood(question: Question) -> int:
    """NO_ERROR, or with what the question has to be turned down before anybody is asked."""
    if question.flags & _OPCODE:
        return NOT_IMPLEMENTED
    return NO_ERROR if question.name else FORMAT_ERROR


def answer(question: Question, code: int, addresses: list[IPAddress]) -> bytes:
    """The message that answers `question` with those of `addresses` that its type is about."""
    version = {TYPE_A: 4, TYPE_AAAA: 6}.get(question.type)
    fit = [one for one in addresses if one.version == version][:MAX_ANSWERS] if code == NO_ERROR else []
    flags = _RESPONSE | _RECURSION_HAD | (question.flags & (_OPCODE | _RECURSION_WANTED)) | code
    records = b"".join(
        struct.pack("!HHHIH", 0xC000 | HEADER.size, question.type, CLASS_IN, TTL_S, len(one.packed)) + one.packed
        for one in fit
    )
    return HEADER.pack(question.id, flags, 1 if question.raw else 0, len(fit), 0, 0) + question.raw + records
