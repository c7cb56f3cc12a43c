"""Evaluate: a run's test fold beside the metadata-only baselines, on three sets of rows.

Missingness may tell the label, so every figure stands three times: on all exams, on those with complete metadata, and
on all exams with the blocks that go missing together masked for everybody.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from prima_ray.base import PrimaError, read_json, write_atomic, write_json
from prima_ray.data.description import DataSetConfig
from prima_ray.data.plan import ExamIndex, Roles, split_roles
from prima_ray.data.reader import RowReader, Rows
from prima_ray.evaluation.baselines import BASELINES, mask_blocks, metadata_baselines
from prima_ray.evaluation.metrics import HEADLINE, Probabilities, confusion, headline, per_class
from prima_ray.evaluation.plots import confusion_plot, per_class_plot, training_plot
from prima_ray.evaluation.report import Report, Table, render, text_table
from prima_ray.evaluation.statistics import Interval, intervals, paired_differences
from prima_ray.inference.predictor import Predictor
from prima_ray.stages.rundir import read_record

_log = logging.getLogger(__name__)
_COLUMNS = ("exam_id", "patient_id", "images", "attributes", "label")


@dataclass(frozen=True)
class _RowSet:
    """One of the three sets: its exams, and every model's probabilities for them."""

    name: str
    title: str
    note: str
    rows: Rows
    probabilities: Mapping[str, Probabilities]


def run_evaluate(run_dir: str, *, out: str | None = None, num_resamples: int = 1000) -> Path:
    """Score a run of finetune or fuse; returns the folder of `report.html` and `metrics.json`.

    Args:
        out: default `RUN/evaluation`.
        num_resamples: bootstrap resamples.

    Raises:
        PrimaError: no finished run that diagnoses, its shards are gone, or it holds nothing out (`fold: none`).
    """
    run = Path(run_dir)
    record = read_record(run)
    if record["stage"] not in ("finetune", "fuse"):
        raise PrimaError(f"a run of {record['stage']} does not diagnose", where=run, mend="Name a run of `prima fuse`.")
    config = yaml.safe_load((run / "config.yaml").read_text())
    if config["fold"] == "none":
        raise PrimaError(
            "this run trained on every fold (fold: none): no exam is left to score it on",
            where=run,
            mend="Score a run of the same config with a test fold; the data it saw says nothing about new patients.",
        )
    index = ExamIndex.read(record["inputs"]["shards"]["path"])
    roles = _labelled_roles(index, config)
    model = "PRIMA (photos and attributes)" if record["stage"] == "fuse" else "photos alone"
    sets = _row_sets(run, index, roles, model)
    tables = [_table(item, index, num_resamples) for item in sets]
    target = Path(out) if out else run / "evaluation"
    target.mkdir(parents=True, exist_ok=True)
    differences = [_differences(item, index, model, num_resamples) for item in sets]
    _write(
        target, run=run, record=record, config=config, index=index, sets=sets, tables=tables, differences=differences
    )
    for table in tables:
        _log.info("%s\n", text_table(table))
    return target


def _labelled_roles(index: ExamIndex, config: Mapping[str, Any]) -> Roles:
    roles = split_roles(index, fold=config["fold"], val_fold=config["val_fold"], split=config["split"])
    return Roles(*(rows[index.labels[rows] >= 0] for rows in (roles.train, roles.val, roles.test)))


def _row_sets(run: Path, index: ExamIndex, roles: Roles, model: str) -> list[_RowSet]:
    data_set = index.manifest.data_set
    test = roles.test
    attributes, labels = index.attribute_rows(roles.train), index.labels[roles.train]
    tested = index.attribute_rows(test)
    ours = _read_predictions(run, index, test)
    rivals = {
        BASELINES[name]: found for name, found in metadata_baselines(attributes, labels, tested, data_set).items()
    }
    sets = [_RowSet("all", "All exams", "", test, {model: ours, **rivals})]
    if not data_set.block_attributes:
        return sets
    complete = np.array([data_set.block_attributes <= row.keys() for row in tested], dtype=bool)
    some = _some_of_block(tested, data_set)
    kept = complete if complete.sum() >= 0.5 * some.sum() else some
    sets.append(
        _RowSet(
            "complete",
            "Exams with their metadata",
            "Exams whose blocks were recorded, so that missingness says nothing.",
            test[kept],
            {name: found[kept] for name, found in sets[0].probabilities.items()},
        )
    )
    masked = metadata_baselines(attributes, labels, mask_blocks(tested, data_set), data_set)
    sets.append(
        _RowSet(
            "masked",
            "All exams, blocks masked for everybody",
            f"{', '.join(block.name for block in data_set.blocks)}: treated as missing for every exam.",
            test,
            {
                model: _predict_masked(run, index, test, data_set),
                **{BASELINES[name]: found for name, found in masked.items()},
            },
        )
    )
    return sets


def _some_of_block(rows: Sequence[Mapping[str, str]], data_set: DataSetConfig) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Exams of which every block has at least one attribute: recorded, with gaps."""
    return np.array(
        [all(any(name in row for name in block.attributes) for block in data_set.blocks) for row in rows], dtype=bool
    )


def _read_predictions(run: Path, index: ExamIndex, rows: Rows) -> Probabilities:
    path = run / "predictions.parquet"
    if not path.exists():
        raise PrimaError("no such file", where=path, mend="Run the stage again.")
    table = pq.read_table(path)
    place = {exam: position for position, exam in enumerate(table["exam_id"].to_pylist())}
    absent = [exam for exam in index.exam_ids[rows] if exam not in place]
    if absent:
        raise PrimaError(f"{len(absent)} exams of the test fold have no prediction ({absent[0]}, ...)", where=path)
    names = index.manifest.data_set.class_names
    values = np.column_stack([table[f"prob_{name}"].to_numpy() for name in names])
    return values[[place[exam] for exam in index.exam_ids[rows]]]


def _predict_masked(run: Path, index: ExamIndex, rows: Rows, data_set: DataSetConfig) -> Probabilities:
    predictor = Predictor.load(run)
    return predictor.predict_tables(_tables(index, rows), masked=sorted(data_set.block_attributes))


def _tables(index: ExamIndex, rows: Rows, size: int = 32) -> Iterator[pa.Table]:
    reader = RowReader(index.shards, index.manifest, columns=_COLUMNS)
    for start in range(0, len(rows), size):
        yield reader.read(rows[start : start + size], 0)


def _table(item: _RowSet, index: ExamIndex, num_resamples: int) -> Table:
    labels, patients = index.labels[item.rows], list(index.patient_ids[item.rows])
    return Table(
        title=item.title,
        note=item.note,
        num_exams=len(labels),
        num_patients=len(set(patients)),
        rows={
            name: intervals(headline, labels, found, patients, num_resamples=num_resamples)
            for name, found in item.probabilities.items()
        },
    )


def _differences(item: _RowSet, index: ExamIndex, model: str, num_resamples: int) -> dict[str, dict[str, Interval]]:
    """Ours minus every baseline, on the same exams."""
    labels, patients = index.labels[item.rows], list(index.patient_ids[item.rows])
    if not len(labels):
        return {}
    ours = item.probabilities[model]
    return {
        name: paired_differences(headline, labels, ours, found, patients, num_resamples=num_resamples)
        for name, found in item.probabilities.items()
        if name != model
    }


def _write(
    target: Path,
    *,
    run: Path,
    record: Mapping[str, Any],
    config: Mapping[str, Any],
    index: ExamIndex,
    sets: Sequence[_RowSet],
    tables: Sequence[Table],
    differences: Sequence[Mapping[str, Mapping[str, Interval]]],
) -> None:
    names = index.manifest.data_set.class_names
    labels = index.labels[sets[0].rows]
    by_model = {name: per_class(labels, found, names) for name, found in sets[0].probabilities.items()}
    model, ours = next(iter(sets[0].probabilities.items()))
    counts = confusion(labels, ours, len(names))
    pictures = {
        "Confusion matrix of the test fold: counts, shaded by the share of the true class.": confusion_plot(
            counts, names
        ),
        "F1 by class, beside the baselines.": per_class_plot(by_model),
    }
    if (run / "steps.jsonl").exists():
        steps = [yaml.safe_load(line) for line in (run / "steps.jsonl").read_text().splitlines()]
        pictures["Training loss, step by step."] = training_plot(steps)
    write_json(
        target / "metrics.json",
        {
            "run": str(run),
            "model": model,
            "sets": {
                item.name: {
                    "num_exams": table.num_exams,
                    "num_patients": table.num_patients,
                    "models": {name: _plain(figures) for name, figures in table.rows.items()},
                    "differences": {name: _plain(figures) for name, figures in found.items()},
                }
                for item, table, found in zip(sets, tables, differences, strict=True)
            },
            "per_class": by_model[model],
            "confusion": counts.tolist(),
            "classes": list(names),
        },
    )
    page = Report(
        title=f"{index.manifest.data_set.title or index.manifest.data_set.name}: {model}",
        subtitle=f"Test fold {config['fold']} of {index.manifest.num_folds}, grouped by {config['split']}.",
        verdict=_verdict(tables[0], differences[0]),
        tables=tables,
        per_class=by_model[model],
        pictures=pictures,
        facts=_facts(run, record, index),
        commands=[
            f"prima {record['stage']} {run}/config.yaml --set out=NEW_FOLDER",
            f"prima evaluate {run}",
        ],
    )
    write_atomic(target / "report.html", render(page))


def _plain(figures: Mapping[str, Interval]) -> dict[str, Any]:
    return {name: asdict(item) for name, item in figures.items()}


def _verdict(table: Table, differences: Mapping[str, Mapping[str, Interval]]) -> str:
    """One sentence on macro F1 against the strongest baseline."""
    if not differences:
        return "There is no baseline to compare with."
    best = max(differences, key=lambda name: table.rows[name]["macro_f1"].value)
    gap = differences[best]["macro_f1"]
    word = "better than" if gap.low > 0 else "worse than" if gap.high < 0 else "not distinguishable from"
    return (
        f"On all exams, macro F1 is {word} the strongest metadata-only baseline ({best}): difference "
        f"{100 * gap.value:+.1f} points, 95 % interval {100 * gap.low:+.1f} to {100 * gap.high:+.1f}, paired over "
        "patients."
    )


def _facts(run: Path, record: Mapping[str, Any], index: ExamIndex) -> dict[str, str]:
    data_set = index.manifest.data_set
    metrics = read_json(run / "metrics.json")
    return {
        "data": f"{data_set.title or data_set.name} ({data_set.license or 'licence not stated'}), "
        f"{index.manifest.num_exams} exams, {index.manifest.num_images} photos",
        "classes": ", ".join(f"{item.name}: {item.phrase}" for item in data_set.classes),
        "attributes": ", ".join(data_set.attribute_names),
        "chosen checkpoint": f"step {metrics['best_step']}, by the validation fold",
        "seed": str(record["seed"]),
        "versions": ", ".join(f"{name} {version}" for name, version in record["versions"].items()),
        "commit": str(record["git_commit"] or "not a checkout"),
        "figures": ", ".join(HEADLINE.values()) + "; averages over the classes that occur",
    }
