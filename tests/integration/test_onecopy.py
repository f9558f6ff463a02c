"""Guests get the pages that host-kernel sandboxes of their image have, and nobody gets bytes that are wrong."""

from __future__ import annotations

from typing import Any

import pytest

from tests.hostd.busybox import busybox, rootfs_tar
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


def test_a_layer_with_a_flipped_byte_is_run_by_no_class_and_named(fabric: Fabric) -> None:
    program = busybox()
    assert program is not None
    archive = fabric.home.parent / "small.tar"
    archive.write_bytes(rootfs_tar(program, {"mine": b"rotten"}))
    before = set(fabric.home.rglob("blob"))
    fabric.ok("image", "import", str(archive), "--name", "rotten")
    (blob,) = set(fabric.home.rglob("blob")) - before
    data = bytearray(blob.read_bytes())
    data[data.index(b"rotten")] ^= 1
    blob.write_bytes(data)
    refused = fabric.run("run", "--class", "host-kernel", "rotten", "--", "cat", "/mine")
    assert refused.code == 125
    assert "sha256:" in refused.err and ("is corrupt" in refused.err or "import" in refused.err), refused
    assert not blob.exists()  # in quarantine, where nothing serves it
    again = fabric.run("run", "rotten", "--", "cat", "/mine")
    assert again.code == 125 and "import" in again.err, again
