"""Compare: several runs beside each other on the exams that they share, as `report.html` and `metrics.json`.

The first run is ours: differences are ours minus another, paired over the patients. `metrics.json` holds:

    runs                         addresses, ours first
    stages, folds, splits        run -> its own
    shards_hash, classes         the data, and the order of the classes
    config_differences           run -> keys in which its config differs from ours
    level, num_resamples         of the intervals
    num_exams, num_patients      that all runs hold out
    sets.all|complete            num_exams, num_patients, `headline`, `classes` (`<class>.f1` and the like),
                                 `operating`, `belief`: models, differences and verdicts, see
                                 `evaluation.evidence.plain_scores`
    class_counts                 class -> shared exams
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from prima_ray.base import PrimaError, StrictConfig, write_atomic, write_json
from prima_ray.config import differing_keys
from prima_ray.data.description import DataSetConfig
from prima_ray.evaluation.baselines import has_blocks
from prima_ray.evaluation.comparison import PredictionTable, check_unseen, share_exams
from prima_ray.evaluation.evidence import belief_figures, operating_evidence, plain_scores
from prima_ray.evaluation.metrics import HEADLINE, class_figures, headline_draws
from prima_ray.evaluation.operating import SPECIFICITIES, positive_classes
from prima_ray.evaluation.report import Grid, Report, Section, Table, render, text_table
from prima_ray.evaluation.sections import difference_grid, interval_cell, operating_section
from prima_ray.evaluation.statistics import LEVEL, Interval, bootstrap
from prima_ray.stages.report_folder import ReportKind, check_report_folder
from prima_ray.stages.row_sets import read_predictions
from prima_ray.stages.tested_run import TestedRun, open_tested

_log = logging.getLogger(__name__)
REPORT = ReportKind("compare", frozenset({"shards_hash", "runs"}))
_BELIEF = {
    "nll": ("NLL", 1.0, 3),
    "ece": ("ECE, %", 100.0, 1),
    "brier": ("Brier", 1.0, 3),
    "aurc": ("AURC, %", 100.0, 1),
}
_TITLES = {"all": "All shared exams", "complete": "Shared exams with complete metadata"}


class CompareConfig(StrictConfig):
    """What a comparison looks at."""

    num_resamples: int = Field(default=1000, ge=1)
    """Bootstrap resamples of the patients."""
    seed: int = 0
    """Of the resamples."""
    positive: tuple[str, ...] | None = None
    """Classes that are held against the rest; None: those that the data set declares malignant."""
    specificities: tuple[float, ...] = SPECIFICITIES


def run_compare(
    run_dirs: Sequence[str], *, out: str = "comparison", shards: str | None = None, config: CompareConfig | None = None
) -> Path:
    """Put runs of finetune or fuse beside each other; returns the folder of `report.html` and `metrics.json`.

    Args:
        run_dirs: two or more; the first is ours.
        shards: where the runs' shards are now; default where they were.

    Raises:
        PrimaError: fewer than two runs, one named twice, one that cannot be scored (see `prima evaluate`), runs of
            other shards or without an exam in common, or a run that has seen patients whom another was tested on.
    """
    settings = config or CompareConfig()
    target = Path(out)
    if len(run_dirs) < 2:
        raise PrimaError("one run cannot be compared", mend="Name two or more; the first is ours.")
    twice = sorted({name for name in run_dirs if list(run_dirs).count(name) > 1})
    if twice:
        raise PrimaError("this run is named twice", where=twice[0], mend="Name each run once.")
    check_report_folder(target, REPORT)
    runs = {address: open_tested(address, shards) for address in run_dirs}
    _check_shards(runs)
    tables = share_exams({address: _table(run) for address, run in runs.items()})
    _check_leak(runs, tables)
    metrics = _metrics(runs, tables, settings)
    report = _report(runs, metrics)
    write_atomic(target / "report.html", render(report))
    # Last: whoever finds the figures finds the page.
    write_json(target / "metrics.json", metrics)
    for table in report.tables:
        _log.info("%s\n", text_table(table))
    for sentence in report.verdict:
        _log.info("%s", sentence)
    return target


def _check_shards(runs: Mapping[str, TestedRun]) -> None:
    first = next(iter(runs.values()))
    for address, run in runs.items():
        mine, other = first.index.manifest.content_hash, run.index.manifest.content_hash
        if mine != other:
            raise PrimaError(
                f"trained on other shards than {first.address}: {run.index.shards} (content hash {other[:12]}), not "
                f"{first.index.shards} ({mine[:12]})",
                where=address,
                mend="Only runs on the same shards can be compared. Train one of them again on the other's.",
            )


def _table(run: TestedRun) -> PredictionTable:
    rows = run.roles.test
    return PredictionTable(
        exam_ids=run.index.exam_ids[rows],
        patient_ids=run.index.patient_ids[rows],
        labels=run.index.labels[rows],
        probabilities=read_predictions(run.path, run.index, rows),
        folds=np.full(len(rows), run.config["fold"], dtype=np.int64),
    )


def _check_leak(runs: Mapping[str, TestedRun], tables: Mapping[str, PredictionTable]) -> None:
    """Of runs that are split by lesion all have seen the patients, and the page says so; one among others is unfair."""
    if all(run.config["split"] == "lesion" for run in runs.values()):
        return
    patients = next(iter(tables.values())).patient_ids
    for address, run in runs.items():
        trained = np.concatenate([run.roles.train, run.roles.val])
        check_unseen(run.index.patient_ids[trained], patients, what="patient", where=address)


# ---------------------------------------------------------------------------------------------------- what is written


def _metrics(
    runs: Mapping[str, TestedRun], tables: Mapping[str, PredictionTable], config: CompareConfig
) -> dict[str, Any]:
    first, index = next(iter(tables.values())), next(iter(runs.values())).index
    ours, data_set = next(iter(runs.values())), index.manifest.data_set
    sets = {"all": np.arange(len(first))}
    if data_set.blocks:
        place = {exam: row for row, exam in enumerate(index.exam_ids)}
        known = index.attribute_rows(np.array([place[exam] for exam in first.exam_ids]))
        sets["complete"] = np.flatnonzero(has_blocks(known, data_set))
    positive = positive_classes(data_set, config.positive)
    return {
        "runs": list(runs),
        "stages": {address: run.record["stage"] for address, run in runs.items()},
        "folds": {address: run.config["fold"] for address, run in runs.items()},
        "splits": {address: run.config["split"] for address, run in runs.items()},
        "unvetted": [address for address, run in runs.items() if run.unvetted],
        "shards_hash": index.manifest.content_hash,
        "classes": list(data_set.class_names),
        "config_differences": {
            address: differing_keys(run.config, ours.config, ignored=frozenset({"out"}))
            for address, run in runs.items()
            if run is not ours
        },
        "level": LEVEL,
        "num_resamples": config.num_resamples,
        "positive": [data_set.class_names[place] for place in positive],
        "num_exams": len(first),
        "num_patients": len(set(first.patient_ids)),
        "sets": {
            name: _figures({address: table.take(rows) for address, table in tables.items()}, data_set, positive, config)
            for name, rows in sets.items()
        },
        "class_counts": {name: int((first.labels == place).sum()) for place, name in enumerate(data_set.class_names)},
    }


def _figures(
    tables: Mapping[str, PredictionTable], data_set: DataSetConfig, positive: Sequence[int], config: CompareConfig
) -> dict[str, Any]:
    names = data_set.class_names
    first = next(iter(tables.values()))
    models, patients = {address: table.probabilities for address, table in tables.items()}, list(first.patient_ids)
    how: dict[str, Any] = {"num_resamples": config.num_resamples, "seed": config.seed}
    asked = {"specificities": config.specificities, **how}
    return {
        "num_exams": len(first),
        "num_patients": len(set(patients)),
        "headline": plain_scores(bootstrap(headline_draws, first.labels, models, patients, **how)),
        "operating": operating_evidence(first.labels, models, patients, positive, **asked) if positive else None,
        "classes": plain_scores(bootstrap(class_figures(names), first.labels, models, patients, **how)),
        "belief": plain_scores(bootstrap(belief_figures(), first.labels, models, patients, **how)),
    }


def _report(runs: Mapping[str, TestedRun], metrics: Mapping[str, Any]) -> Report:
    ours = next(iter(runs.values()))
    data_set, count = ours.index.manifest.data_set, len(runs)
    sets = {name: record for name, record in metrics["sets"].items() if record["num_exams"]}
    tables = [
        Table(
            title=_TITLES[name],
            note="Only exams that every run holds out.",
            unit="exams",
            num_exams=record["num_exams"],
            num_patients=record["num_patients"],
            rows={
                address: {figure: Interval(**item) for figure, item in found.items()}
                for address, found in record["headline"]["models"].items()
            },
        )
        for name, record in sets.items()
    ]
    return Report(
        title=f"{data_set.title or data_set.name}: {count} runs",
        subtitle=f"{metrics['num_exams']} exams of {metrics['num_patients']} patients that all {count} runs hold out. "
        "The first run is ours.",
        verdict=_verdicts(sets),
        warnings=_warnings(metrics),
        tables=tables,
        baselines={},
        per_class=[],
        phrases={},
        pictures={},
        sections=_sections(sets, metrics),
        facts={
            **{
                address: f"{run.record['stage']}, test fold {run.config['fold']}, grouped by {run.config['split']}, "
                f"seed {run.record['seed']}; {_differs(metrics, address)}"
                for address, run in runs.items()
            },
            "data": f"{data_set.title or data_set.name} ({data_set.license or 'licence not stated'})",
            **({"citation": data_set.citation} if data_set.citation else {}),
        },
        commands=[f"prima compare {' '.join(runs)}"],
    )


def _differs(metrics: Mapping[str, Any], address: str) -> str:
    if address not in metrics["config_differences"]:
        return "ours"
    keys = metrics["config_differences"][address]
    return f"its config differs in {keys}" if keys else "the same config"


def _verdicts(sets: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A sentence for each set of exams and other run, on macro F1."""
    found = []
    for name, record in sets.items():
        for other, gaps in record["headline"]["differences"].items():
            gap, word = gaps["macro_f1"], record["headline"]["verdicts"][other]["macro_f1"]
            words = {"better": "better than", "worse": "worse than"}.get(word, "not distinguishable from")
            interval = (
                f", 95 % interval {100 * gap['low']:+.1f} to {100 * gap['high']:+.1f}" if word != "too few" else ""
            )
            found.append(
                f"{_TITLES[name]}: our macro F1 is {words} that of {other}. Difference {100 * gap['value']:+.1f} "
                f"points{interval}, paired over patients."
            )
    return found


def _warnings(metrics: Mapping[str, Any]) -> list[str]:
    found = []
    if metrics["unvetted"]:
        found.append(
            f"Unvetted: {', '.join(metrics['unvetted'])} used entries of a risk corpus that nobody has vetted, or "
            "build on a run that did."
        )
    if set(metrics["splits"].values()) == {"lesion"}:
        found.append("Grouped by lesion: the models may have seen other exams of these patients in training.")
    return found


def _sections(sets: Mapping[str, Mapping[str, Any]], metrics: Mapping[str, Any]) -> list[Section]:
    headline = [difference_grid(record["headline"], HEADLINE, caption=_TITLES[name]) for name, record in sets.items()]
    whole = sets["all"]
    belief = [
        (
            address,
            *(interval_cell(found[key], scale=scale, digits=digits) for key, (_, scale, digits) in _BELIEF.items()),
        )
        for address, found in whole["belief"]["models"].items()
    ]
    names = {key: title for key, (title, _, _) in _BELIEF.items()}
    classes = [
        (
            name,
            *(interval_cell(found[f"{name}.f1"]) for found in whole["classes"]["models"].values()),
            *(
                (found[f"{name}.f1"], interval_cell(whole["classes"]["differences"][other][f"{name}.f1"], sign=True)[1])
                for other, found in whole["classes"]["verdicts"].items()
            ),
            str(count),
        )
        for name, count in metrics["class_counts"].items()
    ]
    others = [f"ours beside {other}" for other in whole["classes"]["verdicts"]]
    sections = [
        Section("Differences", "Ours minus the other, in points, paired over patients.", headline),
        Section(
            "Class by class",
            "F1 on all shared exams, in %.",
            [Grid(["class", *metrics["runs"], *others, "exams"], classes)],
        ),
    ]
    if metrics["positive"]:
        operating = {_TITLES[name]: record["operating"] for name, record in sets.items()}
        sections.append(operating_section(metrics["positive"], operating))
    sections.append(
        Section(
            "Can the probabilities be believed?",
            "On all shared exams, calibrated; lower is better.",
            [
                Grid(["run", *names.values()], belief, ours=True),
                difference_grid(whole["belief"], names, caption="Verdicts on ours", verdicts_only=True),
            ],
        )
    )
    return sections
