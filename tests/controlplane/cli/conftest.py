"""The command line against a fake control plane, in this process, with pipes or terminals as standard descriptors."""

from __future__ import annotations

import contextlib
import io
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from controlplane.cli.command import Shell, Stdio
from controlplane.cli.home import Context, Home, save_context
from controlplane.cli.main import main, shell_for
from controlplane.cli.parser import Globals
from tests.controlplane.cli.fakefabric import FakeFabric, issue_tls

NOW_S = 1_700_000_000.0


@dataclass(frozen=True)
class Done:
    """How a command ended: `out` and `err` are all it wrote."""

    code: int
    out: str
    err: str


class Drain:
    """Reads a pipe to its end in a thread."""

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe()
        self.data = bytearray()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while piece := os.read(self.reader, 1 << 16):
            self.data += piece

    def close(self) -> str:
        os.close(self.writer)
        self._thread.join(10)
        os.close(self.reader)
        return self.data.decode(errors="replace")


@dataclass(frozen=True)
class Cli:
    """`sandloom` as a function."""

    home: Path
    environ: Mapping[str, str]

    def __call__(self, *argv: str, stdin: bytes = b"", environ: Mapping[str, str] | None = None) -> Done:
        out, err = Drain(), Drain()
        source, sink = os.pipe()
        feeder = threading.Thread(target=_feed, args=(sink, stdin), daemon=True)
        feeder.start()
        printed, told = io.StringIO(), io.StringIO()
        try:
            with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(told):
                stdio = Stdio(source, out.writer, err.writer)
                ended = main(argv, {**self.environ, **(environ or {})}, _with(stdio))
        finally:
            os.close(source)
            feeder.join(10)
            said, complained = out.close(), err.close()
        return Done(ended.code, said + printed.getvalue(), complained + told.getvalue())

    def ok(self, *argv: str, stdin: bytes = b"") -> str:
        done = self(*argv, stdin=stdin)
        assert done.code == 0, done
        return done.out


def _with(stdio: Stdio):  # type: ignore[no-untyped-def]
    def shell(shared: Globals, environ: Mapping[str, str]) -> Shell:
        return replace(shell_for(shared, environ), stdio=stdio, now_s=lambda: NOW_S)

    return shell


def _feed(sink: int, data: bytes) -> None:
    with contextlib.suppress(OSError):
        view: Sequence[int] | memoryview = memoryview(data)
        while view:
            view = view[os.write(sink, view) :]  # type: ignore[arg-type]
    os.close(sink)


@pytest.fixture
def fabric(tmp_path: Path) -> Iterator[FakeFabric]:
    """A running fake control plane; HOME (tmp_path/home) has its context."""
    fake = FakeFabric()
    home = Home(tmp_path / "home")
    home.prepare()
    tls = issue_tls(home.tls)
    address = fake.serve(tls)
    save_context(home, Context(address, home.tls / "ca.crt", home.tls / "operator.crt", home.tls / "operator.key"))
    yield fake
    fake.stop()


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    return Cli(tmp_path / "home", {"SANDLOOM_HOME": str(tmp_path / "home"), "PATH": os.environ["PATH"]})
