"""The best there can be: a bound by mixed-integer programming (HiGHS) on how many sandboxes of a demand some hosts can
take."""

from __future__ import annotations

from collections.abc import Sequence

import highspy

from controlplane.scheduler_values import Demand, HostState, layer_mib


def bound(wanted: Sequence[tuple[Demand, int]], hosts: Sequence[HostState], *, time_s: float) -> float:
    """No packing places more than this (proved up to the time limit)."""
    model = highspy.Highs()  # type: ignore[no-untyped-call]
    model.setOptionValue("output_flag", False)
    model.setOptionValue("time_limit", time_s)
    integer, binary = highspy.HighsVarType.kInteger, highspy.HighsVarType.kInteger
    placed = []
    for host in hosts:
        sizes = host.capacity
        mapped: dict[tuple[str, str], object] = {}
        memory, cpu = [], []
        for at, (demand, count) in enumerate(wanted):
            own_mib = demand.charge_mib + demand.extra_mib + sizes.vm_overhead_mib
            most = min(count, (sizes.memory_mib - sizes.system_reserve_mib) // own_mib)
            here = model.addVariable(lb=0, ub=most, obj=0, type=integer)
            placed.append((at, here))
            memory.append(own_mib * here)
            cpu.append(demand.cpu_milli * here)
            for layer in demand.layers:
                key = (demand.domain, layer.digest)
                if key not in mapped:
                    mapped[key] = model.addVariable(lb=0, ub=1, obj=0, type=binary)
                    memory.append(layer_mib(layer) * mapped[key])  # type: ignore[operator]
                model.addConstr(here <= most * mapped[key])  # type: ignore[operator]
        model.addConstr(sum(memory) <= sizes.memory_mib - sizes.system_reserve_mib)
        model.addConstr(sum(cpu) <= 16 * sizes.cpu_milli)
    for at, (_, count) in enumerate(wanted):
        model.addConstr(sum(here for number, here in placed if number == at) <= count)
    model.maximize(sum(here for _, here in placed))
    return float(model.getInfo().mip_dual_bound)
