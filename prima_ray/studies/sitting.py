"""A sitting of a study: what it plans, what is known of it, and the running of what is left."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from prima_ray.base import PrimaError
from prima_ray.data.plan import ExamIndex
from prima_ray.data.run_record import RECORD
from prima_ray.studies.answers import Everything, check_classifiers, choose_runs, gather_answers, runs_by_variant
from prima_ray.studies.book import AnswerBook, is_here
from prima_ray.studies.cells import Cell, CellPlanner, plan_study
from prima_ray.studies.config import StudyConfig
from prima_ray.studies.folds import fold_data
from prima_ray.studies.published import FILE, read_published, write_published
from prima_ray.studies.report import count_of
from prima_ray.studies.schedule import Progress, log_of, run_cells

_log = logging.getLogger(__name__)
_MEND_INGEST = "Run the study without --so-far, or its recipe of ingest alone."


class Sitting:
    """What a study plans, and what is known of it."""

    def __init__(self, config: StudyConfig, shards: str) -> None:
        self.config = config
        self.index = ExamIndex.read(shards)
        self.cells, self.asked = plan_study(config, self.index)
        self.data = fold_data(config, self.index)
        check_classifiers(config, next(iter(self.data.values())))
        self.runs = [[self.cells[key] for key in keys] for keys in runs_by_variant(self.asked).values()]
        self.answering = list({cell.key: cell for mine in self.runs for cell in mine}.values())
        self.book = AnswerBook(config, self.data, self.answering)

    def announce(self) -> None:
        """How much there is to do."""
        left = self.book.to_ask(self.cells, self._first())
        stages: dict[str, int] = defaultdict(int)
        for cell in left.values():
            stages[cell.stage] += 1
        told = ", ".join(f"{count} {stage}" for stage, count in stages.items()) or "none"
        variants, runs = count_of(len(self.config.variants), "variant"), count_of(len(left), "run")
        _log.info("study: %s, %s (%s)", variants, runs, told)
        if self.config.answers:
            known = sum(cell.key not in left for cell in self.answering)
            say = _log.info if known else _log.warning
            say(
                "study: `answers` tell what %d of %d runs said, which are not trained again%s",
                known,
                len(self.answering),
                "" if known else ": they are of other data, configs or inputs, or what the configs name is not here",
            )

    def _first(self) -> list[tuple[Cell, Sequence[str]]]:
        """Where there is nothing to choose, a run is asked everything as soon as it is finished."""
        return [(cell, self.book.sets if len(mine) == 1 else ("val",)) for mine in self.runs for cell in mine]

    def ask(self) -> None:
        """Run what is not finished, choose, and ask those that were chosen.

        Raises:
            PrimaError: a run failed.
        """
        first = run_all(self.config, self.book.to_ask(self.cells, self._first()))
        lost, sittings = {*first.failed, *first.skipped}, [first]
        while True:
            # One that was chosen by what is published may choose otherwise once it has been trained here.
            chosen = choose_runs(self.data, self.cells, self.asked, self.book)
            wanted = self.book.to_ask(self.cells, [(cell, self.book.sets) for cell, _ in chosen.values()])
            left = {key: cell for key, cell in wanted.items() if key not in lost}
            if all(is_here(cell) for cell in left.values()):
                break
            again = run_all(self.config, left)
            lost |= {key for key, cell in left.items() if not is_here(cell)}
            sittings.append(again)
        for progress in sittings:
            refuse_failed(progress)

    def gather(self) -> Everything:
        """All answers that there are."""
        chosen = choose_runs(self.data, self.cells, self.asked, self.book)
        return gather_answers(self.config, self.data, chosen, self.book)

    def publish(self, out: Path) -> None:
        """Write `answers.parquet`: of this study's runs, and whatever else was told by the files that it read or now
        replaces.
        """
        class_names = self.index.manifest.data_set.class_names
        found = self.book.to_publish(self.cells.values(), self.answering)
        if (out / FILE).exists():
            try:
                found = found.merged(read_published([str(out / FILE)], class_names), first=True)
            except PrimaError as error:
                # What was trained meanwhile is worth more than what cannot be read.
                _log.warning("study: what was published before is replaced: %s", error)
        write_published(out / FILE, found, class_names)


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
        raise PrimaError("the study's shards are not made yet", where=cell.folder, mend=_MEND_INGEST)
    refuse_failed(run_all(config, planner.cells))
    return str(cell.folder)


def run_all(config: StudyConfig, cells: Mapping[str, Cell]) -> Progress:
    """Run what is not finished, as the study says."""
    return run_cells(
        cells,
        config.context,
        cpus_per_cell=config.cpus_per_cell,
        gpus_per_cell=config.gpus_per_cell,
        keep_checkpoints=config.keep_checkpoints,
    )


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
