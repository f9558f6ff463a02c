"""Values and their codec: what the host builds is checked when built, what a guest sends when decoded."""

from __future__ import annotations

import errno
import re
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest

import guestagent
from guestagent.binary import binary_path
from guestagent.errors import AgentError, AgentMissing, BadRequest, GuestRefused, ProtocolError
from guestagent.fake import DEFAULT_STATS
from guestagent.messages import (
    Configure,
    Exited,
    GuestEvent,
    GuestState,
    GuestStats,
    Kind,
    Output,
    ProcState,
    Renew,
    Reply,
    ReplyReceived,
    StartProcess,
    StdinAcked,
    Stream,
)
from guestagent.wire import (
    decode_agent_message,
    decode_configure,
    decode_hello,
    decode_nil,
    decode_pid,
    decode_refusal,
    decode_start,
    decode_stats,
    encode_configure,
    encode_guest_state,
    encode_renew,
    encode_start,
    encode_stats,
    safe_text,
)

CONTRACT = (Path(guestagent.__file__).parent / "PROTOCOL.md").read_text()
CONFIGURE = Configure(b"web-1", (b"a" * 16, b"b" * 16), 64, b"e" * 32, b"0123456789abcdef" * 2, 1, 5000)
RENEW = Renew(b"web-2", b"e" * 32, b"0123456789abcdef" * 2, 1)
START = StartProcess(1, (b"/bin/sh", b"-c", b"true"), (b"PATH=/bin", b"EMPTY="), b"/", b"1000:1000", True)
STATE = GuestState(1, "0.1.0", "boot", True, (ProcState(1, 101, False, 3, 5, 7),))


# The contract's own text


def test_the_kinds_are_the_contracts() -> None:
    rows = re.findall(r"^\| (\d+) \| ([A-Z_]+) \|", CONTRACT, re.MULTILINE)
    assert {(int(code), name) for code, name in rows} == {(kind.value, kind.name) for kind in Kind}


@pytest.mark.parametrize(
    ("start", "encoded"),
    [
        ("STATS reply: `{", encode_stats(DEFAULT_STATS)),
        ("CONFIGURE: `{", encode_configure(CONFIGURE)),
        ("RENEW: `{", encode_renew(RENEW)),
        ("START: `{", encode_start(START)),
        ("HELLO reply: `{", encode_guest_state(STATE)),
    ],
)
def test_the_maps_have_the_contracts_keys(start: str, encoded: dict[str, object]) -> None:
    at = CONTRACT.index(start) + len(start)
    body = CONTRACT[at : CONTRACT.index("}`", at)]
    body = re.sub(r'\([^)]*\)|"[^"]*"|\[[^\]]*\]', "", body)
    assert re.findall(r"(?:^|,)\s*(\w+)", body) == list(encoded)


# What the host builds


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"hostname": b""}, "not a host name"),
        ({"hostname": b"-x"}, "not a host name"),
        ({"hostname": b"a\nb"}, "not a host name"),
        ({"hostname": b"a\n"}, "not a host name"),
        ({"hostname": b"a" * 65}, "not a host name"),
        ({"layers": ()}, "0 layers"),
        ({"layers": (b"a" * 16,) * 2}, "same uuid"),
        ({"layers": (b"a" * 15,)}, "not 16 bytes"),
        ({"layers": tuple(bytes([n]) * 16 for n in range(129))}, "129 layers"),
        ({"upper_mib": 0}, "upper_mib = 0"),
        ({"entropy": b"e" * 31}, "bytes of entropy = 31"),
        ({"machine_id": b"G" * 32}, "machine_id"),
        ({"time_unix_ns": 0}, "time_unix_ns"),
        ({"deadline_ms": 2**32}, "deadline_ms"),
    ],
)
def test_a_bad_configure_is_refused(change: dict[str, object], problem: str) -> None:
    with pytest.raises(BadRequest, match=problem):
        replace(CONFIGURE, **change)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"hostname": b"-x"}, "not a host name"),
        ({"entropy": b"e" * 31}, "bytes of entropy = 31"),
        ({"machine_id": b"G" * 32}, "machine_id"),
        ({"time_unix_ns": 0}, "time_unix_ns"),
    ],
)
def test_a_bad_renew_is_refused(change: dict[str, object], problem: str) -> None:
    with pytest.raises(BadRequest, match=problem):
        replace(RENEW, **change)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"proc": 0}, "proc = 0"),
        ({"proc": 2**32}, "proc = "),
        ({"argv": ()}, "argv is empty"),
        ({"argv": (b"",)}, "argv is empty"),
        ({"argv": (b"a\x00b",)}, "argv has a NUL"),
        ({"argv": (b"a",) * 4097}, "argv has 4097 entries"),
        ({"env": (b"PATH",)}, "not K=V"),
        ({"env": (b"=x",)}, "not K=V"),
        ({"env": (b"A=\x00",)}, "env has a NUL"),
        ({"cwd": b"tmp"}, "not absolute"),
        ({"cwd": b""}, "not absolute"),
        ({"user": b"\x00"}, "user has a NUL"),
        ({"rows": 65536}, "rows"),
        ({"cols": -1}, "cols"),
    ],
)
def test_a_bad_start_is_refused(change: dict[str, object], problem: str) -> None:
    with pytest.raises(BadRequest, match=problem):
        replace(START, **change)  # type: ignore[arg-type]


def test_requests_survive_the_wire() -> None:
    assert decode_configure(encode_configure(CONFIGURE)) == CONFIGURE
    assert decode_start(encode_start(START)) == START


# What a guest sends


@pytest.mark.parametrize(
    ("message", "value"),
    [
        ([64, 7, 0, None], Reply(7, 0, None)),
        ([65, 0, 1, 2, 10, b"x"], Output(1, Stream.STDERR, 10, b"x")),
        ([66, 0, 1, 3, 0, False], Exited(1, 3, 0, False)),
        ([66, 0, 1, -1, 11, True], Exited(1, -1, 11, True)),
        ([67, 0, 1, 2**64 - 1], StdinAcked(1, 2**64 - 1)),
        ([68, 0, "oom_kill", {"pid": 3, "x": -1}], GuestEvent("oom_kill", (("pid", 3), ("x", -1)))),
    ],
)
def test_the_agents_messages_are_read(message: list[object], value: object) -> None:
    assert decode_agent_message(message, 512) == value


@pytest.mark.parametrize(
    ("message", "problem"),
    [
        ([], "message kind is a NoneType"),
        (["OUTPUT"], "message kind is a str"),
        ([True, 0], "message kind is a bool"),
        ([63, 0], "kind 63 is not"),
        ([3, 1, {}], "START came from the agent"),
        ([65, 0, 1, 1, 0], "OUTPUT has 5 fields, not 6"),
        ([65, 1, 1, 1, 0, b""], "OUTPUT id = 1"),
        ([65, 0, 0, 1, 0, b""], "OUTPUT proc = 0"),
        ([65, 0, 1, 3, 0, b""], "OUTPUT stream = 3"),
        ([65, 0, 1, 0, 0, b""], "OUTPUT stream = 0"),
        ([65, 0, 1, 1, -1, b""], "OUTPUT offset = -1"),
        ([65, 0, 1, 1, 0.0, b""], "OUTPUT offset is a float"),
        ([65, 0, 1, 1, 0, "text"], "OUTPUT data is a str"),
        ([66, 0, 1, 256, 0, False], "EXITED code = 256"),
        ([66, 0, 1, -1, 0, False], "does not go with"),
        ([66, 0, 1, 0, 9, False], "does not go with"),
        ([66, 0, 1, -1, 65, False], "EXITED signal = 65"),
        ([66, 0, 1, 0, 0, 0], "EXITED core is a int"),
        ([67, 0, 1, None], "STDIN_ACK offset is a NoneType"),
        ([68, 0, b"oom", {}], "EVENT name is a bytes"),
        ([68, 0, "oom", []], "EVENT values is a list"),
        ([68, 0, "oom", {"k": "v"}], "EVENT value is a str"),
        ([68, 0, "oom", {b"k": 1}], "EVENT key is a bytes"),
        ([64, 0, 0, None], "REPLY id = 0"),
        ([64, 2**32, 0, None], "REPLY id = "),
        ([64, 1, -2, None], "REPLY errno = -2"),
        ([64, 1, 4096, None], "REPLY errno = 4096"),
    ],
)
def test_anything_else_is_a_breach_that_is_named(message: list[object], problem: str) -> None:
    with pytest.raises(ProtocolError, match=re.escape(problem)):
        decode_agent_message(message, 512)


def test_guest_state_and_stats_survive_the_wire() -> None:
    assert decode_hello(encode_guest_state(STATE), 512) == STATE
    assert decode_stats(encode_stats(DEFAULT_STATS)) == DEFAULT_STATS
    assert decode_stats({**encode_stats(DEFAULT_STATS), "newer": "thing"}) == DEFAULT_STATS


LATER = {"active_kib", "inactive_kib", "swapped_kib", "balloon_kib"}


@pytest.mark.parametrize("name", [item.name for item in fields(GuestStats)])
def test_each_counter_must_be_there_and_a_uint(name: str) -> None:
    stats = asdict(DEFAULT_STATS)
    for bad in (None, -1, 2**64, 1.5, "1", True):
        with pytest.raises(ProtocolError, match=name):
            decode_stats({**stats, name: bad})
    del stats[name]
    if name in LATER:  # an agent of before does not tell it
        assert getattr(decode_stats(stats), name) == 0
        return
    with pytest.raises(ProtocolError, match=name):
        decode_stats(stats)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"version": 2}, "agent speaks version 2, the host speaks 1"),
        ({"version": "1"}, "version is a str"),
        ({"agent": b"x"}, "agent is a bytes"),
        ({"boot_id": 5}, "boot_id is a int"),
        ({"configured": 1}, "configured is a int"),
        ({"procs": {}}, "procs is a dict"),
        ({"procs": [1]}, "procs entry is a int"),
        ({"procs": [asdict(STATE.procs[0])] * 2}, "names a process twice"),
        ({"procs": [{**asdict(STATE.procs[0]), "out_offset": -1}]}, "out_offset = -1"),
        ({"procs": [{**asdict(STATE.procs[0]), "proc": 0}]}, "proc = 0"),
    ],
)
def test_a_lying_hello_is_a_breach(change: dict[str, object], problem: str) -> None:
    with pytest.raises(ProtocolError, match=problem):
        decode_hello({**encode_guest_state(STATE), **change}, 512)


def test_small_bodies() -> None:
    assert decode_pid(3) == 3
    assert decode_refusal("no\x1b[2J such", 512) == "no[2J such"
    for check in (lambda: decode_pid(0), lambda: decode_nil(0, "SIGNAL"), lambda: decode_refusal(None, 512)):
        with pytest.raises(ProtocolError):
            check()


@pytest.mark.parametrize(
    ("text", "safe"),
    [
        ("plain ünïcode 漢", "plain ünïcode 漢"),
        ("a\x1b[31mred\x07", "a[31mred"),
        ("two\nlines\tand\rmore", "two lines and more"),
        ("\u202eevil\u2066\u200b\ufeff", "evil"),
        ("\x00\x7f\x85\u2028x", "  x"),
        ("x" * 600, "x" * 512),
    ],
)
def test_guest_text_can_be_shown(text: str, safe: str) -> None:
    assert safe_text(text, 512) == safe


# Errors


def test_every_leaf_has_the_one_root_and_a_refusal_keeps_its_errno() -> None:
    refusal = GuestRefused(errno.ENOENT, "nope: not found", request="START")
    assert isinstance(refusal, AgentError)
    assert refusal.errno == errno.ENOENT
    assert str(refusal) == "the guest refused START: ENOENT: nope: not found"
    assert "errno 4000" in str(GuestRefused(4000, ""))
    with pytest.raises(GuestRefused):
        ReplyReceived(1, Kind.START, refused=refusal).result()
    assert ReplyReceived(1, Kind.START, 7).result() == 7


def test_a_missing_program_names_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(AgentMissing, match="make setup"):
        binary_path(tmp_path / "sandloom-agent")
    built = tmp_path / "sandloom-agent"
    built.write_bytes(b"\x7fELF")
    assert binary_path(built) == built
