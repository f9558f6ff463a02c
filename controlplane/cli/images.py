"""`sandloom image import|ls|inspect|rm`."""

from __future__ import annotations

import argparse
import asyncio
import os
import shlex
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from controlplane.api.status import Condition
from controlplane.api.v1 import images_pb2
from controlplane.cli import archive, sizes
from controlplane.cli.command import Command, Shell, add_output
from controlplane.cli.connection import CALL_S, PAGE_SIZE, Fabric, calling, every_page, open_stream
from controlplane.cli.errors import CliError, UsageError
from controlplane.cli.output import FORMATS, Column, plain, render_json, render_yaml
from controlplane.cli.progress import Progress
from controlplane.cli.terminal import read_when_ready

Image = images_pb2.Image
STEPS = {"convert": "converting", "verify": "verifying", "publish": "publishing"}
DIGEST_CHARS = len("sha256:") + 12
NO_REMEDY = {Condition.DENIED: "", Condition.UNAVAILABLE: "", Condition.INTERNAL: ""}
"""What a registry or a host says needs no addition."""
MISSING = {Condition.NOT_FOUND: "`sandloom image ls` lists those there are"}


@dataclass(frozen=True)
class ImportOptions:
    """`path` "-" is standard input; `cmd` the default command of a plain root filesystem."""

    path: Path
    name: str
    cmd: tuple[str, ...]
    host: str = ""


@dataclass(frozen=True)
class PullOptions:
    """REGISTRY/REPOSITORY[:TAG][@DIGEST], and what to call it here; `host` "": the server chooses."""

    reference: str
    name: str
    host: str = ""


@dataclass(frozen=True)
class ImagesOptions:
    """Images by name or digest."""

    names: tuple[str, ...] = ()
    form: str = "json"
    force: bool = False


def columns(now_s: float) -> tuple[Column[Image], ...]:
    """The columns of `image ls`."""
    return (
        Column("NAME", lambda row: row.name),
        Column("DIGEST", lambda row: row.digest[:DIGEST_CHARS]),
        Column("FORMAT", lambda row: row.format),
        Column("LAYERS", lambda row: str(len(row.layers)), right=True),
        Column("SIZE", lambda row: sizes.format_bytes(row.size_bytes), right=True),
        Column("AGE", lambda row: sizes.format_age(now_s - row.created_at.ToNanoseconds() / 1e9), right=True),
        Column("HOSTS", lambda row: ",".join(row.hosts), wide=True),
        Column("COMMAND", lambda row: shlex.join([*row.config.entrypoint, *row.config.cmd]), wide=True),
    )


def parse_import(namespace: argparse.Namespace) -> ImportOptions:
    if namespace.path == Path("-") and not namespace.name:
        raise UsageError("an image from standard input needs a name", "", "give it with --name")
    try:
        cmd = tuple(shlex.split(namespace.cmd))
    except ValueError as error:
        raise UsageError(
            "--cmd cannot be taken apart", f"{namespace.cmd!r} ({error})", "quote it as a shell"
        ) from error
    return ImportOptions(namespace.path, namespace.name, cmd, namespace.host)


def act_import(options: ImportOptions, shell: Shell) -> int:
    upload = archive.plan(options.path, options.name)
    if not upload.name:
        raise UsageError("no name can be made of it", str(options.path), "give one with --name")
    if upload.path is None and os.isatty(shell.stdio.stdin):
        raise UsageError("standard input is a terminal", "", "pipe an archive into it, or name a file")
    _print(shell.over(lambda fabric: _import(fabric, upload, options, shell)), shell)
    return 0


def _print(image: Image, shell: Shell) -> None:
    if shell.printer.form in ("json", "yaml"):
        shell.printer.write((render_json if shell.printer.form == "json" else render_yaml)(plain(image)))
    elif shell.printer.form == "name":
        shell.printer.write(f"{image.name}\n")
    else:
        layers = f"{len(image.layers)} layer{'s' if len(image.layers) != 1 else ''}"
        shell.printer.write(f"{image.name} {image.digest}: {layers}, {sizes.format_bytes(image.size_bytes)}\n")


async def _import(fabric: Fabric, upload: archive.Upload, options: ImportOptions, shell: Shell) -> Image:
    start = images_pb2.ImportImageRequest.Start(
        name=upload.name, total_bytes=upload.total_bytes, cmd=options.cmd, host=options.host
    )
    call = open_stream(fabric.images.ImportImage)
    with Progress(quiet=shell.quiet) as progress:
        sender = asyncio.create_task(_send(call, start, upload, shell, progress))
        try:
            with calling(f"cannot import {options.path}"):
                async for answer in call:
                    if answer.WhichOneof("output") == "image":
                        image: Image = answer.image
                        return image
                    step = answer.progress
                    if step.step in STEPS:
                        progress.update(f"{STEPS[step.step]} {upload.name}", step.done_bytes, step.total_bytes)
            if sender.done() and not sender.cancelled():
                sender.result()
            raise CliError(f"cannot import {options.path}", "the control plane gave no image back", "try again")
        except CliError as error:
            if sender.done() and not sender.cancelled() and isinstance(cause := sender.exception(), CliError | OSError):
                raise cause from error  # what we could not read is why the call ended
            raise
        finally:
            call.cancel()
            sender.cancel()
            await asyncio.gather(sender, return_exceptions=True)


async def _send(
    call: Any, start: images_pb2.ImportImageRequest.Start, upload: archive.Upload, shell: Shell, progress: Progress
) -> None:
    """Sends everything; a failed write is no news, the reader learns why. CliError or OSError when reading fails."""
    sent_bytes = 0
    try:
        await call.write(images_pb2.ImportImageRequest(start=start))
        async for data in _pieces(upload, shell):
            await call.write(images_pb2.ImportImageRequest(chunk=data))
            sent_bytes += len(data)
            progress.update(f"sending {upload.name}", sent_bytes, upload.total_bytes)
        await call.done_writing()
    except (grpc.RpcError, asyncio.InvalidStateError):
        return
    except (CliError, OSError):
        call.cancel()
        raise


async def _pieces(upload: archive.Upload, shell: Shell) -> AsyncIterator[bytes]:
    if upload.path is None:
        while data := await read_when_ready(shell.stdio.stdin):
            yield data
        return
    pieces = archive.chunks(upload)
    while data := await asyncio.to_thread(next, pieces, b""):
        yield data


def default_name(reference: str) -> str:
    """What an image of a registry is called: the last part of its repository, with its tag where it has one."""
    repository = reference.partition("@")[0].rpartition("/")[2]
    return repository.removesuffix(":latest")


def act_pull(options: PullOptions, shell: Shell) -> int:
    image = shell.over(lambda fabric: _pull(fabric, options, shell))
    _print(image, shell)
    return 0


async def _pull(fabric: Fabric, options: PullOptions, shell: Shell) -> Image:
    request = images_pb2.PullImageRequest(reference=options.reference, name=options.name, host=options.host)
    with Progress(quiet=shell.quiet) as progress, calling(f"cannot pull {options.reference}", NO_REMEDY):
        call: Any = fabric.images.PullImage(request)
        async for answer in call:
            if answer.WhichOneof("output") == "image":
                image: Image = answer.image
                return image
            step = answer.progress
            said = f"{STEPS.get(step.step, 'fetching')} {options.name}"
            progress.update(said, step.done_bytes, step.total_bytes)
    raise CliError(f"cannot pull {options.reference}", "the control plane gave no image back", "try again")


async def list_images(fabric: Fabric) -> list[Image]:
    """Every image, by name."""

    async def page(token: str) -> images_pb2.ListImagesResponse:
        with calling("cannot list the images"):
            request = images_pb2.ListImagesRequest(page_size=PAGE_SIZE, page_token=token)
            return await fabric.images.ListImages(request, timeout=CALL_S)

    return await every_page(page, lambda answer: list(answer.images))


def act_ls(options: ImagesOptions, shell: Shell) -> int:
    rows = shell.over(list_images)
    shell.printer.listing(rows, columns(shell.now_s()), name=lambda row: row.name, data=plain)
    if not rows and shell.printer.form in ("table", "wide"):
        shell.say("none yet; bring one in with `sandloom image import PATH`")
    return 0


async def _get(fabric: Fabric, names: Sequence[str]) -> list[Image]:
    found: list[Image] = []
    for name in names:
        with calling(f"no image {name}", MISSING):
            found.append(await fabric.images.GetImage(images_pb2.GetImageRequest(name=name), timeout=CALL_S))
    return found


def act_inspect(options: ImagesOptions, shell: Shell) -> int:
    values = [plain(image) for image in shell.over(lambda fabric: _get(fabric, options.names))]
    render = render_yaml if options.form == "yaml" else render_json
    shell.printer.write(render(values[0] if len(values) == 1 else values))
    return 0


def act_rm(options: ImagesOptions, shell: Shell) -> int:
    return shell.over(lambda fabric: _rm(fabric, options, shell))


async def _rm(fabric: Fabric, options: ImagesOptions, shell: Shell) -> int:
    for name in options.names:
        remedies = {**MISSING, Condition.PRECONDITION: "remove the sandboxes that use it first (`sandloom rm`)"}
        with calling(f"cannot remove {name}", remedies):
            request = images_pb2.DeleteImageRequest(name=name, allow_missing=options.force)
            await fabric.images.DeleteImage(request, timeout=CALL_S)
        shell.printer.write(f"{name}\n")
    return 0


def _configure_import(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=Path, metavar="PATH", help="an archive, an OCI layout folder, or - for stdin")
    parser.add_argument("--name", default="", help="the image's name; the file's unless given")
    parser.add_argument("--host", default="", metavar="HOST", help="which host it goes to (operators only)")
    parser.add_argument("--cmd", default="", metavar="'PROGRAM ARG ...'", help="default command of a plain rootfs")
    add_output(parser, FORMATS)


def _configure_names(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", metavar="IMAGE", nargs="+", help="a name or a digest")


def _configure_inspect(parser: argparse.ArgumentParser) -> None:
    _configure_names(parser)
    add_output(parser, ("json", "yaml"))


def _configure_rm(parser: argparse.ArgumentParser) -> None:
    _configure_names(parser)
    parser.add_argument("-f", "--force", action="store_true", help="do not mind when it is not there")


def _configure_pull(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("reference", metavar="REFERENCE", help="REGISTRY/REPOSITORY[:TAG][@DIGEST]")
    parser.add_argument("--name", default="", help="the image's name; the repository's last part and tag unless given")
    parser.add_argument("--host", default="", metavar="HOST", help="which host fetches it (operators only)")
    add_output(parser, FORMATS)


PULL = Command(
    words=("image", "pull"),
    summary="have a host fetch an image from a registry",
    configure=_configure_pull,
    parse=lambda ns: PullOptions(ns.reference, ns.name or default_name(ns.reference), ns.host),
    act=act_pull,
    examples=("sandloom image pull registry.example:5000/team/app:1.2 --name app",),
)
IMPORT = Command(
    words=("image", "import"),
    summary="bring an image in: OCI layout, OCI or docker archive, root filesystem tar",
    configure=_configure_import,
    parse=parse_import,
    act=act_import,
    examples=(
        "sandloom image import debian.tar --name debian",
        "docker save alpine | sandloom image import - --name alpine",
        "sandloom image import rootfs.tar.zst --name base --cmd 'python3 -m http.server'",
    ),
    operand="file",
)
LS = Command(
    words=("image", "ls"),
    summary="list images",
    configure=add_output,
    parse=lambda ns: ImagesOptions(),
    act=act_ls,
    examples=("sandloom image ls", "sandloom image ls -o wide"),
)
INSPECT = Command(
    words=("image", "inspect"),
    summary="show an image's layers and configuration",
    configure=_configure_inspect,
    parse=lambda ns: ImagesOptions(tuple(ns.names), ns.form),
    act=act_inspect,
    examples=("sandloom image inspect debian",),
    operand="image",
)
RM = Command(
    words=("image", "rm"),
    summary="remove images that no sandbox uses",
    configure=_configure_rm,
    parse=lambda ns: ImagesOptions(tuple(ns.names), force=ns.force),
    act=act_rm,
    examples=("sandloom image rm debian",),
    operand="image",
)
