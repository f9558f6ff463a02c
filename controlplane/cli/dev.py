"""`sandloom dev up|down|status`: a whole fabric on one host, for work and for trying it out."""

from __future__ import annotations

import argparse
import os
import re
from dataclasses import dataclass

from controlplane.api.v1 import hosts_pb2
from controlplane.cli import daemons, devdown, devfiles, devup, sizes
from controlplane.cli.command import Command, Shell, add_output
from controlplane.cli.connection import Target
from controlplane.cli.errors import CallFailed, CliError, UsageError
from controlplane.cli.output import Column
from controlplane.cli.progress import Progress

DOWN_GRACE_S = 5.0
REGISTRY = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?(:[0-9]{1,5})?")


@dataclass(frozen=True)
class UpOptions:
    """None: as the last time, or the default."""

    host_name: str | None = None
    accel: str | None = None
    memory_reserve_mib: int | None = None
    store: str | None = None
    registries: tuple[str, ...] = ()
    plain_registries: tuple[str, ...] = ()


@dataclass(frozen=True)
class DownOptions:
    """`keep`: sandboxes run on. `purge`: HOME's data goes too."""

    keep: bool = False
    purge: bool = False
    grace_s: float = DOWN_GRACE_S


@dataclass(frozen=True)
class DaemonStatus:
    """One line of `dev status`."""

    name: str
    state: str  # running, ended, stopped
    pid: int
    uptime_s: float
    address: str
    detail: str
    log: str


def act_up(options: UpOptions, shell: Shell) -> int:
    home = shell.target.home
    _need_root("up")
    devfiles.check_length(home)
    settings = devfiles.settings_for(
        home, options.host_name, options.accel, options.memory_reserve_mib,
        registries=options.registries, plain_registries=options.plain_registries,
    )  # fmt: skip
    home.prepare()
    with Progress(quiet=shell.quiet) as progress, devfiles.locked(home, waiting=lambda: _wait(progress)):
        result = devup.up(home, settings, shell, progress, store=options.store)
    host = result.host
    state = "is up" if result.started else "runs already"
    shell.printer.write(
        f"the fabric {state}: control plane {result.address}, host {host.name} {_readiness(host)} ({host.accel})\n"
    )
    if host.isolation_note:
        shell.say(f"sandloom: note: {host.isolation_note}")
    return 0


def _wait(progress: Progress) -> None:
    progress.update("another `dev up` or `dev down` is at work: waiting for it")


def _readiness(host: hosts_pb2.Host) -> str:
    return hosts_pb2.HostState.Name(host.state)


def _need_root(verb: str) -> None:
    if os.geteuid() != 0:
        raise CliError(
            f"`dev {verb}` needs root", f"uid {os.geteuid()}", "each guest gets a uid and a cgroup: use sudo"
        )


def act_down(options: DownOptions, shell: Shell) -> int:
    home = shell.target.home
    _need_root("down")
    if not home.root.exists():
        shell.say(f"nothing runs here ({home.root} is not there)")
        return 0
    home.prepare()
    settings = devfiles.settings_for(home)
    with Progress(quiet=shell.quiet) as progress, devfiles.locked(home, waiting=lambda: _wait(progress)):
        was_up = devdown.down(home, settings, shell, progress, keep=options.keep, grace_s=options.grace_s)
        if options.purge:
            progress.update("removing its data")
            devdown.purge(home)
    text = "the fabric is down" if was_up else "nothing runs here"
    shell.printer.write(f"{text}{'; its sandboxes run on' if options.keep and was_up else ''}\n")
    return 0


def act_status(options: None, shell: Shell) -> int:
    rows = statuses(shell)
    shell.printer.listing(rows, COLUMNS, name=lambda row: row.name, data=lambda row: row.__dict__)
    return 0 if all(row.state == "running" for row in rows) else 1


def statuses(shell: Shell) -> list[DaemonStatus]:
    """Both daemons as they are: by their pid files, and by what the control plane answers."""
    home = shell.target.home
    answer, hosts = _asked(shell)
    found = []
    for name, running in devup.liveness(home).items():
        recorded = daemons.recorded(home, name)
        state = "running" if running else "ended" if recorded else "stopped"
        detail = ""
        if running is not None:
            detail = answer if name == devup.CONTROLPLANE else ", ".join(f"{h.name} {_readiness(h)}" for h in hosts)
        log = home.log / f"{name}.log"
        found.append(
            DaemonStatus(
                name, state, running.pid if running else 0, daemons.uptime_s(running) if running else 0.0,
                running.address if running else "", detail, str(log) if log.exists() else "",
            )
        )  # fmt: skip
    return found


def _asked(shell: Shell) -> tuple[str, list[hosts_pb2.Host]]:
    try:
        return "answers", Shell(Target(shell.target.home)).over(devup.list_hosts)
    except CallFailed as error:
        return f"does not answer: {error.on}", []
    except CliError as error:
        return error.what, []


STATE_COLOURS = {"running": "green", "ended": "red"}
COLUMNS: tuple[Column[DaemonStatus], ...] = (
    Column("DAEMON", lambda row: row.name),
    Column("STATE", lambda row: row.state, colour=lambda row: STATE_COLOURS.get(row.state, "")),
    Column("PID", lambda row: str(row.pid or ""), right=True),
    Column("UP", lambda row: sizes.format_age(row.uptime_s) if row.pid else "", right=True),
    Column("ADDRESS", lambda row: row.address),
    Column("DETAIL", lambda row: row.detail),
    Column("LOG", lambda row: row.log),
)


def _configure_up(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--host-name", metavar="NAME", help="this host's name in the fabric; the machine's")
    parser.add_argument("--accel", choices=devfiles.ACCELS, help="kvm, tcg, or auto: kvm where it truly works")
    parser.add_argument(
        "--store",
        metavar="etcd:HOST:PORT,...",
        help="keep the records in an etcd that runs; a file of HOME's unless given",
    )
    parser.add_argument("--memory-reserve", metavar="SIZE", help="memory never given to sandboxes; 512M")
    parser.add_argument(
        "--registry", action="append", default=[], metavar="HOST[:PORT]",
        help="let `image pull` fetch from there; may be given again, and is remembered",
    )  # fmt: skip
    parser.add_argument(
        "--plain-registry", action="append", default=[], metavar="HOST[:PORT]",
        help="the same without TLS, or with a certificate that nobody checks",
    )  # fmt: skip


def _parse_up(namespace: argparse.Namespace) -> UpOptions:
    reserve = namespace.memory_reserve
    store = namespace.store
    if store is not None and not store.startswith("etcd:"):
        raise UsageError(f"--store {store} is no etcd", "", "give etcd:HOST:PORT,..., or leave it out")
    reserve_mib = sizes.parse_size_mib(reserve) if reserve else None
    for name in [*namespace.registry, *namespace.plain_registry]:
        if not REGISTRY.fullmatch(name):
            raise UsageError(f"{name} is no registry", "", "give HOST or HOST:PORT, without https:// and repository")
    return UpOptions(
        namespace.host_name, namespace.accel, reserve_mib, store,
        tuple(namespace.registry), tuple(namespace.plain_registry),
    )  # fmt: skip


def _configure_down(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--keep", action="store_true", help="end the daemons only: sandboxes run on")
    parser.add_argument("--purge", action="store_true", help="also remove images, records, logs and certificates")
    parser.add_argument(
        "-t", "--grace", default=f"{DOWN_GRACE_S:.0f}", metavar="S", help="from SIGTERM to SIGKILL; 5 s unless given"
    )


def _parse_down(namespace: argparse.Namespace) -> DownOptions:
    if namespace.keep and namespace.purge:
        raise UsageError("--keep and --purge do not go together", "", "what is kept needs its data")
    return DownOptions(namespace.keep, namespace.purge, sizes.parse_duration_s(namespace.grace))


UP = Command(
    words=("dev", "up"),
    summary="start a fabric on this host: control plane, hostd, their own CA",
    description="Starts what is needed for sandboxes on this one host, or whatever of it does not run: an embedded"
    " store, the control plane, hostd, and a CA of its own. Does nothing when all of it runs. What is added to"
    " HOME/hostd.toml by hand stays there; `dev up` begins hostd anew when that changed, and sandboxes run on.",
    configure=_configure_up,
    parse=_parse_up,
    act=act_up,
    examples=(
        "sandloom dev up",
        "sandloom dev up --accel tcg --memory-reserve 2G",
        "sandloom dev up --registry docker.io --registry registry.example:5000",
    ),
)
DOWN = Command(
    words=("dev", "down"),
    summary="remove all sandboxes and end the fabric",
    configure=_configure_down,
    parse=_parse_down,
    act=act_down,
    examples=("sandloom dev down", "sandloom dev down --keep", "sandloom dev down --purge"),
)
STATUS = Command(
    words=("dev", "status"),
    summary="show the fabric's daemons; exit status 1 when one is not running",
    configure=add_output,
    parse=lambda ns: None,
    act=act_status,
    examples=("sandloom dev status",),
)
