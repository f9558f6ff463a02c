"""The resolver's messages: a question that is understood, one that is not, and answers that fit."""

from __future__ import annotations

import ipaddress
import random
import struct

import pytest

from hostd.services import dns


def query(name: str, kind: int = dns.TYPE_A, *, flags: int = 0x0100, klass: int = 1, questions: int = 1) -> bytes:
    labels = b"".join(bytes([len(part)]) + part.encode() for part in name.split(".") if part)
    return struct.pack("!HHHHHH", 77, flags, questions, 0, 0, 0) + labels + b"\0" + struct.pack("!HH", kind, klass)


def parsed(message: bytes) -> dns.Question:
    question = dns.parse(message)
    assert question is not None
    return question


def test_a_question_is_answered_with_its_types_addresses() -> None:
    question = parsed(query("Mirror.Example.org"))
    assert question.name == "mirror.example.org" and dns.understood(question) == dns.NO_ERROR
    both = [ipaddress.ip_address("10.0.0.1"), ipaddress.ip_address("2001:db8::1")]
    message = dns.answer(question, dns.NO_ERROR, both)
    ident, flags, asked, answers, _, _ = struct.unpack_from("!HHHHHH", message)
    assert (ident, asked, answers) == (77, 1, 1) and flags & 0x8000 and flags & 15 == 0
    assert message.endswith(b"\0\x04" + both[0].packed)
    six = dns.answer(parsed(query("mirror.example.org", dns.TYPE_AAAA)), dns.NO_ERROR, both)
    assert six.endswith(b"\0\x10" + both[1].packed)


def test_a_type_that_is_not_served_has_no_records() -> None:
    message = dns.answer(parsed(query("a.b", 33)), dns.NO_ERROR, [ipaddress.ip_address("10.0.0.1")])
    assert struct.unpack_from("!HHHHHH", message)[3] == 0


def test_answers_fit_without_tcp() -> None:
    name = ".".join(["a" * 62] * 4)
    many = [ipaddress.ip_address("2001:db8::") + number for number in range(100)]
    assert len(dns.answer(parsed(query(name, dns.TYPE_AAAA)), dns.NO_ERROR, many)) <= 1232
    four = [ipaddress.ip_address("10.0.0.0") + number for number in range(100)]
    assert len(dns.answer(parsed(query("mirror.example.org")), dns.NO_ERROR, four)) <= 512


@pytest.mark.parametrize(
    ("message", "code"),
    [
        (query("a.b", questions=2), dns.FORMAT_ERROR), (query("a.b")[:-3], dns.FORMAT_ERROR),
        (query("a.b", flags=0x2900), dns.NOT_IMPLEMENTED), (query("a.b", klass=3), dns.FORMAT_ERROR),
        (query("a")[:12] + b"\xc0\x0c\0\1\0\1", dns.FORMAT_ERROR),
    ],
)  # fmt: skip
def test_what_is_not_understood_is_turned_down(message: bytes, code: int) -> None:
    assert dns.understood(parsed(message)) == code


def test_noise_and_answers_are_not_answered() -> None:
    assert dns.parse(b"") is None and dns.parse(query("a.b", flags=0x8000)) is None


def test_any_bytes_are_survived() -> None:
    rng = random.Random(9)
    for _ in range(5000):
        message = bytearray(query("host.example.net"))
        for _change in range(rng.randrange(6)):
            message[rng.randrange(len(message))] = rng.randrange(256)
        question = dns.parse(bytes(message[: rng.randrange(len(message) + 1)]))
        if question is not None:
            assert dns.answer(question, dns.understood(question), [])[:2] == message[:2]
