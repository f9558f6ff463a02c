"""Guest kernels: Debian's cloud kernel package, extracted (never installed) into the store.

    CACHE/debs/<package>_<version>_<arch>.deb     what apt verified and downloaded, shared by a machine's hostds
    store: one KERNEL object (vmlinuz) and one INITRAMFS object (our agent with that kernel's modules), public
           domain, operator-signed: the operator's own apt keyring vouches for the package.

The package is trusted as far as apt verified it; nothing of it is run on the host.
"""

from __future__ import annotations

import subprocess
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

from hostd.errors import KernelMissing
from hostd.initramfs import WANTED, decompress, initramfs, load_order, module_name

META_PACKAGE = "linux-image-cloud-amd64"
APT_DEADLINE_S = 300.0


@dataclass(frozen=True)
class KernelFiles:
    """What a package holds that we need: the image, every module we may load, and what is built in."""

    version: str
    vmlinuz: bytes
    modules: dict[str, bytes]
    built_in: frozenset[str]

    def initramfs(self, agent: bytes) -> bytes:
        """The initramfs of this kernel for `agent`."""
        return initramfs(agent, self.modules, load_order(WANTED, self.modules, self.built_in))


def _run(argv: list[str], cwd: Path | None = None) -> str:
    try:
        done = subprocess.run(
            argv, cwd=cwd, capture_output=True, text=True, timeout=APT_DEADLINE_S, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelMissing(f"{' '.join(argv)}: {error}") from error
    if done.returncode:
        raise KernelMissing(f"{' '.join(argv)} failed: {done.stderr.strip()[-500:]}; run `apt-get update` and retry")
    return done.stdout


def package_name() -> str:
    """The newest versioned kernel package that apt knows. KernelMissing tells to run apt-get update."""
    text = _run(["apt-cache", "show", "--no-all-versions", META_PACKAGE])
    for line in text.splitlines():
        if line.startswith("Depends:"):
            for part in line.removeprefix("Depends:").split(","):
                name = part.split()[0]
                if name.startswith("linux-image-"):
                    return name
    raise KernelMissing(f"apt knows no dependency of {META_PACKAGE}: run `apt-get update` and retry")


def fetch(cache_dir: Path) -> Path:
    """The kernel's .deb, downloaded by apt when it is not in the cache yet. Blocks; run it in a thread."""
    debs = cache_dir / "debs"
    debs.mkdir(parents=True, exist_ok=True)
    try:
        name = package_name()
    except KernelMissing:
        kept = sorted(debs.glob("linux-image-*.deb"), key=lambda path: path.stat().st_mtime)
        if kept:  # apt's lists are gone, but an earlier download is as good as it was
            return kept[-1]
        raise
    kept = sorted(debs.glob(f"{name}_*.deb"))
    if kept:
        return kept[-1]
    with tempfile.TemporaryDirectory(dir=debs, prefix=".fetch-") as folder:
        # apt drops to its own user for downloads and complains when that user cannot write here.
        _run(["apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", name], cwd=Path(folder))
        found = list(Path(folder).glob("*.deb"))
        if len(found) != 1:
            raise KernelMissing(f"apt-get download {name} left {len(found)} files instead of one")
        target = debs / found[0].name
        found[0].replace(target)
    return target


def extract(deb: Path) -> KernelFiles:
    """Reads image and modules out of the package as a stream; nothing is written. KernelMissing names the package."""
    wanted_modules: dict[str, bytes] = {}
    vmlinuz, version, built_in = b"", "", frozenset[str]()
    try:
        with (
            subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(deb)], stdout=subprocess.PIPE) as unpack,
            tarfile.open(fileobj=unpack.stdout, mode="r|") as archive,
        ):
            for member in archive:
                name = member.name.removeprefix("./")
                if not member.isfile():
                    continue
                file = archive.extractfile(member)
                assert file is not None  # a regular file always has data
                if name.startswith("boot/vmlinuz-"):
                    vmlinuz, version = file.read(), name.removeprefix("boot/vmlinuz-")
                elif ".ko" in name and _may_load(name):
                    wanted_modules[module_name(name)] = decompress(name, file.read())
                elif name.endswith("/modules.builtin"):
                    built_in = frozenset(module_name(line) for line in file.read().decode().splitlines())
    except (OSError, tarfile.TarError) as error:
        raise KernelMissing(f"{deb}: cannot be read as a Debian package: {error}") from error
    if not vmlinuz or not wanted_modules:
        raise KernelMissing(f"{deb}: holds no kernel image or no modules: remove it and retry")
    return KernelFiles(version, vmlinuz, wanted_modules, built_in)


def _may_load(path: str) -> bool:
    """Folders that hold the wanted modules or what they depend on; the rest of the package is drivers."""
    folders = ("/virtio/", "/nvdimm/", "/fs/", "/lib/", "/crypto/", "/drivers/char/", "/drivers/block/", "/dax/")
    return any(folder in path for folder in folders) or module_name(path) in WANTED
