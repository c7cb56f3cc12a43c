"""`prima study`: plan the cells, run what is not finished, ask what remains to be asked, and write the page."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prima_ray.base import PrimaError, write_atomic, write_json
from prima_ray.data.plan import ExamIndex
from prima_ray.data.run_record import RECORD
from prima_ray.evaluation.report import render, text_table
from prima_ray.stages.out_lock import open_alone
from prima_ray.stages.rundir import is_unvetted
from prima_ray.studies.answers import answer_cells, check_classifiers, choose_runs, fold_data, gather_answers
from prima_ray.studies.cells import Cell, CellPlanner, plan_study
from prima_ray.studies.config import StudyConfig
from prima_ray.studies.report import build_report, count_of, verdict_sentences
from prima_ray.studies.results import figures
from prima_ray.studies.schedule import Progress, duration, log_of, recorded_seconds, run_cells

_log = logging.getLogger(__name__)
_HOW = frozenset({"context", "cpus_per_cell", "gpus_per_cell", "keep_checkpoints"})
"""Keys that say where and how fast: a study may be taken up with other values."""


def run_study(config: StudyConfig) -> Path:
    """Run a study to its end, or take it up where it stopped; returns the folder of `report.html` and `metrics.json`.

    Raises:
        PrimaError: a mistake in the study or in a config that it names, a fold that leaks, or a run that failed.
    """
    # A folder is the whole study's, whatever this sitting adds to it.
    whole = config.model_copy(update={"only": None})
    config = config.sitting()
    with open_alone(whole, out=config.out, stage="study", execution_keys=_HOW, prepared=()) as run:
        shards = shards_of(config)
        index = ExamIndex.read(shards)
        cells, asked = plan_study(config, index)
        data = fold_data(config, index)
        check_classifiers(config, next(iter(data.values())))
        _announce(config, cells)
        progress = run_all(config, cells)
        chosen = choose_runs(data, cells, asked)
        asks = config.scored_on == "test"
        further = answer_cells(config, [cell for cell, _ in chosen.values()], shards) if asks else {}
        run_all(config, {cell.key: cell for cell in further.values()})
        everything = gather_answers(config, data, chosen, further)
        if not everything[config.ours]:
            refuse_failed(progress)
        metrics = figures(config, data, everything)
        metrics["waiting"] = [item.title for name, item in whole.variants.items() if name not in config.variants]
        metrics["runs"] = _times(cells)
        metrics["unvetted"] = any(is_unvetted(str(cell.folder)) for cell in cells.values())
        command = f"prima study {config.out}/config.yaml"
        if config.only is not None:
            command += f" --set 'only=[{','.join(config.only)}]'"
        report = build_report(metrics, index.manifest.data_set, command)
        write_atomic(run.path / "report.html", render(report))
        # Last: whoever finds the figures finds the page.
        write_json(run.path / "metrics.json", metrics)
        for table in report.tables:
            _log.info("%s\n", text_table(table))
        for sentence in verdict_sentences(metrics):
            _log.info("%s", sentence)
        _tell_times(metrics["runs"])
        refuse_failed(progress)
        return run.path


def shards_of(config: StudyConfig) -> str:
    """The folder of the study's shards, made first where a recipe makes it."""
    if config.inputs.shards is not None:
        return config.inputs.shards
    planner = CellPlanner(config, shards="")
    cell = planner.cell(str(config.inputs.ingest), fold=0, seed=config.seeds[0])
    refuse_failed(run_all(config, planner.cells))
    return str(cell.folder)


def _announce(config: StudyConfig, cells: Mapping[str, Cell]) -> None:
    stages: dict[str, int] = defaultdict(int)
    for cell in cells.values():
        stages[cell.stage] += 1
    told = ", ".join(f"{count} {stage}" for stage, count in stages.items()) or "none"
    variants, runs = count_of(len(config.variants), "variant"), count_of(len(cells), "run")
    _log.info("study: %s, %s (%s)", variants, runs, told)


def run_all(config: StudyConfig, cells: Mapping[str, Cell]) -> Progress:
    """Run what is not finished, as the study says."""
    return run_cells(
        cells,
        config.context,
        cpus_per_cell=config.cpus_per_cell,
        gpus_per_cell=config.gpus_per_cell,
        keep_checkpoints=config.keep_checkpoints,
    )


def _times(cells: Mapping[str, Cell]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for cell in cells.values():
        if (cell.folder / RECORD).exists():
            item = found.setdefault(cell.recipe, {"runs": 0, "seconds": 0.0})
            item["runs"] += 1
            item["seconds"] += recorded_seconds(cell)
    return found


def _tell_times(runs: Mapping[str, Mapping[str, Any]]) -> None:
    for name, item in runs.items():
        _log.info("study: %s: %s, %s in all", name, count_of(item["runs"], "run"), duration(item["seconds"]))


def refuse_failed(progress: Progress) -> None:
    """Raises:
    PrimaError: a run has failed.
    """
    if not progress.failed:
        return
    key, outcome = next(iter(progress.failed.items()))
    cell = progress.cells[key]
    lost = f", and {len(progress.skipped)} that need them were not run" if progress.skipped else ""
    raise PrimaError(
        f"{len(progress.failed)} of {len(progress.cells)} runs failed{lost}; the first, {cell.title}: "
        f"{outcome.failure}",
        where=log_of(cell),
        mend="Mend it and run the same command again: finished runs are kept.",
    )
