"""Plots for a terminal, in characters. Pure."""

from __future__ import annotations

from collections.abc import Sequence

EIGHTHS = " ▏▎▍▌▋▊▉█"
HEIGHTS = " ▁▂▃▄▅▆▇█"
FILLS = "█▓▒░"


def gib(size_mib: float) -> str:
    """A size for people."""
    if size_mib >= 1 << 20:
        return f"{size_mib / (1 << 20):.3g} TiB"
    return f"{size_mib / 1024:.3g} GiB" if size_mib >= 1024 else f"{size_mib:.0f} MiB"


def stacked(parts: Sequence[float], total: float, width: int) -> str:
    """Parts of a whole as a bar of `width` characters, one of FILLS a part; every part above nothing shows."""
    if total <= 0 or width <= 0:
        return " " * max(0, width)
    cells, upto, drawn = [], 0.0, 0
    for fill, part in zip(FILLS, parts, strict=False):
        upto += part
        end = min(width, max(round(width * upto / total), drawn + (1 if part > 0 else 0)))
        cells.append(fill * (end - drawn))
        drawn = max(drawn, end)
    return "".join(cells)[:width].ljust(width)


def sparkline(values: Sequence[float], width: int, most: float | None = None) -> str:
    """Values over time in one line: the largest of each stretch."""
    if not values or width <= 0:
        return ""
    top = most if most else max(values)
    columns = min(width, len(values))
    line = ""
    for column in range(columns):
        part = values[
            column * len(values) // columns : max(
                (column + 1) * len(values) // columns, column * len(values) // columns + 1
            )
        ]
        level = 0 if top <= 0 else min(len(HEIGHTS) - 1, round((len(HEIGHTS) - 1) * max(part) / top))
        line += HEIGHTS[level]
    return line


def bar(value: float, most: float, width: int) -> str:
    """One value as a bar, to an eighth of a character."""
    if most <= 0 or width <= 0:
        return ""
    eighths = round(8 * width * min(1.0, value / most))
    return EIGHTHS[-1] * (eighths // 8) + (EIGHTHS[eighths % 8] if eighths % 8 else "")
