"""Sizes, CPUs and ranges as planner's files write them. Pure; ValueError says what is wrong with a text."""

from __future__ import annotations

import re

_UNITS_MIB = {"M": 1, "G": 1 << 10, "T": 1 << 20}
_SIZE = re.compile(r"([0-9]{1,12})([MGT])(i?B)?", re.IGNORECASE | re.ASCII)


def parse_mib(text: str) -> int:
    """MiB of `512M`, `1G`, `2TiB` (binary)."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is no size: write it as 512M, 1G or 2T")
    return int(match[1]) * _UNITS_MIB[match[2].upper()]


def parse_range(text: str) -> tuple[int, int]:
    """`MIN:MAX`, or one size that is both."""
    low, colon, high = text.partition(":")
    least = parse_mib(low)
    most = parse_mib(high) if colon else least
    if least > most:
        raise ValueError(f"{text!r}: the minimum is above the maximum")
    return least, most


def parse_milli(cpus: float | int | str) -> int:
    """Thousandths of a CPU of 2, 0.5 or "0.5"."""
    try:
        milli = round(float(cpus) * 1000)
    except (TypeError, ValueError):
        raise ValueError(f"{cpus!r} is no number of CPUs") from None
    if not 0 < milli < 1 << 31 or abs(milli - float(cpus) * 1000) > 1e-6:
        raise ValueError(f"{cpus!r}: CPUs must be above 0 and in thousandths at finest")
    return milli
