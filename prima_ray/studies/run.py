"""`prima study`: plan the cells, run what is not finished, ask what remains to be asked, and write the page."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prima_ray.base import PrimaError, write_atomic, write_json
from prima_ray.config import dump_config
from prima_ray.data.plan import ExamIndex
from prima_ray.data.run_record import CONFIG, RECORD
from prima_ray.evaluation.report import render, text_table
from prima_ray.stages.out_lock import open_alone
from prima_ray.studies.answers import check_classifiers, choose_runs, gather_answers, runs_by_variant
from prima_ray.studies.book import AnswerBook
from prima_ray.studies.cells import Cell, CellPlanner, cells_folder, plan_study
from prima_ray.studies.config import StudyConfig
from prima_ray.studies.folds import fold_data
from prima_ray.studies.published import FILE, RunFacts, write_published
from prima_ray.studies.report import build_report, count_of, verdict_sentences
from prima_ray.studies.results import figures
from prima_ray.studies.schedule import Progress, duration, log_of, run_cells

_log = logging.getLogger(__name__)
_IS = frozenset({"out", "inputs", "split", "scored_on", "ours"})
"""Keys that make a study this one. With any other key changed it goes on: its runs are named by what decides them, and
its page is made anew.
"""
_GROWS = frozenset(StudyConfig.model_fields) - _IS
_RUN = "Run the study without --so-far."


def run_study(config: StudyConfig, *, train: bool = True) -> Path:
    """Run a study to its end, or take it up where it stopped; returns the folder of `report.html`, `metrics.json` and
    `answers.parquet`.

    Args:
        train: False runs nothing, and writes the page of what there is.

    Raises:
        PrimaError: a mistake in the study or in a config that it names, a fold that leaks, or a run that failed.
    """
    # A folder is the whole study's, whatever this sitting adds to it.
    whole = config.model_copy(update={"only": None})
    config = config.sitting()
    with open_alone(whole, out=config.out, stage="study", execution_keys=_GROWS, prepared=()) as run:
        shards = shards_of(config, train=train)
        index = ExamIndex.read(shards)
        cells, asked = plan_study(config, index)
        data = fold_data(config, index)
        check_classifiers(config, next(iter(data.values())))
        book = AnswerBook(config, data)
        _announce(config, cells)
        if known := book.num_published(cells[key] for key in set(asked.values())):
            _log.info("study: what %s said is published already", count_of(known, "run"))
        # Where there is nothing to choose, a run is asked everything as soon as it is finished.
        runs = [[cells[key] for key in keys] for keys in runs_by_variant(asked).values()]
        wanted = [(cell, book.sets if len(mine) == 1 else ("val",)) for mine in runs for cell in mine]
        progress = run_all(config, book.to_ask(cells, wanted) if train else {})
        chosen = choose_runs(data, cells, asked, book)
        wanted = [(cell, book.sets) for cell, _ in chosen.values()]
        further = run_all(config, book.to_ask(cells, wanted) if train else {})
        everything = gather_answers(config, data, chosen, book)
        # Of the page that follows: it names this file as the way to make it again.
        write_atomic(run.path / CONFIG, dump_config(whole))
        if not everything[config.ours]:
            refuse_failed(progress)
            refuse_failed(further)
            if not train:
                raise PrimaError(
                    f"no run of {config.ours} is finished yet, and all others are held against it",
                    where=cells_folder(config),
                    mend=_RUN,
                )
        published = book.to_publish(cells, [cell for mine in runs for cell in mine])
        metrics = figures(config, data, everything)
        metrics["waiting"] = [item.title for name, item in whole.variants.items() if name not in config.variants]
        metrics["runs"] = _times(cells, published.runs)
        metrics["unvetted"] = any(facts.unvetted for facts in published.runs.values())
        write_published(run.path / FILE, published, index.manifest.data_set.class_names)
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
        refuse_failed(further)
        return run.path


def shards_of(config: StudyConfig, *, train: bool = True) -> str:
    """The folder of the study's shards, made first where a recipe makes it.

    Raises:
        PrimaError: the run that makes them failed, or is not finished and may not be run.
    """
    if config.inputs.shards is not None:
        return config.inputs.shards
    planner = CellPlanner(config, shards="")
    cell = planner.cell(str(config.inputs.ingest), fold=0, seed=config.seeds[0])
    if not train and not (cell.folder / RECORD).exists():
        raise PrimaError("the study's shards are not made yet", where=cell.folder, mend=_RUN)
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


def _times(cells: Mapping[str, Cell], runs: Mapping[str, RunFacts]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for key, facts in runs.items():
        item = found.setdefault(cells[key].recipe, {"runs": 0, "seconds": 0.0})
        item["runs"] += 1
        item["seconds"] += facts.seconds
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
