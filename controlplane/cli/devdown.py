"""`dev down`: every sandbox stopped and removed, both daemons ended, and nothing of them left on the machine.

Only hostd can take a sandbox's guest, cgroup and mounts away, so a fabric that is half dead is brought up first.
With keep, sandboxes run on without daemons; the context file stays, and a later `up` or `down` finds them by it.
"""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

from controlplane.api.v1 import sandboxes_pb2
from controlplane.cli import devup, lookup
from controlplane.cli.command import Shell
from controlplane.cli.connection import CALL_S, Fabric, Target, calling
from controlplane.cli.devfiles import HostSettings
from controlplane.cli.errors import CliError, DaemonFailed
from controlplane.cli.home import Home
from controlplane.cli.progress import Progress
from controlplane.cli.sandboxes import STOP_SLACK_S
from controlplane.cli.tenants import list_tenants
from controlplane.tenancy import DEFAULT_TENANT

LET_GO_S = 120.0
STUCK = (
    "`sandloom events` and hostd's log tell why; a hostd that starts tries again: `sandloom dev down --keep`, then"
    " `sandloom dev down`"
)


def down(home: Home, settings: HostSettings, shell: Shell, progress: Progress, *, keep: bool, grace_s: float) -> bool:
    """Takes the fabric down; False when there was none. The caller holds the lock."""
    alive = [name for name, daemon in devup.liveness(home).items() if daemon is not None]
    if not alive and not home.context.exists():
        return False
    if not keep:
        try:
            if len(alive) < 2:
                progress.note("sandloom: part of the fabric is not running: starting it to clean up")
            devup.up(home, settings, shell, progress)
        except CliError as error:
            tail = error.log_tail if isinstance(error, DaemonFailed) else ()
            raise DaemonFailed(
                "its sandboxes cannot be removed", str(error),
                "mend that; `sandloom dev down --keep` ends the daemons only", log_tail=tail,
            ) from error  # fmt: skip
        for tenant in Shell(Target(home), argvs=shell.argvs).over(_tenants):
            local = Shell(Target(home, tenant=tenant), argvs=shell.argvs)
            local.over(lambda fabric: _empty(fabric, grace_s, progress))
    for name in (devup.HOSTD, devup.CONTROLPLANE):
        progress.update(f"ending {name}")
        devup.end(home, name)
    if not keep:
        _nothing_left(home)  # before the context goes: by it, the next `down` tries again
        home.context.unlink(missing_ok=True)
    return True


async def _tenants(fabric: Fabric) -> list[str]:
    """Whose sandboxes there may be: a list of sandboxes is one tenant's only."""
    return sorted({DEFAULT_TENANT, *(tenant.name for tenant in await list_tenants(fabric))})


async def _empty(fabric: Fabric, grace_s: float, progress: Progress) -> None:
    """Stops and removes every sandbox of a tenant, and returns when the hosts have let go of all of them."""
    present = await lookup.list_sandboxes(fabric, ended=True)
    live = [sandbox for sandbox in present if not lookup.has_ended(sandbox)]
    if grace_s > 0:
        progress.update(f"stopping sandboxes: {len(live)}")
        for sandbox in live:
            request = sandboxes_pb2.StopSandboxRequest(name=sandbox.uid)
            request.grace.FromNanoseconds(int(grace_s * 1e9))
            with calling(f"cannot stop {sandbox.name}"):
                await fabric.sandboxes.StopSandbox(request, timeout=CALL_S)
        for sandbox in live:
            await lookup.until(fabric, sandbox.uid, lookup.has_ended, deadline_s=grace_s + STOP_SLACK_S)
    for sandbox in present:
        with calling(f"cannot remove {sandbox.name}"):
            delete = sandboxes_pb2.DeleteSandboxRequest(name=sandbox.uid, force=True, allow_missing=True)
            await fabric.sandboxes.DeleteSandbox(delete, timeout=CALL_S)
    loop = asyncio.get_running_loop()
    give_up_s = loop.time() + LET_GO_S
    while left := await lookup.list_sandboxes(fabric, ended=True):
        progress.update(f"waiting for sandboxes to be let go of: {len(left)}")
        if loop.time() > give_up_s:
            names = ", ".join(sandbox.name for sandbox in left)
            raise CliError("sandboxes are not let go of", names, STUCK)
        await asyncio.sleep(lookup.POLL_S)


def _nothing_left(home: Home) -> None:
    """CliError names what is still there of this HOME: mounts and sockets, and processes that use its run folder."""
    left = leftovers(home)
    if left:
        raise CliError(
            "something of the fabric is left",
            "; ".join(left[:5]),
            "`sandloom dev down` tries again; else end it by hand",
        )


def leftovers(home: Home, proc: Path = Path("/proc")) -> list[str]:
    """Mounts below HOME, processes whose command line names HOME/run, and sockets there that they hold."""
    root, run = str(home.root), str(home.run) + "/"
    found = [f"mount {mount}" for mount in mounts_below(home, proc)]
    for entry in proc.iterdir():
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0") if entry.name.isdigit() else []
        except OSError:
            continue
        if any(run.encode() in word for word in words):
            found.append(f"process {entry.name} ({words[0].decode(errors='replace')})")
    for line in (proc / "net/unix").read_text().splitlines():
        path = line.split(maxsplit=7)[7] if len(line.split(maxsplit=7)) == 8 else ""
        if path.startswith(root + "/"):
            found.append(f"socket {path}")
    return found


def mounts_below(home: Home, proc: Path = Path("/proc")) -> list[str]:
    """Mount points below HOME."""
    points = [line.split()[4] for line in (proc / "self/mountinfo").read_text().splitlines()]
    return [point for point in points if point.startswith(f"{home.root}/")]


def purge(home: Home) -> None:
    """Removes what `dev up` made in HOME, and HOME itself when nothing else is in it. Nothing may run."""
    if any(daemon is not None for daemon in devup.liveness(home).values()) or mounts_below(home):
        raise CliError("HOME is in use", str(home.root), "run `sandloom dev down` first")
    for folder in (home.state, home.run, home.store, home.tls, home.log, home.pids):
        if folder.exists():
            shutil.rmtree(folder)
    for name in ("context.json", "controlplane.toml", "hostd.toml", "lock"):
        (home.root / name).unlink(missing_ok=True)
    try:
        home.root.rmdir()
    except OSError:
        return  # not there, a mount point, or somebody keeps something else in it
