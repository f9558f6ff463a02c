"""What to run: a request joined with its image's configuration, as docker does it. Pure."""

from __future__ import annotations

from dataclasses import replace

from hostd.errors import InvalidSpec
from hostd.spec import Command, ProcessSpec

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def resolve(
    process: ProcessSpec,
    *,
    entrypoint: tuple[str, ...],
    cmd: tuple[str, ...],
    env: tuple[tuple[str, str], ...],
    workdir: str,
    user: str,
    hostname: str,
) -> Command:
    """The main process: the image's entrypoint before the asked command, or before the image's own command.

    Later env wins: defaults, image, request. InvalidSpec when neither side names a command."""
    argv = (*entrypoint, *(process.argv or cmd))
    if not argv:
        raise InvalidSpec("no command: the image has none of its own, so name one after `--`", reason="NoCommand")
    runs_as = process.user or user
    merged = {"PATH": DEFAULT_PATH, "HOME": home_of(runs_as), "HOSTNAME": hostname}
    if process.tty:
        merged["TERM"] = "xterm"
    merged.update(env)
    merged.update(process.env)
    return Command(
        argv=argv,
        env=tuple(merged.items()),
        workdir=absolute(process.workdir or workdir),
        user=runs_as,
        tty=process.tty,
        stdin=process.stdin,
        rows=process.rows,
        cols=process.cols,
    )


def resolve_exec(process: ProcessSpec, main: Command) -> Command:
    """One more process in a sandbox: environment, workdir and user are the main one's unless it says otherwise."""
    if not process.argv:
        raise InvalidSpec("exec needs a command after `--`", reason="NoCommand")
    merged = {key: value for key, value in main.env if process.tty or key != "TERM"}
    if process.tty:
        merged.setdefault("TERM", "xterm")
    merged.update(process.env)
    return replace(
        main,
        argv=process.argv,
        env=tuple(merged.items()),
        workdir=absolute(process.workdir) if process.workdir else main.workdir,
        user=process.user or main.user,
        tty=process.tty,
        stdin=process.stdin,
        rows=process.rows,
        cols=process.cols,
    )


def absolute(workdir: str) -> str:
    """An image may say `app` where it means `/app`."""
    return workdir if workdir.startswith("/") else "/" + workdir


def home_of(user: str) -> str:
    """What HOME is when nobody says so. Another user's is in the image's passwd, which is not read on the host."""
    return "/root" if user.partition(":")[0] in ("", "0", "root") else "/"
