"""Sharing, measured: guests of one image hold its pages once, and their own page caches stay empty of it."""

from __future__ import annotations

from typing import Any

import pytest

from tests.integration.fabric import Fabric

pytestmark = pytest.mark.guest

NAMES = ("one", "two", "three")
READ = """
import os
def cached():
    return next(int(l.split()[1]) for l in open('/proc/meminfo') if l.startswith('Cached:'))
paths = [os.path.join(d, f) for d, _, files in os.walk('/usr') for f in files]
paths = [p for p in paths if os.path.isfile(p) and not os.path.islink(p)]
before, n = cached(), 0
for p in paths:
    with open(p, 'rb') as o:
        while b := o.read(1 << 20): n += len(b)
print(before, cached(), n)
"""
"""Folders are listed first: their blocks are metadata, which the kernel caches whatever the file system."""


@pytest.fixture(scope="module")
def readers(fabric: Fabric) -> dict[str, list[int]]:
    """Three guests that have read the whole image: {name: [cached before, cached after (KiB), bytes read]}."""
    for name in NAMES:
        fabric.start(name)
    return {
        name: [int(word) for word in fabric.ok("exec", name, "--", "python3", "-c", READ).split()] for name in NAMES
    }


def rows(fabric: Fabric) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in fabric.asked("share")["sandboxes"]}


def test_reading_layers_leaves_the_guests_page_cache_alone(readers: dict[str, list[int]]) -> None:
    for before_kib, after_kib, read_bytes in readers.values():
        assert read_bytes > 100 << 20
        assert abs(after_kib - before_kib) <= 0.05 * before_kib, readers


def test_the_host_holds_the_image_once(fabric: Fabric, readers: dict[str, list[int]]) -> None:
    ledger = fabric.asked("share")
    by_name = {row["name"]: row for row in ledger["sandboxes"]}
    read_bytes = min(value[2] for value in readers.values())
    for name in NAMES:
        shared_by_all = sum(part["bytes"] for part in by_name[name]["shared"] if part["holders"] == len(NAMES))
        assert by_name[name]["layer_bytes"] >= 0.95 * read_bytes
        assert shared_by_all >= 0.95 * read_bytes
    blob_bytes = fabric.asked("image", "inspect", "userland")
    image = blob_bytes[0] if isinstance(blob_bytes, list) else blob_bytes
    assert ledger["hosts"][0]["layer_cache_bytes"] <= image["size_bytes"]  # once, not three times


def test_the_ledger_adds_up(fabric: Fabric, readers: dict[str, list[int]]) -> None:
    ledger = fabric.asked("share")
    proportional = 0.0
    for row in ledger["sandboxes"]:
        shared = sum(part["bytes"] for part in row["shared"])
        assert row["private_bytes"] + shared == row["resident_bytes"]
        assert row["saved_bytes"] == row["resident_bytes"] - row["proportional_bytes"]
        proportional += row["proportional_bytes"]
    distinct = ledger["hosts"][0]["distinct_bytes"]
    assert abs(proportional - distinct) <= 4096 * len(ledger["sandboxes"])  # each page once, whoever holds it


def test_one_more_guest_costs_the_host_far_less_than_the_image(fabric: Fabric, readers: dict[str, list[int]]) -> None:
    row = rows(fabric)["three"]
    assert row["saved_bytes"] > 0.5 * row["layer_bytes"]
