"""Elastic: a training whose workers come and go by a schedule, beside one of fixed size -> how far they are apart.

Two run directories are made below `out`, `fixed` and `elastic`, by ordinary `prima <stage>` processes of one config, on
nodes that this machine plays (`training/elastic_cluster.py`). The report compares them.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import Field, model_validator

from prima_ray.base import InputPath, StrictConfig
from prima_ray.config import load_config
from prima_ray.data.plan import ExamIndex, num_steps
from prima_ray.stages import align, finetune, fuse
from prima_ray.stages.elastic_answers import answer_difference
from prima_ray.stages.elastic_drive import Drive
from prima_ray.stages.elastic_report import write_report
from prima_ray.stages.elastic_schedule import EventConfig, ScheduleConfig, resolve_schedule
from prima_ray.stages.out_lock import open_alone
from prima_ray.stages.rundir import check_finished, finish_run
from prima_ray.stages.training import split_rows
from prima_ray.training.config import TrainingConfig
from prima_ray.training.elastic_cluster import QUICK_HEALTH_CHECKS, local_nodes

_log = logging.getLogger(__name__)
_STAGES: dict[str, type[TrainingConfig]] = {
    "align": align.AlignConfig,
    "finetune": finetune.FinetuneConfig,
    "fuse": fuse.FuseConfig,
}
_MAX_FAILURES = 20
"""More than any schedule kills, and few enough that a training which fails by itself comes to an end."""
_CPUS_PER_NODE = 2
_CPUS_PER_WORKER = 1.5
"""One worker fits a node, none fits the head, and Ray Data has what is left."""


class ElasticInputs(StrictConfig):
    """Parents."""

    training: InputPath
    """The config file of the stage that is trained."""


class ElasticConfig(StrictConfig):
    """See the module."""

    out: str
    seed: int = Field(default=0, ge=0)
    """Of a random schedule; the training has its own."""
    inputs: ElasticInputs
    stage: Literal["align", "finetune", "fuse"] = "align"
    changes: dict[str, Any] = Field(default={})
    """Keys of the training's config to change, as `--set` would: `optimizer.lr: 1e-3`."""
    num_workers: tuple[int, int] = (1, 3)
    """The elastic run's [min, max]; a node carries one worker."""
    start_nodes: int = Field(default=2, gt=0)
    fixed_workers: int = Field(default=2, gt=0)
    """Of the run that it is compared with."""
    schedule: ScheduleConfig
    resize_interval_s: float = Field(default=5.0, gt=0)
    """How often the run looks for nodes to grow onto."""
    loss_tolerance: float = Field(default=1e-4, gt=0)
    """Largest relative difference of the loss curves that the report calls the same training."""
    patience_s: float = Field(default=300.0, gt=0)
    """The experiment is given up after so long without a step."""
    plain_ray: bool = False
    """Leave Ray and Ray Train at their defaults: to measure what our settings are worth."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        low, high = self.num_workers
        if low < 1 or high < low:
            raise ValueError(f"num_workers: expected [min, max] from 1, got {list(self.num_workers)}")
        return self


def run(config: ElasticConfig) -> Path:
    """Run both trainings and compare them; returns the run directory.

    Raises:
        PrimaError: a mistake in the config, its training's or its schedule; or a training failed or did not recover.
    """
    training = _training_config(config)
    low, high = config.num_workers
    events = resolve_schedule(
        config.schedule,
        start=config.start_nodes,
        low=low,
        high=high,
        total_steps=_total_steps(training),
        seed=config.seed,
    )
    with open_alone(config, out=config.out, stage="elastic") as mine:
        if mine.finished:
            check_finished(mine)
            _log.info("%s: already finished, nothing to do", mine.path)
            return mine.path
        folder = mine.path.resolve()
        fixed = _write(training, folder / "fixed.yaml", out=folder / "fixed", num_workers=config.fixed_workers)
        elastic = _write(training, folder / "elastic.yaml", out=folder / "elastic", num_workers=[low, high])
        _log.info("elastic: a run of %d workers to compare with", config.fixed_workers)
        _drive(config, fixed, folder / "fixed", nodes=config.fixed_workers, events=())
        # Half an experiment has no events to show for what happened; the training is done again.
        shutil.rmtree(folder / "elastic", ignore_errors=True)
        happened = _drive(config, elastic, folder / "elastic", nodes=config.start_nodes, events=events)
        shards: str = training.inputs.shards  # type: ignore[attr-defined]
        difference = answer_difference(folder / "elastic", folder / "fixed", stage=config.stage, shards=shards)
        write_report(
            mine.path,
            stage=config.stage,
            happened=happened,
            answer_difference=difference,
            tolerance=config.loss_tolerance,
            global_batch=training.global_batch,
            facts={
                "training": config.inputs.training,
                "workers": f"{low} to {high} beside {config.fixed_workers}",
                "engine": training.engine.kind,
                "global batch": str(training.global_batch),
                "Ray": "at its defaults" if config.plain_ray else "with our settings (docs/elastic.md)",
            },
        )
        finish_run(mine, seed=config.seed, inputs={"shards": shards})
        return mine.path


def _training_config(config: ElasticConfig) -> TrainingConfig:
    changes = [f"{key}={yaml.safe_dump(value, default_flow_style=True)}" for key, value in _dotted(config.changes)]
    engine = [f"context={{kind: ray, cpus_per_worker: {_CPUS_PER_WORKER}, max_failures: {_MAX_FAILURES}, "
              f"resize_interval_s: {config.resize_interval_s}}}", f"num_workers={list(config.num_workers)}",
              "log_exam_ids=true"]  # fmt: skip
    return load_config(_STAGES[config.stage], config.inputs.training, [*changes, *engine])


def _dotted(changes: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Keys of keys as `--set` has them: it makes a section of `changes.inputs.shards`."""
    for key, value in changes.items():
        if isinstance(value, Mapping):
            yield from _dotted(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _write(training: TrainingConfig, path: Path, *, out: Path, num_workers: Any) -> Path:
    changed = {**training.model_dump(mode="json"), "out": str(out), "num_workers": num_workers}
    path.write_text(yaml.safe_dump(changed, sort_keys=False), encoding="utf-8")
    load_config(type(training), path)
    return path


def _total_steps(training: TrainingConfig) -> int:
    shards: str = training.inputs.shards  # type: ignore[attr-defined]
    index = ExamIndex.read(shards)
    rows = split_rows(training, index, labelled=not isinstance(training, align.AlignConfig)).train
    total = num_steps(len(rows), training.global_batch) * training.epochs
    return min(total, training.max_steps or total)


def _drive(
    config: ElasticConfig, path: Path, out: Path, *, nodes: int, events: tuple[EventConfig, ...]
) -> list[dict[str, Any]]:
    if (out / "run.json").exists():
        return []
    system = {} if config.plain_ray else QUICK_HEALTH_CHECKS
    with (
        local_nodes(count=nodes, cpus_per_node=_CPUS_PER_NODE, system_config=system) as cluster,
        Drive(
            cluster,
            config.stage,
            path,
            run=out,
            log=out.with_suffix(".log"),
            patience_s=config.patience_s,
            plain=config.plain_ray,
        ) as drive,
    ):
        return drive.follow(events)
