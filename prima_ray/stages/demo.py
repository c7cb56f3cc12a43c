"""The demo: every stage in a row on phantoms, whose best possible accuracies are known, and what came of it.

Nothing here but the order of the stages: each is its own config of `jobs/configs/phantoms` and its own run directory,
so a demo that was broken off goes on where it stopped.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

import prima_ray
from prima_ray.base import hash_key, read_json, write_json
from prima_ray.config import load_config
from prima_ray.data.phantoms import IMAGES, TABLE, PhantomConfig, bayes_accuracy, write_phantoms
from prima_ray.data.plan import ExamIndex, split_roles
from prima_ray.data.reader import RowReader
from prima_ray.data.schema import SHARD_SCHEMA
from prima_ray.inference.predictor import Predictor
from prima_ray.stages import align, evaluate, finetune, fuse, ingest

_log = logging.getLogger(__name__)
PHANTOMS = PhantomConfig(image_side=64)


@dataclass(frozen=True)
class Outcome:
    """One accuracy on the exams of the test fold, beside the best that can be had."""

    name: str
    accuracy: float
    bound: float
    num_exams: int

    @property
    def standard_error(self) -> float:
        """Of the accuracy: the square root of p (1 - p) / n."""
        return math.sqrt(self.accuracy * (1 - self.accuracy) / self.num_exams)


def run_demo(out: str) -> Path:
    """Run every stage below ``out``; returns the run directory of fuse.

    Writes `demo.json` beside them: the accuracies reached, their bounds, and the seconds each stage took.

    Raises:
        PrimaError: ``out`` holds something else.
    """
    root = Path(out)
    shards, aligned, finetuned, fused = (str(root / name) for name in ("shards", "align", "finetune", "fuse"))
    timings: dict[str, float] = {}
    with _timed("phantoms", timings):
        if not (root / "raw" / TABLE).exists():
            write_phantoms(root / "raw", PHANTOMS, progress=True)
    with _timed("ingest", timings):
        table, images = root / "raw" / TABLE, root / "raw" / IMAGES
        overrides = [f"out={shards}", f"source.table={table}", f"source.images={images}", "context.kind=local"]
        ingest.run(load_config(ingest.IngestConfig, config_file("ingest"), overrides))
    parents = [f"inputs.shards={shards}"]
    with _timed("align", timings):
        align.run(load_config(align.AlignConfig, config_file("align"), [f"out={aligned}", *parents]))
    parents.append(f"inputs.align={aligned}")
    with _timed("finetune", timings):
        finetune.run(load_config(finetune.FinetuneConfig, config_file("finetune"), [f"out={finetuned}", *parents]))
    parents.append(f"inputs.finetune={finetuned}")
    with _timed("fuse", timings):
        run = fuse.run(load_config(fuse.FuseConfig, config_file("fuse"), [f"out={fused}", *parents]))
    with _timed("evaluate", timings):
        report = evaluate.run_evaluate(fused)
        outcomes = measure(finetuned, fused)
    write_json(root / "demo.json", {"outcomes": [asdict(item) for item in outcomes], "seconds": timings})
    _tell(root, report, outcomes, timings)
    return run


def config_file(stage: str) -> Path:
    """The stage's config: in a checkout from `jobs/configs`, in an installed package from its own copy."""
    package = Path(prima_ray.__file__).parent
    checkout = package.parent / "jobs" / "configs" / "phantoms" / f"{stage}.yaml"
    return checkout if checkout.exists() else package / "configs" / "phantoms" / f"{stage}.yaml"


def measure(finetuned: str, fused: str) -> list[Outcome]:
    """Accuracies on fuse's test fold beside the bounds: each modality alone, both, and either one shuffled.

    Args:
        finetuned: a run of finetune, which sees photos alone.
        fused: a run of fuse.
    """
    record, config = read_json(Path(fused) / "run.json"), load_config(fuse.FuseConfig, Path(fused) / "config.yaml")
    index = ExamIndex.read(record["inputs"]["shards"]["path"])
    fold = None if config.fold == "none" else config.fold
    rows = split_roles(index, fold=fold, val_fold=config.val_fold, split=config.split).test
    table = RowReader(index.shards, index.manifest, columns=SHARD_SCHEMA.names).read(rows, 0)
    labels = index.labels[rows]
    bounds = bayes_accuracy(PHANTOMS)
    both = Predictor.load(fused)
    # Another exam's photos, or attributes: a turn of a random order gives every exam those of another one.
    order = np.random.default_rng(hash_key("demo", "shuffle")).permutation(len(rows))
    dealt = np.empty_like(order)
    dealt[order] = np.roll(order, 1)
    photos, attributes = _column_from(table, dealt, "images"), _column_from(table, dealt, "attributes")
    asked: list[tuple[str, Predictor, pa.Table, float]] = [
        ("photos alone", Predictor.load(finetuned), table, bounds.image),
        ("photos and attributes", both, table, bounds.both),
        ("photos shuffled", both, photos, bounds.image_shuffled),
        ("attributes shuffled", both, attributes, bounds.attributes_shuffled),
    ]
    return [
        Outcome(name, _accuracy(predictor, given, labels), bound, len(rows)) for name, predictor, given, bound in asked
    ]


def _column_from(table: pa.Table, order: np.ndarray[Any, np.dtype[np.int64]], name: str) -> pa.Table:
    taken = table[name].combine_chunks().take(pa.array(order))
    return table.set_column(table.column_names.index(name), table.schema.field(name), taken)


def _accuracy(predictor: Predictor, table: pa.Table, labels: np.ndarray[Any, np.dtype[np.int64]]) -> float:
    batches = (table.slice(start, 32) for start in range(0, table.num_rows, 32))
    return float((predictor.predict_tables(batches).argmax(axis=1) == labels).mean())


@contextmanager
def _timed(name: str, timings: dict[str, float]) -> Iterator[None]:
    _log.info("demo: %s ...", name)
    started = time.perf_counter()
    yield
    timings[name] = round(time.perf_counter() - started, 1)
    _log.info("demo: %s done in %.0f s", name, timings[name])


def _tell(root: Path, report: Path, outcomes: list[Outcome], timings: Mapping[str, float]) -> None:
    width = max(len(item.name) for item in outcomes)
    lines = [f"{'accuracy of the test fold':<{width + 4}} reached   best possible"]
    lines += [
        f"{item.name:<{width + 4}} {item.accuracy:6.1%} +- {item.standard_error:.1%}   {item.bound:6.1%}"
        for item in outcomes
    ]
    photo = sorted((root / "raw" / IMAGES).glob("*.jpg"))[0]
    asked = json.dumps({"grew": True, "itch": True, "months": 4})
    lines += [
        f"seconds: {', '.join(f'{name} {value:.0f}' for name, value in timings.items())}",
        f"report: {report / 'report.html'}",
        f"ask it: prima predict {root / 'fuse'} --image {photo} --metadata '{asked}'",
    ]
    for line in lines:
        _log.info("demo: %s", line)
