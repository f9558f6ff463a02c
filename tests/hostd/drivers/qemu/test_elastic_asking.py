"""What QEMU is asked of virtio-mem, against a device whose guest stops half way. The real one is in test_elastic.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import pytest

from hostd.agentlink import AgentLink
from hostd.cgroups import Hierarchy
from hostd.drivers.qemu.control import Control
from hostd.drivers.qemu.elastic import GuestMemory
from hostd.journal import Handle
from hostd.memory.policy import ElasticNow, Step
from hostd.memory.values import Mechanism


@dataclass
class StubbornDevice:
    """As Linux' virtio_mem.c has it: it unplugs `willing_mib`, and goes on only when the requested size changes."""

    plugged_mib: int
    willing_mib: int
    requested_mib: int
    asked: list[int] = field(default_factory=list)

    async def request_elastic_mib(self, mib: int) -> None:
        self.asked.append(mib)
        if mib == self.requested_mib:
            return
        self.requested_mib = mib
        self.plugged_mib = max(mib, self.plugged_mib - self.willing_mib)

    async def elastic_mib(self) -> int:
        return self.plugged_mib


def now(plugged_mib: int) -> ElasticNow:
    return ElasticNow(128, 896, plugged_mib, 0, 512, punchable=False)


async def test_a_guest_that_gave_up_unplugging_is_asked_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hostd.drivers.qemu.elastic.PLUG_STILL_S", 0.0)
    device = StubbornDevice(plugged_mib=768, willing_mib=100, requested_mib=768)
    handle = Handle(1, 1, 1, "tcg", 128, 896, 1)
    memory = GuestMemory("x", handle, cast(Control, device), cast(AgentLink, None), Hierarchy(2, {"": Path("/")}))
    for left_mib in (668, 568, 512):
        await memory.act(Step(Mechanism.VIRTIO_MEM, 512), now(device.plugged_mib), lambda: None)
        assert device.plugged_mib == left_mib
    assert device.asked == [512, 668, 512, 568, 512]
    await memory.act(Step(Mechanism.VIRTIO_MEM, 600), now(device.plugged_mib), lambda: None)  # growing asks once
    assert device.asked[5:] == [600]
