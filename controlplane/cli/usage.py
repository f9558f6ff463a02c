"""`usage`: what each sandbox was given, and for how long: those there are, and those that are gone, by the ledger."""

from __future__ import annotations

import argparse
import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from controlplane.api.v1 import sandboxes_pb2
from controlplane.capacity.trace import COLUMNS
from controlplane.cli import lookup, sizes
from controlplane.cli.command import Command, Shell, add_output
from controlplane.cli.connection import CALL_S, PAGE_SIZE, Fabric, calling, every_page
from controlplane.cli.images import list_images
from controlplane.cli.output import Column

HOUR_S, GIB_MIB = 3600.0, 1024.0
FORMS = ("table", "wide", "json", "yaml", "name", "csv")


@dataclass(frozen=True)
class UsageOptions:
    """`since_s`: what ended longer ago is left out; 0: nothing is."""

    since_s: float = 0.0


@dataclass(frozen=True)
class Span:
    """One sandbox's time. `started_at_s` None: it never ran; `ended_at_s` None: it has not ended. `kind`: the number of
    its class in the API."""

    name: str
    uid: str
    tenant: str
    image: str
    kind: int
    resources: sandboxes_pb2.Resources
    created_at_s: float
    started_at_s: float | None
    ended_at_s: float | None

    def ran_s(self, now_s: float) -> float:
        """How long it has run."""
        if self.started_at_s is None:
            return 0.0
        return max(0.0, (now_s if self.ended_at_s is None else self.ended_at_s) - self.started_at_s)


async def lived(fabric: Fabric) -> list[Span]:
    """Every sandbox of the tenant, present or gone, by the time when it was created. One that is removed between the
    two lists is in both of them, and here once."""

    async def page(token: str) -> sandboxes_pb2.ListUsageResponse:
        with calling("cannot read the usage ledger"):
            request = sandboxes_pb2.ListUsageRequest(page_size=PAGE_SIZE, page_token=token)
            return await fabric.sandboxes.ListUsage(request, timeout=CALL_S)

    present = [_span_of(box) for box in await lookup.list_sandboxes(fabric, ended=True)]
    gone: Iterable[sandboxes_pb2.Usage] = await every_page(page, lambda answer: list(answer.usage))
    spans = {span.uid: span for span in [*present, *map(_gone, gone)]}
    return sorted(spans.values(), key=lambda span: (span.created_at_s, span.uid))


def _seconds(message: Any, field: str) -> float | None:
    return getattr(message, field).ToNanoseconds() / 1e9 if message.HasField(field) else None


def _span_of(box: sandboxes_pb2.Sandbox) -> Span:
    return Span(
        box.name, box.uid, box.tenant, box.spec.image, getattr(box.spec, "class"), box.spec.resources,
        box.created_at.ToNanoseconds() / 1e9, _seconds(box.status, "started_at"), _seconds(box.status, "finished_at"),
    )  # fmt: skip


def _gone(usage: sandboxes_pb2.Usage) -> Span:
    return Span(
        usage.name, usage.uid, usage.tenant, usage.image, getattr(usage, "class"), usage.resources,
        usage.created_at.ToNanoseconds() / 1e9, _seconds(usage, "started_at"), _seconds(usage, "ended_at"),
    )  # fmt: skip


def gib_h(span: Span, now_s: float) -> float:
    """Guaranteed memory times how long it ran."""
    return span.resources.memory_min_mib / GIB_MIB * span.ran_s(now_s) / HOUR_S


def cpu_h(span: Span, now_s: float) -> float:
    """CPUs times how long it ran."""
    return span.resources.cpu_milli / 1000 * span.ran_s(now_s) / HOUR_S


def plain(span: Span, now_s: float) -> dict[str, Any]:
    """For JSON and YAML."""
    asked = span.resources
    return {
        "name": span.name, "uid": span.uid, "tenant": span.tenant, "image": span.image, "class": _class(span),
        "memory_min_mib": asked.memory_min_mib, "memory_max_mib": asked.memory_max_mib, "cpu_milli": asked.cpu_milli,
        "created_at_s": span.created_at_s, "started_at_s": span.started_at_s, "ended_at_s": span.ended_at_s,
        "ran_s": round(span.ran_s(now_s), 3), "gib_h": round(gib_h(span, now_s), 6),
        "cpu_h": round(cpu_h(span, now_s), 6),
    }  # fmt: skip


def _class(span: Span) -> str:
    return sandboxes_pb2.SandboxClass.Name(span.kind).lower().replace("_", "-")  # type: ignore[arg-type]


def as_trace(spans: Sequence[Span], layers: Mapping[str, str]) -> str:
    """The CSV that `sandloom plan replay` reads (controlplane/capacity/trace.py); `layers` by image, in its form."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n", restval="")
    writer.writeheader()
    first_s = min((span.created_at_s for span in spans), default=0.0)
    for span in spans:
        lasted_s = "" if span.ended_at_s is None else f"{max(0.0, span.ended_at_s - span.created_at_s):.3f}"
        asked = span.resources
        writer.writerow({
            "time_s": f"{span.created_at_s - first_s:.3f}", "lifetime_s": lasted_s, "name": span.name,
            "image": span.image, "layers": layers.get(span.image, ""), "tenant": span.tenant,
            "memory_min_mib": asked.memory_min_mib, "cpu_milli": asked.cpu_milli,
            "memory_max_mib": max(asked.memory_min_mib, asked.memory_max_mib),
        })  # fmt: skip
    return text.getvalue()


def columns(now_s: float) -> tuple[Column[Span], ...]:
    """The columns of `usage`."""
    return (
        Column("NAME", lambda row: row.name),
        Column("IMAGE", lambda row: row.image),
        Column("CLASS", _class),
        Column("MEMORY MIN", lambda row: sizes.format_mib(row.resources.memory_min_mib), right=True),
        Column("CPUS", lambda row: sizes.format_cpus(row.resources.cpu_milli), right=True),
        Column("CREATED", lambda row: f"{datetime.fromtimestamp(row.created_at_s, UTC):%Y-%m-%dT%H:%M:%SZ}"),
        Column("RAN", lambda row: sizes.format_age(row.ran_s(now_s)), right=True),
        Column("GIB H", lambda row: f"{gib_h(row, now_s):.3f}", right=True),
        Column("CPU H", lambda row: f"{cpu_h(row, now_s):.3f}", right=True),
        Column("TENANT", lambda row: row.tenant, wide=True),
        Column("MEMORY MAX", lambda row: sizes.format_mib(row.resources.memory_max_mib), wide=True, right=True),
        Column("UID", lambda row: row.uid, wide=True),
    )


def act(options: UsageOptions, shell: Shell) -> int:
    now_s = shell.now_s()
    oldest_s = now_s - options.since_s if options.since_s else 0.0
    spans = [span for span in shell.over(lived) if (now_s if span.ended_at_s is None else span.ended_at_s) >= oldest_s]
    if shell.printer.form == "csv":
        found = shell.over(list_images)
        layers = {
            image.name: " ".join(f"{layer.digest}={-(-layer.size_bytes >> 20)}" for layer in image.layers)
            for image in found
        }
        shell.printer.write(as_trace(spans, layers))
        return 0
    shell.printer.listing(spans, columns(now_s), name=lambda row: row.name, data=lambda row: plain(row, now_s))
    if shell.printer.form in ("table", "wide"):
        memory, cpu = (sum(hours(span, now_s) for span in spans) for hours in (gib_h, cpu_h))
        shell.say(f"{len(spans)} sandboxes: {memory:.3f} GiB h guaranteed, {cpu:.3f} CPU h")
    return 0


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--since", metavar="DURATION", default="", help="leave out what ended longer ago, e.g. 24h, 7d")
    add_output(parser, FORMS)


COMMAND = Command(
    words=("usage",),
    summary="what each sandbox was given, and for how long",
    description="Lists the sandboxes there are and those that are gone (the usage ledger keeps them for 30 days), with"
    " guaranteed memory and CPU times how long they ran. `-o csv` is a trace that `sandloom plan replay` reads.",
    configure=_configure,
    parse=lambda ns: UsageOptions(sizes.parse_duration_s(ns.since) if ns.since else 0.0),
    act=act,
    examples=("sandloom usage", "sandloom usage --since 7d -o csv > week.csv"),
)
