"""Which template is cloned, made and dropped: pure decisions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostd.drivers.contract import LayerFile, StartPlan
from hostd.drivers.qemu.plan import GuestKernel, lacking_template, template_shape
from hostd.drivers.qemu.template import (
    HOT_WINDOW_S,
    IDLE_S,
    Candidates,
    GuestIdentity,
    Origin,
    TemplateUse,
    ceiling_bucket_mib,
    choose,
    evictable,
    is_hot,
    layers_bucket_mib,
    template_key,
)
from hostd.spec import Resources
from tests.contract.driver_suite import spec_of

IDENTITY = GuestIdentity("sha256:k", "sha256:i", "QEMU 7.2", "tcg max")


@given(st.integers(1, 1 << 20))
def test_a_bucket_holds_what_is_asked_and_wastes_less_than_half(memory_mib: int) -> None:
    bucket = ceiling_bucket_mib(memory_mib)
    assert bucket >= memory_mib
    assert bucket == 512 or bucket < 2 * memory_mib
    assert bucket & (bucket - 1) == 0


@given(st.integers(0, 1 << 40))
def test_a_layers_bucket_holds_the_layers(layers_bytes: int) -> None:
    assert layers_bucket_mib(layers_bytes) << 20 >= layers_bytes
    assert layers_bucket_mib(layers_bytes) % 512 == 0


def test_the_key_covers_everything_that_must_be_equal() -> None:
    base = template_key(["-m", "1"], IDENTITY, "tenant/a", ["sha256:l"])
    others = {
        template_key(["-m", "2"], IDENTITY, "tenant/a", ["sha256:l"]),
        template_key(["-m", "1"], replace(IDENTITY, kernel_digest="x"), "tenant/a", ["sha256:l"]),
        template_key(["-m", "1"], replace(IDENTITY, initrd_digest="x"), "tenant/a", ["sha256:l"]),
        template_key(["-m", "1"], replace(IDENTITY, qemu="x"), "tenant/a", ["sha256:l"]),
        template_key(["-m", "1"], replace(IDENTITY, cpu="x"), "tenant/a", ["sha256:l"]),
        template_key(["-m", "1"], IDENTITY, "tenant/b", ["sha256:l"]),
        template_key(["-m", "1"], IDENTITY, "tenant/a", ["sha256:m"]),
        template_key(["-m", "1"], IDENTITY, "tenant/a"),
        template_key(["-m 1"], IDENTITY, "tenant/a", ["sha256:l"]),
    }
    assert base not in others
    assert len(others) == 9
    assert base == template_key(["-m", "1"], IDENTITY, "tenant/a", ["sha256:l"])


BOTH = Candidates("i", "g")


@pytest.mark.parametrize(
    ("candidates", "ready", "cold", "origin", "words"),
    [
        (BOTH, {"i": True, "g": True}, False, Origin.IMAGE, ""),
        (BOTH, {"i": False, "g": True}, False, Origin.GENERIC, ""),
        (BOTH, {"g": True}, False, Origin.GENERIC, ""),
        (BOTH, {"g": False}, False, Origin.COLD, "being made"),
        (BOTH, {}, False, Origin.COLD, "could not be made"),
        (BOTH, {"i": False}, False, Origin.COLD, "could not be made"),
        (BOTH, {"i": True, "g": True}, True, Origin.COLD, "--cold"),
        (Candidates("i", "", "too many layers"), {}, False, Origin.COLD, "too many layers"),
        (Candidates("i", ""), {"i": True}, False, Origin.IMAGE, ""),
    ],
)
def test_the_best_that_is_there(
    candidates: Candidates, ready: dict[str, bool], cold: bool, origin: Origin, words: str
) -> None:
    choice = choose(candidates, ready, cold=cold)
    assert choice.origin is origin
    assert words in choice.reason
    assert bool(choice.key) == (origin is not Origin.COLD)


def test_a_start_waits_for_the_template_that_is_being_made() -> None:
    assert choose(BOTH, {"g": False}, cold=False).awaits == "g"
    assert choose(BOTH, {"g": False, "i": False}, cold=False).awaits == "g"
    assert choose(BOTH, {"g": False}, cold=True).awaits == ""
    assert choose(BOTH, {"i": False}, cold=False).awaits == ""


def test_an_image_is_hot_by_recent_starts_only() -> None:
    assert not is_hot([], 0.0)
    assert not is_hot([0.0, 1.0], 2.0)
    assert is_hot([0.0, 1.0, 2.0], 2.0)
    assert not is_hot([0.0, 1.0, 2.0], 2.0 + HOT_WINDOW_S)


def test_only_idle_templates_without_clones_go_oldest_first() -> None:
    uses = [
        TemplateUse("young", 1, 0, False, 100.0),
        TemplateUse("old", 1, 0, False, 10.0),
        TemplateUse("cloned", 1, 2, False, 0.0),
        TemplateUse("pooled", 1, 0, True, 0.0),
    ]
    assert evictable(uses, 10.0 + IDLE_S, pressed=False) == ["old"]
    assert evictable(uses, 101.0, pressed=True) == ["old", "young"]
    assert evictable(uses, 9.0, pressed=False) == []


@pytest.mark.parametrize(
    ("least_mib", "layers", "why"),
    [
        (160, 1, ""),
        (140, 1, "its minimum of 140 MiB is below the 152 MiB in which a template of 1024 MiB boots"),
        (160, 99, "more layers than can be hot-plugged"),
    ],
)
def test_a_cold_boot_says_what_kept_it_from_a_template(least_mib: int, layers: int, why: str) -> None:
    files = tuple(LayerFile(Path(f"/{n}"), 2 << 20, n.to_bytes(16, "big"), 0) for n in range(layers))
    plan = StartPlan(spec_of("one", Resources(least_mib, 1000, least_mib, 1000)), files, 1, Path("/run/one"))
    found = lacking_template(plan)
    assert why in found and bool(found) == bool(why)
    shape = template_shape(
        plan, GuestKernel("6", "sha256:k", "sha256:i", Path("/k"), Path("/i"), 0), "tcg", with_image=False
    )
    assert (shape is None) == bool(why)
