"""`dev up`: whatever of the one-host fabric does not run is started; what runs is left alone.

Order: control plane, then hostd, then the host is READY under the address that this hostd serves at. The control
plane comes back under the port it had, so that a hostd that runs on finds it again.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

from controlplane.api.identity import Role
from controlplane.api.v1 import hosts_pb2
from controlplane.cli import daemons, devfiles
from controlplane.cli.command import Shell
from controlplane.cli.connection import CALL_S, PAGE_SIZE, Fabric, Target, calling, every_page
from controlplane.cli.daemons import Daemon
from controlplane.cli.devfiles import HostSettings
from controlplane.cli.errors import CallFailed, CliError, DaemonFailed, NoFabric
from controlplane.cli.home import Home, load_context, save_context
from controlplane.cli.progress import Progress

CONTROLPLANE, HOSTD = "controlplane", "hostd"
CONTROLPLANE_S = 30.0
HOSTD_S = 400.0  # the first time it fetches a guest kernel and boots a guest to try the accelerator
READY_S = 60.0
GRACE_S = 30.0
POLL_S = 0.1


@dataclass(frozen=True)
class Up:
    """A fabric that runs, and which of its daemons were started now."""

    host: hosts_pb2.Host
    address: str
    started: tuple[str, ...]


def up(home: Home, settings: HostSettings, shell: Shell, progress: Progress, *, store: str | None = None) -> Up:
    """Makes the fabric run, with its records in `store` (devfiles.store_for). The caller holds the lock and has
    prepared HOME.

    DaemonFailed or CliError when it cannot; daemons that this call started are then ended again, unless the fabric
    was there before (its sandboxes may need them).
    """
    known = home.context.exists()
    started: list[str] = []
    try:
        controlplane = _ensure_controlplane(home, shell, progress, started, devfiles.store_for(home, store))
        hostd = _ensure_hostd(home, settings, controlplane, shell, progress, started)
        host = _until_ready(shell, hostd, settings.name, progress)
    except BaseException:
        if not known:
            for name in reversed(started):
                end(home, name)
            home.context.unlink(missing_ok=True)
        raise
    return Up(host, controlplane.address, tuple(started))


def end(home: Home, name: str) -> None:
    """Ends a daemon of this HOME, if it runs, and forgets it. DaemonFailed when it does not go."""
    daemon = daemons.recorded(home, name)
    if daemon is not None and not daemons.stop(daemon, grace_s=GRACE_S):
        raise DaemonFailed(f"{name} does not end", f"process {daemon.pid}", f"look at {home.log / name}.log")
    daemons.forget(home, name)


def _ensure_controlplane(home: Home, shell: Shell, progress: Progress, started: list[str], store: str) -> Daemon:
    running = daemons.running(home, CONTROLPLANE)
    if running is None:
        devfiles.issue(home, Role.OPERATOR, devfiles.OPERATOR)
        devfiles.issue(home, Role.CONTROLPLANE, devfiles.CONTROLPLANE)
        running = _start_controlplane(home, shell, progress, store)
        started.append(CONTROLPLANE)
    save_context(home, devfiles.context_of(home, running.address))
    return running


def _start_controlplane(home: Home, shell: Shell, progress: Progress, store: str) -> Daemon:
    """On the port it had, so that a hostd that runs finds it; on another one when that is taken now."""
    listens = [address for address in (_former_address(home),) if address] + [devfiles.ANY_PORT]
    for listen in listens:
        devfiles.write_config(devfiles.controlplane_config(home), devfiles.controlplane_toml(home, listen, store))
        argv = [*shell.argvs[CONTROLPLANE], "--config", str(devfiles.controlplane_config(home))]
        try:
            return _start(home, CONTROLPLANE, argv, CONTROLPLANE_S, progress, "starting the control plane")
        except DaemonFailed:
            if listen == listens[-1]:
                raise
    raise AssertionError("the last address returns or raises")


def _former_address(home: Home) -> str:
    try:
        return load_context(home).address
    except (NoFabric, CliError):
        return ""


def _ensure_hostd(
    home: Home, settings: HostSettings, controlplane: Daemon, shell: Shell, progress: Progress, started: list[str]
) -> Daemon:
    text = devfiles.hostd_toml(home, settings, controlplane.address)
    path = devfiles.hostd_config(home)
    running = daemons.running(home, HOSTD)
    if running is not None:
        before = devfiles.recorded_settings(home)
        if before is not None and not before.runs_as(settings):
            raise CliError(
                "the host runs with other settings", f"accel {before.accel}, reserve {before.memory_reserve_mib} MiB",
                "run `sandloom dev down --keep` first: sandboxes run on",
            )  # fmt: skip
        changed = devfiles.is_newer_than(path, daemons.uptime_s(running))
        if path.read_text(encoding="utf-8") == text and not changed:
            return running
        end(home, HOSTD)  # the control plane is elsewhere, or other things are asked for; its sandboxes run on
    devfiles.issue(home, Role.HOST, settings.name)
    devfiles.write_config(path, text)
    argv = [*shell.argvs[HOSTD], "--config", str(path)]
    step = "starting hostd (the first time it fetches a guest kernel and tries the accelerator)"
    daemon = _start(home, HOSTD, argv, HOSTD_S, progress, step)
    started.append(HOSTD)
    return daemon


def _start(home: Home, name: str, argv: list[str], deadline_s: float, progress: Progress, step: str) -> Daemon:
    return daemons.start(home, name, argv, deadline_s=deadline_s, waiting=lambda _: progress.update(step))


def _until_ready(shell: Shell, hostd: Daemon, name: str, progress: Progress) -> hosts_pb2.Host:
    """The host once it is READY and served by this very hostd."""
    give_up_s = time.monotonic() + READY_S
    local = Target(shell.target.home)
    while True:
        host = _host(shell, local, name)
        if host is not None and host.state == hosts_pb2.READY and _port(host.runtime_address) == _port(hostd.address):
            return host
        home = shell.target.home
        if not daemons.is_alive(hostd):
            raise DaemonFailed("hostd ended", "", f"its log is {home.log / 'hostd.log'}", log_tail=_tail(home))
        if time.monotonic() > give_up_s:
            state = hosts_pb2.HostState.Name(host.state) if host is not None else "not known to the control plane"
            raise DaemonFailed(
                f"host {name} is not ready after {READY_S:.0f} s", f"it is {state}",
                f"its log is {home.log / 'hostd.log'}", log_tail=_tail(home),
            )  # fmt: skip
        progress.update(f"waiting for host {name} to be ready")
        time.sleep(POLL_S)


def _tail(home: Home) -> tuple[str, ...]:
    return daemons.tail(home.log / "hostd.log")


def _host(shell: Shell, target: Target, name: str) -> hosts_pb2.Host | None:
    try:
        hosts = Shell(target, argvs=shell.argvs).over(list_hosts)
    except CallFailed:
        return None
    return {host.name: host for host in hosts}.get(name)


def _port(address: str) -> str:
    return address.rpartition(":")[2]


async def list_hosts(fabric: Fabric) -> list[hosts_pb2.Host]:
    """Every host, by name."""

    async def page(token: str) -> hosts_pb2.ListHostsResponse:
        with calling("cannot list the hosts"):
            request = hosts_pb2.ListHostsRequest(page_size=PAGE_SIZE, page_token=token)
            return await fabric.hosts.ListHosts(request, timeout=CALL_S)

    return await every_page(page, lambda answer: list(answer.hosts))


def liveness(home: Home) -> Mapping[str, Daemon | None]:
    """The two daemons, None for one that does not run."""
    return {name: daemons.running(home, name) for name in (CONTROLPLANE, HOSTD)}
