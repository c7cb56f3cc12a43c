"""The final model of a study: ours, trained on every fold, and calibrated by cross-fitting.

A model that learned from every exam has none left to be calibrated on. The study's models of single folds have: each
has answered a fold that it never saw, and together these answers cover every exam once. Temperature, prediction sets,
the threshold of confidence and the limits of what is familiar are fitted on them, as in cross-conformal prediction
(Vovk 2015, "Cross-conformal predictors"). Here one more model answers in the end, which learned from more exams by the
same recipe, so it is an estimate and no proof of coverage.

Nothing is left to stop the final model at either: each of its runs trains for as many epochs as those of single folds
were best after, by their median.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from prima_ray.base import PrimaError, is_uri, read_json, write_json
from prima_ray.data.plan import ExamIndex
from prima_ray.data.reader import Rows
from prima_ray.data.run_record import CONFIG
from prima_ray.evaluation.metrics import headline
from prima_ray.evaluation.statistics import mean_sd
from prima_ray.inference.bundle import Bundle, load_bundle, read_calibration, save_bundle
from prima_ray.inference.calibration import Calibration, CalibrationConfig, calibration_figures, fit_calibration
from prima_ray.inference.familiarity import (
    FamiliarityConfig,
    strangest,
    with_limits,
)
from prima_ray.inference.predictor import Predictor
from prima_ray.stages.answers import Seen, drawn_rows, look_at, make_reference
from prima_ray.stages.out_lock import open_alone
from prima_ray.stages.row_sets import read_predictions
from prima_ray.stages.rundir import check_finished, finish_run, is_fresh, no_run
from prima_ray.stages.scarce import ask_with_less, with_scarcity
from prima_ray.stages.training import driver_context, write_predictions
from prima_ray.studies.answers import choose_runs
from prima_ray.studies.book import AnswerBook
from prima_ray.studies.cells import Cell, CellPlanner, folds_of, plan_study
from prima_ray.studies.config import StudyConfig, TrainedVariant
from prima_ray.studies.folds import fold_data, labelled_roles
from prima_ray.studies.sitting import refuse_failed, run_all, shards_of
from prima_ray.training.config import EXECUTION_KEYS, TrainingConfig

_log = logging.getLogger(__name__)
_SMALLEST = 1e-300
Matrix = NDArray[np.float64]


def check_final(config: StudyConfig, out: str) -> TrainedVariant:
    """Whether there can be a final model of ours, before anything is trained.

    Raises:
        PrimaError: ours is not trained, the study leaves folds out or looks at no test fold, a config cannot be
            trained on every fold, or ``out`` holds something else.
    """
    ours = config.variants[config.ours]
    if not isinstance(ours, TrainedVariant):
        raise PrimaError(f"{config.ours} is not trained: there is no final model of it", mend="Name another in `ours`.")
    if config.scored_on != "test":
        raise PrimaError(
            "a final model is calibrated on test folds, at which a search does not look",
            mend="Name a study that is scored on its test folds.",
        )
    if not is_uri(out) and not is_fresh(out) and not (Path(out) / CONFIG).exists():
        raise no_run(out)
    if config.inputs.shards is not None:
        index = ExamIndex.read(config.inputs.shards)
        if set(folds_of(config, index)) != set(range(index.manifest.num_folds)):
            raise PrimaError(
                "a final model is calibrated on every fold, and this study leaves folds out", mend="Drop `folds`."
            )
        planner = CellPlanner(config, shards=index.shards)
        for change in ours.candidates:
            planner.cell(ours.recipe, fold="none", seed=config.seeds[0], change=change)
    elif config.folds is not None:
        raise PrimaError("a final model is calibrated on every fold, and this study names folds", mend="Drop `folds`.")
    return ours


def train_final(config: StudyConfig, out: str) -> Path | str:
    """Train ours on every fold into ``out``; the study's runs of single folds must be there, or are trained first.

    Returns:
        the run directory: a path, or the address on an object store.

    Raises:
        PrimaError: see `check_final`, or a run failed.
    """
    ours = check_final(config, out)
    shards = shards_of(config)
    index = ExamIndex.read(shards)
    if config.answers:
        _log.warning("study: the final model asks the folds' models more than `answers` tell: they are trained here")
    alone = config.model_copy(update={"variants": {config.ours: ours}, "seeds": config.seeds[:1], "answers": ()})
    cells, asked = plan_study(alone, index)
    refuse_failed(run_all(alone, cells))
    candidate, runs = _chosen(alone, index, cells, asked)
    planner = CellPlanner(alone, shards=shards, epochs=_best_epochs(cells, runs.values()))
    last = planner.cell(ours.recipe, fold="none", seed=alone.seeds[0], change=ours.candidates[candidate])
    refuse_failed(run_all(alone, planner.cells))
    return _write(last, runs, index, out)


def _chosen(
    config: StudyConfig, index: ExamIndex, cells: Mapping[str, Cell], asked: Mapping[Any, str]
) -> tuple[int, dict[int, Cell]]:
    """The candidate that is best on the validation folds on average, and its run in each fold."""
    data, seed = fold_data(config, index), config.seeds[0]
    found = choose_runs(data, cells, asked, AnswerBook(config, data, ()))
    scores = np.mean([found[config.ours, fold, seed][1] for fold in data], axis=0)
    best = int(np.argmax(scores))
    return best, {fold: cells[asked[config.ours, best, fold, seed]] for fold in data}


def _best_epochs(cells: Mapping[str, Cell], runs: Iterable[Cell]) -> dict[str, int]:
    """Recipe -> the median of the epochs after which its runs were best, of some runs and all before them."""
    wanted = [cell.key for cell in runs]
    found: dict[str, dict[str, int]] = {}
    while wanted:
        cell = cells[wanted.pop()]
        wanted += cell.parents
        if isinstance(cell.config, TrainingConfig):
            found.setdefault(cell.recipe, {})[cell.key] = _best_epoch(cell)
    return {recipe: max(1, round(float(np.median(list(each.values()))))) for recipe, each in found.items()}


def _best_epoch(cell: Cell) -> int:
    """After how many epochs a run was best."""
    best = read_json(cell.folder / "metrics.json")["best_step"]
    steps = (json.loads(line) for line in (cell.folder / "steps.jsonl").read_text().splitlines())
    return next(int(step["epoch"]) + 1 for step in steps if step["step"] == best)


@dataclass(frozen=True)
class _Answers:
    """What models of single folds said of the exams that they never saw."""

    rows: Rows
    """(N,) every labelled exam, once."""
    fold: NDArray[np.int64]
    """(N,) whose model answered."""
    scores: Matrix
    """(N, C) log-probabilities before any calibration."""
    read: tuple[str, ...]
    """The attributes that these models read."""
    with_less: Mapping[float, Matrix]
    """See `ask_with_less`."""

    def of(self, chosen: NDArray[np.bool_]) -> _Answers:
        """Those about some of the exams."""
        with_less = {share: logits[chosen] for share, logits in self.with_less.items()}
        return replace(
            self,
            rows=self.rows[chosen],
            fold=self.fold[chosen],
            scores=self.scores[chosen],
            with_less=with_less,
        )


@dataclass(frozen=True)
class _HeldOut:
    """These answers, and what comes of them."""

    answers: _Answers
    probabilities: Matrix
    """(N, C) calibrated on the answers to all other folds."""
    calibrations: Mapping[int, Calibration]
    """Fold -> fitted on the answers to all others."""
    seen: list[Seen]
    """Photos of some of the exams, as the answering model reads them."""
    strangeness: Mapping[str, Matrix]
    """Space -> (M,) how far an exam's strangest photo is from the answering model's training photos."""

    @property
    def rows(self) -> Rows:
        """(N,) every labelled exam, once."""
        return self.answers.rows


def _write(last: Cell, runs: Mapping[int, Cell], index: ExamIndex, out: str) -> Path | str:
    config: Any = last.config.model_copy(update={"out": out})
    with open_alone(config, out=out, stage=last.stage, execution_keys=EXECUTION_KEYS, prepared=()) as run:
        if run.finished:
            check_finished(run)
            _log.info("%s: already finished, nothing to do", run.address)
            return run.address
        held_out = _held_out(runs, index, config)
        labels = index.labels[held_out.rows]
        calibration = _calibrated(held_out.answers, index, config)
        note = f"fitted on the answers of {len(runs)} models like this one, each of a fold that it did not learn from"
        calibration = calibration.model_copy(update={"notes": (*calibration.notes, note)})
        bundle = _completed(load_bundle(last.folder / "model"), calibration, held_out, index, config.familiarity)
        shutil.rmtree(run.path / "model", ignore_errors=True)
        save_bundle(run.path / "model", bundle)
        folds = index.folds(config.split)
        write_predictions(
            run.path / "predictions.parquet", index, held_out.rows, folds, torch.from_numpy(held_out.probabilities)
        )
        figures = _figures(held_out, index, labels)
        write_json(
            run.path / "metrics.json",
            {
                "stage": last.stage,
                "calibration": calibration.figures(),
                "cross_fitted": {"num_folds": len(runs), "num_exams": len(labels), **figures},
            },
        )
        parents = {"all_folds": str(last.folder), **{f"fold_{fold}": str(cell.folder) for fold, cell in runs.items()}}
        finish_run(run, seed=config.seed, inputs={"shards": index.shards, **parents})
        told = ", ".join(
            f"{name} {100 * item['mean']:.1f} ({100 * item['sd']:.1f})" for name, item in figures["headline"].items()
        )
        _log.info("final model: %s; of %d folds' models, mean (SD) in %%: %s", run.address, len(runs), told)
        return run.address


def _figures(held_out: _HeldOut, index: ExamIndex, labels: NDArray[np.int64]) -> dict[str, Any]:
    """Of every fold's model on its own test fold, calibrated on the others: mean and SD, and each."""
    plain, belief = [], {}
    for fold, calibration in held_out.calibrations.items():
        mine = held_out.answers.fold == fold
        plain.append(headline(labels[mine], held_out.probabilities[mine]))
        completeness = calibration.completeness(index.attribute_rows(held_out.rows[mine]))
        belief[str(fold)] = calibration_figures(calibration, held_out.answers.scores[mine], labels[mine], completeness)
    means = {name: dict(zip(("mean", "sd"), mean_sd([item[name] for item in plain]), strict=True)) for name in plain[0]}
    return {"headline": means, "calibration_by_fold": belief}


def _held_out(runs: Mapping[int, Cell], index: ExamIndex, config: Any) -> _HeldOut:
    rows, folds, scores, seen = [], [], [], []
    with_less: dict[float, list[Matrix]] = {}
    read: tuple[str, ...] = ()
    strangeness: dict[str, list[Matrix]] = {}
    for fold, cell in runs.items():
        held = labelled_roles(index, split=config.split, fold=fold).test
        known = read_calibration(cell.folder / "model") or Calibration.none()
        completeness = known.completeness(index.attribute_rows(held))
        own = known.undone(read_predictions(cell.folder, index, held), completeness)
        rows.append(held)
        folds.append(np.full(len(held), fold))
        scores.append(np.log(np.maximum(own, _SMALLEST)))
        predictor = Predictor.load(cell.folder, device=str(driver_context(config).device))
        some = drawn_rows(index, held, max(1, config.familiarity.max_exams // len(runs)), "familiarity")
        read = predictor.read_attributes
        for share, logits in ask_with_less(predictor, index, held).items():
            with_less.setdefault(share, []).append(logits)
        photos = list(look_at(predictor, index, some))
        seen += photos
        if predictor.bundle.familiarity is not None:
            mine = [(item.features, item.looks) for item in photos]
            for name, values in strangest(predictor.bundle.familiarity, mine).items():
                strangeness.setdefault(name, []).append(values)
    order = np.argsort(np.concatenate(rows), kind="stable")
    answers = _Answers(
        rows=np.concatenate(rows)[order],
        fold=np.concatenate(folds)[order],
        scores=np.concatenate(scores)[order],
        read=read,
        with_less={share: np.concatenate(logits)[order] for share, logits in with_less.items()},
    )
    calibrations, probabilities = _crossed(answers, index, config)
    return _HeldOut(
        answers,
        probabilities=probabilities,
        calibrations=calibrations,
        seen=seen,
        # A fold whose photos were too few to tell has none: then nobody can.
        strangeness={name: np.concatenate(values) for name, values in strangeness.items() if len(values) == len(runs)},
    )


def _crossed(answers: _Answers, index: ExamIndex, config: Any) -> tuple[dict[int, Calibration], Matrix]:
    """Each fold calibrated on the answers to the others."""
    found, probabilities = {}, np.zeros_like(answers.scores)
    for number in np.unique(answers.fold).tolist():
        mine = answers.fold == number
        found[number] = fitted = _calibrated(answers.of(~mine), index, config)
        completeness = fitted.completeness(index.attribute_rows(answers.rows[mine]))
        probabilities[mine] = fitted.probabilities(answers.scores[mine], completeness)
    return found, probabilities


def _calibrated(answers: _Answers, index: ExamIndex, config: Any) -> Calibration:
    asked: CalibrationConfig = config.calibration
    labels, names = index.labels[answers.rows], index.manifest.data_set.class_names
    return with_scarcity(
        fit_calibration(answers.scores, labels, names, asked),
        answers.with_less,
        index,
        answers.rows,
        asked,
        read=answers.read,
        learned=drawn_rows(index, answers.rows, config.familiarity.max_exams, "scarcity"),
    )


def _completed(
    bundle: Bundle, calibration: Calibration, held_out: _HeldOut, index: ExamIndex, config: FamiliarityConfig
) -> Bundle:
    familiarity = bundle.familiarity
    novelty: list[float | None] = [None] * len(held_out.seen)
    if familiarity is not None:
        familiarity = with_limits(familiarity, held_out.strangeness, num_val=len(held_out.seen), config=config)
        limits = familiarity.record.limits
        shares = [
            held_out.strangeness[name] / limit
            for name, limit in limits.items()
            if limit and name in held_out.strangeness
        ]
        novelty = np.max(shares, axis=0).tolist() if shares else novelty
    reference = make_reference(
        index,
        held_out.rows,
        held_out.probabilities,
        novelty=novelty,
        seen=held_out.seen,
        learned=held_out.rows,
    )
    return replace(bundle, calibration=calibration, familiarity=familiarity, reference=reference)
