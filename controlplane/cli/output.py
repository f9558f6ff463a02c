"""What a command prints: tables for people, JSON, YAML and names for programs. Pure but for `Printer`.

Text in tables may come from a guest (names, messages): control characters are shown escaped, never sent to the
terminal. Colour only on a terminal and never when NO_COLOR is set (no-color.org).
"""

from __future__ import annotations

import base64
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any, Generic, TypeVar

import yaml
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

T = TypeVar("T")
FORMATS = ("table", "wide", "json", "yaml", "name")
COLOURS = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33", "cyan": "36"}


@dataclass(frozen=True)
class Column(Generic[T]):
    """One column: its header, the text of a row, whether only `-o wide` has it, right alignment, a row's colour."""

    header: str
    text: Callable[[T], str]
    wide: bool = False
    right: bool = False
    colour: Callable[[T], str] | None = None


def safe(text: str) -> str:
    """`text` on one line with every unprintable character escaped as \\xNN or \\uNNNN."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def paint(text: str, colour: str, enabled: bool) -> str:
    """`text` in an SGR colour of COLOURS; unchanged when not enabled or the colour is ""."""
    return f"\x1b[{COLOURS[colour]}m{text}\x1b[0m" if enabled and colour else text


def render_table(columns: Sequence[Column[T]], rows: Sequence[T], *, wide: bool, colour: bool) -> str:
    """Header and rows in columns two spaces apart, no trailing blanks, a newline at the end of each line."""
    shown = [column for column in columns if wide or not column.wide]
    cells = [[safe(column.text(row)) or "-" for column in shown] for row in rows]
    widths = [max([len(column.header), *(len(line[index]) for line in cells)]) for index, column in enumerate(shown)]

    def line(texts: Sequence[str], colours: Sequence[str]) -> str:
        parts: list[str] = []
        for index, (text, tint) in enumerate(zip(texts, colours, strict=True)):
            space = " " * (widths[index] - len(text))
            last = index == len(texts) - 1
            tinted = paint(text, tint, colour)
            parts.append(space + tinted if shown[index].right else tinted if last else tinted + space)
        return "  ".join(parts) + "\n"

    body = [line([column.header for column in shown], ["bold"] * len(shown))]
    for row, texts in zip(rows, cells, strict=True):
        body.append(line(texts, [column.colour(row) if column.colour else "" for column in shown]))
    return "".join(body)


def plain(message: Message) -> dict[str, Any]:
    """A protobuf message as JSON types: every field by its proto name, enums as names, 64-bit numbers as numbers,
    times as RFC 3339, durations as seconds, bytes as base64; an unset message as None."""
    return {field.name: _field(message, field) for field in message.DESCRIPTOR.fields}


def _field(message: Message, field: Any) -> Any:
    value = getattr(message, field.name)
    kind = field.message_type
    if kind is not None and kind.GetOptions().map_entry:
        return {str(key): _value(kind.fields_by_name["value"], value[key]) for key in sorted(value)}
    if field.is_repeated:
        return [_value(field, item) for item in value]
    if kind is not None and not message.HasField(field.name):
        return None
    return _value(field, value)


def _value(field: FieldDescriptor, value: Any) -> Any:
    if isinstance(value, Timestamp):
        return value.ToJsonString()
    if isinstance(value, Duration):
        return value.ToNanoseconds() / 1e9
    if isinstance(value, Message):
        return plain(value)
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if field.enum_type is not None:
        known = field.enum_type.values_by_number.get(value)
        return known.name if known is not None else int(value)
    return value


def render_json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def render_yaml(value: Any) -> str:
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, default_flow_style=False)


@dataclass(frozen=True)
class Printer:
    """Where results go and how they look: `form` is one of FORMATS."""

    form: str = "table"
    out: IO[str] | None = None
    environ: Mapping[str, str] | None = None

    @property
    def stream(self) -> IO[str]:
        return self.out if self.out is not None else sys.stdout

    @property
    def colour(self) -> bool:
        return wants_colour(self.stream, os.environ if self.environ is None else self.environ)

    def write(self, text: str) -> None:
        self.stream.write(text)
        self.stream.flush()

    def listing(
        self, rows: Sequence[T], columns: Sequence[Column[T]], *, name: Callable[[T], str], data: Callable[[T], Any]
    ) -> None:
        """Prints rows in the chosen form; `data` gives a row's JSON value, `name` its name."""
        if self.form == "json":
            self.write(render_json([data(row) for row in rows]))
        elif self.form == "yaml":
            self.write(render_yaml([data(row) for row in rows]))
        elif self.form == "name":
            self.write("".join(f"{safe(name(row))}\n" for row in rows))
        else:
            self.write(render_table(columns, rows, wide=self.form == "wide", colour=self.colour))


def wants_colour(stream: IO[str], environ: Mapping[str, str]) -> bool:
    """Colour on a terminal only; NO_COLOR set to anything but "" or TERM=dumb turns it off."""
    return not environ.get("NO_COLOR") and environ.get("TERM") != "dumb" and stream.isatty()
