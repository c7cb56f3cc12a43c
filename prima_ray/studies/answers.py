"""What every variant answers, fold by fold: trained runs, classifiers of the attributes, and sums of others.

Whatever is chosen (a candidate, a weight) is chosen on the validation fold, and every score that it was chosen by is
kept.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from prima_ray.base import PrimaError, StrictConfig, hash_json, write_atomic, write_json
from prima_ray.data.description import DataSetConfig
from prima_ray.data.plan import ExamIndex, Roles, split_roles
from prima_ray.data.run_record import RECORD
from prima_ray.evaluation.baselines import Baseline, check_options, mask_blocks, metadata_baseline
from prima_ray.evaluation.metrics import Probabilities, headline
from prima_ray.inference.predictor import Predictor
from prima_ray.stages.row_sets import read_predictions, shard_tables, single_photos
from prima_ray.studies.cells import Cell, Question, cells_folder, folds_of
from prima_ray.studies.config import LateFusionVariant, MetadataVariant, StudyConfig, TrainedVariant

_FILE = "answers.npz"
_SMALLEST = 1e-12
SETS = ("test", "masked", "photos")


class AnswersConfig(StrictConfig):
    """Further questions to a finished run: the test fold with the blocks masked, and photo by photo."""

    out: str
    run: str
    shards: str
    split: str
    fold: int


def ask(config: AnswersConfig) -> Path:
    """Ask them; returns the folder of `answers.npz`: `masked` (N, C), and `photos` (P, C), in the order of the rows."""
    index = ExamIndex.read(config.shards)
    rows = labelled_roles(index, split=config.split, fold=config.fold).test
    predictor = Predictor.load(config.run)
    blocks = sorted(index.manifest.data_set.block_attributes)
    found = {
        "masked": predictor.predict_tables(shard_tables(index, rows), masked=blocks),
        "photos": predictor.predict_tables(single_photos(table) for table in shard_tables(index, rows)),
    }
    written = io.BytesIO()
    np.savez(written, masked=found["masked"], photos=found["photos"])
    out = Path(config.out)
    write_atomic(out / _FILE, written.getvalue())
    write_json(out / RECORD, {"stage": "answers", "run": config.run})
    return out


def answer_cells(study: StudyConfig, cells: Sequence[Cell], shards: str) -> dict[str, Cell]:
    """The cells that ask further questions of runs: key of the run -> cell."""
    found = {}
    for cell in cells:
        key = hash_json(["answers", cell.key])[: len(cell.key)]
        folder = cells_folder(study) / f"answers-{key}"
        config = AnswersConfig(
            out=str(folder),
            run=str(cell.folder),
            shards=shards,
            split=study.split,
            fold=cell.fold if cell.fold is not None else 0,
        )
        found[cell.key] = replace(
            cell,
            key=key,
            recipe=f"answers of {cell.recipe}",
            stage="answers",
            config=config,
            parents=(),
            work=ask,
            folder=folder,
        )
    return found


@dataclass(frozen=True)
class Answers:
    """What a variant said, for one test fold and seed; (N, C) each."""

    val: Probabilities
    test: Probabilities
    masked: Probabilities
    """Of the test exams, with the blocks that go missing together masked."""
    photos: Probabilities
    """Of the test exams' photos, each an exam of its own; (P, C)."""
    chosen: int
    """Which candidate."""
    scores: tuple[float, ...]
    """Of each candidate, on the validation fold."""


@dataclass(frozen=True)
class FoldData:
    """A test fold."""

    index: ExamIndex
    roles: Roles
    fold: int
    choose_by: str

    @property
    def num_classes(self) -> int:
        return len(self.index.manifest.data_set.classes)

    @property
    def photo_rows(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """(P,) the place of each photo's exam among the test exams."""
        return np.repeat(np.arange(len(self.roles.test)), self.index.num_images[self.roles.test])

    def score(self, probabilities: Probabilities) -> float:
        """Of the validation fold."""
        return headline(self.index.labels[self.roles.val], probabilities)[self.choose_by]


def labelled_roles(index: ExamIndex, *, split: Any, fold: int) -> Roles:
    """The roles of a test fold, of the exams that have a diagnosis."""
    roles = split_roles(index, fold=fold, val_fold=None, split=split)
    return Roles(*(rows[index.labels[rows] >= 0] for rows in (roles.train, roles.val, roles.test)))


def fold_data(study: StudyConfig, index: ExamIndex) -> dict[int, FoldData]:
    """Every test fold of a study."""
    return {
        fold: FoldData(index, labelled_roles(index, split=study.split, fold=fold), fold, study.choose_by)
        for fold in folds_of(study, index)
    }


def choose_runs(
    data: Mapping[int, FoldData], cells: Mapping[str, Cell], asked: Mapping[Question, str]
) -> dict[tuple[str, int, int], tuple[Cell, list[float]]]:
    """Of every trained variant, fold and seed: the candidate that is best on the validation fold, and all scores.

    Where a candidate's run is missing, that variant is left out for this fold and seed.
    """
    found = {}
    for (name, fold, seed), mine in _by_variant(asked).items():
        runs = [cells[key] for key in mine]
        if not all((cell.folder / RECORD).exists() for cell in runs):
            continue
        scores = [data[fold].score(read_predictions(c.folder, data[fold].index, data[fold].roles.val)) for c in runs]
        found[name, fold, seed] = (runs[int(np.argmax(scores))], scores)
    return found


def _by_variant(asked: Mapping[Question, str]) -> dict[tuple[str, int, int], list[str]]:
    found: dict[tuple[str, int, int], list[str]] = {}
    for (name, _, fold, seed), key in sorted(asked.items()):
        found.setdefault((name, fold, seed), []).append(key)
    return found


def trained_answers(data: FoldData, cell: Cell, further: Cell | None, scores: Sequence[float], number: int) -> Answers:
    """What a run said; without further questions nothing of `masked` and `photos`."""
    masked = photos = np.zeros((0, data.num_classes))
    if further is not None:
        with np.load(further.folder / _FILE) as more:
            masked, photos = more["masked"], more["photos"]
    return Answers(
        val=read_predictions(cell.folder, data.index, data.roles.val),
        test=read_predictions(cell.folder, data.index, data.roles.test),
        masked=masked,
        photos=photos,
        chosen=number,
        scores=tuple(scores),
    )


def metadata_answers(variant: MetadataVariant, data: FoldData) -> Answers:
    """What a classifier of the attributes says.

    Raises:
        PrimaError: it has nothing to read, or an option is none of its class's.
    """
    index, roles = data.index, data.roles
    data_set = index.manifest.data_set
    train, val, test = (index.attribute_rows(rows) for rows in (roles.train, roles.val, roles.test))
    learned = np.sort(np.concatenate([roles.train, roles.val])) if variant.refit else roles.train
    found = _classifiers(variant, data_set)
    scores = [data.score(model.fit_predict(train, index.labels[roles.train], val, data.num_classes)) for model in found]
    number = int(np.argmax(scores))
    best = found[number]
    known, labels = index.attribute_rows(learned), index.labels[learned]
    answers = best.fit_predict(known, labels, test, data.num_classes)
    return Answers(
        val=best.fit_predict(train, index.labels[roles.train], val, data.num_classes),
        test=answers,
        masked=best.fit_predict(known, labels, mask_blocks(test, data_set), data.num_classes),
        photos=answers[data.photo_rows],
        chosen=number,
        scores=tuple(scores),
    )


def _classifiers(variant: MetadataVariant, data_set: DataSetConfig) -> list[Baseline]:
    """Its candidates."""
    found = []
    for options in variant.candidates:
        check_options(variant.model, options)
        model = metadata_baseline(
            variant.title, data_set, blocks=variant.blocks, classifier=variant.model, options=options
        )
        if model is None:
            raise PrimaError(f"{data_set.name} has no attribute that `{variant.title}` could read")
        found.append(model)
    return found


def check_classifiers(study: StudyConfig, data: FoldData) -> None:
    """Every candidate learns from one fold: a mistake in its options is told before hours of training, not behind them.

    Raises:
        PrimaError: see `metadata_answers`; or the classifier refuses an option's value.
    """
    index, rows = data.index, data.roles.train
    known, labels = index.attribute_rows(rows), index.labels[rows]
    for name, variant in study.variants.items():
        if not isinstance(variant, MetadataVariant):
            continue
        for model in _classifiers(variant, index.manifest.data_set):
            try:
                model.fit_predict(known, labels, known[:1], data.num_classes)
            except (TypeError, ValueError) as error:
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                raise PrimaError(f"variants.{name}: {variant.model} with {dict(model.options)}: {reason}") from None


def late_fusion_answers(variant: LateFusionVariant, parts: Sequence[Answers], data: FoldData) -> Answers:
    """The sum of log-probabilities."""
    candidates = variant.candidates or (tuple(1.0 for _ in parts),)

    def added(weights: Sequence[float], pick: Callable[[Answers], Probabilities]) -> Probabilities:
        if not all(len(pick(part)) for part in parts):
            # A search asks runs nothing further.
            return np.zeros((0, data.num_classes))
        terms = [np.log(np.maximum(pick(part), _SMALLEST)) for part in parts]
        summed = np.tensordot(weights, terms, axes=1)
        powers = np.exp(summed - summed.max(axis=1, keepdims=True))
        answers: Probabilities = powers / powers.sum(axis=1, keepdims=True)
        return answers

    scores = [data.score(added(weights, lambda part: part.val)) for weights in candidates]
    number = int(np.argmax(scores))
    best = candidates[number]
    return Answers(
        val=added(best, lambda part: part.val),
        test=added(best, lambda part: part.test),
        masked=added(best, lambda part: part.masked),
        photos=added(best, lambda part: part.photos),
        chosen=number,
        scores=tuple(scores),
    )


Everything = dict[str, dict[tuple[int, int], Answers]]
"""Variant -> (fold, seed) -> what it said."""


def gather_answers(
    study: StudyConfig,
    data: Mapping[int, FoldData],
    chosen: Mapping[tuple[str, int, int], tuple[Cell, list[float]]],
    further: Mapping[str, Cell],
) -> Everything:
    """All answers that there are: a variant that failed in a fold is absent there."""
    found: Everything = {name: {} for name in study.variants}
    late = []
    for name, variant in study.variants.items():
        for fold, mine in data.items():
            # A classifier of the attributes draws nothing: one answer serves every seed.
            said = metadata_answers(variant, mine) if isinstance(variant, MetadataVariant) else None
            for seed in study.seeds:
                if said is not None:
                    found[name][fold, seed] = said
                elif isinstance(variant, TrainedVariant) and (name, fold, seed) in chosen:
                    cell, scores = chosen[name, fold, seed]
                    more = further.get(cell.key)
                    if more is None or (more.folder / RECORD).exists():
                        number = int(np.argmax(scores))
                        found[name][fold, seed] = trained_answers(mine, cell, more, scores, number)
                elif isinstance(variant, LateFusionVariant):
                    late.append((name, variant, fold, seed))
    for name, variant, fold, seed in late:
        if all((fold, seed) in found[other] for other in variant.of):
            parts = [found[other][fold, seed] for other in variant.of]
            found[name][fold, seed] = late_fusion_answers(variant, parts, data[fold])
    # In the order of the study.
    return {name: found[name] for name in study.variants}
