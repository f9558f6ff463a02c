"""Where the public traces are that benchmarks run on: `shared/data` beside the checkout or above it, or
$SANDLOOM_TRACES."""

from __future__ import annotations

import os
from pathlib import Path

from tests.bench.report import CannotMeasure

OPENB_PODS, OPENB_NODES = "openb_pod_list_default.csv", "openb_node_list_all_node.csv"


def folder() -> Path:
    """The folder. CannotMeasure when there is none."""
    asked = os.environ.get("SANDLOOM_TRACES")
    places = [Path(asked)] if asked else [parent / "shared" / "data" for parent in Path(__file__).resolve().parents]
    for place in places:
        if (place / OPENB_PODS).is_file():
            return place
    raise CannotMeasure(f"no {OPENB_PODS}: set SANDLOOM_TRACES to the folder of alibaba/clusterdata's openb CSVs")
