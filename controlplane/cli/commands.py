"""The table of commands: the one place that knows them all."""

from __future__ import annotations

from controlplane.cli import (
    attach,
    checkpoints,
    completion,
    dev,
    doctor,
    events,
    explain,
    hosts,
    images,
    logs,
    pools,
    resize,
    run,
    sandboxes,
    share,
    version,
)
from controlplane.cli.command import AnyCommand
from controlplane.cli.exec import COMMAND as EXEC

ALL: tuple[AnyCommand, ...] = (
    doctor.COMMAND,
    dev.UP,
    dev.DOWN,
    dev.STATUS,
    images.IMPORT,
    images.LS,
    images.INSPECT,
    images.RM,
    pools.CREATE,
    pools.LS,
    pools.INSPECT,
    pools.RESIZE,
    pools.RM,
    run.COMMAND,
    EXEC,
    attach.COMMAND,
    logs.COMMAND,
    sandboxes.PS,
    sandboxes.INSPECT,
    resize.COMMAND,
    checkpoints.TAKE,
    checkpoints.LS,
    checkpoints.RM,
    checkpoints.RESTORE,
    checkpoints.FORK,
    sandboxes.STOP,
    sandboxes.RM,
    sandboxes.WAIT,
    share.COMMAND,
    hosts.COMMAND,
    explain.COMMAND,
    events.COMMAND,
    version.COMMAND,
)

TABLE: dict[tuple[str, ...], AnyCommand] = {command.words: command for command in ALL}
"""In the order in which the help shows them."""

TABLE["completion",] = completion.command_for(TABLE)
