"""What the trained runs of a study said, wherever it is known from: their folders, or published answers."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from prima_ray.base import PrimaError, StrictConfig, hash_json, write_atomic, write_json
from prima_ray.data.plan import ExamIndex
from prima_ray.data.run_record import RECORD
from prima_ray.evaluation.metrics import Probabilities
from prima_ray.inference.predictor import Predictor
from prima_ray.stages.row_sets import read_predictions, shard_tables, single_photos
from prima_ray.stages.rundir import is_unvetted
from prima_ray.studies.cells import Cell, cells_folder
from prima_ray.studies.config import StudyConfig
from prima_ray.studies.folds import FoldData, labelled_roles
from prima_ray.studies.published import SETS, Published, RunFacts, as_published, read_published
from prima_ray.studies.schedule import recorded_seconds

_FILE = "answers.npz"


class AnswersConfig(StrictConfig):
    """Further questions to a finished run: the test fold with the blocks masked, and photo by photo."""

    out: str
    run: str
    shards: str
    split: str
    fold: int


def ask(config: AnswersConfig) -> Path:
    """Ask them; returns the folder of `answers.npz`: `masked` (N, C), and `photos` (P, C), in the order of the rows."""
    index = ExamIndex.read(config.shards)
    rows = labelled_roles(index, split=config.split, fold=config.fold).test
    predictor = Predictor.load(config.run)
    blocks = sorted(index.manifest.data_set.block_attributes)
    found = {
        "masked": predictor.predict_tables(shard_tables(index, rows), masked=blocks),
        "photos": predictor.predict_tables(single_photos(table) for table in shard_tables(index, rows)),
    }
    written = io.BytesIO()
    np.savez(written, masked=found["masked"], photos=found["photos"])
    out = Path(config.out)
    write_atomic(out / _FILE, written.getvalue())
    write_json(out / RECORD, {"stage": "answers", "run": config.run})
    return out


class AnswerBook:
    """Answers of runs, by cell and set; see the module."""

    def __init__(self, study: StudyConfig, data: Mapping[int, FoldData]) -> None:
        """Raises:
        PrimaError: a file of published answers is missing or damaged.
        """
        self._study, self._data = study, data
        self._index = next(iter(data.values())).index
        self._class_names = self._index.manifest.data_set.class_names
        self._published = read_published(study.answers, self._class_names)

    def num_published(self, cells: Iterable[Cell]) -> int:
        """How many of these are not here, and need not be."""
        return sum(not (cell.folder / RECORD).exists() and self.knows(cell, self.sets) for cell in cells)

    @property
    def sets(self) -> tuple[str, ...]:
        """What is asked of a run that answers; a search asks about the validation fold alone."""
        return SETS if self._study.scored_on == "test" else SETS[:1]

    def question(self, cell: Cell) -> Cell:
        """The cell that asks a run what it has not been asked in training."""
        key = hash_json(["answers", cell.key])[: len(cell.key)]
        folder = cells_folder(self._study) / f"answers-{key}"
        config = AnswersConfig(
            out=str(folder),
            run=str(cell.folder),
            shards=self._index.shards,
            split=self._study.split,
            fold=_fold(cell),
        )
        return replace(
            cell,
            key=key,
            recipe=f"answers of {cell.recipe}",
            stage="answers",
            config=config,
            parents=(cell.key,),
            work=ask,
            folder=folder,
        )

    def knows(self, cell: Cell, sets: Iterable[str]) -> bool:
        """Whether all these answers are there."""
        return all((cell.key, name) in self._published.answers or self._is_here(cell, name) for name in sets)

    def read(self, cell: Cell, name: str) -> Probabilities | None:
        """(N, C) probabilities of one of the sets, as they are published; None where they are not known.

        Raises:
            PrimaError: a file is damaged, or tells of other exams.
        """
        mine = self._data[_fold(cell)]
        if self._is_here(cell, name):
            if name in ("val", "test"):
                return as_published(read_predictions(cell.folder, mine.index, getattr(mine.roles, name)))
            with np.load(self.question(cell).folder / _FILE) as found:
                return as_published(found[name])
        if (cell.key, name) not in self._published.answers:
            return None
        exam_ids, probabilities = self._published.answers[cell.key, name]
        if exam_ids != self._exam_ids(cell, name):
            raise PrimaError(
                f"answers: what is told of {cell.title} is of other exams",
                where=", ".join(self._study.answers),
                mend="The file is damaged, or of another data set: leave it out.",
            )
        return probabilities

    def facts(self, cell: Cell) -> RunFacts | None:
        """What is known of a run; None of one that is neither finished nor published."""
        if (cell.folder / RECORD).exists():
            return RunFacts(cell.recipe, cell.fold, cell.seed, recorded_seconds(cell), is_unvetted(str(cell.folder)))
        return self._published.runs.get(cell.key)

    def to_publish(self, cells: Mapping[str, Cell], answering: Iterable[Cell]) -> Published:
        """Everything that is known of a study's runs."""
        found = Published(runs={key: facts for key, cell in cells.items() if (facts := self.facts(cell))})
        for cell in answering:
            for name in self.sets:
                probabilities = self.read(cell, name)
                if probabilities is not None:
                    found.answers[cell.key, name] = self._exam_ids(cell, name), probabilities
        return found

    def to_ask(self, cells: Mapping[str, Cell], asked: Iterable[tuple[Cell, Iterable[str]]]) -> dict[str, Cell]:
        """Whom to ask for some answers: runs, those before them, and further questions, in their order.

        Finished ones are among them; runs that are not here and of which everything is published are not.
        """
        wanted: dict[str, Cell] = {}
        for cell, sets in asked:
            missing = {name for name in sets if not self._is_here(cell, name)}
            if missing and self.knows(cell, sets):
                continue
            further = [] if {"val", "test"}.issuperset(sets) else [self.question(cell)]
            wanted |= {found.key: found for found in (*_with_parents(cell, cells), *further)}
        return dict(sorted(wanted.items(), key=lambda item: (item[1].place, item[1].stage == "answers")))

    def _is_here(self, cell: Cell, name: str) -> bool:
        asked = cell if name in ("val", "test") else self.question(cell)
        return (asked.folder / RECORD).exists()

    def _exam_ids(self, cell: Cell, name: str) -> list[str]:
        mine = self._data[_fold(cell)]
        rows = mine.roles.val if name == "val" else mine.roles.test
        exams = [str(mine.index.exam_ids[row]) for row in rows]
        return [exams[place] for place in mine.photo_rows] if name == "photos" else exams


def _fold(cell: Cell) -> int:
    return cell.fold if cell.fold is not None else 0


def _with_parents(cell: Cell, cells: Mapping[str, Cell]) -> list[Cell]:
    """A run and those before it; of what came before a finished one, what is there."""
    finished = (cell.folder / RECORD).exists()
    parents = [cells[key] for key in cell.parents]
    needed = [parent for parent in parents if not finished or (parent.folder / RECORD).exists()]
    return [found for parent in needed for found in _with_parents(parent, cells)] + [cell]
