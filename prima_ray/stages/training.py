"""The frame of every training stage: open the run, plan the rows, launch, and turn the best checkpoint into a run.

A stage brings a task and a way to save its model; everything else is here. The driver builds the model afresh and
loads the chosen checkpoint into it, so workers hand over nothing but checkpoints, whatever the engine or its sharding.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from prima_ray.base import PrimaError, is_uri, write_atomic, write_json
from prima_ray.data.fetched import local_copy
from prima_ray.data.plan import ExamIndex, Roles, plan_epoch, split_roles
from prima_ray.data.reader import Rows
from prima_ray.data.schema import join, split
from prima_ray.data.storage import Folder, reaching
from prima_ray.data.views import ViewConfig
from prima_ray.inference.bundle import read_bundle_config
from prima_ray.inference.calibration import Calibration, calibration_figures
from prima_ray.models.image_tower import ImageTowerConfig
from prima_ray.stages.out_lock import open_alone
from prima_ray.stages.parent_folds import check_parent_folds
from prima_ray.stages.rundir import ParentState, RunDir, check_finished, check_parent, finish_run
from prima_ray.training.checkpoint import Progress, check_origin, load_best, load_last
from prima_ray.training.config import EXECUTION_KEYS, LocalContextConfig, LoopConfig, TrainingConfig
from prima_ray.training.contexts import LocalContext
from prima_ray.training.engine import State, trainable_parameters
from prima_ray.training.launch import launch
from prima_ray.training.loop import TrainingJob
from prima_ray.training.task import Task
from prima_ray.training.tracking import absolute_uri

_log = logging.getLogger(__name__)

_PREPARED = frozenset({"soft_targets.json", "priors.json", "mistake.json", "text_features.json", "ray"})
"""What a run holds before its first step, besides its config."""


@dataclass(frozen=True)
class Plan:
    """What a stage knows once the shards are read."""

    run: RunDir
    index: ExamIndex
    roles: Roles


@dataclass(frozen=True)
class Trained:
    """What a stage has once training is over."""

    plan: Plan
    task: Task
    model: nn.Module
    """On the CPU, in eval mode, with the chosen checkpoint's weights."""
    progress: Mapping[str, Any]


def run_training(
    config: TrainingConfig,
    *,
    stage: str,
    shards: str,
    inputs: Mapping[str, str],
    make_task: Callable[[Plan], Task],
    save: Callable[[Trained], Mapping[str, Any]],
    labelled: bool,
    parents: Callable[[Plan], ParentState] | None = None,
) -> Path | str:
    """Run a training stage to its end, or take it up where it stopped.

    Args:
        inputs: role -> path of every parent, for the record.
        make_task: called in the driver with the plan; the task goes to the workers.
        save: writes `model/` and predictions; returns what belongs into metrics.json.
        labelled: True leaves exams without a diagnosis out.
        parents: what the record says of parents beyond their paths; called last.

    Returns:
        the run directory: a path, or the address on an object store.
    """
    with open_alone(config, out=config.out, stage=stage, execution_keys=EXECUTION_KEYS, prepared=_PREPARED) as run:
        if run.finished:
            check_finished(run)
            _log.info("%s: already finished, nothing to do", run.address)
            return run.address
        for path in inputs.values():
            check_parent(path)
        plan = _plan(config, run, shards, labelled=labelled)
        check_parent_folds(plan.index, plan.roles, inputs)
        task = make_task(plan)
        prepared, model, progress = train_task(
            config,
            task,
            run=run,
            shards=plan.index.shards,
            train_rows=plan.roles.train,
            val_rows=plan.roles.val,
            files=plan.index.file if config.shuffle_window else None,
        )
        metrics = save(Trained(plan=plan, task=prepared, model=model, progress=vars(progress)))
        write_json(
            run.path / "metrics.json",
            {"stage": stage, "best_step": progress.step, "val": progress.metrics, **metrics},
        )
        known = parents(plan) if parents else None
        finish_run(run, seed=config.seed, inputs={"shards": shards, **inputs}, parents=known)
        return run.address


def _plan(config: TrainingConfig, run: RunDir, shards: str, *, labelled: bool) -> Plan:
    index = ExamIndex.read(shards)
    roles = split_rows(config, index, labelled=labelled)
    _check_rows(roles, config, shards)
    _log.info(
        "%s: %d exams train, %d validate, %d are held out",
        run.stage,
        len(roles.train),
        len(roles.val),
        len(roles.test),
    )
    return Plan(run=run, index=index, roles=roles)


def _check_selection(config: LoopConfig, task: Task) -> None:
    metric, known = config.selection.metric, task.metric_names
    if metric not in known:
        raise PrimaError(
            f"selection.metric is {metric!r}, which {task.kind} does not report",
            mend=f"It reports {', '.join(sorted(known))}.",
        )


def train_task(
    config: LoopConfig,
    task: Task,
    *,
    run: RunDir,
    shards: str,
    train_rows: Rows,
    val_rows: Rows,
    files: Rows | None = None,
) -> tuple[Task, nn.Module, Progress]:
    """Train where ``config`` says, or find it done; the checkpoints are in ``run``.

    Returns:
        the prepared task; the model on the CPU, in eval mode, with the chosen checkpoint's weights; that checkpoint.

    Raises:
        PrimaError: the task does not report what is to choose; or what a worker found wrong.
    """
    if len(val_rows):
        _check_selection(config, task)
    job = TrainingJob(
        config=_portable(config),
        task=task,
        run=run.path.resolve(),
        shards=shards,
        train_rows=train_rows,
        val_rows=val_rows,
        files=files,
        store=run.address if isinstance(run.address, str) else None,
    )
    last = load_last(job.checkpoints)
    if last is None or not last[1].done:
        run.push()
        launch(job)
    else:
        check_origin(job.checkpoints, last[1].step, job.origin())
    if run.files:
        # What rank 0 wrote, wherever it ran.
        run.files.pull()
    state, progress = load_best(job.checkpoints)
    # Found finished: the workers computed whatever is computed once.
    prepared = task.prepare(driver_context(config))
    model = prepared.build()
    load_parameters(model, state)
    return prepared, model.eval(), progress


def split_rows(config: TrainingConfig, index: ExamIndex, *, labelled: bool) -> Roles:
    """The rows that train, choose and test; with ``labelled``, of the exams that have a diagnosis."""
    roles = split_roles(
        index,
        fold=None if config.fold == "none" else config.fold,
        val_fold=config.val_fold,
        split=config.split,
    )
    if labelled:
        return Roles(*(rows[index.labels[rows] >= 0] for rows in (roles.train, roles.val, roles.test)))
    return roles


def _check_rows(roles: Roles, config: TrainingConfig, shards: str) -> None:
    if not len(roles.train):
        raise PrimaError("no exams are left to train on", where=shards, mend="Check `fold` and `val_fold`.")
    if not len(roles.val) and (config.fold != "none" or config.val_fold is not None):
        raise PrimaError("the validation fold holds no exams", where=shards, mend="Choose another `val_fold`.")


def _portable(config: LoopConfig) -> LoopConfig:
    """The config for workers, whose working directory is another one."""
    uri = config.tracking.mlflow_uri
    if uri is None:
        return config
    tracking = config.tracking.model_copy(update={"mlflow_uri": absolute_uri(uri)})
    return config.model_copy(update={"tracking": tracking})


def driver_context(config: LoopConfig) -> LocalContext:
    """This process, on the device that training used if it ran here."""
    return LocalContext(config.context.device if isinstance(config.context, LocalContextConfig) else "auto")


def load_parameters(model: nn.Module, state: State) -> None:
    """Put a checkpoint's parameters into a freshly built model."""
    with torch.no_grad():
        for name, parameter in trainable_parameters(model):
            parameter.copy_(state[f"param/{name}"])


def feature_root(config: TrainingConfig) -> str:
    """Where frozen towers' features are kept: shared by the runs beside this one.

    Raises:
        PrimaError: it would lie in a file.
    """
    out = config.out
    beside = join(split(out)[0], "features") if is_uri(out) else str(Path(out).resolve().parent / "features")
    root = config.feature_cache or beside
    if is_uri(root):
        return root
    path = Path(root).resolve()
    there = next(folder for folder in (path, *path.parents) if folder.exists())
    if not there.is_dir():
        raise PrimaError("feature_cache: this is a file", where=there, mend="Name a folder in feature_cache.")
    return str(path)


def check_view_size(views: ViewConfig, image_size: int) -> None:
    """Views must have the size that the tower reads.

    Raises:
        ValueError: they differ.
    """
    if views.image_size != image_size:
        raise ValueError(f"views.image_size is {views.image_size}, the image tower reads {image_size}: set them alike")


def check_pixels(views: ViewConfig, *, tower: ImageTowerConfig | None = None, parents: Iterable[str] = ()) -> None:
    """Views must be normalised as the pixels were that the tower learned from.

    A run of ours is held to it; of published weights a deviation is told, for they may be anybody's.

    Raises:
        PrimaError: a parent run had other statistics.
    """
    mine = (views.mean, views.std)
    for path in parents:
        theirs = read_bundle_config(local_copy(path) / "model").views
        if (theirs.mean, theirs.std) != mine:
            raise PrimaError(
                f"views.mean {list(views.mean)} and views.std {list(views.std)} are not those of this run, "
                f"{list(theirs.mean)} and {list(theirs.std)}",
                where=path,
                mend="Set them alike.",
            )
    published = tower.pixel_statistics() if tower else None
    if tower and published and published != mine:
        _log.warning(
            "warning: %s was trained on pixels of mean %s and deviation %s: set views.mean and views.std to them",
            tower.name,
            list(published[0]),
            list(published[1]),
        )


Calibrate = Callable[[NDArray[np.float64], NDArray[np.int64]], Calibration]
"""Log-probabilities (N, C) and labels (N,) of the validation fold -> what is fitted on them."""


@dataclass(frozen=True)
class HeldOut:
    """What came of the validation and test folds."""

    rows: Rows
    probabilities: NDArray[np.float64]
    """(N, C), calibrated."""
    calibration: Calibration
    figures: Mapping[str, Any]
    """For metrics.json: the task's by role, and `calibration`, before and after."""


def predict_held_out(trained: Trained, config: TrainingConfig, calibrate: Calibrate | None = None) -> HeldOut:
    """Write `predictions.parquet` of the validation and test folds.

    The test fold is touched here, once, after everything has been chosen.

    Args:
        calibrate: None leaves probabilities as they are.

    """
    index, roles = trained.plan.index, trained.plan.roles
    rows = np.sort(np.concatenate([roles.val, roles.test]))
    whole = _observe(trained, config, rows)
    num_classes = len(index.manifest.data_set.classes)
    scores = whole["log_probs"].double().numpy() if whole else np.zeros((0, num_classes))
    if not np.isfinite(scores).all():
        raise PrimaError(
            "the trained model gives probabilities that are not numbers (NaN)",
            where=trained.plan.run.path,
            mend="Train it again with a lower optimizer.lr.",
        )
    labels, validates = index.labels[rows], np.isin(rows, roles.val)
    calibration = calibrate(scores[validates], labels[validates]) if calibrate else Calibration.none()
    completeness = calibration.completeness(index.attribute_rows(rows))
    probabilities = calibration.probabilities(scores, completeness)
    write_predictions(
        trained.plan.run.path / "predictions.parquet",
        index,
        rows,
        index.folds(config.split),
        torch.from_numpy(probabilities),
    )
    figures: dict[str, Any] = {}
    reliable: dict[str, Any] = {}
    for role, mine in (("val", roles.val), ("test", roles.test)):
        if len(mine):
            chosen = np.isin(rows, mine)
            figures[role] = trained.task.metrics({key: value[torch.from_numpy(chosen)] for key, value in whole.items()})
            reliable[role] = calibration_figures(calibration, scores[chosen], labels[chosen], completeness[chosen])
    if calibrate:
        for note in calibration.notes:
            _log.warning("warning: %s", note)
        figures["calibration"] = {**calibration.figures(), **reliable}
    return HeldOut(rows=rows, probabilities=probabilities, calibration=calibration, figures=figures)


def _observe(trained: Trained, config: TrainingConfig, rows: Rows) -> dict[str, Tensor]:
    """What the task observes of some exams, (N, ...) each, in their order; nothing of none."""
    context = driver_context(config)
    model = trained.model.to(context.device)
    spec = trained.task.stream(train=False)
    plan = plan_epoch(rows, global_batch=min(config.micro_batch or 64, 64), seed=0, epoch=0, shuffle=False)
    observed: dict[str, list[Tensor]] = {}
    with torch.no_grad():
        for batch in context.batches(trained.plan.index.shards, [(0, plan)], spec):
            moved = batch.to(context.device)
            seen = trained.task.observe(trained.task.condense(model(moved), moved), moved, gather=None)
            for key, value in seen.items():
                observed.setdefault(key, []).append(value[moved.weights > 0].cpu())
    return {key: torch.cat(values) for key, values in observed.items()}


def write_predictions(
    path: str | Path,
    index: ExamIndex,
    rows: Rows,
    folds: Rows,
    probabilities: Tensor,
    *,
    further: pa.Table | None = None,
) -> None:
    """`predictions.parquet`: exam_id, label, fold, prediction, prob_<CLASS>... of ``rows``, (N, C) probabilities.

    Args:
        further: columns behind these, N rows.
    """
    names = index.manifest.data_set.class_names
    values = probabilities.double().numpy()
    predicted = values.argmax(axis=1) if len(values) else np.zeros(0, dtype=np.int64)
    table = pa.table(
        {
            "exam_id": pa.array(list(index.exam_ids[rows]), pa.string()),
            "label": pa.array(index.label_names(rows), pa.string()),
            "fold": pa.array(folds[rows], pa.int32()),
            "prediction": pa.array([names[position] for position in predicted], pa.string()),
            **{f"prob_{name}": pa.array(values[:, position], pa.float64()) for position, name in enumerate(names)},
            **({} if further is None else dict(zip(further.column_names, further.columns, strict=True))),
        }
    )
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    data = sink.getvalue().to_pybytes()
    if not is_uri(str(path)):
        write_atomic(path, data)
        return
    folder, name = split(str(path))
    with reaching(str(path), "cannot be written"):
        Folder.at(folder).write(name, data)
