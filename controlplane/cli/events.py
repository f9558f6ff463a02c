"""`sandloom events`: what happened, oldest first; with -w what happens next."""

from __future__ import annotations

import argparse
import asyncio
import json
from dataclasses import dataclass

from controlplane.api.v1 import sandboxes_pb2
from controlplane.cli.attachment import RETRY_S
from controlplane.cli.command import Command, Shell, add_output
from controlplane.cli.connection import Fabric, calling
from controlplane.cli.errors import CallFailed
from controlplane.cli.lookup import PATIENCE_S
from controlplane.cli.output import Column, plain, render_yaml, safe

Event = sandboxes_pb2.Event
LIST_S = 60.0
WIDTHS = (20, 8, 20, 18)  # of a followed event's columns, which cannot be measured in advance


@dataclass(frozen=True)
class EventsOptions:
    """`subject` "": all of them."""

    watch: bool
    subject: str


def time_text(event: Event) -> str:
    """UTC, to the second."""
    return f"{event.time.ToDatetime():%Y-%m-%dT%H:%M:%SZ}"


COLUMNS: tuple[Column[Event], ...] = (
    Column("TIME", time_text),
    Column("KIND", lambda row: row.kind),
    Column("SUBJECT", lambda row: row.subject),
    Column("REASON", lambda row: row.reason, colour=lambda row: "yellow" if "Fail" in row.reason else ""),
    Column("HOST", lambda row: row.host, wide=True),
    Column("MESSAGE", lambda row: row.message),
)


def followed(event: Event, form: str) -> str:
    """One event as it comes: a line of a table, a line of JSON, a YAML document, or its subject."""
    if form == "json":
        return json.dumps(plain(event), ensure_ascii=False) + "\n"
    if form == "yaml":
        return "---\n" + render_yaml(plain(event))
    if form == "name":
        return safe(event.subject) + "\n"
    texts = [safe(text) or "-" for text in (time_text(event), event.kind, event.subject, event.reason)]
    cells = [f"{text:{width}}" for text, width in zip(texts, WIDTHS, strict=True)]
    host = [f"{safe(event.host) or '-':12}"] if form == "wide" else []
    return "  ".join([*cells, *host, safe(event.message)]).rstrip() + "\n"


def act(options: EventsOptions, shell: Shell) -> int:
    return shell.over(lambda fabric: _events(fabric, options, shell))


async def _events(fabric: Fabric, options: EventsOptions, shell: Shell) -> int:
    printer = shell.printer
    if options.watch:
        await _watch(fabric, options, shell)
        return 0
    request = sandboxes_pb2.WatchEventsRequest(subject=options.subject)
    with calling("cannot read the events"):
        rows = [event async for event in fabric.sandboxes.WatchEvents(request, timeout=LIST_S)]
    printer.listing(rows, COLUMNS, name=lambda row: row.subject, data=plain)
    return 0


async def _watch(fabric: Fabric, options: EventsOptions, shell: Shell) -> None:
    """Prints events until the stream ends. One that breaks is made again, and what was printed is passed over."""
    request = sandboxes_pb2.WatchEventsRequest(follow=True, subject=options.subject)
    loop = asyncio.get_running_loop()
    seen, heard_s = 0, loop.time()
    while True:
        try:
            with calling("cannot read the events"):
                async for event in fabric.sandboxes.WatchEvents(request):
                    heard_s = loop.time()
                    if event.resource_version > seen or not event.resource_version:
                        seen = event.resource_version
                        shell.printer.write(followed(event, shell.printer.form))
            return
        except CallFailed as error:
            if error.code not in ("UNAVAILABLE", "CANCELLED") or loop.time() - heard_s > PATIENCE_S:
                raise
        await asyncio.sleep(RETRY_S)


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-w", "--watch", action="store_true", help="go on with what happens next")
    parser.add_argument("--subject", default="", metavar="NAME", help="only what is about this sandbox, image or host")
    add_output(parser)


COMMAND = Command(
    words=("events",),
    summary="show what happened, and with -w what happens",
    configure=configure,
    parse=lambda ns: EventsOptions(ns.watch, ns.subject),
    act=act,
    examples=("sandloom events --subject web", "sandloom events -w", "sandloom events -w -o json | jq .reason"),
)
