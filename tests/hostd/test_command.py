"""What is run: a request joined with its image."""

from __future__ import annotations

import pytest

from hostd.command import DEFAULT_PATH, resolve, resolve_exec
from hostd.errors import InvalidSpec
from hostd.spec import Command, ProcessSpec


def main_of(process: ProcessSpec = ProcessSpec(), **image: object) -> Command:  # noqa: B008
    values: dict[str, object] = {"entrypoint": (), "cmd": (), "env": (), "workdir": "", "user": "", "hostname": "box"}
    return resolve(process, **{**values, **image})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("entrypoint", "cmd", "asked", "argv"),
    [
        ((), ("sh",), (), ("sh",)),
        ((), ("sh",), ("ls", "-l"), ("ls", "-l")),
        (("run",), ("serve",), (), ("run", "serve")),
        (("run",), ("serve",), ("test",), ("run", "test")),
        (("run",), (), (), ("run",)),
    ],
)
def test_entrypoint_and_command_as_docker_joins_them(
    entrypoint: tuple[str, ...], cmd: tuple[str, ...], asked: tuple[str, ...], argv: tuple[str, ...]
) -> None:
    assert main_of(ProcessSpec(argv=asked), entrypoint=entrypoint, cmd=cmd).argv == argv


def test_nothing_to_run_says_so() -> None:
    with pytest.raises(InvalidSpec, match="no command"):
        main_of()


def test_later_environment_wins() -> None:
    asked = ProcessSpec(env=(("B", "asked"), ("D", "d")), tty=True)
    env = dict(main_of(asked, cmd=("sh",), env=(("A", "image"), ("B", "image"), ("PATH", "/image"))).env)
    assert env == {
        "PATH": "/image", "HOME": "/root", "HOSTNAME": "box", "TERM": "xterm", "A": "image", "B": "asked", "D": "d",
    }  # fmt: skip
    assert dict(main_of(cmd=("sh",)).env) == {"PATH": DEFAULT_PATH, "HOME": "/root", "HOSTNAME": "box"}


@pytest.mark.parametrize(
    ("user", "home"), [("", "/root"), ("root", "/root"), ("0:5", "/root"), ("nobody", "/"), ("1000:1000", "/")]
)
def test_home_follows_the_user(user: str, home: str) -> None:
    assert dict(main_of(cmd=("sh",), user=user).env)["HOME"] == home


@pytest.mark.parametrize(
    ("asked", "image", "workdir"), [("", "", "/"), ("", "/srv", "/srv"), ("/tmp", "/srv", "/tmp"), ("", "app", "/app")]
)
def test_workdir_is_absolute(asked: str, image: str, workdir: str) -> None:
    assert main_of(ProcessSpec(workdir=asked), cmd=("sh",), workdir=image).workdir == workdir


def test_exec_takes_what_it_does_not_say_from_main() -> None:
    main = main_of(ProcessSpec(tty=True, env=(("A", "main"),)), cmd=("sh",), workdir="/srv", user="nobody")
    plain = resolve_exec(ProcessSpec(argv=("ls",), env=(("A", "exec"),)), main)
    assert (plain.argv, plain.workdir, plain.user, plain.tty) == (("ls",), "/srv", "nobody", False)
    assert dict(plain.env)["A"] == "exec"
    assert "TERM" not in dict(plain.env)
    with_terminal = resolve_exec(ProcessSpec(argv=("ls",), tty=True, rows=3, cols=4, user="0", workdir="/x"), main)
    assert dict(with_terminal.env)["TERM"] == "xterm"
    assert (with_terminal.rows, with_terminal.cols, with_terminal.user, with_terminal.workdir) == (3, 4, "0", "/x")
    with pytest.raises(InvalidSpec, match="needs a command"):
        resolve_exec(ProcessSpec(), main)
