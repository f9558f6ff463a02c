"""Charts as SVG text, self-contained: no script, no font, no file beside them. Pure.

Colours are told apart by their lightness as well, so that the pictures also read in grey and to the colour-blind.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

from controlplane.capacity.fit import HostMemory
from controlplane.capacity.measures import Moment
from controlplane.capacity.textplot import gib

WIDTH, LEFT, RIGHT = 860, 130, 24
PRIVATE, SHARED, RESERVED, FREE, SAVED, CAPACITY = "#1b4f72", "#48a9c5", "#8d99a6", "#e8ecef", "#f2b134", "#b03a2e"
PARTS = (("private", PRIVATE), ("shared", SHARED), ("reserved", RESERVED), ("free", FREE))
MOST_BARS = 24


@dataclass(frozen=True)
class Bar:
    """A row of a bar chart: its label, its parts (MiB) in the order of the colours, and what stands at its end."""

    label: str
    parts: tuple[float, ...]
    note: str


def memory_bars(hosts: Sequence[HostMemory]) -> list[Bar]:
    """A bar a host; when there are too many, a bar for each run of hosts in order of how full they are."""
    ranked = sorted(hosts, key=lambda host: (-(host.private_mib + host.shared_mib), host.host))
    size = -(-len(ranked) // MOST_BARS) if len(ranked) > MOST_BARS else 1
    bars = []
    for at in range(0, len(ranked), size):
        group = ranked[at : at + size]
        count = len(group)
        parts = tuple(
            sum(part) / count
            for part in zip(*((h.private_mib, h.shared_mib, h.reserved_mib, h.free_mib) for h in group), strict=True)
        )
        label = group[0].host if count == 1 else f"hosts {at + 1}-{at + count}"
        used = (parts[0] + parts[1]) / max(1.0, sum(parts))
        bars.append(Bar(label, parts, f"{used:.0%}" if count == 1 else f"{used:.0%} on average"))
    return bars


def bar_chart(
    title: str, bars: Sequence[Bar], colours: Sequence[tuple[str, str]], unit: Callable[[float], str] = gib
) -> str:
    """Stacked horizontal bars on one scale, with a legend; `unit` writes a number of the axis."""
    top, height = 58, 20
    longest = max([sum(bar.parts) for bar in bars], default=1.0) or 1.0
    room = WIDTH - LEFT - RIGHT - 150
    lines = [_legend(colours)]
    for number, bar in enumerate(bars):
        y, x = top + number * (height + 6), float(LEFT)
        lines.append(_text(LEFT - 8, y + 14, bar.label[-18:], anchor="end"))
        for value, (name, colour) in zip(bar.parts, colours, strict=True):
            wide = room * value / longest
            tip = f"<title>{escape(bar.label)}: {escape(name)} {unit(value)}</title>"
            lines.append(
                f'<rect x="{x:.1f}" y="{y}" width="{max(0.0, wide):.1f}" height="{height}" fill="{colour}">{tip}</rect>'
            )
            x += wide
        lines.append(_text(x + 6, y + 14, bar.note))
    bottom = top + len(bars) * (height + 6) + 8
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        x = LEFT + room * share
        lines.append(f'<line x1="{x:.1f}" y1="{top - 4}" x2="{x:.1f}" y2="{bottom - 6}" stroke="#0002"/>')
        lines.append(_text(x, bottom + 8, unit(longest * share), anchor="middle", size=11))
    return _figure(title, bottom + 20, lines)


def demand_chart(title: str, moments: Sequence[Moment], losses: Sequence[float] = (), until_s: float = math.inf) -> str:
    """What was asked for and what was promised over time, against what there is; nothing after `until_s`."""
    moments = [moment for moment in moments if moment.time_s <= until_s]
    top, bottom, height = 58, 300, 340
    if not moments:
        return _figure(title, height, [_text(LEFT, top + 20, "nothing happened")])
    first_s, last_s = moments[0].time_s, max(moments[-1].time_s, moments[0].time_s + 1e-9)
    most = max(max(m.asked_mib, m.promised_mib, m.capacity_mib) for m in moments) or 1
    busiest = max(max(m.asked_mib, m.promised_mib) for m in moments)
    clipped = busiest > 0 and most > 3 * busiest
    scale = 1.25 * busiest if clipped else 1.08 * most

    def at(time_s: float, mib: float) -> tuple[float, float]:
        x = LEFT + (WIDTH - LEFT - RIGHT) * (time_s - first_s) / (last_s - first_s)
        return x, bottom - (bottom - top) * min(1.0, mib / scale)

    lines = [_legend((("asked, as if nobody shared", SAVED), ("promised", PRIVATE), ("capacity", CAPACITY)))]
    for share in (0.25, 0.5, 0.75, 1.0):
        y = bottom - (bottom - top) * share
        lines.append(f'<line x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}" stroke="#0001"/>')
        lines.append(_text(LEFT - 8, y + 4, gib(scale * share), anchor="end", size=11))
    lines.append(_area([at(*pair) for pair in _steps([(m.time_s, m.asked_mib) for m in moments])], bottom, SAVED, 0.55))
    lines.append(
        _area([at(*pair) for pair in _steps([(m.time_s, m.promised_mib) for m in moments])], bottom, PRIVATE, 0.9)
    )
    if clipped:
        lines.append(
            _text(WIDTH - RIGHT, top - 2, f"capacity {gib(most)}, above the picture", anchor="end", colour=CAPACITY)
        )
    else:
        lines.append(_line([at(*pair) for pair in _steps([(m.time_s, m.capacity_mib) for m in moments])], CAPACITY))
    for lost_s in losses:
        x, _ = at(lost_s, 0)
        lines.append(
            f'<line x1="{x:.1f}" y1="{top}" x2="{x:.1f}" y2="{bottom}" stroke="{CAPACITY}" stroke-dasharray="3 3"/>'
        )
        lines.append(_text(x + 4, top + 12, "hosts lost", colour=CAPACITY, size=11))
    lines += _time_axis(first_s, last_s, lambda time_s: at(time_s, 0)[0], bottom)
    return _figure(title, height, lines)


@dataclass(frozen=True)
class Series:
    """A value over time (seconds, MiB), which holds until its next point; a line, or an area below it."""

    name: str
    points: tuple[tuple[float, float], ...]
    colour: str
    filled: bool = False


def step_chart(title: str, series: Sequence[Series]) -> str:
    """Several values over the same time, on one scale, with a legend."""
    top, bottom, height = 58, 300, 340
    points = [point for one in series for point in one.points]
    if not points:
        return _figure(title, height, [_text(LEFT, top + 20, "nothing happened")])
    first_s, last_s = min(x for x, _ in points), max(max(x for x, _ in points), min(x for x, _ in points) + 1e-9)
    scale = 1.08 * max(1.0, *(y for _, y in points))

    def at(time_s: float, mib: float) -> tuple[float, float]:
        x = LEFT + (WIDTH - LEFT - RIGHT) * (time_s - first_s) / (last_s - first_s)
        return x, bottom - (bottom - top) * mib / scale

    lines = [_legend([(one.name, one.colour) for one in series])]
    for share in (0.25, 0.5, 0.75, 1.0):
        y = bottom - (bottom - top) * share
        lines.append(f'<line x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}" stroke="#0001"/>')
        lines.append(_text(LEFT - 8, y + 4, gib(scale * share), anchor="end", size=11))
    for one in sorted(series, key=lambda each: not each.filled):
        if one.points:
            corners = [at(*pair) for pair in _steps(one.points)]
            lines.append(_area(corners, bottom, one.colour, 0.55) if one.filled else _line(corners, one.colour))
    lines += _time_axis(first_s, last_s, lambda time_s: at(time_s, 0)[0], bottom)
    return _figure(title, height, lines)


def _time_axis(first_s: float, last_s: float, at: Callable[[float], float], bottom: float) -> list[str]:
    labels = []
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        time_s = first_s + (last_s - first_s) * share
        anchor = "end" if share == 1 else "middle"
        labels.append(_text(at(time_s), bottom + 18, duration(time_s), anchor=anchor, size=11))
    return labels


def duration(seconds: float) -> str:
    """Two digits or so of the largest unit that fits."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}".replace(".0 ", " ")
    return f"{seconds:.3g} s"


def _steps(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """A value holds until the next."""
    made = [points[0]]
    for (_, before), (time_s, value) in pairwise(points):
        made += [(time_s, before), (time_s, value)]
    return made


def _area(points: Sequence[tuple[float, float]], bottom: float, colour: str, opacity: float) -> str:
    corners = [(points[0][0], bottom), *points, (points[-1][0], bottom)]
    return f'<polygon points="{_points(corners)}" fill="{colour}" fill-opacity="{opacity}"/>'


def _line(points: Sequence[tuple[float, float]], colour: str) -> str:
    return f'<polyline points="{_points(points)}" fill="none" stroke="{colour}" stroke-width="2"/>'


def _points(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _legend(colours: Sequence[tuple[str, str]]) -> str:
    parts, x = [], float(LEFT)
    for name, colour in colours:
        parts.append(f'<rect x="{x:.0f}" y="32" width="12" height="12" fill="{colour}" stroke="#0003"/>')
        parts.append(_text(x + 17, 42, name))
        x += 34 + 7.2 * len(name)
    return "".join(parts)


def _text(
    x: float, y: float, text: str, *, anchor: str = "start", size: int = 12, colour: str = "#222", weight: str = ""
) -> str:
    bold = f' font-weight="{weight}"' if weight else ""
    where = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="{colour}"{bold}'
    return f"<text {where}>{escape(text)}</text>"


def _figure(title: str, height: int, lines: Sequence[str]) -> str:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" role="img">'
    )
    return "\n".join(
        [head, f"<title>{escape(title)}</title>", _text(0, 16, title, size=15, weight="bold"), *lines, "</svg>"]
    )
