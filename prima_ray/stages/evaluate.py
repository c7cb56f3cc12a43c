"""Evaluate: a run's test fold beside the metadata-only baselines, as `report.html` and `metrics.json`.

`metrics.json` holds (shares of 1, null where a figure is not defined; an interval is value, low, high):

    run, stage, model            what was scored; `model` is its name among the models below
    fold, num_folds, split       the test fold, and what the folds are grouped by
    shards_hash, classes         the data, and the order of the classes
    unvetted                     true where the run, or one before it, used entries of a corpus that nobody has vetted
    level, num_resamples         of the intervals: percentiles over resamples of the patients
    config                       the evaluation's own keys, resolved
    baselines                    name -> what it reads
    sets.all|complete|masked     num_exams, num_patients,
                                 models: name -> macro_f1|accuracy|balanced_accuracy|auroc -> interval
                                 differences: baseline -> the same figures, ours minus it, paired
                                 verdicts: baseline -> figure -> better|not distinguishable|worse|too few
                                 per_class: name -> [class, precision, recall, f1, auroc, num_exams]
                                 confusion: ours, true class by row
                                 operating: see `evaluation.evidence.operating_evidence`; null without such classes
    per_photo                    the same for single photos (num_exams counts them); null where no exam has two
    per_class, confusion         of ours, on all exams; per_class with `intervals`
    positive                     the classes that `operating` holds against the rest
    calibration                  see `evaluation.evidence.calibration_evidence`, of all exams
    subgroups                    see `evaluation.subgroups.subgroup_evidence`, of all exams
    robustness                   see `evaluation.robustness.robustness_evidence`; null where it was not asked for
    explanations                 see `stages.explanations.explanation_evidence`; null where it was not asked for
    external                     see `stages.external`; null on the run's own data

`complete` and `masked` are there where the data set declares blocks that go missing together.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
from pydantic import Field

from prima_ray.base import PrimaError, StrictConfig, is_uri, write_atomic, write_json
from prima_ray.data.reader import Rows
from prima_ray.data.schema import join, read_manifest
from prima_ray.data.storage import Folder, WorkingCopy
from prima_ray.data.views import fill_color
from prima_ray.evaluation.evidence import calibration_evidence
from prima_ray.evaluation.faithfulness import ExplanationsConfig
from prima_ray.evaluation.operating import SPECIFICITIES, positive_classes
from prima_ray.evaluation.report import render, text_table
from prima_ray.evaluation.robustness import (
    AS_THEY_ARE,
    RobustnessConfig,
    alterations,
    altered,
    robustness_evidence,
)
from prima_ray.evaluation.selective import COVERAGES
from prima_ray.evaluation.statistics import LEVEL
from prima_ray.evaluation.subgroups import SubgroupsConfig, find_subgroups, subgroup_evidence
from prima_ray.inference.attribution import check_installed
from prima_ray.inference.predictor import Predictor
from prima_ray.stages.evaluate_report import build_report, read_baselines
from prima_ray.stages.explanations import Example, examples_of, explanation_evidence
from prima_ray.stages.external import ExternalTest, external_set, open_external
from prima_ray.stages.report_folder import ReportKind, check_report_folder, foreign_file
from prima_ray.stages.row_sets import Load, RowSet, photo_set, read_predictions, row_sets, shard_tables
from prima_ray.stages.scoring import (
    ScoredSet,
    Scoring,
    class_intervals,
    plain_set,
    score_set,
    verdict_sentences,
)
from prima_ray.stages.tested_run import TestedRun, open_tested, read_diagnosing

_log = logging.getLogger(__name__)
REPORT = ReportKind("evaluate", frozenset({"shards_hash", "sets"}))
_Share = Annotated[float, Field(gt=0.0, le=1.0)]


class EvaluateConfig(StrictConfig):
    """What an evaluation looks at."""

    num_resamples: int = Field(default=1000, ge=1)
    """Bootstrap resamples of the patients."""
    seed: int = 0
    """Of the resamples."""
    positive: tuple[str, ...] | None = None
    """Classes that are held against the rest; None: those that the data set declares malignant."""
    specificities: tuple[Annotated[float, Field(gt=0.0, lt=1.0)], ...] = SPECIFICITIES
    """At which the sensitivity is told."""
    coverages: tuple[_Share, ...] = COVERAGES
    """Shares of the exams, the surest first, of which the accuracy is told."""
    subgroups: SubgroupsConfig = SubgroupsConfig()
    robustness: RobustnessConfig = RobustnessConfig()
    explanations: ExplanationsConfig = ExplanationsConfig()


@dataclass(frozen=True)
class _Subject:
    """What is scored, and how to ask about it."""

    run: TestedRun
    test: ExternalTest | None
    """None: the run's own test fold."""
    load: Load
    config: EvaluateConfig

    @property
    def tables(self) -> Callable[[Rows], Iterator[pa.Table]]:
        return self.test.tables if self.test else partial(shard_tables, self.run.index)

    @property
    def others(self) -> list[dict[str, str]]:
        """Attributes of the exams that the run learned from; none where they are not at hand."""
        if self.test:
            return self.test.own.attribute_rows(self.test.learned) if self.test.own is not None else []
        roles = self.run.roles
        return self.run.index.attribute_rows(np.sort(np.concatenate([roles.train, roles.val])))


def run_evaluate(
    run_dir: str,
    *,
    out: str | None = None,
    shards: str | None = None,
    mapping: str | None = None,
    config: EvaluateConfig | None = None,
    notes: Sequence[str] = (),
) -> Path | str:
    """Score a run of finetune or fuse; returns the folder, or its address, of `report.html` and `metrics.json`.

    Args:
        out: default `RUN/evaluation`, with ``mapping`` `RUN/evaluation-<data set>`.
        shards: where the run's shards are now, default where they were; with ``mapping`` the other data set's.
        mapping: a YAML by which another data set is read as the run's own, see `external`.
        notes: sentences that the page shows first.

    Raises:
        PrimaError: no finished run that diagnoses, a file of it is missing, its shards are gone or were replaced, it
            holds nothing out (`fold: none`), a leak, a mapping that does not fit, or ``out`` holds something else than
            an earlier report.
    """
    settings = config or EvaluateConfig()
    if mapping is not None and settings.explanations.enabled:
        raise PrimaError(
            "explanations are checked on a run's own test fold",
            mend="Leave --explanations out where another data set is scored.",
        )
    if settings.explanations.enabled:
        check_installed()
    if mapping is not None and shards is None:
        raise PrimaError("--mapping says how another data set is read", mend="Name its shards: --shards FOLDER.")
    address = out if out is not None else join(run_dir, _folder_name(shards if mapping else None))
    if not is_uri(address):
        check_report_folder(Path(address), REPORT, run=read_diagnosing(run_dir)[1])
        _evaluate(_open(run_dir, shards, mapping, settings), Path(address), notes)
        return Path(address)
    with tempfile.TemporaryDirectory(prefix="prima-evaluate-") as aside:
        files = WorkingCopy(Path(aside) / "report", Folder.at(address))
        # An earlier report is overwritten, anything else is refused.
        foreign = sorted(set(files.store.files()) - {"report.html", "metrics.json"})
        if foreign:
            raise foreign_file(foreign[0], REPORT, where=address)
        files.pull()
        check_report_folder(files.local, REPORT, run=read_diagnosing(run_dir)[1])
        _evaluate(_open(run_dir, shards, mapping, settings), files.local, notes)
        files.push()
    return address


def _folder_name(other: str | None) -> str:
    return "evaluation" if other is None else f"evaluation-{read_manifest(other).data_set.name}"


def _open(run_dir: str, shards: str | None, mapping: str | None, config: EvaluateConfig) -> _Subject:
    test = open_external(run_dir, shards, mapping) if mapping and shards else None
    run = test.run if test else open_tested(run_dir, shards)
    return _Subject(run, test, lru_cache(maxsize=1)(lambda: Predictor.load(run.path)), config)


def _evaluate(subject: _Subject, target: Path, notes: Sequence[str]) -> None:
    run, config = subject.run, subject.config
    positive = positive_classes(run.index.manifest.data_set, config.positive)
    # Wrong keys are told before the work.
    groups = find_subgroups(
        run.index.attribute_rows(run.roles.test), subject.others, run.index.manifest.data_set, config.subgroups
    )
    sets, photos = _row_sets(subject)
    how = Scoring(
        index=run.index,
        model=run.model,
        positive=positive,
        specificities=config.specificities,
        thresholds_from=_validation(subject),
        num_resamples=config.num_resamples,
        seed=config.seed,
    )
    scored = [score_set(item, how) for item in sets]
    by_photo = score_set(photos, how) if photos else None
    whole, patients = sets[0], list(run.index.patient_ids[sets[0].rows])
    labels, again = run.index.labels[whole.rows], {"num_resamples": config.num_resamples, "seed": config.seed}
    metrics = _metrics(subject, scored, by_photo, class_intervals(whole, how)) | {
        "positive": [run.index.manifest.data_set.class_names[place] for place in positive],
        "calibration": _calibration(subject, whole),
        "subgroups": subgroup_evidence(
            labels, whole.probabilities[run.model], patients, groups, min_exams=config.subgroups.min_exams, **again
        ),
        "robustness": _robustness(subject, whole) if config.robustness.enabled else None,
        "explanations": _explanations(subject, whole),
    }
    everything = [*scored, by_photo] if by_photo else scored
    write_atomic(
        target / "report.html", render(build_report(run, everything, metrics, notes, _examples(subject, whole)))
    )
    # Last: whoever finds the figures finds the page.
    write_json(target / "metrics.json", metrics)
    for item in everything:
        _log.info("%s\n", text_table(item.table))
    for sentence in verdict_sentences(everything):
        _log.info("%s", sentence)


def _row_sets(subject: _Subject) -> tuple[list[RowSet], RowSet | None]:
    run, load = subject.run, subject.load
    if subject.test:
        return [external_set(subject.test, load)], None
    sets = row_sets(run.path, run.index, run.roles, model=run.model, load=load)
    return sets, photo_set(sets[0], run.index, model=run.model, load=load)


def _validation(subject: _Subject) -> tuple[Any, Any] | None:
    """Labels and probabilities of the validation fold; None where there is none, or its data are not at hand."""
    run, test = subject.run, subject.test
    index = test.own if test else run.index
    if index is None:
        return None
    rows = test.validated if test else run.roles.val
    return (index.labels[rows], read_predictions(run.path, index, rows)) if len(rows) else None


def _calibration(subject: _Subject, whole: RowSet) -> dict[str, Any]:
    run, config, known = subject.run, subject.config, subject.run.calibration
    completeness = known.completeness(run.index.attribute_rows(whole.rows))
    return {
        "temperature": known.temperature,
        "notes": list(known.notes),
        **calibration_evidence(
            run.index.labels[whole.rows],
            whole.probabilities,
            known.undone(whole.probabilities[run.model], completeness),
            known.sets(whole.probabilities[run.model], completeness),
            list(run.index.patient_ids[whole.rows]),
            class_names=run.index.manifest.data_set.class_names,
            asked_coverage=known.coverage,
            coverages=config.coverages,
            num_resamples=config.num_resamples,
            seed=config.seed,
        ),
    }


def _robustness(subject: _Subject, whole: RowSet) -> dict[str, Any]:
    run, config, predictor = subject.run, subject.config, subject.load()
    wanted = alterations(
        config.robustness,
        reads_attributes=predictor.uses_attributes,
        recorded=subject.others,
        mean_color=fill_color(predictor.config.views),
    )
    as_they_are, known = run.index.attribute_rows(whole.rows), run.calibration
    conditions = {AS_THEY_ARE: whole.probabilities[run.model]}
    answered = {AS_THEY_ARE: known.answered(conditions[AS_THEY_ARE], known.completeness(as_they_are))}
    for item in wanted:
        _log.info("robustness: %s", item.title)
        told: list[Mapping[str, str]] = []
        tables = _noting(altered(subject.tables(whole.rows), item), told)
        conditions[item.name] = predictor.predict_tables(tables)
        answered[item.name] = known.answered(conditions[item.name], known.completeness(told))
    return robustness_evidence(
        run.index.labels[whole.rows],
        conditions,
        list(run.index.patient_ids[whole.rows]),
        titles={item.name: item.title for item in wanted},
        answered=answered,
        num_resamples=config.num_resamples,
        seed=config.seed,
    )


def _noting(tables: Iterator[pa.Table], told: list[Mapping[str, str]]) -> Iterator[pa.Table]:
    """The tables, and as they go by the attributes of their exams."""
    for table in tables:
        told += [dict(pairs or ()) for pairs in table["attributes"].to_pylist()]
        yield table


def _explanations(subject: _Subject, whole: RowSet) -> dict[str, Any] | None:
    config = subject.config
    if not config.explanations.enabled:
        return None
    _log.info("explanations: %d exams", min(config.explanations.num_exams, len(whole.rows)))
    return explanation_evidence(
        subject.load(), subject.run.index, whole.rows, config.explanations, num_resamples=config.num_resamples
    )


def _examples(subject: _Subject, whole: RowSet) -> list[Example]:
    run, config = subject.run, subject.config.explanations
    if not (config.enabled and config.examples):
        return []
    return examples_of(subject.load(), run.index, whole.rows, whole.probabilities[run.model], config)


def _metrics(
    subject: _Subject, scored: Sequence[ScoredSet], by_photo: ScoredSet | None, classes: list[dict[str, Any]]
) -> dict[str, Any]:
    run, manifest = subject.run, subject.run.index.manifest
    return {
        "run": run.address,
        "stage": run.record["stage"],
        "model": run.model,
        "fold": run.config["fold"],
        "num_folds": manifest.num_folds,
        "split": run.config["split"],
        "shards_hash": manifest.content_hash,
        "classes": list(manifest.data_set.class_names),
        "unvetted": run.unvetted,
        "level": LEVEL,
        "num_resamples": subject.config.num_resamples,
        "config": subject.config.model_dump(mode="json"),
        "baselines": read_baselines(run, scored[0]),
        "sets": {item.rows.name: plain_set(item) for item in scored},
        "per_photo": plain_set(by_photo) if by_photo else None,
        "per_class": classes,
        "confusion": scored[0].confusion.tolist(),
        "external": subject.test.record if subject.test else None,
    }
