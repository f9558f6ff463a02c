"""Images from a registry into this host's store: fetched by skopeo into a spool, then imported as an upload is.

    STATE/.import-<random>/archive tmp/      gone when the pull ends; a crash's remains go at the next start

Only registries that the configuration names are asked: a tenant must not make this host speak to whatever it likes.
What comes is checked by its digests (skopeo checks them against the manifest, the import checks them again) and bounded
by the store's disk reserve while it comes.

A registry is told who a tenant is by that tenant's own file of credentials (registry_auth_dir), never by another's, and
never by what root happens to be logged in to. skopeo reads the file itself: no secret is in an argument, an environment
or a log. What skopeo says when it fails is told by `hostd/pullfailures.py`.
"""

from __future__ import annotations

import asyncio
import re
import signal
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

from controlplane.api.v1 import images_pb2
from hostd.config import Config
from hostd.errors import HostdError, InvalidSpec, NotAdmitted
from hostd.images import DEFAULT_TENANT, domain_of
from hostd.pullfailures import failure_of
from hostd.sandboxes import IMPORT_PREFIX
from hostd.uploads import MAX_UPLOAD_BYTES, Responses, convert, progress_of
from sharedcache.errors import LimitExceeded
from sharedcache.store import Store

PULL_S = 3600.0
POLL_S = 0.5
TOLD_BYTES = 8 << 10
ANY = "*"
REFERENCE = re.compile(r"[a-z0-9][A-Za-z0-9._:/@-]{2,511}")


def registry_of(reference: str, config: Config) -> str:
    """The registry of a reference. InvalidSpec; NotAdmitted when the configuration does not name it. Pure."""
    if not REFERENCE.fullmatch(reference) or "/" not in reference:
        raise InvalidSpec(f"{reference!r} is not REGISTRY/REPOSITORY[:TAG][@DIGEST]")
    registry = reference.partition("/")[0]
    if registry not in config.registries and ANY not in config.registries:
        named = ", ".join(config.registries) or "none"
        text = (
            f"this host does not fetch from {registry} (it may from: {named}): its operator adds it to registries in"
            f" hostd.toml, or, on a fabric of one host, runs `sandloom dev up --registry {registry}`"
        )
        raise NotAdmitted(text, reason="RegistryNotAllowed")
    return registry


def argv_of(reference: str, archive: Path, scratch: Path, *, verify: bool, credentials: Path | None) -> list[str]:
    """How skopeo is called. Pure. Digests are checked, signatures are not."""
    known_by = ["--src-no-creds"] if credentials is None else ["--src-authfile", str(credentials)]
    return [
        "skopeo", "--insecure-policy", "--tmpdir", str(scratch), "--override-os", "linux", "copy", "--quiet",
        "--retry-times", "3", f"--src-tls-verify={'true' if verify else 'false'}", *known_by,
        f"docker://{reference}", f"oci-archive:{archive}",
    ]  # fmt: skip


def credentials_of(tenant: str, config: Config) -> Path | None:
    """The tenant's file of credentials, None when it has none. NotAdmitted when others than its owner may read it."""
    domain_of(tenant)  # a name without a slash
    tenant = tenant or DEFAULT_TENANT
    path = config.registry_auth_dir / f"{tenant}.json" if config.registry_auth_dir else None
    if path is None or not path.is_file():
        return None
    if path.stat().st_mode & 0o077:
        text = f"the credentials of tenant {tenant} on this host are readable by others: chmod 600 {path}"
        raise NotAdmitted(text, reason="CredentialsOpen")
    return path


async def pull_image(request: images_pb2.PullImageRequest, store: Store, config: Config) -> Responses:
    """Progress, then the image. InvalidSpec, NotAdmitted, ImageMissing, RegistryUnavailable, HostdError (PullFailed),
    CacheError."""
    registry = registry_of(request.reference, config)
    credentials = credentials_of(request.tenant, config)
    with tempfile.TemporaryDirectory(dir=config.state_dir, prefix=IMPORT_PREFIX) as folder:
        path = Path(folder) / "archive"
        (Path(folder) / "tmp").mkdir()
        verify = registry not in config.plain_registries
        argv = argv_of(request.reference, path, Path(folder) / "tmp", verify=verify, credentials=credentials)
        async for size_bytes in _fetched(argv, Path(folder), store, request):
            yield progress_of("receive", size_bytes, 0)
        start = images_pb2.ImportImageRequest.Start(tenant=request.tenant)
        async for response in convert(store, path, start, config.host):
            yield response


async def _fetched(
    argv: list[str], folder: Path, store: Store, request: images_pb2.PullImageRequest
) -> AsyncIterator[int]:
    """Runs skopeo to its end and says how much came so far; ends it when the consumer goes."""
    loop = asyncio.get_running_loop()
    give_up_s = loop.time() + PULL_S
    with (folder / "said").open("wb") as said:
        try:
            process = await asyncio.create_subprocess_exec(
                *argv, stdin=asyncio.subprocess.DEVNULL, stdout=said, stderr=said, start_new_session=True
            )
        except FileNotFoundError as error:
            raise HostdError("skopeo is not on this host: apt-get install skopeo", reason="PullFailed") from error
    waiting = asyncio.ensure_future(process.wait())
    try:
        while not waiting.done():
            await asyncio.wait({waiting}, timeout=POLL_S)
            size_bytes = await asyncio.to_thread(_size_bytes, folder)
            if size_bytes > MAX_UPLOAD_BYTES:
                raise LimitExceeded("pull_bytes", allowed=MAX_UPLOAD_BYTES, remedy="pull a smaller image")
            await asyncio.to_thread(store.require_space, 0)
            if loop.time() > give_up_s:
                raise HostdError(f"it took longer than {PULL_S:g} s", reason="PullFailed")
            yield size_bytes
    finally:
        if not waiting.done():
            process.send_signal(signal.SIGKILL)
        await waiting
    if process.returncode:
        text = (folder / "said").read_bytes()[-TOLD_BYTES:].decode(errors="replace")
        raise failure_of(text, request.reference, request.tenant or DEFAULT_TENANT, known="--src-authfile" in argv)


def _size_bytes(folder: Path) -> int:
    total_bytes = 0
    for path in folder.rglob("*"):
        try:
            total_bytes += path.lstat().st_size
        except OSError:
            continue  # gone meanwhile
    return total_bytes
