"""The account of a VMM's memory: every page is told once, under the right name."""

from __future__ import annotations

import os

from native import _dax
from tests.bench import account
from tests.bench.account import Held


def mapping(path: str, perms: str, pss_kib: int, private_kib: int, anonymous_kib: int) -> _dax.Mapping:
    sizes = {"rss_kib": pss_kib, "pss_kib": pss_kib, "private_dirty_kib": private_kib, "anonymous_kib": anonymous_kib}
    where: list[int | str | tuple[int, int]] = [4096, 8192, perms, 0, (0, 0), path]
    return _dax.Mapping([*where, *(sizes.get(name, 0) for name in _dax.Mapping.__match_args__[len(where) :])])


def test_each_kind_gets_its_own() -> None:
    held = account.account(
        [
            mapping("/memfd:sandloom-template (deleted)", "rw-p", 100, 30, 30),
            mapping("/memfd:memory-backend-memfd (deleted)", "rw-s", 50, 50, 0),
            mapping("/store/objects/ab/blob", "r--s", 7, 0, 0),
            mapping("[heap]", "rw-p", 9, 9, 9),
            mapping("", "rwxp", 16, 16, 16),
            mapping("", "rw-p", 5, 5, 5),
            mapping("/usr/lib/libglib.so", "r--p", 12, 4, 3),
        ],
        page_tables_kib=2,
    )
    assert held == {
        account.COPIED: Held(30, 30),
        account.RAM: Held(70, 0),
        account.SHARED_RAM: Held(50, 50),
        account.LAYERS: Held(7, 0),
        account.HEAP: Held(9, 9),
        account.TCG: Held(16, 16),
        account.ANON: Held(5, 5),
        account.RELOCATED: Held(3, 3),
        account.CODE: Held(9, 1),
        account.PAGE_TABLES: Held(2, 2),
    }
    assert account.total(held) == Held(201, 116)


def test_of_a_process_it_is_its_pss_and_page_tables() -> None:
    held = account.account_of(os.getpid())
    assert held[account.PAGE_TABLES].pss_kib > 0
    assert held[account.COPIED] == held[account.RAM] == Held()
    assert account.total(held).pss_kib > 1024
