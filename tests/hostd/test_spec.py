"""Specs, memory shapes, admission and resize: arithmetic that must hold for any numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostd.admission import GUEST_OVERHEAD_MIB, HostNow, admit, reserved_mib
from hostd.errors import InvalidSpec, ShortOfResources
from hostd.spec import BLOCK_MIB, MEMORY_BLOCK_MIB, ProcessSpec, Resources, SandboxSpec, memory_shape

SIZES = st.integers(1, 1 << 20)


@st.composite
def resources(draw: st.DrawFn) -> Resources:
    least, now, most = sorted(draw(st.tuples(SIZES, SIZES, SIZES)))
    return Resources(least, most, now, draw(st.integers(1, 64_000)))


@given(resources(), st.integers(0, 64 << 30))
def test_a_shape_can_reach_its_ceiling_and_never_passes_it(wanted: Resources, layers_bytes: int) -> None:
    try:
        shape = memory_shape(wanted, layers_bytes)
    except InvalidSpec as error:
        assert error.reason == "MemoryTooSmall"
        return
    assert shape.base_mib <= wanted.memory_min_mib
    assert shape.base_mib % BLOCK_MIB == 0
    assert wanted.memory_max_mib - BLOCK_MIB < shape.ceiling_mib <= wanted.memory_max_mib
    assert shape.region_mib % MEMORY_BLOCK_MIB == 0  # else the guest leaves its last block alone
    assert shape.elastic_mib <= shape.region_mib < shape.elastic_mib + MEMORY_BLOCK_MIB
    requested = shape.requested_mib(wanted.memory_mib)
    assert 0 <= requested <= shape.elastic_mib
    assert requested % BLOCK_MIB == 0
    if wanted.memory_mib >= shape.base_mib:
        assert wanted.memory_mib - BLOCK_MIB < shape.base_mib + requested <= wanted.memory_mib


def test_too_small_a_guarantee_says_how_much_it_needs() -> None:
    with pytest.raises(InvalidSpec, match="at least 144 MiB"):
        memory_shape(Resources(100, 1024, 100, 1000), 0)


@pytest.mark.parametrize(
    ("least", "now", "most"), [(0, 1, 2), (2, 1, 3), (2, 4, 3), (0, 0, 0)], ids=["zero", "below", "above", "nothing"]
)
def test_memory_out_of_order_is_refused(least: int, now: int, most: int) -> None:
    with pytest.raises(InvalidSpec, match="does not hold"):
        Resources(least, most, now, 1000)


@pytest.mark.parametrize(("cpu_milli", "vcpus"), [(1, 1), (1000, 1), (1001, 2), (64_000, 64)])
def test_vcpus_hold_the_cpu(cpu_milli: int, vcpus: int) -> None:
    assert Resources(1, 1, 1, cpu_milli).vcpus == vcpus


@pytest.mark.parametrize("cpu_milli", [0, 64_001])
def test_cpu_out_of_range_is_refused(cpu_milli: int) -> None:
    with pytest.raises(InvalidSpec, match="is outside"):
        Resources(1, 1, 1, cpu_milli)


SPEC = SandboxSpec("u-1", "web", "acme", "sha256:1", "web", Resources(256, 512, 256, 1000), ProcessSpec(), epoch=1)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("uid", ""), ("uid", "../x"), ("uid", "a/b"), ("uid", "a" * 65), ("uid", "a\n"), ("uid", "ü"),
        ("hostname", ""), ("hostname", "a b"), ("hostname", "-a"), ("hostname", "a" * 65), ("hostname", "a\n"),
        ("stop_grace_s", -1.0), ("stop_grace_s", float("nan")), ("stop_grace_s", 1e9),
    ],
)  # fmt: skip
def test_what_could_become_a_path_or_break_the_guest_is_refused(field: str, value: object) -> None:
    with pytest.raises(InvalidSpec):
        replace(SPEC, **{field: value})  # type: ignore[arg-type]


# Admission.

ROOMY = HostNow(16_384, 12_000, 512, 10_000, 512)


@given(st.lists(resources(), max_size=8), resources(), st.integers(0, 1 << 22), st.integers(0, 1 << 22))
def test_what_is_admitted_fits(live: list[Resources], wanted: Resources, total_mib: int, available_mib: int) -> None:
    host = HostNow(total_mib, available_mib, 512, 10_000, 512)
    need = wanted.memory_min_mib + GUEST_OVERHEAD_MIB
    fits = reserved_mib(live) + need + 512 <= total_mib and need + 512 <= available_mib
    if fits:
        admit(host, live, wanted)
    else:
        with pytest.raises(ShortOfResources, match=f"{need} MiB needed"):
            admit(host, live, wanted)


def test_a_full_disk_admits_nothing() -> None:
    with pytest.raises(ShortOfResources, match="511 MiB free") as short:
        admit(replace(ROOMY, disk_free_mib=511), [], Resources(256, 512, 256, 1000))
    assert short.value.reason == "ShortOfDisk"
