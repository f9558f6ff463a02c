"""Between the control plane's values and the bytes in the store.

Layout of every record: `{"kind": "Sandbox", "schema": 1, "value": {...}}`, UTF-8 JSON, keys sorted, fields that have
their default left out. Enums are their values, tuples arrays. A field added later has a default, so that older records
stay readable; a field that this version does not know is an error, never dropped in silence.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Callable
from enum import Enum
from functools import cache
from typing import Any, TypeVar

from controlplane.errors import BadState

SCHEMA = 1
T = TypeVar("T")
Reader = Callable[[Any], Any]
_ATOMS = frozenset({str, int, float, bool, types.NoneType})
_TO_JSON = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode


def encode(value: Any) -> bytes:
    """A dataclass as the store keeps it."""
    document = {"kind": type(value).__name__, "schema": SCHEMA, "value": _plain(value)}
    return _TO_JSON(document).encode()


def decode(kind: type[T], data: bytes, source: str, *, revision: int | None = None) -> T:
    """The value of class `kind` in `data`; its `revision` field is set when one is given.

    BadState names `source` (the record's key) when the bytes are no such record of this schema."""
    try:
        document = json.loads(data)
        if document["schema"] != SCHEMA or document["kind"] != kind.__name__:
            found = f"{document['kind']} of schema {document['schema']}"
            raise ValueError(f"it is a {found}, wanted {kind.__name__} of schema {SCHEMA}")
        value = _reader(typing.cast(typing.Hashable, kind))(document["value"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadState("BadRecord", f"record {source} cannot be read: {error}", key=source) from error
    return typing.cast(T, value if revision is None else dataclasses.replace(value, revision=revision))


def _plain(value: Any) -> Any:
    kind = value.__class__
    return value if kind in _ATOMS else _writer(kind)(value)


@cache
def _writer(kind: type) -> Callable[[Any], Any]:
    """What turns a value of this very class into plain JSON."""
    if dataclasses.is_dataclass(kind):
        return _dataclass_writer(kind)
    if issubclass(kind, Enum):
        return lambda value: value.value
    if issubclass(kind, tuple):
        return lambda value: [_plain(item) for item in value]
    return lambda value: value


def _dataclass_writer(kind: type) -> Callable[[Any], Any]:
    stored = [(each.name, each.default) for each in dataclasses.fields(kind) if each.metadata.get("stored", True)]

    def write(value: Any) -> dict[str, Any]:
        document = {}
        for name, default in stored:
            part = getattr(value, name)
            if part is not default and part != default:
                document[name] = part if part.__class__ in _ATOMS else _plain(part)
        return document

    return write


@cache
def _reader(kind: Any) -> Reader:
    """What turns plain JSON into a `kind`; strict about types."""
    if dataclasses.is_dataclass(kind):
        return _dataclass_reader(typing.cast(type[Any], kind))
    if isinstance(kind, type) and issubclass(kind, Enum):
        return kind
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:
        (inner,) = (argument for argument in arguments if argument is not types.NoneType)
        read = _reader(inner)
        return lambda value: None if value is None else read(value)
    if origin is tuple and arguments[-1] is Ellipsis:
        item = _reader(arguments[0])
        return lambda value: tuple(item(part) for part in _checked(list, value))
    if origin is tuple:
        items = [_reader(argument) for argument in arguments]
        return lambda value: tuple(read(part) for read, part in zip(items, _checked(list, value), strict=True))
    if kind is float:
        return lambda value: float(_checked((int, float), value))
    return lambda value: _checked(kind, value)


def _dataclass_reader(kind: type[Any]) -> Reader:
    hints = typing.get_type_hints(kind)
    stored = [field.name for field in dataclasses.fields(kind) if field.metadata.get("stored", True)]
    readers = {name: _reader(hints[name]) for name in stored}

    def read(value: Any) -> Any:
        unknown = set(_checked(dict, value)) - set(readers)
        if unknown:
            raise ValueError(f"{kind.__name__} has no field {', '.join(sorted(unknown))}: upgrade the control plane")
        return kind(**{name: readers[name](part) for name, part in value.items()})

    return read


def _checked(kind: type | tuple[type, ...], value: Any) -> Any:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise TypeError(f"{value!r} is not {kind}")
    return value
