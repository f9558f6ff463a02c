"""The public traces that the planner knows, and the rule by which what they do not say is made up. Pure but for
reading.

- openb (alibaba/clusterdata, cluster-trace-gpu-v2023: `openb_pod_list_*.csv`, `openb_node_list_*.csv`; "Beware of
  Fragmentation", USENIX ATC'23). A pod's memory_mib is its guarantee and its ceiling; GPUs are left out.
- Azure Functions 2019 (a folder with invocations.csv, durations.csv, memory.csv; "Serverless in the Wild", USENIX
ATC'20):
  a sandbox an invocation, evenly within its minute, for its function's median duration; its memory between the 1st
  percentile and the most seen.
- Azure Functions 2021 (`app,func,end_timestamp,duration`): a sandbox an invocation, of the sizes that are given.

**Tags of images**, for the traces name none. With random.Random(seed) over the pods in the file's order, each draws a
tenant (there is one unless more are asked for: the traces are one operator's), the k-th with weight 1/k, and one of the
tenant's IMAGES images, the k-th with weight 1/k. Pods that ask for a GPU draw from `gpu` images, others from `cpu`
images. An image has a base layer (one of BASES), a framework layer (one of FRAMEWORKS) and a layer of its own,
uncompressed, with the sizes below, which are those of usual public images (CUDA with cuDNN and a Debian base; PyTorch,
TensorFlow and JAX; Python, Node and Java). Layers of one name are one layer, and are shared within a tenant only. Every
pod needs all pages of its layers, beside its own memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from random import Random

from controlplane.capacity.calibration import Calibration
from controlplane.capacity.cluster import empty_host
from controlplane.capacity.trace import Arrival, Fields, Trace, in_order, parse_own, read_rows
from controlplane.capacity.workload import Image, Workload
from controlplane.errors import ConfigError
from controlplane.model import LayerSize
from controlplane.scheduler_values import MIB, HostState

IMAGES = 24
BASES = {"gpu": (("cuda-runtime", 3400), ("cuda-devel", 8200)), "cpu": (("debian", 125), ("ubuntu", 80))}
FRAMEWORKS = {
    "gpu": (("pytorch", 4300), ("tensorflow", 3900), ("jax", 2900)),
    "cpu": (("python", 900), ("node", 1000), ("java", 450)),
}
OWN = {"gpu": (200, 1500), "cpu": (20, 400)}
"""MiB; OWN is a range, drawn evenly for each image."""
OPENB_PODS = ("name", "cpu_milli", "memory_mib", "num_gpu", "creation_time", "deletion_time")
OPENB_NODES = ("sn", "cpu_milli", "memory_mib")
AZURE_2021 = ("app", "func", "end_timestamp", "duration")


@dataclass(frozen=True)
class Assumed:
    """What a trace does not say: the seed of the tags, how large images are (1: as above, 0: no layers), the sizes of
    an Azure 2021 invocation, and what sandboxes use of their memory, as shares of the ceiling."""

    seed: int = 1
    image_scale: float = 1.0
    tenants: int = 1
    memory_min_mib: int = 128
    memory_max_mib: int = 256
    cpu_milli: int = 1000
    use_share: float | None = None
    use_std_share: float = 0.0


def read(path: Path, classes: Mapping[str, Workload], assumed: Assumed = Assumed()) -> Trace:
    """Whatever trace `path` is: a folder of Azure 2019, or a CSV known by its header. ConfigError."""
    if path.is_dir():
        return azure_2019(path, assumed)
    header, rows = read_rows(path)
    if set(OPENB_PODS) <= set(header):
        return openb(path, rows, assumed)
    if header[: len(AZURE_2021)] == AZURE_2021:
        return azure_2021(path, rows, assumed)
    if {"time_s", "lifetime_s"} & set(header):
        return parse_own(path, header, rows, classes)
    raise ConfigError(
        f"{path}: no trace that is known here: its header is {','.join(header[:6])!r}; see `plan replay --help`"
    )


class Tagger:
    """The rule of the module. Images are made once, with a generator of their own."""

    def __init__(self, assumed: Assumed) -> None:
        self._random, self._tenants = Random(assumed.seed), assumed.tenants
        made = Random(f"images {assumed.seed}")
        self._images = {
            (tenant, family): [_image(made, assumed.image_scale, tenant, family, number) for number in range(IMAGES)]
            for tenant in range(assumed.tenants)
            for family in ("gpu", "cpu")
        }

    def draw(self, family: str) -> tuple[str, Image]:
        """The next pod's tenant and image."""
        tenant = self._random.choices(range(self._tenants), _weights(self._tenants))[0]
        return f"tenant-{tenant}", self._random.choices(self._images[tenant, family], _weights(IMAGES))[0]


@cache
def _weights(count: int) -> Sequence[float]:
    return [1 / rank for rank in range(1, count + 1)]


def _image(random: Random, scale: float, tenant: int, family: str, number: int) -> Image:
    name = f"tenant-{tenant}/{family}-{number}"
    sizes = [random.choice(BASES[family]), random.choice(FRAMEWORKS[family]), (name, random.randint(*OWN[family]))]
    if not scale:
        return Image(name)
    return Image(name, tuple(LayerSize(layer, max(1, round(mib * scale)) * MIB) for layer, mib in sizes))


def openb(path: Path, rows: Sequence[Mapping[str, str]], assumed: Assumed) -> Trace:
    """The pods, each for the time from its creation to its deletion."""
    tagger, made = Tagger(assumed), dict[Workload, Workload]()
    arrivals: list[Arrival] = []
    for line, row in enumerate(rows, 2):
        field = Fields(f"{path}:{line}", row)
        family = "gpu" if field.whole("num_gpu", 0) else "cpu"
        tenant, image = tagger.draw(family)
        memory_mib = max(1, field.whole("memory_mib", None))
        work = Workload(
            f"{family}-{memory_mib}", memory_mib, memory_mib, max(1, field.whole("cpu_milli", None)), image, tenant,
            use_mib=None if assumed.use_share is None else memory_mib * assumed.use_share,
            use_std_mib=memory_mib * assumed.use_std_share,
        )  # fmt: skip
        begun_s = field.number("creation_time", None)
        lifetime_s = max(0.0, field.number("deletion_time", None) - begun_s)
        arrivals.append(Arrival(begun_s, lifetime_s, field.text("name"), made.setdefault(work, work)))
    return in_order(arrivals, f"openb, GPUs left out, images by seed {assumed.seed} at scale {assumed.image_scale:g}")


def openb_hosts(path: Path, calibration: Calibration, *, reserve_mib: int = 0) -> tuple[HostState, ...]:
    """openb's nodes as hosts on which nothing runs."""
    header, rows = read_rows(path)
    if not set(OPENB_NODES) <= set(header):
        raise ConfigError(f"{path}: no list of openb's nodes: it has no columns {', '.join(OPENB_NODES)}")
    fields = (Fields(f"{path}:{line}", row) for line, row in enumerate(rows, 2))
    return tuple(
        empty_host(
            field.text("sn"),
            field.whole("memory_mib", None),
            field.whole("cpu_milli", None),
            calibration,
            reserve_mib=reserve_mib,
            accel="kvm",
        )
        for field in fields
    )


def azure_2021(path: Path, rows: Sequence[Mapping[str, str]], assumed: Assumed) -> Trace:
    """A sandbox an invocation."""
    tagger, tags = Tagger(assumed), dict[str, Workload]()
    arrivals: list[Arrival] = []
    for line, row in enumerate(rows, 2):
        field = Fields(f"{path}:{line}", row)
        function = field.text("func")[:12]
        if function not in tags:
            tenant, image = tagger.draw("cpu")
            tags[function] = _function(function, assumed.memory_min_mib, assumed.memory_max_mib, image, tenant, assumed)
        lasted_s = field.number("duration", None)
        begun_s = max(0.0, field.number("end_timestamp", None) - lasted_s)
        arrivals.append(Arrival(begun_s, lasted_s, f"{function}-{line - 1}", tags[function]))
    return in_order(arrivals, "Azure Functions 2021, sizes as given, images by seed")


def azure_2019(folder: Path, assumed: Assumed) -> Trace:
    """A sandbox an invocation, evenly within its minute."""
    lasting = {row["HashFunction"]: row for row in read_rows(folder / "durations.csv")[1]}
    sizes = {row["HashFunction"]: row for row in read_rows(folder / "memory.csv")[1]}
    path, tagger = folder / "invocations.csv", Tagger(assumed)
    arrivals: list[Arrival] = []
    for line, row in enumerate(read_rows(path)[1], 2):
        function, where = row["HashFunction"], f"{path}:{line}"
        if function not in lasting or function not in sizes:
            raise ConfigError(f"{where}: function {function[:12]} has no line in durations.csv and memory.csv")
        lasted_s = Fields(where, lasting[function]).number("percentile_Average_50", None) / 1000
        memory = Fields(where, sizes[function])
        tenant, image = tagger.draw("cpu")
        least_mib, most_mib = (memory.whole(f"AverageAllocatedMb_pct{at}", None) for at in (1, 100))
        work = _function(function[:12], least_mib, most_mib, image, tenant, assumed)
        mean_mib = memory.number("AverageAllocatedMb", None)
        spread_mib = (
            memory.number("AverageAllocatedMb_pct99", None) - memory.number("AverageAllocatedMb_pct1", None)
        ) / 4.65
        work = replace(work, use_mib=mean_mib, use_std_mib=max(0.0, spread_mib))
        counts = [(int(minute), Fields(where, row).whole(minute, 0)) for minute in row if minute.isdigit()]
        for minute, count in counts:
            arrivals += (
                Arrival((minute - 1) * 60 + 60 * at / count, lasted_s, f"{function[:12]}-{minute}-{at}", work)
                for at in range(count)
            )
    return in_order(arrivals, "Azure Functions 2019, median durations, images by seed")


def _function(name: str, least_mib: int, most_mib: int, image: Image, tenant: str, assumed: Assumed) -> Workload:
    most_mib = max(1, least_mib, most_mib)
    return Workload(
        name, max(1, least_mib), most_mib, assumed.cpu_milli, image, tenant,
        use_mib=None if assumed.use_share is None else most_mib * assumed.use_share,
        use_std_mib=most_mib * assumed.use_std_share,
    )  # fmt: skip
