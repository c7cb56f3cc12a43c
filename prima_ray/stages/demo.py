"""The demo: every stage in a row on phantoms, whose best possible accuracies are known, and what came of it.

Nothing here but the order of the stages: each is its own config of `jobs/configs/phantoms` and its own run directory,
so a demo that was broken off goes on where it stopped.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

import prima_ray
from prima_ray.base import hash_key, read_json, write_json
from prima_ray.config import load_config
from prima_ray.data.phantoms import IMAGES, TABLE, PhantomConfig, bayes_accuracy, write_phantoms
from prima_ray.data.plan import ExamIndex, split_roles
from prima_ray.data.reader import RowReader, Rows
from prima_ray.data.schema import SHARD_SCHEMA
from prima_ray.inference.predictor import Predictor
from prima_ray.stages import align, corpus, evaluate, finetune, fuse, ingest, refine

_log = logging.getLogger(__name__)
PHANTOMS = PhantomConfig(image_side=64)
EXAM = "exam.json"
"""The attributes of a held-out exam, for `prima predict`."""


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

    Writes `demo.json` beside them: the accuracies reached, their bounds, and the seconds each stage took. A finished
    demo is told again from there.

    Raises:
        PrimaError: ``out`` holds something else.
    """
    root = Path(out)
    if (root / "demo.json").exists() and (root / "fuse" / "evaluation" / "metrics.json").exists():
        _log.info("demo: %s is finished already; delete it, or choose another --out, to run it again", root)
        _tell(root, read_json(root / "demo.json"))
        return root / "fuse"
    names = ("shards", "corpus", "refine", "align", "finetune", "fuse")
    shards, book, refined, aligned, finetuned, fused = (str(root / name) for name in names)
    timings: dict[str, float] = {}
    with _timed("phantoms", timings):
        if not (root / "raw" / TABLE).exists():
            write_phantoms(root / "raw", PHANTOMS, progress=True)
    with _timed("ingest", timings):
        table, images = root / "raw" / TABLE, root / "raw" / IMAGES
        overrides = [f"out={shards}", f"source.table={table}", f"source.images={images}", "context.kind=local"]
        ingest.run(load_config(ingest.IngestConfig, config_file("ingest"), overrides))
    with _timed("corpus", timings):
        corpus.run(load_config(corpus.CorpusConfig, config_file("corpus"), [f"out={book}"]))
    with _timed("refine", timings):
        overrides = [f"out={refined}", f"inputs.corpus={book}"]
        refine.run(load_config(refine.RefineConfig, config_file("refine"), overrides))
    parents = [f"inputs.shards={shards}"]
    with _timed("align", timings):
        knowledge = [f"inputs.corpus={book}", f"inputs.text_encoder={refined}"]
        overrides = [f"out={aligned}", *parents, *knowledge]
        align.run(load_config(align.AlignConfig, config_file("align"), overrides))
    parents.append(f"inputs.align={aligned}")
    with _timed("finetune", timings):
        finetune.run(load_config(finetune.FinetuneConfig, config_file("finetune"), [f"out={finetuned}", *parents]))
    parents.append(f"inputs.finetune={finetuned}")
    with _timed("fuse", timings):
        fuse.run(load_config(fuse.FuseConfig, config_file("fuse"), [f"out={fused}", *parents]))
    with _timed("evaluate", timings):
        index, rows, table = _held_out(fused)
        outcomes = measure(finetuned, fused, table, index.labels[rows])
        evaluate.run_evaluate(fused, notes=[_headline(outcomes)])
    exam = table.slice(0, 1).to_pylist()[0]
    write_json(root / EXAM, dict(exam["attributes"]))
    found = {
        "outcomes": [asdict(item) for item in outcomes],
        "seconds": timings,
        "photos": [f"{photo['image_id']}.jpg" for photo in exam["images"]],
    }
    # Last: a demo that has it is finished.
    write_json(root / "demo.json", found)
    _tell(root, found)
    return root / "fuse"


def config_file(stage: str) -> Path:
    """The stage's config: in a checkout from `jobs/configs`, in an installed package from its own copy."""
    package = Path(prima_ray.__file__).parent
    checkout = package.parent / "jobs" / "configs" / "phantoms" / f"{stage}.yaml"
    return checkout if checkout.exists() else package / "configs" / "phantoms" / f"{stage}.yaml"


def _held_out(fused: str) -> tuple[ExamIndex, Rows, pa.Table]:
    """The exams of fuse's test fold: the shards' index, their rows in it, and what the shards hold of them."""
    record, config = read_json(Path(fused) / "run.json"), load_config(fuse.FuseConfig, Path(fused) / "config.yaml")
    index = ExamIndex.read(record["inputs"]["shards"]["path"])
    fold = None if config.fold == "none" else config.fold
    rows = split_roles(index, fold=fold, val_fold=config.val_fold, split=config.split).test
    return index, rows, RowReader(index.shards, index.manifest, columns=SHARD_SCHEMA.names).read(rows, 0)


def measure(finetuned: str, fused: str, table: pa.Table, labels: NDArray[np.int64]) -> list[Outcome]:
    """Accuracies beside the bounds: each modality alone, both, and either one shuffled.

    Args:
        finetuned: a run of finetune, which sees photos alone.
        fused: a run of fuse.
        table: exams that both held out, N rows of the shard schema.
        labels: (N,) their classes.
    """
    bounds = bayes_accuracy(PHANTOMS)
    both = Predictor.load(fused)
    # Another exam's photos, or attributes: a turn of a random order gives every exam those of another one.
    order = np.random.default_rng(hash_key("demo", "shuffle")).permutation(len(labels))
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
        Outcome(name, _accuracy(predictor, given, labels), bound, len(labels))
        for name, predictor, given, bound in asked
    ]


def _column_from(table: pa.Table, order: NDArray[np.int64], name: str) -> pa.Table:
    taken = table[name].combine_chunks().take(pa.array(order))
    return table.set_column(table.column_names.index(name), table.schema.field(name), taken)


def _accuracy(predictor: Predictor, table: pa.Table, labels: NDArray[np.int64]) -> float:
    batches = (table.slice(start, 32) for start in range(0, table.num_rows, 32))
    return float((predictor.predict_tables(batches).argmax(axis=1) == labels).mean())


@contextmanager
def _timed(name: str, timings: dict[str, float]) -> Iterator[None]:
    _log.info("demo: %s ...", name)
    started = time.perf_counter()
    yield
    timings[name] = round(time.perf_counter() - started, 1)
    _log.info("demo: %s done in %.0f s", name, timings[name])


def _headline(outcomes: Sequence[Outcome]) -> str:
    parts = [f"{item.name} {item.accuracy:.1%} (best possible {item.bound:.1%})" for item in outcomes]
    return (
        "Phantoms have a known truth, so the best accuracy that any model can have is computed. Reached on "
        f"{outcomes[0].num_exams} held-out exams: {'; '.join(parts)}."
    )


def _tell(root: Path, found: Mapping[str, Any]) -> None:
    outcomes = [Outcome(**item) for item in found["outcomes"]]
    width = max(len(item.name) for item in outcomes) + 4
    lines = [f"{'accuracy on the test fold':<{width}} reached, 1 std. error   best possible"]
    lines += [
        f"{item.name:<{width}} {item.accuracy:6.1%} +- {item.standard_error:.1%}         {item.bound:6.1%}"
        for item in outcomes
    ]
    photos = " ".join(f"--image {root / 'raw' / IMAGES / name}" for name in found["photos"])
    lines += [
        f"seconds: {', '.join(f'{name} {value:.0f}' for name, value in found['seconds'].items())}",
        f"report: {root / 'fuse' / 'evaluation' / 'report.html'}",
        f"ask it: {_program()} predict {root / 'fuse'} {photos} --metadata {root / EXAM}",
        f"serve it: {_program()} serve {root / 'fuse'}",
    ]
    for line in lines:
        _log.info("demo: %s", line)


def _program() -> str:
    """What to type for this program: its name where the shell finds it by that, else where it lies."""
    name = Path(sys.argv[0]).name
    found = shutil.which(name)
    if found is not None and Path(found).resolve() == Path(sys.argv[0]).resolve():
        return name
    return os.path.relpath(sys.argv[0])
