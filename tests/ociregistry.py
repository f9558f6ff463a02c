"""Debian's docker-registry on loopback, for tests that pull from one; skopeo pushes."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.sharedcache.ocikit import OciLayout

UP_S = 60.0


@dataclass(frozen=True)
class Registry:
    """One that runs. `pushed` puts a layout there under a name."""

    address: str
    folder: Path
    credentials: str = ""

    def push(self, layout: OciLayout, name: str) -> str:
        source = layout.to_folder(self.folder / name.replace(":", "_").replace("/", "_"))
        subprocess.run(
            [
                "skopeo", "--insecure-policy", "copy", "--quiet", "--dest-tls-verify=false",
                *(["--dest-creds", self.credentials] if self.credentials else []), f"oci:{source}", f"docker://{self.address}/{name}",
            ],
            check=True, capture_output=True, timeout=UP_S,
        )  # fmt: skip
        return f"{self.address}/{name}"


@contextlib.contextmanager
def serving(folder: Path, more: str = "") -> Iterator[Registry]:
    """Debian's docker-registry over a folder."""
    binary = shutil.which("docker-registry")
    if binary is None or shutil.which("skopeo") is None:
        pytest.skip("Debian's docker-registry or skopeo is not installed")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = folder / "config.yml"
    config.write_text(
        f"version: 0.1\nstorage:\n  filesystem:\n    rootdirectory: {folder / 'data'}\n"
        f"http:\n  addr: 127.0.0.1:{port}\n{more}"
    )
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([binary, "serve", str(config)], stdout=log, stderr=log)
    try:
        _until_up(port, process)
        yield Registry(f"127.0.0.1:{port}", folder)
    finally:
        process.kill()
        process.wait()


def _until_up(port: int, process: subprocess.Popen[bytes]) -> None:
    for _ in range(int(UP_S / 0.1)):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.1)
            raise AssertionError(f"the registry ended: {process.returncode}")
    raise AssertionError("the registry does not listen")
