"""Sizes, CPUs and KEY=VALUE as people type them, and sizes as people read them. Pure.

Sizes are binary: 512M = 512MiB = 536870912 bytes; the API counts whole MiB, so anything finer is refused rather
than rounded.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from controlplane.cli.errors import UsageError

MIB = 1 << 20
MAX_MEMORY_MIB = (1 << 32) - 1  # the API's uint32
_UNITS_MIB = {"M": 1, "G": 1 << 10, "T": 1 << 20}
_SIZE = re.compile(r"([0-9]{1,12})(?:([MGT])(?:i?B)?)", re.IGNORECASE | re.ASCII)
_CPUS = re.compile(r"([0-9]{1,6})(?:\.([0-9]{1,3}))?", re.ASCII)
_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_.\-]*", re.ASCII)
_SIZE_HELP = "write a size as 512M, 1G or 64MiB (binary, whole MiB)"


@dataclass(frozen=True)
class MemoryRange:
    """Guaranteed minimum and ceiling of a sandbox, MiB; 0 < min <= max."""

    min_mib: int
    max_mib: int


DEFAULT_MEMORY = MemoryRange(256, 1024)


def parse_size_mib(text: str) -> int:
    """MiB of `512M`, `1G`, `64MiB`, `2gb`; never 0. UsageError says what is wrong with the text."""
    match = _SIZE.fullmatch(text)
    if match is None:
        if text.isascii() and text.isdigit():
            raise UsageError("a size needs a unit", repr(text), _SIZE_HELP)
        raise UsageError("not a size", repr(text), _SIZE_HELP)
    size_mib = int(match[1]) * _UNITS_MIB[match[2].upper()]
    if size_mib == 0:
        raise UsageError("a size must be more than 0", repr(text), _SIZE_HELP)
    if size_mib > MAX_MEMORY_MIB:
        raise UsageError("a size is too large", repr(text), f"{MAX_MEMORY_MIB} MiB is the most there can be")
    return size_mib


def parse_memory_range(text: str) -> MemoryRange:
    """`MIN:MAX`, or one size that is both. UsageError when MIN > MAX or a part is not a size."""
    low_text, colon, high_text = text.partition(":")
    if not colon:
        low_mib = high_mib = parse_size_mib(text)
    elif not low_text or not high_text:
        raise UsageError("half of MIN:MAX is missing", repr(text), "write both, as in 256M:1G")
    else:
        low_mib, high_mib = parse_size_mib(low_text), parse_size_mib(high_text)
    if low_mib > high_mib:
        raise UsageError("the minimum is above the maximum", repr(text), f"try {high_text}:{low_text}")
    return MemoryRange(low_mib, high_mib)


def parse_memory_target(text: str) -> tuple[int, int]:
    """What `resize --memory` takes: `CUR` or `MIN:CUR` → (min or 0 for unchanged, current), MiB."""
    if ":" not in text:
        return 0, parse_size_mib(text)
    both = parse_memory_range(text)
    return both.min_mib, both.max_mib


def parse_cpu_milli(text: str) -> int:
    """Thousandths of a CPU of `1`, `0.5`, `2.25`; never 0. UsageError otherwise."""
    match = _CPUS.fullmatch(text)
    if match is None:
        raise UsageError("not a number of CPUs", repr(text), "write it as 1, 0.5 or 2.25 (thousandths at finest)")
    cpu_milli = int(match[1]) * 1000 + int((match[2] or "0").ljust(3, "0"))
    if cpu_milli == 0:
        raise UsageError("CPUs must be more than 0", repr(text), "write it as 1, 0.5 or 2.25")
    return cpu_milli


def parse_whole(text: str, flag: str, least: int, most: int) -> int:
    """A whole number within bounds. UsageError names `flag`."""
    if not re.fullmatch(r"-?[0-9]{1,9}", text, re.ASCII) or not least <= int(text) <= most:
        raise UsageError(f"{flag} takes a whole number", repr(text), f"give {least} to {most}")
    return int(text)


def parse_pairs(texts: Sequence[str], flag: str) -> dict[str, str]:
    """`KEY=VALUE` texts as a dict; a later one wins. UsageError names `flag` and the text."""
    pairs: dict[str, str] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not _KEY.fullmatch(key) or "\0" in value:
            raise UsageError(f"{flag} takes KEY=VALUE", repr(text), "keys are letters, digits and _ . -")
        pairs[key] = value
    return pairs


def parse_duration_s(text: str) -> float:
    """Seconds of `10`, `1.5`, `90s`, `2m`, `7d`; 0 is allowed. UsageError otherwise."""
    match = re.fullmatch(r"([0-9]{1,7}(?:\.[0-9]{1,3})?)(s|m|h|d)?", text, re.ASCII)
    if match is None:
        raise UsageError("not a time", repr(text), "write it as 10, 1.5, 90s or 2m (seconds without a unit)")
    return float(match[1]) * {None: 1, "s": 1, "m": 60, "h": 3600, "d": 86_400}[match[2]]


def format_bytes(size_bytes: int) -> str:
    """Three significant digits and a binary unit: `0 B`, `512 KiB`, `1.50 GiB`."""
    value, units = float(size_bytes), ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"]
    unit = units.pop(0)
    while abs(value) >= 999.5 and units:
        value, unit = value / 1024, units.pop(0)
    if unit == "B" or abs(value) >= 99.95:
        return f"{value:.0f} {unit}"
    return f"{value:.1f} {unit}" if abs(value) >= 9.995 else f"{value:.2f} {unit}"


def format_mib(size_mib: int) -> str:
    """A size in MiB as it would be typed: `512M`, `1G`, `1536M`."""
    for unit, factor in (("T", 1 << 20), ("G", 1 << 10)):
        if size_mib and size_mib % factor == 0:
            return f"{size_mib // factor}{unit}"
    return f"{size_mib}M"


def format_cpus(cpu_milli: int) -> str:
    """`1`, `0.5`, `2.25`."""
    return f"{cpu_milli / 1000:.3f}".rstrip("0").rstrip(".")


def format_age(age_s: float) -> str:
    """The largest unit that says it: `3s`, `5m`, `7h`, `12d`; negative (clocks differ) counts as 0."""
    whole_s = max(0, int(age_s))
    for limit, unit, size in ((120, "s", 1), (7200, "m", 60), (172800, "h", 3600)):
        if whole_s < limit:
            return f"{whole_s // size}{unit}"
    return f"{whole_s // 86400}d"
