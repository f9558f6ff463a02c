"""A small builder of image archives: OCI layouts and docker archives, honest ones, and their parts to tamper with."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.sharedcache.tarkit import header, make_tar

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_INDEX = "application/vnd.docker.distribution.manifest.list.v2+json"
RUN = {
    "Entrypoint": ["/bin/app"], "Cmd": ["--serve", "ü"], "Env": ["PATH=/bin:/usr/bin", "EMPTY=", "EQ=a=b"],
    "WorkingDir": "/srv", "User": "1000:100",
}  # fmt: skip

Json = dict[str, Any]


def sha256(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def layer(*names: str, content: bytes = b"x") -> bytes:
    """A layer's tar with these files."""
    return make_tar(*((header(name), content + name.encode()) for name in names))


def squeeze(data: bytes) -> bytes:
    """gzip, the same bytes every time."""
    return gzip.compress(data, mtime=0)


@dataclass
class OciLayout:
    """A layout under construction: `files` by member name; nothing is checked, so that anything can be wrong."""

    files: dict[str, bytes] = field(default_factory=lambda: {"oci-layout": b'{"imageLayoutVersion":"1.0.0"}'})

    def blob(self, data: bytes, media_type: str, **extra: Any) -> Json:
        """Adds a blob; its descriptor."""
        digest = sha256(data)
        self.files[f"blobs/sha256/{digest[7:]}"] = data
        return {"mediaType": media_type, "digest": digest, "size": len(data), **extra}

    def json(self, body: Any, media_type: str, **extra: Any) -> Json:
        return self.blob(json.dumps(body).encode(), media_type, **extra)

    def image(
        self,
        layers: Iterable[bytes],
        *,
        run: Mapping[str, Any] = RUN,
        compress: Callable[[bytes], bytes] = lambda data: data,
        suffix: str = "",
        platform: Mapping[str, str] | None = None,
        config: Mapping[str, Any] | None = None,
        **extra: Any,
    ) -> Json:
        """Adds config, layers and manifest; the manifest's descriptor."""
        tars = list(layers)
        where = {"os": "linux", "architecture": "amd64"} if platform is None else dict(platform)
        body = {**where, "config": dict(run), "rootfs": {"type": "layers", "diff_ids": [sha256(tar) for tar in tars]}}
        manifest = {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": self.json({**body, **(config or {})}, CONFIG),
            "layers": [self.blob(compress(tar), LAYER + suffix) for tar in tars],
        }
        return self.json(manifest, MANIFEST, **({"platform": dict(platform)} if platform else {}), **extra)

    def index(self, *manifests: Json) -> OciLayout:
        """Sets index.json."""
        body = {"schemaVersion": 2, "mediaType": INDEX, "manifests": list(manifests)}
        self.files["index.json"] = json.dumps(body).encode()
        return self

    def to_folder(self, path: Path) -> Path:
        for name, data in self.files.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(data)
        return path

    def to_tar(self, path: Path, **options: Any) -> Path:
        path.write_bytes(archive(self.files, **options))
        return path


def archive(files: Mapping[str, bytes], *more: tarfile.TarInfo, **options: Any) -> bytes:
    """A tar of `files`, then of the members `more`."""
    return make_tar(*((header(name), data) for name, data in files.items()), *more, **options)


def docker_files(
    layers: Iterable[bytes], *, tags: list[str] | None = None, repositories: bool = True, run: Mapping[str, Any] = RUN
) -> dict[str, bytes]:
    """What `docker save` writes (before version 25): a folder a layer, manifest.json, perhaps repositories."""
    tars = list(layers)
    body = {
        "os": "linux", "architecture": "amd64", "config": dict(run),
        "rootfs": {"type": "layers", "diff_ids": [sha256(tar) for tar in tars]},
    }  # fmt: skip
    config = json.dumps(body).encode()
    files: dict[str, bytes] = {}
    names = []
    for number, tar in enumerate(tars):
        folder = hashlib.sha256(b"%d" % number + tar).hexdigest()
        files[f"{folder}/VERSION"] = b"1.0"
        files[f"{folder}/json"] = b"{}"
        files[f"{folder}/layer.tar"] = tar
        names.append(f"{folder}/layer.tar")
    config_name = f"{sha256(config)[7:]}.json"
    files[config_name] = config
    files["manifest.json"] = json.dumps([{"Config": config_name, "RepoTags": tags, "Layers": names}]).encode()
    if repositories:
        files["repositories"] = json.dumps({"app": {"latest": names[-1].partition("/")[0]}}).encode()
    return files


def gzip_tar(data: bytes) -> bytes:
    """A whole archive, compressed."""
    buffer = io.BytesIO()
    with gzip.GzipFile(fileobj=buffer, mode="wb", mtime=0) as out:
        out.write(data)
    return buffer.getvalue()
