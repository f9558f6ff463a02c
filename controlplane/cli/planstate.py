"""What a plan is made over: a cluster file, openb's list of nodes, or the hosts of the running fabric; and the class
meant."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from controlplane.api.v1 import hosts_pb2, images_pb2, sandboxes_pb2
from controlplane.capacity import calibration as calibrations
from controlplane.capacity import cluster as clusters
from controlplane.capacity.calibration import Calibration
from controlplane.capacity.cluster import Cluster, Planning, empty_host
from controlplane.capacity.sizes import parse_milli, parse_range
from controlplane.capacity.trace import FOREVER, Arrival, Trace, in_order
from controlplane.capacity.trace_public import openb_hosts
from controlplane.capacity.workload import Image, Workload, demand_of
from controlplane.cli import lookup
from controlplane.cli.command import Shell
from controlplane.cli.connection import CALL_S, PAGE_SIZE, Fabric, calling, every_page
from controlplane.cli.devup import list_hosts
from controlplane.cli.errors import CliError, UsageError
from controlplane.cli.usage import lived
from controlplane.edge.enums import parse_class
from controlplane.errors import ConfigError
from controlplane.model import LayerSize, SandboxClass
from controlplane.rules import parse_pair
from controlplane.scheduler_values import HostState

LIVE = "the running fabric"


@dataclass(frozen=True)
class StateOptions:
    """Where the state comes from. `cluster` None: the running fabric."""

    cluster: Path | None
    calibration: Path | None
    memory: str = ""
    cpus: str = ""
    tenant: str = "default"


@dataclass(frozen=True)
class State:
    """The state of a plan, and where it is from."""

    cluster: Cluster
    calibration: Calibration
    source: str


def add_state(parser: argparse.ArgumentParser, *, sizes: bool = True) -> None:
    """The options that say over what a plan is made."""
    parser.add_argument(
        "--cluster", type=Path, metavar="FILE",
        help="hosts, images and classes (TOML or JSON, see controlplane/capacity/cluster.py), or openb's nodes (CSV);"
        " the running fabric unless given",
    )  # fmt: skip
    parser.add_argument("--calibration", type=Path, metavar="FILE", help="what `sandloom plan calibrate` measured")
    if sizes:
        parser.add_argument(
            "--memory", default="", metavar="MIN:MAX", help="of an image that is named instead of a class"
        )
        parser.add_argument("--cpus", default="1", metavar="N", help="of an image that is named instead of a class")


def parse_state(namespace: argparse.Namespace) -> StateOptions:
    """What add_state added."""
    return StateOptions(
        namespace.cluster, namespace.calibration, getattr(namespace, "memory", ""), getattr(namespace, "cpus", "1"),
        namespace.tenant or "default",
    )  # fmt: skip


def load_state(options: StateOptions, shell: Shell) -> State:
    """The state. CliError says what is wrong with a file."""
    try:
        calibration = calibrations.load(options.calibration) if options.calibration else Calibration()
        if options.cluster is None:
            cluster = shell.over(lambda fabric: live(fabric, calibration, measured=options.calibration is not None))
            return State(cluster, calibration, LIVE)
        if options.cluster.suffix == ".csv":
            return State(Cluster(openb_hosts(options.cluster, calibration), {}), calibration, str(options.cluster))
        return State(clusters.load(options.cluster, calibration), calibration, str(options.cluster))
    except ConfigError as error:
        raise CliError("cannot plan", str(error)) from error


def workload_of(name: str, state: State, options: StateOptions) -> Workload:
    """The class of that name, or an image with the sizes that were given. CliError names those there are."""
    cluster = state.cluster
    if name in cluster.classes and not options.memory:
        return cluster.classes[name]
    if name not in cluster.images:
        known = ", ".join([*cluster.classes, *cluster.images][:12]) or "none"
        raise CliError(f"no class or image {name}", f"{state.source} has {known}", "an image needs --memory MIN:MAX")
    if not options.memory:
        raise UsageError("how large is one?", name, "give --memory MIN:MAX (and --cpus) with an image")
    try:
        least_mib, most_mib = parse_range(options.memory)
        return Workload(name, least_mib, most_mib, parse_milli(options.cpus), cluster.images[name], options.tenant)
    except ValueError as error:
        raise UsageError("not a size", str(error)) from error


async def live(fabric: Fabric, calibration: Calibration, *, measured: bool) -> Cluster:
    """The running fabric's hosts with what runs on each. Unless `measured`, a guest's overhead is what hosts charge."""
    images = await _images(fabric)
    found = await list_hosts(fabric)
    names = {host.name for host in found}
    boxes = await lookup.list_sandboxes(fabric, ended=False)
    assigned = tuple(
        (box.assignment.host, workload_of_sandbox(box, images)) for box in boxes if box.assignment.host in names
    )
    taken = {name: Counter[str]() for name in names}
    for host, workload in assigned:
        taken[host].update(dict(demand_of(workload, calibration).extras))
    hosts = [_host(host, calibration, taken[host.name], measured) for host in found]
    return Cluster(tuple(hosts), {}, (), Planning(), images, assigned)


async def recorded(fabric: Fabric) -> Trace:
    """The demand that the fabric's own records tell of: when each sandbox was created, and when it ended."""
    images = await _images(fabric)
    spans = await lived(fabric)
    first_s = min((span.created_at_s for span in spans), default=0.0)
    arrivals = []
    for span in spans:
        lasted_s = FOREVER if span.ended_at_s is None else max(0.0, span.ended_at_s - span.created_at_s)
        image = images.get(span.image, Image(span.image))
        workload = _workload(span.resources, image, parse_class(span.kind, "class"), span.tenant)
        arrivals.append(Arrival(span.created_at_s - first_s, lasted_s, span.name, workload))
    return in_order(arrivals, "the fabric's own records: its sandboxes, and the usage ledger of those that are gone")


async def samples_now(fabric: Fabric) -> list[tuple[str, float]]:
    """What each running sandbox holds in its own memory now, by its image's name: (name, MiB), by the sharing
    ledger."""
    boxes = {box.uid: box for box in await lookup.list_sandboxes(fabric, ended=False)}
    with calling("cannot read the sharing ledger"):
        ledger = await fabric.sandboxes.GetSharingLedger(sandboxes_pb2.GetSharingLedgerRequest(), timeout=CALL_S)
    return [
        (boxes[row.uid].spec.image, row.guest_ram_bytes / (1 << 20)) for row in ledger.sandboxes if row.uid in boxes
    ]


async def _images(fabric: Fabric) -> dict[str, Image]:
    async def page(token: str) -> images_pb2.ListImagesResponse:
        with calling("cannot list the images"):
            request = images_pb2.ListImagesRequest(page_size=PAGE_SIZE, page_token=token)
            return await fabric.images.ListImages(request, timeout=CALL_S)

    found: Iterable[images_pb2.Image] = await every_page(page, lambda answer: list(answer.images))
    return {
        image.name: Image(image.name, tuple(LayerSize(layer.digest, layer.size_bytes) for layer in image.layers))
        for image in found
    }


def workload_of_sandbox(box: sandboxes_pb2.Sandbox, images: dict[str, Image]) -> Workload:
    """A recorded sandbox as a class of its own kind."""
    image = images.get(box.spec.image, Image(box.spec.image))
    return _workload(box.spec.resources, image, parse_class(getattr(box.spec, "class"), "class"), box.tenant)


def _workload(sizes: sandboxes_pb2.Resources, image: Image, kind: SandboxClass, tenant: str) -> Workload:
    most_mib = max(sizes.memory_max_mib, sizes.memory_min_mib)
    return Workload(
        image.name, sizes.memory_min_mib, most_mib, sizes.cpu_milli, image, tenant or "default", kind
    )  # fmt: skip


def _host(host: hosts_pb2.Host, calibration: Calibration, taken: Counter[str], measured: bool) -> HostState:
    """A host without its sandboxes, which take `taken`: what it reports of counted things is left beside them."""
    sizes = host.capacity
    left = {limit.name: limit.left + taken[limit.name] for limit in host.limits if not limit.of_a_guest}
    of_a_guest = tuple((limit.name, limit.left) for limit in host.limits if limit.of_a_guest)
    state = empty_host(
        host.name, sizes.memory_mib, sizes.cpu_milli, calibration, reserve_mib=sizes.system_reserve_mib,
        limits=left, labels=tuple(sorted(host.labels.items())),
        taints=tuple(sorted(map(parse_pair, host.taints))), accel=host.accel, smt=host.smt,
        cordoned=host.state != hosts_pb2.READY,
    )  # fmt: skip
    overhead_mib = calibration.guest_overhead_mib if measured else sizes.vm_overhead_mib
    kinds = frozenset(parse_class(number, "host.classes") for number in host.classes)
    capacity = replace(state.capacity, vm_overhead_mib=overhead_mib)
    return replace(state, classes=kinds, capacity=capacity, guest_limits=of_a_guest)
