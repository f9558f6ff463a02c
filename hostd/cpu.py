"""What the machine's CPUs are like."""

from __future__ import annotations

from pathlib import Path

SMT_ACTIVE = Path("/sys/devices/system/cpu/smt/active")


def smt_is_on(active: Path = SMT_ACTIVE) -> bool:
    """Whether hyperthreads share cores now. A kernel that does not say counts as one where they do."""
    try:
        return active.read_text(encoding="ascii").strip() != "0"
    except OSError:
        return True
