"""Epoch time with frozen towers' features streamed from disk, against computing them anew every epoch.

*align*: the frozen text tower (the image tower trains and sees pixels either way): `cache_features: true`, `false`.
*fuse*: both towers. The stage has no switch, since streaming is the point of it, so "recomputed" is written here:
decode, augment and tokenize, both towers without gradients, and the same forward, backward and step of the fusion
model.

Local context, torch engine, the models and batches of the small preset (the image tower is untrained: its weights do
not change the time). An epoch is every exam once, from the first batch asked for to the last step; no validation, no
checkpoint. The one-off cost is `prepare` on an empty folder, of one variant of the training features and of those for
validation; every further variant costs and stores the training part again. "Break-even" is that cost over the time an
epoch saves.

    python benchmarks/feature_cache.py [--shards SHARDS] [--pairs 7] [--only align|fuse] [--quick]
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
from _harness import CONFIGS, WORK, find_shards, interleave, parse, parser, report

from prima_ray.config import read_yaml, validate_config
from prima_ray.data.batch import ImageTextBatch
from prima_ray.data.collate import Collator
from prima_ray.data.plan import ExamIndex, plan_epoch, split_roles
from prima_ray.models.dual_encoder import FeatureEncoder
from prima_ray.stages import align, fuse
from prima_ray.stages.rundir import open_run
from prima_ray.stages.training import Plan
from prima_ray.training.config import TrainingConfig
from prima_ray.training.contexts import LocalContext, StreamSpec
from prima_ray.training.engine import build_engine
from prima_ray.training.task import Task
from prima_ray.training.tasks.fuse import FuseTask

Change = Callable[[ImageTextBatch], ImageTextBatch]


def load(cls: type[Any], name: str, arguments: argparse.Namespace, **changes: Any) -> Any:
    """A stage of the small preset, in this process, by the torch engine, on every exam."""
    path = CONFIGS / "pad_ufes_20" / f"{name}.yaml"
    raw = read_yaml(path)
    raw |= {
        "out": str(arguments.work / name),
        "inputs": {"shards": arguments.shards},
        "fold": "none",
        "num_workers": 1,
        "engine": {"kind": "torch"},
        "context": {"kind": "local"},
        "feature_cache": str(arguments.work / f"features-{name}"),
        **changes,
    }
    return validate_config(cls, raw, where=path)


def make_plan(config: TrainingConfig, stage: str, shards: str) -> Plan:
    index = ExamIndex.read(shards)
    roles = split_roles(index, fold=None, val_fold=None, split=config.split)
    return Plan(run=open_run(config, out=config.out, stage=stage), index=index, roles=roles)


@dataclass
class Trainer:
    """One side: epochs through the engine, as the loop runs them."""

    config: TrainingConfig
    task: Task
    shards: str
    spec: StreamSpec
    rows: np.ndarray
    change: Change | None = None
    """What happens to a batch before the model sees it."""

    def __post_init__(self) -> None:
        self.context = LocalContext()
        self.engine = build_engine(
            self.task.build().train(),
            self.config.engine,
            self.config.optimizer,
            precision=self.config.precision,
            device=self.context.device,
        )

    def epoch(self, number: int) -> dict[str, float]:
        plan = plan_epoch(self.rows, global_batch=self.config.global_batch, seed=self.config.seed, epoch=number)
        start = time.perf_counter()
        for host_batch in self.context.batches(self.shards, [(number, plan)], self.spec):
            batch = host_batch.to(self.context.device)
            if self.change is not None:
                batch = self.change(batch)
            weight = torch.zeros(()) if self.task.interacts else self.task.batch_weight(batch)
            outputs = self.task.condense(self.engine.forward(batch), batch)
            loss, _ = self.task.loss(outputs, batch, gather=None, total_weight=weight)
            self.engine.backward(loss, last=True)
            self.engine.step(self.config.optimizer.lr)
        return {"s an epoch": time.perf_counter() - start}


def align_sides(arguments: argparse.Namespace) -> tuple[dict[str, Trainer], dict[str, Any]]:
    """Streamed and recomputed text features, and what the cache cost."""
    config = load(align.AlignConfig, "align", arguments, features={"variants": 1})
    plan = make_plan(config, "align", arguments.shards)
    task = align.make_task(config, plan)
    cached, cost = prepare(task, config)
    plain = replace(task, cache_text=False)
    rows = plan.roles.train[: arguments.exams]
    sides = {
        name: Trainer(config, one, arguments.shards, one.stream(train=True), rows)
        for name, one in (("recomputed", plain), ("streamed", cached))
    }
    return sides, cost


def fuse_sides(arguments: argparse.Namespace) -> tuple[dict[str, Trainer], dict[str, Any]]:
    """Streamed and recomputed features of both towers, and what the cache cost."""
    towers = read_yaml(CONFIGS / "pad_ufes_20" / "align.yaml")
    config = load(
        fuse.FuseConfig,
        "fuse",
        arguments,
        feature_store={"variants": 1},
        image_tower=towers["image_tower"],
        text_tower=towers["text_tower"],
    )
    plan = make_plan(config, "fuse", arguments.shards)
    task = fuse.make_task(config, plan)
    cached, cost = prepare(task, config)
    assert isinstance(cached, FuseTask)  # noqa: S101
    encoder = cached.towers.build()
    collate = Collator(
        data_set=cached.data_set,
        seed=cached.seed,
        train=True,
        views=cached.views,
        text=cached.text,
        tokenizer=encoder.text_tower.config.tokenizer(),
    )
    rows = plan.roles.train[: arguments.exams]
    sides = {
        "recomputed": Trainer(config, cached, arguments.shards, StreamSpec(collate), rows, encode_with(encoder)),
        "streamed": Trainer(config, cached, arguments.shards, cached.stream(train=True), rows),
    }
    return sides, cost


def encode_with(encoder: FeatureEncoder) -> Change:
    """Pixels and tokens -> the features that the stage would have streamed."""

    def change(batch: ImageTextBatch) -> ImageTextBatch:
        with torch.no_grad():
            features = encoder(batch)
        return replace(batch, images=None, input_ids=None, **features)

    return change


def prepare(task: Any, config: TrainingConfig) -> tuple[Any, dict[str, Any]]:
    """Compute the cache; the task that streams it, and what it cost."""
    start = time.perf_counter()
    prepared = task.prepare(LocalContext())
    seconds = time.perf_counter() - start
    folder = Path(config.feature_cache or "")
    size = sum(file.stat().st_size for file in folder.rglob("*.parquet"))
    return prepared, {"one_off_s": round(seconds, 1), "on_disk_mib": round(size / 2**20, 1)}


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--only", choices=("align", "fuse"), help="one stage; default: both")
    arguments.add_argument("--exams", type=int, help="exams an epoch (default: all)")
    arguments.add_argument("--work", type=Path, default=WORK / "feature_cache", help="a folder that is emptied")
    arguments = parse(arguments, argv, exams=128)
    arguments.shards, data = find_shards(arguments.shards)
    arguments.shards = str(Path(arguments.shards).resolve())
    shutil.rmtree(arguments.work, ignore_errors=True)
    sections: dict[str, dict[str, Any]] = {}
    for stage, make in (("align", align_sides), ("fuse", fuse_sides)):
        if arguments.only not in (None, stage):
            continue
        sides, cost = make(arguments)
        for side in sides.values():
            side.epoch(0)  # warm: allocator, page cache, tokenizer
        pairs = interleave(
            {name: lambda pair, side=side: side.epoch(pair) for name, side in sides.items()}, pairs=arguments.pairs
        )
        seconds = {name: statistics.median(values) for name, values in pairs.values["s an epoch"].items()}
        saved = seconds["recomputed"] - seconds["streamed"]
        sections[stage] = {
            "pairs": pairs,
            "ratio": ("s an epoch", "recomputed", "streamed"),
            "data": data,
            **cost,
            "break_even_epochs": round(cost["one_off_s"] / saved, 2) if saved > 0 else None,
            "setting": {
                "config": f"jobs/configs/pad_ufes_20/{stage}.yaml",
                "exams_an_epoch": len(sides["streamed"].rows),
            },
        }
    report("feature_cache", arguments, sections=sections, argv=argv)
    shutil.rmtree(arguments.work, ignore_errors=True)


if __name__ == "__main__":
    main()
