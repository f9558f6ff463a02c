"""What plans print: sentences, tables, terminal plots, JSON, and reports as HTML files."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from controlplane.capacity.fit import HostMemory
from controlplane.capacity.html import Page, page
from controlplane.capacity.textplot import FILLS, stacked
from controlplane.cli.command import Shell
from controlplane.cli.errors import CliError
from controlplane.cli.output import render_json, render_yaml

FORMS = ("table", "wide", "json", "yaml")
BAR_WIDTH = 32
LEGEND = "  ".join(
    f"{fill} {name}" for fill, name in zip(FILLS, ("private", "shared", "reserved", "free"), strict=True)
)


def told(shell: Shell, data: Any, text: str) -> None:
    """The data for programs, or the text for people, as -o says."""
    if shell.printer.form in ("json", "yaml"):
        shell.printer.write((render_json if shell.printer.form == "json" else render_yaml)(plain(data)))
    else:
        shell.printer.write(text)


def plain(value: Any) -> Any:
    """Dataclasses, enums and tuples as JSON has them; infinite numbers as null."""
    if is_dataclass(value) and not isinstance(value, type):
        return {key: plain(part) for key, part in asdict(value).items()}
    if isinstance(value, dict):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple | frozenset):
        return [plain(part) for part in value]
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, float) and value in (float("inf"), float("-inf")):
        return None
    return value


def memory_bar(memory: HostMemory, width: int = BAR_WIDTH) -> str:
    """A host's memory as a bar; LEGEND tells the parts."""
    parts = (memory.private_mib, memory.shared_mib, memory.reserved_mib, memory.free_mib)
    return stacked(parts, sum(parts), width)


def change(now: float, before: float) -> str:
    """`+12 %`; how much `now` differs from `before`."""
    return "" if not before else f"{100 * (now - before) / before:+.0f} %"


def hosts_text(count: int) -> str:
    """`1 host`, `1,200 hosts`."""
    return f"{count:,} host{'' if count == 1 else 's'}"


def share(value: float) -> str:
    """A share for people: enough digits to see that it is not nothing."""
    return f"{value:.0%}" if value >= 0.1 or value == 0 else f"{100 * value:.2g}%"


def plot_width() -> int:
    """How wide a plot over the whole line may be."""
    return max(20, min(100, shutil.get_terminal_size().columns - 24))


def aligned(rows: Sequence[tuple[str, str]]) -> str:
    """Names and what belongs to them, in two columns."""
    width = max((len(name) for name, _ in rows), default=0)
    return "".join(f"  {name:{width}}  {text}\n" for name, text in rows if text)


def write_report(path: Path | None, content: Page, shell: Shell) -> None:
    """The page, if it is wanted. CliError when it cannot be written."""
    if path is None:
        return
    try:
        path.write_text(page(content), encoding="utf-8")
    except OSError as error:
        raise CliError("cannot write the report", f"{path} ({error.strerror})", "name another file") from error
    shell.say(f"report: {path}")
