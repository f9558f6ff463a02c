"""A host gives its guests the pages that its host-kernel sandboxes of the same image have, and tells so."""

from __future__ import annotations

from typing import Any

import pytest

from tests.integration.fabric import Fabric, until

pytestmark = pytest.mark.guest


def shared_by_both(fabric: Fabric) -> dict[str, int]:
    """How many bytes each of the two holds together with the other one."""
    rows: list[dict[str, Any]] = fabric.asked("share")["sandboxes"]
    return {row["name"]: sum(part["bytes"] for part in row["shared"] if part["holders"] == 2) for row in rows}


def test_a_guest_that_was_first_shares_with_a_host_kernel_sandbox(fabric: Fabric) -> None:
    fabric.start("guest")
    fabric.start("plain", "--class", "host-kernel")

    def together() -> bool:
        for name in ("guest", "plain"):
            fabric.ok("exec", name, "--", "cat", "/dev/null")
        return (
            min(shared_by_both(fabric).get(name, 0) for name in ("guest", "plain")) >= 256 << 10
        )  # sleep, and its libc

    until(together, 120.0, lambda: str(fabric.asked("share")))
