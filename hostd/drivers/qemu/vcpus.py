"""Whole vCPUs of a running guest: QEMU plugs them in, the agent brings them online and takes them offline.

A guest starts with as many as its CPU share needs and room for more. What was plugged stays plugged: offline it costs a
sleeping thread. QEMU's types and places of vCPUs come from itself (query-hotpluggable-cpus).
"""

from __future__ import annotations

from typing import Any

from guestagent.elastic import SetCpus
from guestagent.errors import GuestRefused
from hostd.agentlink import AgentLink
from hostd.drivers.qemu.control import Control
from hostd.errors import ControlLost

ONLINE_DEADLINE_S = 20.0
LATE_S = 5.0


async def set_online(control: Control, link: AgentLink, wanted: int) -> int:
    """Has `wanted` vCPUs online, plugging what is missing; how many are, when the guest has followed or did not within
    the deadline. Idempotent. ControlLost, AgentLost."""
    places = await control.execute("query-hotpluggable-cpus")
    free = sorted((place for place in places if "qom-path" not in place), key=_order)
    for place in free[: max(0, wanted - (len(places) - len(free)))]:
        await control.execute("device_add", **device_of(place))
    try:
        online = await link.elastic(SetCpus(wanted, int(ONLINE_DEADLINE_S * 1000)), ONLINE_DEADLINE_S + LATE_S)
    except GuestRefused as refusal:
        raise ControlLost(f"the guest's vCPUs cannot be set: {refusal}", reason="AgentRefused") from refusal
    assert isinstance(online, int)
    return online


async def plugged_count(control: Control) -> int:
    """How many vCPUs were hot-plugged: a copy of the guest needs them, too."""
    places = await control.execute("query-hotpluggable-cpus")
    return sum(1 for place in places if "/peripheral/" in str(place.get("qom-path", "")))


def device_of(place: dict[str, Any]) -> dict[str, object]:
    """device_add's arguments for the vCPU of a place that QEMU told. Pure."""
    return {"driver": place["type"], "id": f"vcpu{place['props']['core-id']}", **place["props"]}


def _order(place: dict[str, Any]) -> int:
    return int(place["props"]["core-id"])
