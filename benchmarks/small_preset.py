"""The small preset on PAD-UFES-20, every stage as the README has it, timed; and whether alignment matters.

Runs ingest, align, finetune, fuse and evaluate as commands, through Ray Train with two DeepSpeed workers. Then fuse
twice more, alike but for their towers: align's, and untrained ones of the same architecture. Their difference on the
test fold, with its interval over the same resamples of patients, says what alignment is worth to fusion.

What is finished already is not run again, so a run that was broken off goes on; its times are then incomplete.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from _harness import CONFIGS, WORK, circumstances, parser

from prima_ray.base import read_json, write_json
from prima_ray.config import load_config
from prima_ray.data.plan import ExamIndex
from prima_ray.evaluation.metrics import HEADLINE, headline_draws
from prima_ray.evaluation.statistics import bootstrap, paired_differences
from prima_ray.stages.align import AlignConfig
from prima_ray.stages.fuse import FuseConfig

PRESET = CONFIGS / "pad_ufes_20"
LOCAL = ["engine={kind: torch}", "context={kind: local}", "num_workers=1"]


def main(argv: Sequence[str] | None = None) -> int:
    """See the module."""
    found = parser(__doc__, shards=False)
    found.add_argument(
        "--runs", type=Path, default=WORK / "small_preset", help="folder of the runs (default %(default)s)"
    )
    found.add_argument("--fold", type=int, default=0, help="the test fold (default %(default)s)")
    arguments = found.parse_args(argv)
    root: Path = arguments.runs
    seconds = _walk(root, arguments)
    alignment = _alignment(root, arguments)
    scored = read_json(root / "fuse" / "evaluation" / "metrics.json")
    print(f"\nseconds: {', '.join(f'{name} {value:.0f}' for name, value in seconds.items())}")
    print(f"end to end: {sum(seconds.values()) / 60:.1f} minutes")
    print(f"alignment matters by (aligned minus untrained towers, fold {arguments.fold}, points):")
    for name, title in HEADLINE.items():
        gap = alignment["difference"][name]
        print(f"  {title:<18} {100 * gap['value']:+.1f} ({100 * gap['low']:+.1f} to {100 * gap['high']:+.1f})")
    if arguments.quick:
        return 0
    result = {
        "benchmark": "small_preset",
        **circumstances("small_preset", argv),
        "seconds": seconds,
        "test_fold": scored["sets"],
        "alignment": alignment,
    }
    write_json(arguments.out / "small_preset.json", result)
    return 0


def _walk(root: Path, arguments: Namespace) -> dict[str, float]:
    """Every stage in a row; returns the seconds of each command, start-up included."""
    shards, align, finetune, fuse = (str(root / name) for name in ("shards", "align", "finetune", "fuse"))
    short = ["epochs=1"] if arguments.quick else []
    trained = [f"fold={arguments.fold}", f"inputs.shards={shards}", *short]
    commands = {
        "ingest": ["ingest", str(PRESET / "ingest.yaml"), *_set(f"out={shards}")],
        "align": ["align", str(PRESET / "align.yaml"), *_set(f"out={align}", *trained)],
        "finetune": [
            "finetune", str(PRESET / "finetune.yaml"), *_set(f"out={finetune}", *trained, f"inputs.align={align}"),
        ],
        "fuse": [
            "fuse", str(PRESET / "fuse.yaml"),
            *_set(f"out={fuse}", *trained, f"inputs.align={align}", f"inputs.photos={finetune}"),
        ],
        "evaluate": ["evaluate", fuse],
    }  # fmt: skip
    return {name: _prima(command) for name, command in commands.items()}


def _alignment(root: Path, arguments: Namespace) -> dict[str, Any]:
    """Fuse from align's towers, and from untrained ones: figures of both and their paired difference."""
    align = root / "align"
    towers = load_config(AlignConfig, align / "config.yaml")
    image = towers.image_tower.model_dump(mode="json")
    text = towers.text_tower.model_dump(mode="json")
    ways = {
        "aligned": [f"inputs.align={align}"],
        "untrained": [
            "inputs.align=null",
            f"image_tower={json.dumps(image)}", f"text_tower={json.dumps(text)}",
        ],
    }  # fmt: skip
    short = ["epochs=1"] if arguments.quick else []
    # The language model by itself: the classifier of photos would come from align too.
    alone = ["inputs.photos=null", "experts=null"]
    for name, towers_of in ways.items():
        out = [f"out={root / f'fuse_{name}'}", f"fold={arguments.fold}", f"inputs.shards={root / 'shards'}"]
        _prima(["fuse", str(PRESET / "fuse.yaml"), *_set(*out, *towers_of, *alone, *LOCAL, *short)])
    index = ExamIndex.read(str(root / "shards"))
    config = load_config(FuseConfig, root / "fuse_aligned" / "config.yaml")
    rows = np.flatnonzero((index.folds(config.split) == arguments.fold) & (index.labels >= 0))
    models = {name: _probabilities(root / f"fuse_{name}", index, rows) for name in ways}
    scores = bootstrap(headline_draws, index.labels[rows], models, list(index.patient_ids[rows]))
    difference = paired_differences(scores["aligned"], scores["untrained"])
    return {
        "num_exams": len(rows),
        "figures": {name: dict(score.values) for name, score in scores.items()},
        "difference": {name: asdict(interval) for name, interval in difference.items()},
    }


def _probabilities(run: Path, index: ExamIndex, rows: np.ndarray[Any, np.dtype[np.int64]]) -> np.ndarray[Any, Any]:
    table = pq.read_table(run / "predictions.parquet")
    place = {exam: position for position, exam in enumerate(table["exam_id"].to_pylist())}
    columns = [table[f"prob_{name}"].to_numpy() for name in index.manifest.data_set.class_names]
    return np.column_stack(columns)[[place[exam] for exam in index.exam_ids[rows]]]


def _set(*overrides: str) -> list[str]:
    return [part for override in overrides for part in ("--set", override)]


def _prima(arguments: Sequence[str]) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "prima_ray.cli", *arguments], check=True, stdout=subprocess.DEVNULL)
    return round(time.perf_counter() - started, 1)


if __name__ == "__main__":
    sys.exit(main())
