"""A real image for demo, tests and benchmarks: a Debian userland with python3 and ssh-keygen, made by mmdebstrap.

    $XDG_CACHE_HOME/sandloom/userland-<codename>-<packages>.tar     about 220 MB; made once (a minute), then reused

It comes from the same archive that this machine's apt already trusts and uses, verified by the same keyring.
"""

from __future__ import annotations

import os
import platform
import subprocess
import tempfile
from pathlib import Path

from tests.once import one_at_a_time

PACKAGES = ("python3", "openssh-client")
BUILD_DEADLINE_S = 900.0


class UserlandUnavailable(Exception):
    """The image cannot be made here; str() says what failed."""


def cache_dir() -> Path:
    """Where made images are kept between runs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sandloom"


def codename() -> str:
    """This Debian's codename, e.g. "bookworm". UserlandUnavailable elsewhere."""
    release = platform.freedesktop_os_release()
    if release.get("ID") != "debian" or "VERSION_CODENAME" not in release:
        raise UserlandUnavailable(f"this is {release.get('PRETTY_NAME', 'no Debian')}: the image is made from Debian")
    return release["VERSION_CODENAME"]


def archive_uri(suite: str) -> str:
    """The archive that apt uses for `suite`'s main component."""
    asked = ["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages", f"Codename: {suite}"]
    done = subprocess.run([*asked, "Component: main"], capture_output=True, text=True, timeout=60)
    uris = done.stdout.split()
    if done.returncode or not uris:
        raise UserlandUnavailable(f"apt knows no archive for {suite}: run `apt-get update`. {done.stderr.strip()}")
    return uris[0]


def userland_tar() -> Path:
    """The root filesystem's tar, made when it is not in the cache. Blocks for a minute then. UserlandUnavailable."""
    suite = codename()
    target = cache_dir() / f"userland-{suite}-{'-'.join(PACKAGES)}.tar"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with one_at_a_time(target.with_suffix(".lock")):
        if not target.exists():
            _make(suite, target)
    return target


def _make(suite: str, target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".making-") as folder:
        made = Path(folder) / "userland.tar"
        argv = [
            "mmdebstrap", "--quiet", "--variant=minbase", f"--include={','.join(PACKAGES)}",
            "--aptopt=Acquire::Languages none", suite, str(made), f"deb {archive_uri(suite)} {suite} main",
        ]  # fmt: skip
        try:
            done = subprocess.run(argv, capture_output=True, text=True, timeout=BUILD_DEADLINE_S)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise UserlandUnavailable(f"mmdebstrap: {error}; apt-get install mmdebstrap") from error
        if done.returncode:
            raise UserlandUnavailable(f"mmdebstrap failed: {done.stderr.strip()[-800:]}")
        made.rename(target)


if __name__ == "__main__":
    print(userland_tar())
