"""hostd: wiring, start and stop.

    sandloom-hostd --config FILE          serves; prints {"ready": true, "address": "..."} when it does
    sandloom-hostd doctor [--json] [--probe]

SIGTERM or SIGINT lets go of every sandbox, which all keep running; the next start takes them over. One hostd a state
directory: the store's lock sees to it.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import json
import logging
import os
import platform
import shutil
import signal
import sys
import time
from collections.abc import Coroutine
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc.aio

from controlplane.api.channel import TlsFiles, connect, server_credentials, server_options
from controlplane.api.errors import ControlPlaneError
from controlplane.api.v1 import checkpoints_pb2_grpc, hosts_pb2, hosts_pb2_grpc
from guestagent.errors import AgentError
from hostd import doctor, features, limits
from hostd.admission import GUEST_OVERHEAD_MIB, reserved_mib
from hostd.authority import OnlyControlPlane
from hostd.config import Config, load
from hostd.cpu import smt_is_on
from hostd.drivers.choice import Chosen, choose
from hostd.edge import render_classes
from hostd.errors import HostdError
from hostd.fetching import Fetcher
from hostd.memory import pressure
from hostd.peers import HostPeers, Offers
from hostd.poolreports import render_report
from hostd.register import Outbox, Registration
from hostd.sandboxes import Happened, Sandboxes
from hostd.scrub import keep_scrubbing
from hostd.service import Runtime
from hostd.service_checkpoints import HostCheckpoints
from sharedcache.errors import CacheError
from sharedcache.store import Store

log = logging.getLogger("sandloom.hostd")

SHUTDOWN_GRACE_S = 2.0


class Server:
    """Everything that one hostd is made of. Made by serve()."""

    def __init__(self, config: Config, store: Store, chosen: Chosen, outbox: Outbox) -> None:
        self.config, self.store, self.chosen, self.outbox = config, store, chosen, outbox
        self.sandboxes = Sandboxes(
            config,
            store,
            chosen.driver,
            report=self.outbox.report,
            happened=self.outbox.happened,
            cgroups=chosen.cgroups,
        )
        self.address = ""
        self._kernel_features = features.kernel_features()

    async def describe(self) -> hosts_pb2.Host:
        """This host as it is now."""
        live = self.sandboxes.live_resources()
        digests = await asyncio.to_thread(lambda: sorted({image.digest for image in self.store.images()}))
        memory = await asyncio.to_thread(self.sandboxes.broker.host_memory)
        capacity = hosts_pb2.HostCapacity(
            memory_mib=memory.total_mib,
            # Where nothing is admitted, nothing is available to what would come.
            memory_available_mib=0 if self.sandboxes.broker.closed else memory.available_mib,
            memory_reserved_mib=reserved_mib(self.sandboxes.held_resources()),
            cpu_milli=1000 * (os.cpu_count() or 1),
            disk_free_mib=shutil.disk_usage(self.config.state_dir).free >> 20,
            system_reserve_mib=self.config.memory_reserve_mib,
            vm_overhead_mib=GUEST_OVERHEAD_MIB,
        )
        return hosts_pb2.Host(
            name=self.config.host,
            state=hosts_pb2.READY,
            capacity=capacity,
            accel=self.chosen.accel,
            isolation_note=self.chosen.isolation_note,
            kernel_version=platform.release(),
            guest_kernel_version=self.chosen.guest_kernel_version,
            qemu_version=self.chosen.qemu_version,
            cgroup_version=self.chosen.cgroup_version,
            elastic_memory=self.chosen.elastic_memory,
            runtime_address=self.address,
            image_digests=digests,
            sandboxes=len(live),
            classes=render_classes(self.chosen.classes),
            kernel_features=self._kernel_features,
            resident=[
                hosts_pb2.ResidentObjects(kind=kind, count=count, bytes=size_bytes)
                for kind, count, size_bytes in await asyncio.to_thread(features.resident, self.store.objects)
            ],
            pools=[render_report(status) for status in self.sandboxes.pools.status()],
            labels=dict(text.partition("=")[::2] for text in self.config.labels),
            taints=self.config.taints,
            smt=smt_is_on(),
            admission_closed=self.sandboxes.broker.closed,
            limits=self._limits(capacity.disk_free_mib),
        )

    def _limits(self, disk_free_mib: int) -> list[hosts_pb2.CountedLimit]:
        left = {**limits.counted_left(), "disk_mib": disk_free_mib}
        counted = [hosts_pb2.CountedLimit(name=name, left=count) for name, count in sorted(left.items())]
        if slots := self.chosen.pmem_slots:
            counted.append(hosts_pb2.CountedLimit(name="pmem_slots", left=slots, of_a_guest=True))
        return counted

    async def run(self, stop: asyncio.Event) -> None:
        """Serves until `stop`; then lets go of everything that runs."""
        tls = TlsFiles(ca=self.config.tls_ca, cert=self.config.tls_cert, key=self.config.tls_key)
        async with AsyncExitStack() as stack:
            channel = await stack.enter_async_context(connect(self.config.controlplane, tls))
            registration = Registration(channel, self.config.host, self.sandboxes, self.outbox, self.describe)
            self.sandboxes.pools.on_change = registration.poke
            self.sandboxes.fetch = Fetcher(
                hosts_pb2_grpc.HostSyncStub(channel), tls, self.config.host, self.store
            ).fetch
            server = self._grpc_server(registration, tls)
            await server.start()
            stack.push_async_callback(server.stop, SHUTDOWN_GRACE_S)
            scrubbing = keep_scrubbing(self.store, self.config.scrub_interval_s, self._tell)
            await _until_first_ends(self.sandboxes.run(), self._report(registration), scrubbing, stop.wait())

    def _tell(self, reason: str, message: str) -> None:
        tell_of_host(self.outbox, self.config.host, reason, message)

    async def _report(self, registration: Registration) -> None:
        """Nothing is taken from the control plane before the journal's sandboxes are taken over."""
        await self.sandboxes.ready.wait()
        print(json.dumps({"ready": True, "address": self.address}), flush=True)
        await registration.run()

    def _grpc_server(self, registration: Registration, tls: TlsFiles) -> grpc.aio.Server:
        server = grpc.aio.server(interceptors=[OnlyControlPlane()], options=server_options())
        offers = Offers(self.store, time.monotonic)
        runtime = Runtime(self.sandboxes, self.config.host, registration.poke, offers)
        hosts_pb2_grpc.add_HostPeersServicer_to_server(HostPeers(self.store, offers), server)
        hosts_pb2_grpc.add_HostRuntimeServicer_to_server(runtime, server)
        checkpoints_pb2_grpc.add_HostCheckpointsServicer_to_server(
            HostCheckpoints(self.sandboxes, self.config.host), server
        )
        try:
            port = server.add_secure_port(self.config.listen, server_credentials(tls))
        except RuntimeError as error:
            raise HostdError(f"cannot listen on {self.config.listen}: {error}", reason="BadConfig") from error
        if port == 0:
            raise HostdError(f"cannot listen on {self.config.listen}: is it taken?", reason="BadConfig")
        self.address = f"{self.config.listen.rpartition(':')[0]}:{port}"
        return server


def tell_of_host(outbox: Outbox, host: str, reason: str, message: str) -> None:
    """Puts something about the host itself into log and event log."""
    log.info("%s: %s", reason, message)
    outbox.happened(Happened(host, reason, message, time.time(), kind="host"))


async def _until_first_ends(*works: Coroutine[Any, Any, object]) -> None:
    """Runs all until one ends, ends the others, and raises what any of them failed with."""
    tasks = [asyncio.create_task(work) for work in works]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
    failed = [result for result in results if isinstance(result, Exception)]
    if failed:
        raise failed[0]


async def serve(config: Config) -> None:
    """Runs a hostd until SIGTERM or SIGINT."""
    doctor.require_no_ksm()
    config.require_room(pressure.total_mib())
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for signo in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signo, stop.set)
    for folder in (config.state_dir, config.run_dir):
        folder.mkdir(parents=True, exist_ok=True, mode=0o711)  # VM uids pass through
    outbox = Outbox()

    tell = functools.partial(tell_of_host, outbox, config.host)
    with Store.open(config.state_dir / "store", min_free_bytes=config.disk_reserve_mib << 20) as store:
        async with AsyncExitStack() as stack:
            chosen = await choose(config, store, tell, stack)
            log.info("driver %s, accel %s: %s", config.driver, chosen.accel, chosen.why)
            await Server(config, store, chosen, outbox).run(stop)


def main(arguments: list[str]) -> int:
    """The command. 0 after a clean stop, 1 when it could not start or failed, 2 for bad arguments."""
    if arguments[:1] == ["doctor"]:
        return doctor.main(arguments[1:])
    parser = argparse.ArgumentParser(prog="sandloom-hostd", description="the host daemon of sandloom")
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="TOML; see hostd/config.py")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        asyncio.run(serve(load(options.config)))
    except (HostdError, CacheError, AgentError, ControlPlaneError, OSError) as error:
        print(f"sandloom-hostd: {error}", file=sys.stderr)
        return 1
    return 0


def entry() -> None:
    """Console script."""
    sys.exit(main(sys.argv[1:]))


if __name__ == "__main__":
    entry()
