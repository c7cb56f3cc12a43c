"""`prima study`: plan the cells, run what is not finished, ask what remains to be asked, and write the page."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from prima_ray.base import PrimaError, write_atomic, write_json
from prima_ray.config import dump_config
from prima_ray.data.run_record import CONFIG
from prima_ray.evaluation.report import render, text_table
from prima_ray.stages.out_lock import open_alone
from prima_ray.stages.rundir import RunDir, open_run
from prima_ray.studies.answers import Everything, on_finished_folds
from prima_ray.studies.cells import Cell, cells_folder, plan_study
from prima_ray.studies.config import StudyConfig
from prima_ray.studies.published import FILE, RunFacts
from prima_ray.studies.report import build_report, count_of, verdict_sentences
from prima_ray.studies.results import figures
from prima_ray.studies.schedule import duration
from prima_ray.studies.sitting import Sitting, shards_of

_log = logging.getLogger(__name__)
_IDENTITY = frozenset({"out", "inputs", "split", "scored_on", "ours"})
"""Keys that make a study this one. With any other key changed it goes on: its runs are named by what decides them, and
its page is made anew.
"""
_MAY_CHANGE = frozenset(StudyConfig.model_fields) - _IDENTITY
_MEND_SO_FAR = "Run the study without --so-far, or name the `answers.parquet` of another machine in `answers`."


def run_study(config: StudyConfig) -> Path:
    """Run a study to its end, or take it up where it stopped; returns the folder of `report.html`, `metrics.json` and
    `answers.parquet`.

    Raises:
        PrimaError: a mistake in the study or in a config that it names, a fold that leaks, or a run that failed.
    """
    with _opened(config) as run:
        shards = shards_of(config)
        sitting = Sitting(config.sitting(), shards)
        sitting.announce()
        failure: PrimaError | None = None
        try:
            sitting.ask()
        except PrimaError as error:
            failure = error
        sitting.publish(run.path)
        everything = sitting.gather()
        if failure and not everything[config.ours]:
            raise failure
        _write(run.path, config, sitting, sitting.config, everything)
        if failure:
            raise failure
        return run.path


def study_so_far(config: StudyConfig) -> Path:
    """The same files of what there is, without running anything; a study that is under way is left alone.

    The page stands on the folds that most variants have finished, and leaves out those that are behind.

    Raises:
        PrimaError: see `run_study`; or nothing of ours is finished.
    """
    shards = shards_of(config, train=False)
    sitting = Sitting(config.sitting(), shards)
    everything = sitting.gather()
    if not everything[config.ours]:
        raise PrimaError(
            f"no run of {config.ours} is finished yet, and all others are held against it",
            where=cells_folder(config),
            mend=_MEND_SO_FAR,
        )
    found = on_finished_folds(everything, config.ours)
    shown = sitting.config.cut_to([name for name, answers in found.items() if answers])
    path = open_run(_kept(config), out=config.out, stage="study", execution_keys=_MAY_CHANGE).path
    sitting.publish(path)
    _write(path, config, sitting, shown, {name: found[name] for name in shown.variants}, so_far=True)
    return path


def _kept(config: StudyConfig) -> StudyConfig:
    """As `config.yaml` has it: the folder is the whole study's, whatever a sitting adds or takes from elsewhere."""
    return config.model_copy(update={"only": None, "answers": ()})


def _opened(config: StudyConfig) -> AbstractContextManager[RunDir]:
    return open_alone(_kept(config), out=config.out, stage="study", execution_keys=_MAY_CHANGE, prepared=())


def _write(
    out: Path, whole: StudyConfig, sitting: Sitting, shown: StudyConfig, everything: Everything, *, so_far: bool = False
) -> None:
    """The page and the figures."""
    metrics = figures(shown, sitting.data, everything)
    metrics["waiting"] = [item.title for name, item in whole.variants.items() if name not in shown.variants]
    # Of what is shown: a variant that is left out may have read what nobody has vetted.
    cells, _ = plan_study(shown, sitting.index)
    facts = sitting.book.all_facts(cells.values())
    metrics["runs"] = _times(cells, facts)
    metrics["unvetted"] = any(item.unvetted for item in facts.values())
    command = f"prima study {whole.out}/config.yaml"
    if so_far:
        command += " --so-far"
    if whole.answers:
        command += f" --set 'answers=[{whole.out}/{FILE}]'"
    if whole.only is not None:
        command += f" --set 'only=[{','.join(whole.only)}]'"
    report = build_report(metrics, sitting.index.manifest.data_set, command)
    # What the page names as the way to make it again.
    write_atomic(out / CONFIG, dump_config(_kept(whole)))
    write_atomic(out / "report.html", render(report))
    # Last: whoever finds the figures finds the page.
    write_json(out / "metrics.json", metrics)
    for table in report.tables:
        _log.info("%s\n", text_table(table))
    for sentence in verdict_sentences(metrics):
        _log.info("%s", sentence)
    _tell_times(metrics["runs"])


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
