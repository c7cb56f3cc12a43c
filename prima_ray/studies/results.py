"""Answers of a study -> its figures, as `metrics.json` holds them (shares of 1; an interval is value, low, high):

    title, ours, split, folds, seeds, choose_by, num_resamples, level
    shards_hash, classes, positive      the data
    variants                            name -> title, kind, and `missing`: test folds and seeds without an answer
    scored_on                           `test`, or `validation`: then `sets.validation` is the only one
    sets.all|complete|masked|photos     num_exams, num_patients, and `headline`, `classes` (F1), `belief`, `operating`:
                                        see `evaluation.evidence.plain_scores`; models are named by their variants
    claims                              what, with, without; sets.<set>: difference and verdict by figure
    best                                set -> the rival with the highest macro F1
    choices                             variant -> of each fold and seed the candidate chosen, and all scores
    runs                                stage -> how many, and seconds

Figures are means over the folds (and seeds, where there are several): models of different folds share no scale. The
patients are resampled over all folds together, and all variants see the same resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from prima_ray.base import PrimaError
from prima_ray.evaluation.baselines import has_blocks
from prima_ray.evaluation.comparison import PredictionTable, pool_folds, share_exams
from prima_ray.evaluation.evidence import belief_figures, operating_evidence, plain_scores
from prima_ray.evaluation.metrics import Figures, Probabilities, class_figures, headline_draws
from prima_ray.evaluation.operating import SPECIFICITIES, positive_classes
from prima_ray.evaluation.statistics import LEVEL, bootstrap, paired_differences, verdict
from prima_ray.studies.answers import Answers, Everything
from prima_ray.studies.config import StudyConfig
from prima_ray.studies.folds import FoldData

TITLES = {
    "all": "All exams",
    "validation": "Validation folds",
    "complete": "Exams with complete metadata",
    "masked": "All exams, blocks masked for everybody",
    "photos": "Photo by photo",
}
WHOLE = ("all", "validation")
"""Sets of all exams: one of them is what a study is judged by."""
_SEEDS = 10_000
"""More than there are folds."""


@dataclass(frozen=True)
class ExamSet:
    """Which answers a set of exams is made of."""

    name: str
    role: Literal["test", "val"]
    pick: Callable[[Answers], Probabilities]
    rows: Mapping[int, NDArray[np.int64]]
    """Test fold -> places among the exams of the role, one for each row of the answers that are picked."""
    kept: Mapping[int, NDArray[np.int64]]
    """Test fold -> rows of the answers that count."""


def exam_sets(data: Mapping[int, FoldData], scored_on: str = "test") -> list[ExamSet]:
    """The sets of exams of a study; the first is the one that it is judged by."""
    if scored_on == "validation":
        held = {fold: np.arange(len(mine.roles.val)) for fold, mine in data.items()}
        return [ExamSet("validation", "val", lambda answers: answers.val, held, held)]
    index = next(iter(data.values())).index
    places = {fold: np.arange(len(mine.roles.test)) for fold, mine in data.items()}
    sets = [ExamSet("all", "test", lambda answers: answers.test, places, places)]
    data_set = index.manifest.data_set
    if data_set.blocks:
        whole = {
            fold: np.flatnonzero(has_blocks(index.attribute_rows(mine.roles.test), data_set))
            for fold, mine in data.items()
        }
        if any(map(len, whole.values())):
            sets.append(ExamSet("complete", "test", lambda answers: answers.test, places, whole))
        sets.append(ExamSet("masked", "test", lambda answers: answers.masked, places, places))
    photos = {fold: mine.photo_rows for fold, mine in data.items()}
    if any(len(photos[fold]) > len(places[fold]) for fold in data):
        everything = {fold: np.arange(len(rows)) for fold, rows in photos.items()}
        sets.append(ExamSet("photos", "test", lambda answers: answers.photos, photos, everything))
    return sets


def tables_of(data: Mapping[int, FoldData], everything: Everything, wanted: ExamSet) -> dict[str, PredictionTable]:
    """A table a variant, of all folds and seeds: an exam stands there once a seed."""
    found = {}
    for name, answers in everything.items():
        parts = [
            _part(data[fold], said, wanted, fold, seed)
            for (fold, seed), said in sorted(answers.items())
            if len(wanted.pick(said))
        ]
        if parts:
            found[name] = pool_folds(parts)
    return found


def _part(data: FoldData, said: Answers, wanted: ExamSet, fold: int, seed: int) -> PredictionTable:
    kept = wanted.kept[fold]
    places = wanted.rows[fold][kept]
    exams = getattr(data.roles, wanted.role)[places]
    return PredictionTable(
        exam_ids=np.array(
            [f"{data.index.exam_ids[row]}/{at}/{seed}" for row, at in zip(exams, kept, strict=True)], dtype=object
        ),
        patient_ids=data.index.patient_ids[exams],
        labels=data.index.labels[exams],
        probabilities=wanted.pick(said)[kept],
        folds=np.full(len(kept), fold + _SEEDS * seed, dtype=np.int64),
    )


def figures(study: StudyConfig, data: Mapping[int, FoldData], everything: Everything) -> dict[str, Any]:
    """All figures of a study, and its choices.

    Raises:
        PrimaError: ours has no answer, or nothing else has.
    """
    said = {name: answers for name, answers in everything.items() if answers}
    if study.ours not in said:
        raise PrimaError(f"{study.ours} has no finished run", mend="See what failed above, mend it, and run it again.")
    index = next(iter(data.values())).index
    data_set = index.manifest.data_set
    positive = positive_classes(data_set, None)
    ordered = {study.ours: said[study.ours], **said}
    sets = {}
    for wanted in exam_sets(data, study.scored_on):
        found = tables_of(data, ordered, wanted)
        if study.ours not in found:
            # Nobody has been asked yet.
            continue
        tables = share_exams(found)
        sets[wanted.name] = _set_figures(study, tables, data_set.class_names, positive, brief=wanted.name not in WHOLE)
    return {
        "title": study.title,
        "ours": study.ours,
        "split": study.split,
        "folds": sorted({fold for fold, _ in said[study.ours]}),
        "seeds": list(study.seeds),
        "choose_by": study.choose_by,
        "scored_on": study.scored_on,
        "num_resamples": study.num_resamples,
        "level": LEVEL,
        "shards_hash": index.manifest.content_hash,
        "classes": list(data_set.class_names),
        "positive": [data_set.class_names[place] for place in positive],
        "variants": {
            name: {
                "title": variant.title,
                "kind": variant.kind,
                "missing": sorted(
                    [fold, seed] for fold in data for seed in study.seeds if (fold, seed) not in everything[name]
                ),
            }
            for name, variant in study.variants.items()
        },
        "sets": {name: record for name, (record, _) in sets.items()},
        "best": {name: best_rival(record) for name, (record, _) in sets.items()},
        "claims": _claims(study, {name: scores for name, (_, scores) in sets.items()}),
        "choices": {
            name: [
                {"fold": fold, "seed": seed, "chosen": item.chosen, "scores": list(item.scores)}
                for (fold, seed), item in sorted(answers.items())
            ]
            for name, answers in everything.items()
        },
    }


def best_rival(record: Mapping[str, Any]) -> str | None:
    """The one that is not ours with the highest macro F1; None where there is none."""
    _, *others = record["headline"]["models"]
    found = {name: record["headline"]["models"][name]["macro_f1"]["value"] for name in others}
    return max(found, key=lambda name: found[name]) if found else None


def _set_figures(
    study: StudyConfig,
    tables: Mapping[str, PredictionTable],
    class_names: Sequence[str],
    positive: Sequence[int],
    *,
    brief: bool,
) -> tuple[dict[str, Any], dict[str, Any]]:
    first = next(iter(tables.values()))
    patients, several = list(first.patient_ids), len(np.unique(first.folds)) > 1
    how: dict[str, Any] = {
        "folds": first.folds if several else None,
        "num_resamples": study.num_resamples,
        "seed": study.seed,
    }
    models = {name: table.probabilities for name, table in tables.items()}

    def draw(asked: Figures) -> Any:
        return bootstrap(asked, first.labels, models, patients, **how)

    scores = draw(headline_draws)
    record = {
        "num_exams": len({str(name).rpartition("/")[0] for name in first.exam_ids}),
        "num_patients": len(set(patients)),
        "headline": plain_scores(scores),
        "operating": None,
        "classes": None,
        "belief": None,
    }
    if positive:
        record["operating"] = operating_evidence(
            first.labels, models, patients, positive, specificities=SPECIFICITIES, **how
        )
    if not brief:
        record["classes"] = plain_scores(draw(class_figures(class_names)))
        record["belief"] = plain_scores(draw(belief_figures()))
        # An exam stands there once a seed.
        exams = {str(name).rpartition("/")[0]: label for name, label in zip(first.exam_ids, first.labels, strict=True)}
        labels = np.array(list(exams.values()))
        record["class_counts"] = {name: int((labels == place).sum()) for place, name in enumerate(class_names)}
    return record, scores


def _claims(study: StudyConfig, scores: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for first, second, what in study.claims:
        sets = {}
        for name, mine in scores.items():
            if first in mine and second in mine:
                gaps = paired_differences(mine[first], mine[second])
                sets[name] = {
                    "differences": {figure: asdict(gap) for figure, gap in gaps.items()},
                    "verdicts": {figure: verdict(gap) for figure, gap in gaps.items()},
                }
        found.append({"what": what, "with": first, "without": second, "sets": sets})
    return found
