"""The final model of a study: ours, trained on every fold, and calibrated by cross-fitting.

A model that learned from every exam has none left to be calibrated on. The study's models of single folds have: each
has answered a fold that it never saw, and together these answers cover every exam once. Temperature, prediction sets,
the threshold of confidence and the limits of what is familiar are fitted on them (cross-conformal prediction, Vovk
2015, "Cross-conformal predictors"). The models of single folds learned from fewer exams than the final one, so what is
fitted errs on the side of caution.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prima_ray.base import PrimaError, write_json
from prima_ray.data.plan import ExamIndex
from prima_ray.evaluation.metrics import headline
from prima_ray.evaluation.statistics import mean_sd
from prima_ray.inference.bundle import Bundle, load_bundle, read_calibration, save_bundle
from prima_ray.inference.calibration import Calibration, calibration_figures, fit_calibration
from prima_ray.inference.familiarity import Familiarity, FamiliarityConfig, familiar_limits, strangest
from prima_ray.inference.predictor import Predictor
from prima_ray.stages.answers import Seen, look_at, make_reference
from prima_ray.stages.out_lock import open_alone
from prima_ray.stages.row_sets import read_predictions
from prima_ray.stages.rundir import finish_run
from prima_ray.stages.training import write_predictions
from prima_ray.studies.answers import choose_runs, fold_data, labelled_roles
from prima_ray.studies.cells import Cell, CellPlanner, folds_of, plan_study
from prima_ray.studies.config import StudyConfig, TrainedVariant
from prima_ray.studies.run import refuse_failed, run_all, shards_of
from prima_ray.training.config import EXECUTION_KEYS

_log = logging.getLogger(__name__)
_SMALLEST = 1e-300


@dataclass(frozen=True)
class _HeldOut:
    """What models of single folds said of the exams that they never saw."""

    rows: Any
    """(N,) every labelled exam, once."""
    fold: Any
    """(N,) whose model answered."""
    scores: Any
    """(N, C) log-probabilities before any calibration."""
    seen: list[Seen]
    """Their photos, as the answering model reads them."""
    strangeness: Mapping[str, Any]
    """Space -> (N,) how far an exam's strangest photo is from the answering model's training photos."""


def train_final(config: StudyConfig, out: str) -> Path:
    """Train ours on every fold into ``out``; the study's runs of single folds must be there, or are trained first.

    Raises:
        PrimaError: ours is not trained, the study leaves folds out, or a run failed.
    """
    ours = config.variants[config.ours]
    if not isinstance(ours, TrainedVariant):
        raise PrimaError(f"{config.ours} is not trained: there is no final model of it", mend="Name another in `ours`.")
    shards = shards_of(config)
    index = ExamIndex.read(shards)
    if set(folds_of(config, index)) != set(range(index.manifest.num_folds)):
        raise PrimaError(
            "a final model is calibrated on every fold, and this study leaves folds out", mend="Drop `folds`."
        )
    alone = config.model_copy(update={"variants": {config.ours: ours}, "seeds": config.seeds[:1]})
    cells, asked = plan_study(alone, index)
    refuse_failed(run_all(alone, cells))
    candidate, runs = _chosen(alone, index, cells, asked)
    planner = CellPlanner(alone, shards=shards)
    last = planner.cell(ours.recipe, fold="none", seed=alone.seeds[0], change=ours.candidates[candidate])
    refuse_failed(run_all(alone, planner.cells))
    return _write(last, runs, index, out)


def _chosen(
    config: StudyConfig, index: ExamIndex, cells: Mapping[str, Cell], asked: Mapping[Any, str]
) -> tuple[int, dict[int, Cell]]:
    """The candidate that is best on the validation folds on average, and its run in each fold."""
    data, seed = fold_data(config, index), config.seeds[0]
    found = choose_runs(data, cells, asked)
    scores = np.mean([found[config.ours, fold, seed][1] for fold in data], axis=0)
    best = int(np.argmax(scores))
    return best, {fold: cells[asked[config.ours, best, fold, seed]] for fold in data}


def _write(last: Cell, runs: Mapping[int, Cell], index: ExamIndex, out: str) -> Path:
    config: Any = last.config.model_copy(update={"out": out})
    with open_alone(config, out=out, stage=last.stage, execution_keys=EXECUTION_KEYS, prepared=()) as run:
        if run.finished:
            _log.info("%s: already finished, nothing to do", run.address)
            return run.path
        held_out = _held_out(runs, index, config.split)
        labels, names = index.labels[held_out.rows], index.manifest.data_set.class_names
        calibration = fit_calibration(held_out.scores, labels, names, config.calibration)
        note = f"fitted on the answers of {len(runs)} models, each of a fold that it did not learn from"
        calibration = calibration.model_copy(update={"notes": (*calibration.notes, note)})
        bundle = _completed(load_bundle(last.folder / "model"), calibration, held_out, index, config.familiarity)
        shutil.rmtree(run.path / "model", ignore_errors=True)
        save_bundle(run.path / "model", bundle)
        probabilities = calibration.probabilities(held_out.scores)
        folds = index.folds(config.split)
        write_predictions(
            run.path / "predictions.parquet", index, held_out.rows, folds, torch.from_numpy(probabilities)
        )
        by_fold = [headline(labels[held_out.fold == fold], probabilities[held_out.fold == fold]) for fold in runs]
        figures = {
            name: dict(zip(("mean", "sd"), mean_sd([item[name] for item in by_fold]), strict=True))
            for name in by_fold[0]
        }
        write_json(
            run.path / "metrics.json",
            {
                "stage": last.stage,
                "cross_fitted": {
                    "folds": len(runs),
                    "num_exams": len(labels),
                    "figures": figures,
                    **calibration.model_dump(mode="json"),
                    "all": calibration_figures(calibration, held_out.scores, labels),
                },
            },
        )
        parents = {"all_folds": str(last.folder), **{f"fold_{fold}": str(cell.folder) for fold, cell in runs.items()}}
        finish_run(run, seed=config.seed, inputs={"shards": index.shards, **parents})
        told = ", ".join(f"{name} {100 * item['mean']:.1f} ({100 * item['sd']:.1f})" for name, item in figures.items())
        _log.info("final model: %s; of %d folds' models, mean (SD) in %%: %s", run.path, len(runs), told)
        return run.path


def _held_out(runs: Mapping[int, Cell], index: ExamIndex, split: str) -> _HeldOut:
    rows, folds, scores, seen = [], [], [], []
    strangeness: dict[str, list[Any]] = {}
    for fold, cell in runs.items():
        held = labelled_roles(index, split=split, fold=fold).test
        known = read_calibration(cell.folder / "model") or Calibration.none()
        own = known.undone(read_predictions(cell.folder, index, held))
        rows.append(held)
        folds.append(np.full(len(held), fold))
        scores.append(np.log(np.maximum(own, _SMALLEST)))
        predictor = Predictor.load(cell.folder)
        photos = list(look_at(predictor, index, held))
        seen += photos
        familiarity = predictor.bundle.familiarity
        if familiarity is not None:
            for name, values in strangest(familiarity, [(item.features, item.looks) for item in photos]).items():
                strangeness.setdefault(name, []).append(values)
    order = np.argsort(np.concatenate(rows), kind="stable")
    return _HeldOut(
        rows=np.concatenate(rows)[order],
        fold=np.concatenate(folds)[order],
        scores=np.concatenate(scores)[order],
        seen=[seen[place] for place in order],
        strangeness={
            name: np.concatenate(values)[order] for name, values in strangeness.items() if len(values) == len(runs)
        },
    )


def _completed(
    bundle: Bundle, calibration: Calibration, held_out: _HeldOut, index: ExamIndex, config: FamiliarityConfig
) -> Bundle:
    familiarity = bundle.familiarity
    if familiarity is not None:
        limits = familiar_limits(held_out.strangeness, config)
        record = familiarity.record.model_copy(
            update={"limits": {**familiarity.record.limits, **limits}, "num_val": len(held_out.rows), "notes": ()}
        )
        familiarity = Familiarity(record, familiarity.spaces)
    novelty: list[float | None] = [None] * len(held_out.rows)
    if familiarity is not None:
        known = {name: limit for name, limit in familiarity.record.limits.items() if limit}
        shares = [held_out.strangeness[name] / limit for name, limit in known.items() if name in held_out.strangeness]
        novelty = np.max(shares, axis=0).tolist() if shares else novelty
    reference = make_reference(
        index,
        held_out.rows,
        calibration.probabilities(held_out.scores),
        novelty=novelty,
        seen=held_out.seen,
        learned=held_out.rows,
    )
    return replace(bundle, calibration=calibration, familiarity=familiarity, reference=reference)
