"""Evaluate: a run's test fold beside the metadata-only baselines, as `report.html` and `metrics.json`.

`metrics.json` holds (shares of 1, null where a figure is not defined):

    run, stage, model            what was scored; `model` is its name among the models below
    fold, num_folds, split       the test fold, and what the folds are grouped by
    shards_hash, classes         the data, and the order of the classes
    unvetted                     true where the run, or one before it, used entries of a corpus that nobody has vetted
    level, num_resamples         of the intervals: percentiles over resamples of the patients
    baselines                    name -> what it reads
    sets.all|complete|masked     num_exams, num_patients,
                                 models: name -> macro_f1|accuracy|balanced_accuracy|auroc -> value, low, high
                                 differences: baseline -> the same figures, ours minus it, paired
                                 per_class: name -> [class, precision, recall, f1, auroc, num_exams]
                                 confusion: ours, true class by row
    per_photo                    the same for single photos (num_exams counts them); null where no exam has two
    per_class, confusion         of ours, on all exams

`complete` and `masked` are there where the data set declares blocks that go missing together.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from prima_ray.base import PrimaError, is_uri, read_json, write_atomic, write_json
from prima_ray.config import read_yaml
from prima_ray.data.fetched import local_copy
from prima_ray.data.plan import ExamIndex, Roles, split_roles
from prima_ray.data.schema import join
from prima_ray.data.storage import Folder, WorkingCopy
from prima_ray.evaluation.baselines import metadata_baselines
from prima_ray.evaluation.metrics import HEADLINE, confusion, headline_draws, per_class
from prima_ray.evaluation.plots import confusion_plot, per_class_plot, training_plot
from prima_ray.evaluation.report import Report, Table, render, text_table
from prima_ray.evaluation.statistics import LEVEL, Interval, bootstrap, paired_differences
from prima_ray.inference.predictor import Predictor
from prima_ray.stages.row_sets import RowSet, photo_set, row_sets
from prima_ray.stages.rundir import CONFIG, RECORD, check_outputs, read_record

_log = logging.getLogger(__name__)
_FEW_EXAMS = 10
_MEND = "Copy the run again, or train it again."
_MEND_OUT = "Name a new folder, or the one of an earlier report."


@dataclass(frozen=True)
class _Run:
    """A finished run that diagnoses, and the data it was trained on."""

    address: str
    """As the user named it."""
    path: Path
    """A local copy of it, where it lies on an object store."""
    record: Mapping[str, Any]
    config: Mapping[str, Any]
    index: ExamIndex
    roles: Roles
    """Exams with a diagnosis."""
    model: str
    """The name of ours in the tables."""


@dataclass(frozen=True)
class _Scored:
    """A set of exams with its figures."""

    rows: RowSet
    table: Table
    differences: Mapping[str, Mapping[str, Interval]]
    """Baseline -> ours minus it."""
    per_class: Mapping[str, list[dict[str, Any]]]
    confusion: np.ndarray[Any, np.dtype[np.int64]]


def run_evaluate(
    run_dir: str,
    *,
    out: str | None = None,
    shards: str | None = None,
    num_resamples: int = 1000,
    notes: Sequence[str] = (),
) -> Path | str:
    """Score a run of finetune or fuse; returns the folder, or its address, of `report.html` and `metrics.json`.

    Args:
        out: default `RUN/evaluation`.
        shards: where the run's shards are now; default where they were.
        num_resamples: bootstrap resamples.
        notes: sentences that the page shows first.

    Raises:
        PrimaError: no finished run that diagnoses, a file of it is missing, its shards are gone or were replaced, it
            holds nothing out (`fold: none`), or ``out`` holds something else than an earlier report.
    """
    address = out if out is not None else join(run_dir, "evaluation")
    if not is_uri(address):
        _evaluate(run_dir, Path(address), shards, num_resamples, notes)
        return Path(address)
    with tempfile.TemporaryDirectory(prefix="prima-evaluate-") as aside:
        files = WorkingCopy(Path(aside) / "report", Folder.at(address))
        # An earlier report is overwritten, anything else is refused.
        foreign = sorted(set(files.store.files()) - {"report.html", "metrics.json"})
        if foreign:
            raise PrimaError(
                f"--out holds something that is no report of `prima evaluate`: {foreign[0]}",
                where=address,
                mend=_MEND_OUT,
            )
        files.pull()
        _evaluate(run_dir, files.local, shards, num_resamples, notes)
        files.push()
    return address


def _evaluate(run_dir: str, target: Path, shards: str | None, num_resamples: int, notes: Sequence[str]) -> None:
    run = _open(run_dir, shards, target)
    load = lru_cache(maxsize=1)(lambda: Predictor.load(run.path))
    sets = row_sets(run.path, run.index, run.roles, model=run.model, load=load)
    photos = photo_set(sets[0], run.index, model=run.model, load=load)
    scored = [_score(item, run, num_resamples) for item in sets]
    by_photo = _score(photos, run, num_resamples) if photos else None
    everything = [*scored, by_photo] if by_photo else scored
    write_atomic(target / "report.html", render(_report(run, everything, notes)))
    # Last: whoever finds the figures finds the page.
    write_json(target / "metrics.json", _metrics(run, scored, by_photo, num_resamples))
    for item in everything:
        _log.info("%s\n", text_table(item.table))
    for sentence in _verdicts(everything):
        _log.info("%s", sentence)


def _check_out(target: Path, run: Path) -> None:
    """The report gets a folder of its own; only an earlier report is overwritten."""
    there = next(folder for folder in (target, *target.absolute().parents) if os.path.lexists(folder))
    if not there.is_dir():
        what = "is a file, not a folder" if there == target else "cannot be made (its folder is a file)"
        raise PrimaError(f"--out {what}", where=target, mend=_MEND_OUT)
    if not os.access(there, os.W_OK | os.X_OK):
        raise PrimaError("--out cannot be written (Permission denied)", where=target, mend=_MEND_OUT)
    if there != target:
        return
    if target.resolve() == run.resolve():
        raise PrimaError("--out is the run itself, whose metrics.json is another", where=target, mend=_MEND_OUT)
    foreign = sorted(item.name for item in target.iterdir() if not _is_ours(item))
    if foreign:
        raise PrimaError(
            f"--out holds something that is no report of `prima evaluate`: {foreign[0]}", where=target, mend=_MEND_OUT
        )


def _is_ours(file: Path) -> bool:
    if not file.is_file():
        return False
    if file.name == "metrics.json":
        found: Any = None
        with contextlib.suppress(PrimaError):
            found = read_json(file)
        return isinstance(found, dict) and {"shards_hash", "sets"} <= set(found)
    if file.name == "report.html":
        return b"prima evaluate" in file.read_bytes()
    # What a kill leaves of `write_atomic`.
    return file.name.startswith((".metrics.json.", ".report.html."))


def _open(address: str, shards: str | None, target: Path) -> _Run:
    record, path = read_record(address), local_copy(address)
    if record["stage"] not in ("finetune", "fuse"):
        raise PrimaError(
            f"a run of {record['stage']} does not diagnose", where=path, mend="Name a run of `prima fuse`."
        )
    _check_out(target, path)
    check_outputs(path, record)
    config = read_yaml(path / CONFIG)
    absent = [key for key in ("fold", "val_fold", "split") if key not in config]
    if absent:
        raise PrimaError(f"damaged: it has no key {absent[0]!r}", where=path / CONFIG)
    if config["fold"] == "none":
        raise PrimaError(
            "this run trained on every fold (fold: none): no exam is held out to score it on",
            where=path,
            mend="Score a run of the same config with a test fold; the data it saw says nothing about new patients.",
        )
    if "shards" not in record["inputs"]:
        raise PrimaError("damaged: its inputs do not name the shards", where=path / RECORD, mend=_MEND)
    parent = record["inputs"]["shards"]
    index = _read_shards(shards or parent["path"], parent["hash"], moved=shards is None)
    roles = split_roles(index, fold=config["fold"], val_fold=config["val_fold"], split=config["split"])
    roles = Roles(*(rows[index.labels[rows] >= 0] for rows in (roles.train, roles.val, roles.test)))
    if not len(roles.test):
        raise PrimaError(f"no exam of the test fold {config['fold']} has a diagnosis", where=index.shards)
    model = "PRIMA (photos and attributes)" if record["stage"] == "fuse" else "photos alone"
    return _Run(address, path, record, config, index, roles, model)


def _read_shards(shards: str, wanted: str, *, moved: bool) -> ExamIndex:
    try:
        index = ExamIndex.read(shards)
    except PrimaError as error:
        if moved and not Path(shards).exists() and "://" not in shards:
            raise PrimaError(
                "the run's shards are no longer here", where=shards, mend="Say where they are: --shards FOLDER."
            ) from None
        raise error
    if index.manifest.content_hash != wanted:
        raise PrimaError(
            f"these are not the shards that the run was trained on: content hash {index.manifest.content_hash[:12]}, "
            f"the run's record says {wanted[:12]}",
            where=shards,
            mend="Their folds may differ, so test exams may have been trained on. Name the right ones with --shards.",
        )
    return index


def _score(item: RowSet, run: _Run, num_resamples: int) -> _Scored:
    labels, patients = run.index.labels[item.rows], list(run.index.patient_ids[item.rows])
    scores = bootstrap(headline_draws, labels, item.probabilities, patients, num_resamples=num_resamples)
    names = run.index.manifest.data_set.class_names
    return _Scored(
        rows=item,
        table=Table(
            title=item.title,
            note=item.note,
            unit="photos" if item.name == "photos" else "exams",
            num_exams=len(labels),
            num_patients=len(set(patients)),
            rows={name: found.intervals() for name, found in scores.items()},
        ),
        differences={
            name: paired_differences(scores[run.model], found) for name, found in scores.items() if name != run.model
        },
        per_class={name: per_class(labels, found, names) for name, found in item.probabilities.items()},
        confusion=confusion(labels, item.probabilities[run.model]),
    )


# ---------------------------------------------------------------------------------------------------- what is written


def _metrics(run: _Run, scored: Sequence[_Scored], by_photo: _Scored | None, num_resamples: int) -> dict[str, Any]:
    manifest = run.index.manifest
    return {
        "run": run.address,
        "stage": run.record["stage"],
        "model": run.model,
        "fold": run.config["fold"],
        "num_folds": manifest.num_folds,
        "split": run.config["split"],
        "shards_hash": manifest.content_hash,
        "classes": list(manifest.data_set.class_names),
        "unvetted": _is_unvetted(run),
        "level": LEVEL,
        "num_resamples": num_resamples,
        "baselines": _baselines(run),
        "sets": {item.rows.name: _plain(item) for item in scored},
        "per_photo": _plain(by_photo) if by_photo else None,
        "per_class": scored[0].per_class[run.model],
        "confusion": scored[0].confusion.tolist(),
    }


def _plain(item: _Scored) -> dict[str, Any]:
    def plain(models: Mapping[str, Mapping[str, Interval]]) -> dict[str, Any]:
        return {name: {key: asdict(value) for key, value in figures.items()} for name, figures in models.items()}

    return {
        "num_exams": item.table.num_exams,
        "num_patients": item.table.num_patients,
        "models": plain(item.table.rows),
        "differences": plain(item.differences),
        "per_class": item.per_class,
        "confusion": item.confusion.tolist(),
    }


def _report(run: _Run, scored: Sequence[_Scored], notes: Sequence[str]) -> Report:
    data_set = run.index.manifest.data_set
    whole = scored[0]
    pictures = {
        "Confusion matrix of the test fold: counts, shaded by the share of the true class.": confusion_plot(
            whole.confusion, data_set.class_names
        ),
        "F1 by class, beside the baselines.": per_class_plot(whole.per_class),
    }
    steps = _steps(run.path)
    if steps:
        pictures["Training loss, step by step."] = training_plot(steps)
    return Report(
        title=f"{data_set.title or data_set.name}: {run.model}",
        subtitle=f"Test fold {run.config['fold']} of {run.index.manifest.num_folds} (0 to "
        f"{run.index.manifest.num_folds - 1}), grouped by {run.config['split']}; one model, trained once.",
        verdict=[*notes, *_verdicts(scored)],
        warnings=_warnings(run, scored),
        tables=[item.table for item in scored],
        baselines=_baselines(run),
        per_class=whole.per_class[run.model],
        phrases={item.name: item.phrase for item in data_set.classes},
        pictures=pictures,
        facts=_facts(run),
        commands=[
            f"prima {run.record['stage']} {run.address}/config.yaml --set out=NEW_FOLDER",
            "prima evaluate NEW_FOLDER",
        ],
    )


def _baselines(run: _Run) -> dict[str, str]:
    return {item.title: item.inputs for item in metadata_baselines(run.index.manifest.data_set)}


def _verdicts(scored: Sequence[_Scored]) -> list[str]:
    """A sentence a set of exams, on macro F1 against the strongest baseline there."""
    found = [_verdict(item) for item in scored if item.rows.name != "photos" and item.differences]
    return found or ["There is no metadata-only baseline to compare with."]


def _verdict(item: _Scored) -> str:
    if not item.table.num_exams:
        return f"{item.table.title}: there are none in the test fold."
    best = max(item.differences, key=lambda name: item.table.rows[name]["macro_f1"].value)
    gap = item.differences[best]["macro_f1"]
    word = "better than" if gap.low > 0 else "worse than" if gap.high < 0 else "not distinguishable from"
    interval = f", 95 % interval {100 * gap.low:+.1f} to {100 * gap.high:+.1f}" if math.isfinite(gap.low) else ""
    return (
        f"{item.table.title}: macro F1 is {word} the strongest metadata-only baseline ({best}). Difference "
        f"{100 * gap.value:+.1f} points{interval}, paired over patients."
    )


def _warnings(run: _Run, scored: Sequence[_Scored]) -> list[str]:
    """What a reader must know before believing a figure."""
    found = []
    if _is_unvetted(run):
        found.append(
            "Unvetted: this run, or one that it builds on, used entries of a risk corpus that nobody has vetted. Its "
            "figures are those of an experiment."
        )
    rows = scored[0].per_class[run.model]
    absent = [row["class"] for row in rows if not row["num_exams"]]
    few = [f"{row['class']} ({row['num_exams']})" for row in rows if 0 < row["num_exams"] < _FEW_EXAMS]
    if absent:
        found.append(f"The test fold has no exam of {', '.join(absent)}: averages run over the other classes.")
    if few:
        found.append(f"The test fold has very few exams of {', '.join(few)}: macro averages hang on each of them.")
    if any(item.table.num_patients == 1 for item in scored):
        found.append("All exams are of one patient: there is nothing to draw intervals from.")
    return found


def _is_unvetted(run: _Run) -> bool:
    # Runs of before there were corpora do not say.
    return bool(run.record.get("unvetted", False))


def _facts(run: _Run) -> dict[str, str]:
    data_set, record, manifest = run.index.manifest.data_set, run.record, run.index.manifest
    metrics = read_json(run.path / "metrics.json")
    if not isinstance(metrics, dict):
        raise PrimaError("damaged: holds no object", where=run.path / "metrics.json", mend=_MEND)
    chosen = "by the validation fold" if len(run.roles.val) else "the last, there was no validation fold"
    return {
        "data": f"{data_set.title or data_set.name} ({data_set.license or 'licence not stated'}), "
        f"{manifest.num_exams} exams, {manifest.num_images} photos",
        "exams": f"{len(run.roles.train)} trained, {len(run.roles.val)} validated, {len(run.roles.test)} are tested",
        "classes": ", ".join(f"{item.name}: {item.phrase}" for item in data_set.classes),
        "attributes": ", ".join(data_set.attribute_names) or "none",
        "chosen checkpoint": f"step {metrics.get('best_step')}, {chosen}",
        "seed": str(record["seed"]),
        "versions": ", ".join(f"{name} {version}" for name, version in record["versions"].items()),
        "commit": str(record["git_commit"] or "not a checkout"),
        "figures": ", ".join(HEADLINE.values()) + " (macro, one class against the rest); averages over the classes "
        "that occur",
        **({"citation": data_set.citation} if data_set.citation else {}),
    }


def _steps(run: Path) -> list[dict[str, Any]]:
    path = run / "steps.jsonl"
    if not path.exists():
        return []
    try:
        steps = [json.loads(line) for line in path.read_text().splitlines()]
    except ValueError as error:
        raise PrimaError(f"not valid JSON ({error})", where=path) from None
    for number, step in enumerate(steps, start=1):
        if not isinstance(step, dict) or not all(isinstance(step.get(key), int | float) for key in ("step", "loss")):
            raise PrimaError(f"damaged: line {number} is not a step with its loss", where=path, mend=_MEND)
    return steps
