"""A fabric of several hosts on this machine: one control plane, hostds that joined by tokens, each behind a proxy that
can cut it off. Real processes, driven by the `sandloom` command; the sandboxes are the fake driver's unless said."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from controlplane.api.identity import Identity, Role
from controlplane.ca import Authority
from tests.integration.fabric import Done, until

LEASE_S, GRACE_S = 3, 2
READY_S = 120.0
LIVE = ("starting", "running", "stopping")


class Proxy:
    """Passes TCP on to one address until it is cut: then open connections die, and new ones are refused."""

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._open: set[socket.socket] = set()
        self._guard = threading.Lock()
        self._cut = False
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        with self._guard:
            self._cut = True
            for one in self._open:
                with contextlib.suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)

    def mend(self) -> None:
        with self._guard:
            self._cut = False

    def close(self) -> None:
        self.cut()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError), client, socket.create_connection(self._target, timeout=10) as server:
            with self._guard:
                if self._cut:
                    return
                self._open |= {client, server}
            try:
                _pump(client, server)
            finally:
                with self._guard:
                    self._open -= {client, server}


def _pump(one: socket.socket, other: socket.socket) -> None:
    with selectors.DefaultSelector() as selector:
        selector.register(one, selectors.EVENT_READ, other)
        selector.register(other, selectors.EVENT_READ, one)
        while True:
            for key, _ in selector.select():
                data = key.fileobj.recv(1 << 16)  # type: ignore[union-attr]
                if not data:
                    return
                key.data.sendall(data)


@dataclass
class HostProcess:
    """One hostd and all that is its own."""

    name: str
    home: Path
    proxy: Proxy
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        argv = [sys.executable, "-m", "hostd.server", "--config", str(self.home / "hostd.toml")]
        self.process = _ready(argv, self.home / "hostd.log")

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def live(self) -> dict[str, int]:
        """Epochs by uid of what runs here, as the journal on disk has it."""
        found: dict[str, int] = {}
        for path in (self.home / "state" / "sandboxes").glob("*/record.json"):
            with contextlib.suppress(OSError, ValueError):
                record = json.loads(path.read_bytes())["record"]
                if record["phase"] in LIVE:
                    found[record["spec"]["uid"]] = int(record["spec"]["epoch"])
        return found

    def end(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.terminate()
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.proxy.close()


@dataclass
class ManyHosts:
    """See the module. Made by `many_hosts`."""

    folder: Path
    address: str
    hosts: dict[str, HostProcess] = field(default_factory=dict)

    def argv(self, *arguments: str, home: Path | None = None) -> list[str]:
        """A command line of the operator's."""
        argv = [sys.executable, "-m", "controlplane.cli.main", "--home", str(home or self.folder / "home")]
        if home is None:
            argv += ["--address", self.address, "--tls-dir", str(self.folder / "tls")]
        return [*argv, *arguments]

    def run(self, *arguments: str, home: Path | None = None) -> Done:
        """One command of the operator to its end."""
        done = subprocess.run(
            self.argv(*arguments, home=home), stdin=subprocess.DEVNULL, capture_output=True, timeout=240
        )
        return Done(done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace"))

    def ok(self, *arguments: str, home: Path | None = None) -> str:
        done = self.run(*arguments, home=home)
        assert done.code == 0, f"sandloom {' '.join(arguments)}: {done}\n{self.logs()}"
        return done.out

    def asked(self, *arguments: str) -> Any:
        return json.loads(self.ok(*arguments, "-o", "json"))

    def join(
        self, name: str, *, driver: str = "fake", reserve_mib: int = 1, settings: Mapping[str, object] | None = None
    ) -> HostProcess:
        """A host that joined by a token and serves; `settings` are more lines of its hostd.toml."""
        home, proxy = self.folder / name, Proxy(self.address)
        token = self.ok("hosts", "token", "--host", name).strip()
        self.ok(
            "host", "join", token, "--name", name, "--listen", "127.0.0.1:0", "--controlplane", proxy.address,
            "--memory-reserve", f"{reserve_mib}M", home=home,
        )  # fmt: skip
        more = {"driver": driver, "disk_reserve_mib": 0, **(settings or {})}
        with (home / "hostd.toml").open("a") as config:
            config.writelines(f"{key} = {json.dumps(value)}\n" for key, value in more.items())
        host = self.hosts[name] = HostProcess(name, home, proxy)
        host.start()
        self.until_state(name, "READY")
        return host

    def until_state(self, name: str, state: str) -> None:
        def reached() -> bool:
            return {host["name"]: host["state"] for host in self.asked("hosts")}.get(name) == state

        until(reached, 90, lambda: f"{name} is not {state}: {self.asked('hosts')}\n{self.logs()}")

    def inspect(self, name: str) -> dict[str, Any]:
        found = self.asked("inspect", name)
        one = found[0] if isinstance(found, list) else found
        assert isinstance(one, dict)
        return one

    def where(self, name: str) -> tuple[str, int, str]:
        """(host, epoch, phase) of a sandbox."""
        found = self.inspect(name)
        place = found["assignment"] or {"host": "", "epoch": 0}
        return str(place["host"]), int(place["epoch"]), str(found["status"]["phase"])

    def reasons(self, subject: str) -> list[str]:
        return [event["reason"] for event in self.asked("events", "--subject", subject)]

    def logs(self) -> str:
        return "\n".join(
            f"--- {path}\n{path.read_text(errors='replace')[-2500:]}" for path in sorted(self.folder.glob("**/*.log"))
        )


def _ready(argv: list[str], log: Path) -> subprocess.Popen[bytes]:
    """A daemon that has said that it is ready."""
    with log.open("ab") as said:
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=said)
    assert process.stdout is not None
    line = _line(process.stdout, READY_S)
    assert line, log.read_text(errors="replace")[-4000:]
    process.ready = json.loads(line)  # type: ignore[attr-defined]
    return process


def _line(stream: IO[bytes], deadline_s: float) -> bytes:
    with selectors.DefaultSelector() as selector:
        selector.register(stream, selectors.EVENT_READ)
        return stream.readline() if selector.select(deadline_s) else b""


@contextlib.contextmanager
def many_hosts(folder: Path, *, lease_s: int = LEASE_S, grace_s: int = GRACE_S) -> Iterator[ManyHosts]:
    """A control plane without hosts. Every process that was started has ended afterwards."""
    authority = Authority.create(folder / "ca")
    authority.issue_files(Identity(Role.OPERATOR, "op"), folder / "tls")
    tls = authority.issue_files(Identity(Role.CONTROLPLANE, "cp"), folder / "cp", ip_addresses=("127.0.0.1",))
    config = {
        "listen": "127.0.0.1:0", "store": f"sqlite:{folder / 'store.db'}", "tls_ca": str(tls.ca),
        "tls_cert": str(tls.cert), "tls_key": str(tls.key), "ca_dir": str(folder / "ca"), "join_listen": "127.0.0.1:0",
    }  # fmt: skip
    text = "".join(f"{key} = {json.dumps(value)}\n" for key, value in config.items())
    (folder / "cp.toml").write_text(f"{text}lease_s = {lease_s}\nlost_grace_s = {grace_s}\n")
    argv = [sys.executable, "-m", "controlplane.server", "--config", str(folder / "cp.toml")]
    process = _ready(argv, folder / "cp.log")
    fabric = ManyHosts(folder, process.ready["address"])  # type: ignore[attr-defined]
    try:
        yield fabric
    finally:
        for host in fabric.hosts.values():
            host.end()
        process.terminate()
        process.wait(30)


def never_twice(hosts: list[HostProcess], seen: dict[tuple[str, int], str]) -> None:
    """Notes where each (uid, epoch) runs; fails when one ever runs on two hosts."""
    for host in hosts:
        for uid, epoch in host.live().items():
            assert seen.setdefault((uid, epoch), host.name) == host.name, f"{uid} of epoch {epoch} runs twice"


def now_s() -> float:
    return time.monotonic()


def is_root() -> bool:
    return os.geteuid() == 0
