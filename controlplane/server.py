"""The control plane's server: wiring, start and stop.

    sandloom-controlplane --config FILE     serves; prints {"ready": true, "address": "HOST:PORT"} when it does

Every peer shows a certificate of the fabric's CA. SIGTERM or SIGINT ends open calls with UNAVAILABLE (ServerStopping)
and closes the store. Hosts and their sandboxes run on meanwhile.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import logging
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import grpc.aio
from grpc_health.v1 import _async as aio_health
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from controlplane.admission import Admission
from controlplane.api.channel import server_credentials, server_options
from controlplane.api.unknown import UNKNOWN_METHODS
from controlplane.api.v1 import (
    checkpoints_pb2,
    checkpoints_pb2_grpc,
    hosts_pb2,
    hosts_pb2_grpc,
    images_pb2,
    images_pb2_grpc,
    pools_pb2,
    pools_pb2_grpc,
    sandboxes_pb2,
    sandboxes_pb2_grpc,
    tenants_pb2,
    tenants_pb2_grpc,
)
from controlplane.ca import Authority
from controlplane.checkpoints import Checkpoints
from controlplane.config import Config, load
from controlplane.distribution import Distribution
from controlplane.drains import Drains
from controlplane.errors import ConfigError, ControlPlaneError
from controlplane.events import EventLog
from controlplane.gate import Gate
from controlplane.images import Images
from controlplane.joining import Joining
from controlplane.leadership import Elected, Fenced, Leadership, OnlyOne
from controlplane.pools import Pools
from controlplane.reconciler import Reconciler
from controlplane.records import Records
from controlplane.registry import Registry
from controlplane.relay import HostLinks
from controlplane.reports import Reports
from controlplane.sandboxes import Sandboxes
from controlplane.service_checkpoints import CheckpointsService
from controlplane.service_hosts import HostsService, HostSyncService
from controlplane.service_images import ImagesService
from controlplane.service_join import HostJoinService, join_server
from controlplane.service_pools import PoolsService
from controlplane.service_sandboxes import SandboxesService
from controlplane.service_streams import Streams
from controlplane.service_tenants import TenantsService
from controlplane.store.contract import Store
from controlplane.store.opening import open_store
from controlplane.streams import Locator
from controlplane.tenants import Tenants
from controlplane.view import View

log = logging.getLogger("sandloom.controlplane")

STOP_GRACE_S = 2.0
GC_THRESHOLDS = (50_000, 20, 50)
"""The view is many long-lived values without cycles: looking through all of them as often as Python does costs much."""
SERVICES = (
    sandboxes_pb2.DESCRIPTOR.services_by_name["Sandboxes"].full_name,
    images_pb2.DESCRIPTOR.services_by_name["Images"].full_name,
    hosts_pb2.DESCRIPTOR.services_by_name["Hosts"].full_name,
    hosts_pb2.DESCRIPTOR.services_by_name["HostSync"].full_name,
    pools_pb2.DESCRIPTOR.services_by_name["Pools"].full_name,
    checkpoints_pb2.DESCRIPTOR.services_by_name["Checkpoints"].full_name,
    tenants_pb2.DESCRIPTOR.services_by_name["Tenants"].full_name,
)


class ControlPlane:
    """All the parts of one control plane, wired together over an open store."""

    def __init__(self, config: Config, store: Store, links: HostLinks, leadership: Leadership | None = None) -> None:
        self.config, self.store, self.links = config, store, links
        self.view = View(store)
        self.leadership = leadership or self._leadership()
        self.tenants = Tenants(store, self.view, dict(config.quotas))
        self.gate = Gate(lambda name: self.tenants.find(name) is not None, lambda *known: self.registry.admits(*known))
        self.event_log = EventLog(store, kept=config.kept_events)
        self.admission = Admission(self.view, self.tenants.quota)
        self.images = Images(store, self.view, quota_of=self.tenants.quota, admission=self.admission)
        self.records = Records(store, self.view)
        self.reports = Reports(store, self.records)
        self.sandboxes = Sandboxes(
            store, self.view, self.records, self.images, self.tenants,
            leadership=self.leadership, admission=self.admission,
        )  # fmt: skip
        self.pools = Pools(store, self.view, self.images, quota_of=self.tenants.quota, admission=self.admission)
        self.registry = Registry(store, self.view, self.images, config.lease_s)
        authority = Authority.load(config.ca_dir) if config.ca_dir else None
        self.joining = Joining(store, self.registry, authority)
        self.distribution = Distribution(store, self.view, links)
        self.drains = Drains(store, self.view, self.records, self.registry)
        self.reconciler = self._reconciler()
        self.locator = Locator(self.records, self.view)
        self.checkpoints = Checkpoints(self.sandboxes, self.locator, self.view, links, quota_of=self.tenants.quota)
        self.health = aio_health.HealthServicer()

    def _leadership(self) -> Leadership:
        if not self.config.etcd_endpoints:
            return OnlyOne()
        return Elected(self.store, self.config.name, self.view.reached)

    def _reconciler(self) -> Reconciler:
        """The leader's work, over a store that refuses it once another one leads."""
        config, view = self.config, self.view
        store = Fenced(self.store, self.leadership)
        images, records = Images(store, view, quota_of=self.tenants.quota), Records(store, view)
        registry = Registry(store, view, images, config.lease_s)
        return Reconciler(
            store, view, records, self.sandboxes, images, self.links,
            EventLog(store, kept=config.kept_events), Drains(store, view, records, registry),
            Joining(store, registry, None),
            lost_grace_s=config.lost_grace_s, history_s=config.history_s,
        )  # fmt: skip

    def add_to(self, server: grpc.aio.Server) -> None:
        """Registers every service."""
        guarded = self.gate.guarding(server)
        streams = Streams(self.locator, self.links, self.view)
        sandboxes_pb2_grpc.add_SandboxesServicer_to_server(
            SandboxesService(
                self.gate, self.store, self.records, self.sandboxes, self.event_log, streams, dict(self.config.services)
            ),
            guarded,
        )
        images_pb2_grpc.add_ImagesServicer_to_server(
            ImagesService(self.gate, self.store, self.view, self.images, self.links), guarded
        )
        hosts_pb2_grpc.add_HostsServicer_to_server(
            HostsService(self.gate, self.store, self.registry, self.view, self.drains, self.joining), guarded
        )
        hosts_pb2_grpc.add_HostSyncServicer_to_server(
            HostSyncService(
                self.gate,
                self.view,
                self.registry,
                self.reports,
                self.event_log,
                self.distribution,
                self.tenants.quota,
            ),
            guarded,
        )
        checkpoints_pb2_grpc.add_CheckpointsServicer_to_server(CheckpointsService(self.gate, self.checkpoints), guarded)
        pools_pb2_grpc.add_PoolsServicer_to_server(PoolsService(self.gate, self.store, self.pools), guarded)
        tenants_pb2_grpc.add_TenantsServicer_to_server(TenantsService(self.gate, self.tenants, self.view), guarded)
        health_pb2_grpc.add_HealthServicer_to_server(self.health, server)
        reflection.enable_server_reflection((*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
        server.add_generic_rpc_handlers((UNKNOWN_METHODS,))  # the last to be asked

    async def set_serving(self, serving: bool) -> None:
        """What the health service answers for every service and for the server as a whole."""
        state = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for service in ("", *SERVICES):
            await self.health.set(service, state)


@asynccontextmanager
async def running(config: Config, leadership: Leadership | None = None) -> AsyncIterator[tuple[ControlPlane, str]]:
    """A control plane that serves while the block runs, with its address. Ends everything it started."""
    async with open_store(config) as store, HostLinks(config.tls) as links:
        plane = ControlPlane(config, store, links, leadership)
        server = grpc.aio.server(options=server_options())
        plane.add_to(server)
        port = _bind(server, config)
        tasks = [
            asyncio.create_task(plane.view.run(), name="view"),
        ]
        address = f"{config.listen.rpartition(':')[0]}:{port}"
        try:
            await plane.view.until(lambda: plane.view.revision or None)
            gc.freeze()  # the view lives as long as the process
            tasks.append(asyncio.create_task(plane.leadership.lead(plane.reconciler.run), name="reconciler"))
            await server.start()
            await plane.set_serving(True)
            async with _letting_join(plane, config.advertise or address):
                yield plane, address
        finally:
            await plane.set_serving(False)
            await plane.gate.close(STOP_GRACE_S)  # first: a server that stops drops statuses that are on their way
            await server.stop(STOP_GRACE_S)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


@asynccontextmanager
async def _letting_join(plane: ControlPlane, address: str) -> AsyncIterator[None]:
    """Hosts may join while the block runs, where the configuration says so; afterwards they reach us at `address`."""
    config = plane.config
    if not config.join_listen:
        yield
        return
    server, port = join_server(HostJoinService(plane.joining, address), config.join_listen, config.tls)
    plane.joining.join_address = config.join_advertise or f"{config.join_listen.rpartition(':')[0]}:{port}"
    await server.start()
    try:
        yield
    finally:
        await server.stop(STOP_GRACE_S)


def _bind(server: grpc.aio.Server, config: Config) -> int:
    try:
        port = server.add_secure_port(config.listen, server_credentials(config.tls))
    except RuntimeError as error:
        raise ConfigError(f"cannot listen on {config.listen}: {error}") from error
    if port == 0:
        raise ConfigError(f"cannot listen on {config.listen}: is it taken?")
    return port


async def serve(config: Config) -> None:
    """Runs a control plane until SIGTERM or SIGINT."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for signo in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signo, stop.set)
    async with running(config) as (_, address):
        print(json.dumps({"ready": True, "address": address}), flush=True)
        log.info("serving at %s", address)
        await stop.wait()
        log.info("stopping")


def main(arguments: list[str]) -> int:
    """The command. 0 after a clean stop, 1 when it could not start or failed, 2 for bad arguments."""
    parser = argparse.ArgumentParser(prog="sandloom-controlplane", description="the control plane of sandloom")
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="TOML; see controlplane/config.py")
    options = parser.parse_args(arguments)
    gc.set_threshold(*GC_THRESHOLDS)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        asyncio.run(serve(load(options.config)))
    except (ControlPlaneError, OSError) as error:
        print(f"sandloom-controlplane: {error}", file=sys.stderr)
        return 1
    return 0


def entry() -> None:
    """Console script."""
    sys.exit(main(sys.argv[1:]))


if __name__ == "__main__":
    entry()
