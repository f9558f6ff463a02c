"""Between msgpack arrays and the values of `guestagent.messages`: the only place that knows both.

Promise: decoding takes anything msgpack can say and gives a checked value or a ProtocolError that names the
field; encoding gives arrays exactly as PROTOCOL.md has them. Keys a guest's map has on top are ignored (a
newer agent may tell more), missing or mistyped ones are a breach.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields

from guestagent.errors import ProtocolError
from guestagent.messages import (
    MAX_BLOCKS,
    MAX_SIGNAL,
    MAX_VCPUS,
    PROTOCOL_VERSION,
    RUN,
    RUNS_AT_ONCE,
    U32_MAX,
    U64_MAX,
    BalloonReport,
    Configure,
    Exited,
    GuestEvent,
    GuestState,
    GuestStats,
    Kind,
    Output,
    Prepare,
    ProcState,
    Renew,
    Reply,
    Services,
    StartProcess,
    StdinAcked,
    Stream,
)

ERRNO_MAX = 4095
AgentMessage = Reply | Output | Exited | StdinAcked | GuestEvent


def safe_text(text: str, max_chars: int) -> str:
    """`text` cut to `max_chars` with nothing in it that moves a cursor or turns a line around.

    Control, format (bidirectional marks too), surrogate and unassigned characters go; white space becomes a
    plain space.
    """
    return "".join(c if c.isprintable() else " " for c in text[:max_chars] if c.isprintable() or c.isspace())


def _uint(value: object, what: str, maximum: int = U64_MAX, minimum: int = 0) -> int:
    if type(value) is not int:
        raise ProtocolError(f"{what} is a {type(value).__name__}, not an integer")
    if not minimum <= value <= maximum:
        raise ProtocolError(f"{what} = {value} is outside {minimum} … {maximum}")
    return value


def _flag(value: object, what: str) -> bool:
    if not isinstance(value, bool):
        raise ProtocolError(f"{what} is a {type(value).__name__}, not a boolean")
    return value


def _data(value: object, what: str) -> bytes:
    if not isinstance(value, bytes):
        raise ProtocolError(f"{what} is a {type(value).__name__}, not bytes")
    return value


def _text(value: object, what: str, max_chars: int) -> str:
    if not isinstance(value, str):
        raise ProtocolError(f"{what} is a {type(value).__name__}, not text")
    return safe_text(value, max_chars)


def _map(value: object, what: str) -> Mapping[object, object]:
    if not isinstance(value, dict):
        raise ProtocolError(f"{what} is a {type(value).__name__}, not a map")
    return value


def _list(value: object, what: str) -> list[object]:
    if not isinstance(value, list):
        raise ProtocolError(f"{what} is a {type(value).__name__}, not an array")
    return value


def _kind(message: list[object]) -> Kind:
    code = _uint(message[0] if message else None, "message kind", U32_MAX)
    try:
        return Kind(code)
    except ValueError:
        raise ProtocolError(f"message kind {code} is not in the protocol") from None


def decode_agent_message(message: list[object], max_text_chars: int) -> AgentMessage:
    """What the agent said. Only form is checked here; whether it may say so now is the session's to judge."""
    kind = _kind(message)
    lengths = {Kind.REPLY: 4, Kind.OUTPUT: 6, Kind.EXITED: 6, Kind.STDIN_ACK: 4, Kind.EVENT: 4}
    if kind not in lengths:
        raise ProtocolError(f"{kind.name} came from the agent, only the host may say it")
    if len(message) != lengths[kind]:
        raise ProtocolError(f"{kind.name} has {len(message)} fields, not {lengths[kind]}")
    if kind is Kind.REPLY:
        return Reply(_uint(message[1], "REPLY id", U32_MAX, 1), _uint(message[2], "REPLY errno", ERRNO_MAX), message[3])
    _uint(message[1], f"{kind.name} id", 0)
    if kind is Kind.EVENT:
        return _event(message, max_text_chars)
    proc = _uint(message[2], f"{kind.name} proc", U32_MAX, 1)
    if kind is Kind.OUTPUT:
        stream = Stream(_uint(message[3], "OUTPUT stream", 2, 1))
        return Output(proc, stream, _uint(message[4], "OUTPUT offset"), _data(message[5], "OUTPUT data"))
    if kind is Kind.EXITED:
        return _exited(proc, message)
    return StdinAcked(proc, _uint(message[3], "STDIN_ACK offset"))


def _exited(proc: int, message: list[object]) -> Exited:
    signal = _uint(message[4], "EXITED signal", MAX_SIGNAL)
    code = _uint(message[3], "EXITED code", 255, -1)
    if (signal == 0) == (code == -1):
        raise ProtocolError(f"EXITED code {code} does not go with signal {signal}")
    return Exited(proc, code, signal, _flag(message[5], "EXITED core"))


def _event(message: list[object], max_text_chars: int) -> GuestEvent:
    name = _text(message[2], "EVENT name", max_text_chars)
    values = tuple(
        (_text(key, "EVENT key", max_text_chars), _uint(value, "EVENT value", U64_MAX, -(2**63)))
        for key, value in _map(message[3], "EVENT values").items()
    )
    return GuestEvent(name, values)


def decode_hello(body: object, max_text_chars: int) -> GuestState:
    """The body of HELLO's reply."""
    state = _map(body, "HELLO reply")
    version = _uint(state.get("version"), "version")
    if version != PROTOCOL_VERSION:
        raise ProtocolError(f"agent speaks version {version}, the host speaks {PROTOCOL_VERSION}")
    procs = tuple(_proc_state(item) for item in _list(state.get("procs"), "procs"))
    if len({item.proc for item in procs}) != len(procs):
        raise ProtocolError("HELLO reply names a process twice")
    return GuestState(
        version,
        _text(state.get("agent"), "agent", max_text_chars),
        _text(state.get("boot_id"), "boot_id", max_text_chars),
        _flag(state.get("configured"), "configured"),
        procs,
    )


def _proc_state(item: object) -> ProcState:
    proc = _map(item, "procs entry")
    return ProcState(
        _uint(proc.get("proc"), "proc", U32_MAX, 1),
        _uint(proc.get("pid"), "pid", U32_MAX),
        _flag(proc.get("exited"), "exited"),
        _uint(proc.get("stdin_offset"), "stdin_offset"),
        _uint(proc.get("out_offset"), "out_offset"),
        _uint(proc.get("err_offset"), "err_offset"),
    )


def decode_stats(body: object) -> GuestStats:
    """The body of STATS' reply."""
    stats = _map(body, "STATS reply")
    told = [item for item in fields(GuestStats) if item.default is MISSING or item.name in stats]
    return GuestStats(**{item.name: _uint(stats.get(item.name), item.name) for item in told})


def decode_balloon(body: object) -> BalloonReport:
    """The body of BALLOON's and BALLOON_RUNS' reply. What the runs say is checked where they are used."""
    report = _map(body, "BALLOON reply")
    runs = _data(report.get("runs"), "runs")
    if len(runs) % RUN.size or len(runs) > RUNS_AT_ONCE * RUN.size:
        raise ProtocolError(f"runs of {len(runs)} bytes are no 0 … {RUNS_AT_ONCE} runs of {RUN.size}")
    blocks, next_block = (_uint(report.get(key), key, MAX_BLOCKS) for key in ("blocks", "next"))
    return BalloonReport(blocks, runs, next_block)


def decode_vcpus(body: object) -> int:
    """The body of CPUS' reply."""
    return _uint(body, "vCPUs online", MAX_VCPUS, 1)


def decode_pid(body: object) -> int:
    """The body of START's reply."""
    return _uint(body, "guest pid", U32_MAX, 1)


def decode_nil(body: object, request: str) -> None:
    """The body of a reply that has none."""
    if body is not None:
        raise ProtocolError(f"reply to {request} has a {type(body).__name__} where nil belongs")


def decode_refusal(body: object, max_text_chars: int) -> str:
    """The message that goes with an errno."""
    return _text(body, "error message", max_text_chars)


def encode_configure(configure: Configure) -> dict[str, object]:
    return {**asdict(configure), "layers": list(configure.layers)}


def encode_prepare(prepare: Prepare) -> dict[str, object]:
    return {"layers": list(prepare.layers), "deadline_ms": prepare.deadline_ms}


def encode_renew(renew: Renew) -> dict[str, object]:
    return asdict(renew)


def encode_services(services: Services) -> dict[str, object]:
    """SERVICES's map."""
    return {"who": list(services.who), "nonce": services.nonce}


def encode_start(start: StartProcess) -> dict[str, object]:
    return {**asdict(start), "argv": list(start.argv), "env": list(start.env)}


# The agent's side of the same, for the fake agent.


def decode_configure(body: object) -> Configure:
    """BadRequest or ProtocolError when the map is not one."""
    given = _map(body, "CONFIGURE")
    return Configure(
        _data(given.get("hostname"), "hostname"),
        tuple(_data(uuid, "layer") for uuid in _list(given.get("layers"), "layers")),
        _uint(given.get("upper_mib"), "upper_mib"),
        _data(given.get("entropy"), "entropy"),
        _data(given.get("machine_id"), "machine_id"),
        _uint(given.get("time_unix_ns"), "time_unix_ns"),
        _uint(given.get("deadline_ms"), "deadline_ms"),
    )


def decode_prepare(body: object) -> Prepare:
    """BadRequest or ProtocolError when the map is not one."""
    given = _map(body, "PREPARE")
    layers = tuple(_data(uuid, "layer") for uuid in _list(given.get("layers"), "layers"))
    return Prepare(layers, _uint(given.get("deadline_ms"), "deadline_ms"))


def decode_renew(body: object) -> Renew:
    """BadRequest or ProtocolError when the map is not one."""
    given = _map(body, "RENEW")
    return Renew(
        _data(given.get("hostname"), "hostname"),
        _data(given.get("entropy"), "entropy"),
        _data(given.get("machine_id"), "machine_id"),
        _uint(given.get("time_unix_ns"), "time_unix_ns"),
    )


def decode_start(body: object) -> StartProcess:
    """BadRequest or ProtocolError when the map is not one."""
    given = _map(body, "START")
    return StartProcess(
        _uint(given.get("proc"), "proc"),
        tuple(_data(item, "argv") for item in _list(given.get("argv"), "argv")),
        tuple(_data(item, "env") for item in _list(given.get("env"), "env")),
        _data(given.get("cwd"), "cwd"),
        _data(given.get("user"), "user"),
        _flag(given.get("tty"), "tty"),
        _uint(given.get("rows"), "rows"),
        _uint(given.get("cols"), "cols"),
        _flag(given.get("stdin"), "stdin"),
    )


def encode_guest_state(state: GuestState) -> dict[str, object]:
    return {**asdict(state), "procs": [asdict(item) for item in state.procs]}


def encode_stats(stats: GuestStats) -> dict[str, object]:
    return asdict(stats)
