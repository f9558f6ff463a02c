"""Where the one-host fabric of `dev up` lives, and the file that tells other commands how to reach it.

HOME/                       0711: the uids of VMs pass through to run/ and state/
  context.json              address and TLS files of the control plane; there while a fabric, or a sandbox of it, runs
  controlplane.toml hostd.toml
  lock                      flock: one `dev up` or `dev down` at a time
  tls/                0700  the CA and the certificates of operator, server and host
  store/              0700  the control plane's database
  state/ run/         0711  hostd's own; it sets the modes below them
  log/                0700  controlplane.log, hostd.log
  pids/               0700  controlplane.json, hostd.json (controlplane.cli.daemons)
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from controlplane.cli.errors import CliError, NoFabric

HOME_VARIABLE = "SANDLOOM_HOME"
SYSTEM_HOME = Path("/var/lib/sandloom")


@dataclass(frozen=True)
class Context:
    """How to reach a control plane: `host:port` and the PEM files of mutual TLS."""

    address: str
    tls_ca: Path
    tls_cert: Path
    tls_key: Path


@dataclass(frozen=True)
class Home:
    """The paths below one HOME; nothing here touches the disk but `prepare`, `load_context` and `save_context`."""

    root: Path

    @property
    def context(self) -> Path:
        return self.root / "context.json"

    @property
    def lock(self) -> Path:
        return self.root / "lock"

    @property
    def tls(self) -> Path:
        return self.root / "tls"

    @property
    def store(self) -> Path:
        return self.root / "store"

    @property
    def state(self) -> Path:
        return self.root / "state"

    @property
    def run(self) -> Path:
        return self.root / "run"

    @property
    def log(self) -> Path:
        return self.root / "log"

    @property
    def pids(self) -> Path:
        return self.root / "pids"

    def prepare(self) -> None:
        """Makes the folders with their modes. CliError when one cannot be made."""
        wanted = (
            (self.root, 0o711), (self.state, 0o711), (self.run, 0o711),
            (self.tls, 0o700), (self.store, 0o700), (self.log, 0o700), (self.pids, 0o700),
        )  # fmt: skip
        for folder, mode in wanted:
            try:
                folder.mkdir(mode=mode, parents=True, exist_ok=True)
                folder.chmod(mode)
            except OSError as error:
                raise CliError(
                    "a folder cannot be made", f"{folder} ({error.strerror})", "be root, or choose another --home"
                ) from error


def default_home(environ: Mapping[str, str], *, root: bool) -> Home:
    """$SANDLOOM_HOME, else /var/lib/sandloom for root, else ~/.local/state/sandloom ($XDG_STATE_HOME)."""
    if environ.get(HOME_VARIABLE):
        return Home(Path(environ[HOME_VARIABLE]).absolute())
    if root:
        return Home(SYSTEM_HOME)
    state = environ.get("XDG_STATE_HOME") or str(Path(environ.get("HOME") or "/") / ".local/state")
    return Home(Path(state) / "sandloom")


def load_context(home: Home) -> Context:
    """NoFabric when there is none; CliError when it cannot be read or is not one."""
    try:
        raw = json.loads(home.context.read_bytes())
    except FileNotFoundError:
        raise NoFabric(f"{home.context} is not there") from None
    except OSError as error:
        raise CliError(
            "the fabric's context cannot be read", f"{home.context} ({error.strerror})", "be root, or give --address"
        ) from error
    except ValueError as error:
        raise _bad_context(home, "it is not JSON") from error
    names = {field.name for field in fields(Context)}
    if not isinstance(raw, dict) or set(raw) != names or not all(isinstance(value, str) for value in raw.values()):
        raise _bad_context(home, f"it must have exactly {', '.join(sorted(names))}")
    return Context(raw["address"], Path(raw["tls_ca"]), Path(raw["tls_cert"]), Path(raw["tls_key"]))


def _bad_context(home: Home, why: str) -> CliError:
    return CliError("the fabric's context is not right", f"{home.context} ({why})", "run `sandloom dev up` again")


def save_context(home: Home, context: Context) -> None:
    replace_file(home.context, json.dumps(asdict(context), default=str, indent=2) + "\n")


def replace_file(path: Path, text: str, mode: int = 0o600) -> None:
    """Writes `path` whole or not at all: temporary file beside it, fsync, rename."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
