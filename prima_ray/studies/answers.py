"""What every variant answers, fold by fold: trained runs, classifiers of the attributes, and sums of others.

Whatever is chosen (a candidate, a weight) is chosen on the validation fold, and every score that it was chosen by is
kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from prima_ray.base import PrimaError
from prima_ray.data.description import DataSetConfig
from prima_ray.evaluation.baselines import Baseline, check_options, mask_blocks, metadata_baseline
from prima_ray.evaluation.metrics import Probabilities
from prima_ray.studies.book import AnswerBook
from prima_ray.studies.cells import Cell, Question
from prima_ray.studies.config import LateFusionVariant, MetadataVariant, StudyConfig, TrainedVariant
from prima_ray.studies.folds import FoldData
from prima_ray.studies.published import SETS

_SMALLEST = 1e-12


@dataclass(frozen=True)
class Answers:
    """What a variant said, for one test fold and seed; (N, C) each, no rows where it has not been asked."""

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


def choose_runs(
    data: Mapping[int, FoldData], cells: Mapping[str, Cell], asked: Mapping[Question, str], book: AnswerBook
) -> dict[tuple[str, int, int], tuple[Cell, list[float]]]:
    """Of every trained variant, fold and seed: the candidate that is best on the validation fold, and all scores.

    Where a candidate's run is missing, that variant is left out for this fold and seed.
    """
    found = {}
    for (name, fold, seed), mine in runs_by_variant(asked).items():
        runs = [cells[key] for key in mine]
        said = [probabilities for cell in runs if (probabilities := book.read(cell, "val")) is not None]
        if len(said) == len(runs):
            scores = [data[fold].score(probabilities) for probabilities in said]
            found[name, fold, seed] = (runs[int(np.argmax(scores))], scores)
    return found


def runs_by_variant(asked: Mapping[Question, str]) -> dict[tuple[str, int, int], list[str]]:
    """Variant, fold and seed -> the key of each candidate's run."""
    found: dict[tuple[str, int, int], list[str]] = {}
    for (name, _, fold, seed), key in sorted(asked.items()):
        found.setdefault((name, fold, seed), []).append(key)
    return found


def trained_answers(book: AnswerBook, data: FoldData, cell: Cell, scores: Sequence[float]) -> Answers | None:
    """What a run said, nothing of sets that it has not been asked about; None where its predictions are not known."""
    nothing = np.zeros((0, data.num_classes))
    said = {name: book.read(cell, name) for name in book.sets}
    known = {name: probabilities for name, probabilities in said.items() if probabilities is not None}
    if "val" not in known or ("test" in said and "test" not in known):
        return None
    return Answers(
        **{name: known.get(name, nothing) for name in SETS},
        chosen=int(np.argmax(scores)),
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
            # One of them has not been asked.
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
    book: AnswerBook,
) -> Everything:
    """All answers that there are: a variant that failed in a fold is absent there."""
    found: Everything = {name: {} for name in study.variants}
    late = []
    for name, variant in study.variants.items():
        for fold, mine in data.items():
            # A classifier of the attributes draws nothing: one answer serves every seed.
            always = metadata_answers(variant, mine) if isinstance(variant, MetadataVariant) else None
            for seed in study.seeds:
                said = always
                if isinstance(variant, TrainedVariant) and (name, fold, seed) in chosen:
                    said = trained_answers(book, mine, *chosen[name, fold, seed])
                elif isinstance(variant, LateFusionVariant):
                    late.append((name, variant, fold, seed))
                if said is not None:
                    found[name][fold, seed] = said
    for name, variant, fold, seed in late:
        if all((fold, seed) in found[other] for other in variant.of):
            parts = [found[other][fold, seed] for other in variant.of]
            found[name][fold, seed] = late_fusion_answers(variant, parts, data[fold])
    # In the order of the study.
    return {name: found[name] for name in study.variants}


def on_finished_folds(everything: Everything, ours: str) -> Everything:
    """What can be held against each other while a study is under way: some folds, and the variants that have answered
    all of them. Of all such choices the one with the most answers beside ours; other variants have none then.
    """
    sets = {name: frozenset(answers) & frozenset(everything[ours]) for name, answers in everything.items()}

    def covering(folds: frozenset[tuple[int, int]]) -> list[str]:
        return [name for name, mine in sets.items() if mine >= folds]

    best = max(sets.values(), key=lambda folds: (len(folds) * (len(covering(folds)) - 1), len(folds)))
    kept = set(covering(best))
    return {
        name: {key: said for key, said in answers.items() if name in kept and key in best}
        for name, answers in everything.items()
    }
