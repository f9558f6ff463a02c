"""Follows one request for other sizes: sets the targets that are granted, and tells how far the engine came.

Tried again by itself: what the host or the guest deferred, and, with a growing pause, what the engine refused. Runs
until the sizes are there, or until cancelled, when the request or what is granted changes. A request that can never be
changes nothing, but what the broker grants is followed beneath it: the sandbox may need more, and others may need it.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Protocol

from hostd.drivers.contract import Engine
from hostd.errors import HostdError, InvalidSpec
from hostd.journal import Handle
from hostd.memory.values import Resized
from hostd.resize import (
    Cause,
    Grant,
    ResizeProgress,
    ResizeState,
    begun,
    infeasible,
    judge,
    refused,
    retry_s,
)
from hostd.spec import BLOCK_MIB, MemoryShape, Resources, SandboxSpec

FIRST_LOOK_S, LOOK_S = 1.0, 5.0
DEFERRED_PAUSE_S, PAUSE_S = 2.0, 0.05


class Resizing(Protocol):
    """What is needed of the sandbox; hostd/sandbox.py is it."""

    grant: Grant
    resize: ResizeProgress | None

    @property
    def spec(self) -> SandboxSpec: ...
    def most_mib(self) -> int: ...
    def now_s(self) -> float: ...
    def tell_resize(self, progress: ResizeProgress) -> None: ...


def granted(wanted: Resources, grant: Grant) -> Resources:
    """The targets: what is granted within the bounds of what is asked. Pure."""
    memory_mib = max(wanted.memory_min_mib, min(wanted.memory_max_mib, grant.memory_mib))
    return replace(wanted, memory_mib=memory_mib)


def impossible(spec: SandboxSpec, handle: Handle, most_mib: int) -> tuple[Cause, str]:
    """Why what is asked of this engine can never be, and by which limit; NONE when it can. Pure."""
    shape = MemoryShape(handle.base_mib, handle.elastic_mib)
    return infeasible(shape.ceiling_mib, handle.ceiling_vcpus, most_mib, spec.resources)


async def follow_resize(owner: Resizing, engine: Engine, *, begins: bool = False) -> None:
    """See the module. `begins`: the engine has just come up, and may have what is granted already: then that is no
    news."""
    wanted, grant, handle = owner.spec.resources, owner.grant, engine.handle
    shape = MemoryShape(handle.base_mib, handle.elastic_mib)
    progress = begun(wanted, owner.resize, grant.memory_mib, owner.now_s())
    limit, problem = impossible(owner.spec, handle, owner.most_mib())
    if limit is not Cause.NONE:
        await _hold(owner, engine, replace(progress, cause=limit, message=problem), grant)
        return
    if begins:
        progress = replace(progress, actual_mib=await _actual_mib(engine, progress.actual_mib))
    if not begins or abs(progress.actual_mib - shape.base_mib - shape.requested_mib(grant.memory_mib)) >= BLOCK_MIB:
        owner.tell_resize(progress)
    look_s = FIRST_LOOK_S
    while True:
        try:
            resized = await engine.resize(granted(wanted, grant), deadline_s=look_s)
        except HostdError as error:
            progress = refused(progress, grant, error)
            owner.tell_resize(progress)
            if isinstance(error, InvalidSpec):
                return
            await asyncio.sleep(retry_s(progress.attempts))
            continue
        progress = judge(progress, shape, grant, resized, owner.now_s())
        owner.tell_resize(progress)
        if settled(progress, resized):
            return
        look_s = min(LOOK_S, max(PAUSE_S, progress.deadline_s - owner.now_s()))
        await asyncio.sleep(DEFERRED_PAUSE_S if progress.state is ResizeState.DEFERRED else PAUSE_S)


def settled(progress: ResizeProgress, resized: Resized) -> bool:
    """Whether there is nothing left to do until something else is asked or granted. Pure."""
    return abs(resized.actual_mib - progress.allocated_mib) < BLOCK_MIB


async def _hold(owner: Resizing, engine: Engine, progress: ResizeProgress, grant: Grant) -> None:
    """What cannot be is not begun. The sandbox keeps its CPU, and its memory follows what is granted."""
    actual_mib = await _actual_mib(engine, progress.actual_mib)
    shape = MemoryShape(engine.handle.base_mib, engine.handle.elastic_mib)
    granted_mib = shape.base_mib + shape.requested_mib(grant.memory_mib)
    known = replace(progress, state=ResizeState.INFEASIBLE, allocated_mib=granted_mib, actual_mib=actual_mib)
    owner.tell_resize(known)
    wanted = owner.spec.resources
    cpu_milli = known.cpu_milli or min(wanted.cpu_milli, 1000 * engine.handle.ceiling_vcpus)
    sizes, attempts = granted(replace(wanted, cpu_milli=cpu_milli), grant), 0
    while True:
        try:
            resized = await engine.resize(sizes, deadline_s=LOOK_S)
        except HostdError:
            attempts += 1
            await asyncio.sleep(retry_s(attempts))
            continue
        known = replace(known, actual_mib=resized.actual_mib, cpu_milli=cpu_milli)
        owner.tell_resize(known)
        if settled(known, resized):
            return
        await asyncio.sleep(DEFERRED_PAUSE_S)


async def _actual_mib(engine: Engine, known_mib: int) -> int:
    try:
        return (await engine.memory()).actual_mib
    except HostdError:
        return known_mib
