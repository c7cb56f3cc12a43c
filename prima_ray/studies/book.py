"""What the trained runs of a study said, wherever it is known from: their folders, or published answers.

A run that is here is asked here; of one that is not, what was published counts. What two trainings of a run said is
never mixed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np

from prima_ray.base import PrimaError, hash_json, read_json
from prima_ray.data.run_record import RECORD
from prima_ray.evaluation.metrics import Probabilities
from prima_ray.stages.row_sets import read_predictions
from prima_ray.stages.rundir import is_unvetted
from prima_ray.studies.cells import Cell, cells_folder
from prima_ray.studies.config import StudyConfig
from prima_ray.studies.folds import FoldData
from prima_ray.studies.published import SETS, Published, RunFacts, Said, as_published, read_published
from prima_ray.studies.questions import FILE, QuestionConfig, ask
from prima_ray.studies.schedule import recorded_seconds

_OWN = ("val", "test")
"""Sets that a run predicts by itself, when it has been trained."""


class AnswerBook:
    """Answers of runs, by cell and set; see the module."""

    def __init__(self, study: StudyConfig, data: Mapping[int, FoldData], cells: Iterable[Cell]) -> None:
        """Args:
            cells: the runs that answer.

        Raises:
            PrimaError: a file of published answers is missing, damaged, or tells of other exams.
        """
        self._study, self._data = study, data
        self._index = next(iter(data.values())).index
        self.published = read_published(study.answers, self._index.manifest.data_set.class_names)
        data_set, num_images = self._index.manifest.data_set, self._index.num_images
        further = {"masked": bool(data_set.blocks), "photos": bool(len(num_images) and num_images.max() > 1)}
        asked = SETS if study.scored_on == "test" else SETS[:1]
        # A search asks about the validation fold alone; where no block goes missing, or no exam has two photos, there
        # is nothing to ask about those.
        self.sets = tuple(name for name in asked if further.get(name, True))
        for cell in cells:
            self._check_published(cell)

    def _check_published(self, cell: Cell) -> None:
        for name, said in self.published.answers.get(cell.key, {}).items():
            if name not in SETS or said.exam_ids != self._exam_ids(cell, name):
                raise PrimaError(
                    f"what it tells of {cell.title} ({name}) is of other exams",
                    where=self.published.files[cell.key],
                    mend="It is damaged, or somebody has changed it: leave it out of `answers`.",
                )

    def question(self, cell: Cell) -> Cell:
        """The cell that asks a run what it has not been asked in training."""
        key = hash_json(["answers", cell.key])[: len(cell.key)]
        folder = cells_folder(self._study) / f"answers-{key}"
        config = QuestionConfig(
            out=str(folder),
            run=str(cell.folder),
            shards=self._index.shards,
            split=self._study.split,
            fold=_fold(cell),
            sets=tuple(name for name in self.sets if name not in _OWN),
        )
        return replace(
            cell,
            key=key,
            recipe=f"questions to {cell.recipe}",
            stage="questions",
            config=config,
            parents=(cell.key,),
            work=ask,
            folder=folder,
        )

    def knows(self, cell: Cell, name: str) -> bool:
        """Whether this answer is there."""
        if not is_here(cell):
            return name in self.published.answers.get(cell.key, {})
        return name in _OWN or is_here(self.question(cell))

    def read(self, cell: Cell, name: str) -> Probabilities | None:
        """(N, C) probabilities of one of the sets, as they are published; None where they are not known.

        Raises:
            PrimaError: a file is damaged.
        """
        if not self.knows(cell, name):
            return None
        if not is_here(cell):
            return self.published.answers[cell.key][name].probabilities
        if name in _OWN:
            mine = self._data[_fold(cell)]
            return as_published(read_predictions(cell.folder, mine.index, getattr(mine.roles, name)))
        with np.load(self.question(cell).folder / FILE) as found:
            return as_published(found[name])

    def facts(self, cell: Cell) -> RunFacts | None:
        """What is known of a run; None of one that is neither finished nor published."""
        if not is_here(cell):
            return self.published.runs.get(cell.key)
        record = read_json(cell.folder / RECORD)
        return RunFacts(
            recipe=cell.recipe,
            fold=cell.fold,
            seed=cell.seed,
            seconds=recorded_seconds(cell),
            unvetted=is_unvetted(str(cell.folder)),
            version=record.get("versions", {}).get("prima_ray"),
            commit=record.get("git_commit"),
        )

    def all_facts(self, cells: Iterable[Cell]) -> dict[str, RunFacts]:
        """Key -> what is known of a run, of those that are finished or published."""
        return {cell.key: facts for cell in cells if (facts := self.facts(cell))}

    def to_publish(self, cells: Iterable[Cell], answering: Iterable[Cell]) -> Published:
        """What the runs that are here said, and of others what was published."""
        found = Published(runs=self.all_facts(cell for cell in cells if is_here(cell)))
        for cell in answering:
            for name in self.sets:
                probabilities = self.read(cell, name) if is_here(cell) else None
                if probabilities is not None:
                    said = Said(self._exam_ids(cell, name), probabilities)
                    found.answers.setdefault(cell.key, {})[name] = said
        return found.merged(self.published, first=True)

    def to_ask(self, cells: Mapping[str, Cell], asked: Iterable[tuple[Cell, Iterable[str]]]) -> dict[str, Cell]:
        """Whom to ask for some answers: runs, those before them, and further questions, in their order.

        Finished ones are among them; runs that are not here and of which enough is published are not.
        """
        wanted: dict[str, Cell] = {}
        for cell, sets in asked:
            if not is_here(cell) and all(self.knows(cell, name) for name in sets):
                continue
            further = [] if set(_OWN).issuperset(sets) else [self.question(cell)]
            wanted |= {found.key: found for found in (*_with_parents(cell, cells), *further)}
        return dict(sorted(wanted.items(), key=lambda item: (item[1].place, item[1].stage == "questions")))

    def _exam_ids(self, cell: Cell, name: str) -> list[str]:
        mine = self._data[_fold(cell)]
        rows = mine.roles.val if name == "val" else mine.roles.test
        exams = [str(mine.index.exam_ids[row]) for row in rows]
        return [exams[place] for place in mine.photo_rows] if name == "photos" else exams


def is_here(cell: Cell) -> bool:
    """Whether a run is finished in its folder."""
    return (cell.folder / RECORD).exists()


def _fold(cell: Cell) -> int:
    return cell.fold if cell.fold is not None else 0


def _with_parents(cell: Cell, cells: Mapping[str, Cell]) -> list[Cell]:
    """A run and those before it; of what came before a finished one, what is there."""
    parents = [cells[key] for key in cell.parents]
    needed = [parent for parent in parents if not is_here(cell) or is_here(parent)]
    return [found for parent in needed for found in _with_parents(parent, cells)] + [cell]
