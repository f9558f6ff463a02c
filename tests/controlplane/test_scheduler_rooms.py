"""Rows sorted by their room: what is found is what is there, whatever was added, changed or replaced before."""

from __future__ import annotations

from controlplane.model import Capacity, SandboxClass
from controlplane.scheduler import HostState
from controlplane.scheduler_rooms import BLOCK, Rooms
from controlplane.scheduler_rows import Cell, Row

HOSTS = 3 * BLOCK


def row_of(name: str, memory_mib: int = 4096) -> Row:
    sizes = Capacity(memory_mib, memory_mib, 0, 4000, 0, 0, 64)
    state = HostState(name, True, sizes, frozenset({SandboxClass.GUEST_KERNEL}), frozenset(), frozenset())
    return Row(state, Cell(state.traits, 64), {}, (1.0,))


def found(rooms: Rooms, need_mib: int = 1, *, among: set[Row] | None = None) -> Row | None:
    return rooms.first(need_mib, 0, 1000, 1, lambda row: among is None or row in among)


def names(rooms: Rooms) -> list[str]:
    """Every row by room and name, as searches find them one after the other."""
    left, seen = set(rooms.rows), []
    while left:
        row = found(rooms, among=left)
        assert row is not None, [one.name for one in left]
        left.remove(row)
        seen.append(row.name)
    return seen


def test_a_host_that_is_replaced_has_one_row_and_it_is_the_new_one() -> None:
    """Old and new row have one name and one room: the old one must be out before the new one is put in."""
    rooms = Rooms()
    rows = [row_of(f"h{number:02}") for number in range(HOSTS)]
    for row in rows:
        rooms.add(row)
    assert found(rooms) is rows[0]
    for _ in range(8):  # which of the two comes first is a matter of their hashes
        for number, old in enumerate(rows):
            rooms.discard(old)
            rows[number] = row_of(old.name)
            rooms.add(rows[number])
            assert found(rooms, among={old, rows[number]}) is rows[number]
    assert names(rooms) == [row.name for row in rows]
    assert len(rooms) == HOSTS


def test_rows_that_go_are_found_no_more_and_those_that_change_are_in_their_new_place() -> None:
    rooms = Rooms()
    rows = {f"h{number:02}": row_of(f"h{number:02}", 1024 + number) for number in range(HOSTS)}
    for row in rows.values():
        rooms.add(row)
    assert names(rooms) == list(rows)
    rooms.discard(rows["h00"])
    moved = rows["h01"]
    moved.take(row_of("h01", 8192).state, (1.0,))
    rooms.stale.add(moved)
    assert names(rooms) == [*list(rows)[2:], "h01"]
    assert found(rooms, 5000) is moved and found(rooms, 9000) is None
