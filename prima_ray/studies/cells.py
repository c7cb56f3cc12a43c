"""A study's cells: every run that it needs, each once, named by what decides its result.

A cell's key is a hash of its stage, its resolved config and its parents' keys (of what lies outside the study, a hash
of the content). Two variants, or two studies, whose pipelines begin alike share those cells; a config that changes in
any key that matters is another cell.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from prima_ray.base import PrimaError, StrictConfig, canonical_json, hash_file, hash_json, is_uri
from prima_ray.config import input_paths, load_config
from prima_ray.data.plan import ExamIndex, split_roles
from prima_ray.evaluation.comparison import check_unseen
from prima_ray.knowledge.files import find_files
from prima_ray.knowledge.literature import sources_by_key
from prima_ray.stages.registry import config_class, execution_keys, run_of
from prima_ray.stages.rundir import input_hash
from prima_ray.studies.config import Changes, StudyConfig, TrainedVariant
from prima_ray.training.config import LoopConfig

_KEY_LENGTH = 12
_BESIDE = frozenset({"out", "feature_cache", "tracking"})
"""Keys that say where, not what."""


@dataclass(frozen=True)
class Cell:
    """One run of a study."""

    key: str
    recipe: str
    stage: str
    config: StrictConfig
    parents: tuple[str, ...]
    """Keys of the cells that it needs."""
    fold: int | None
    seed: int | None
    place: int
    """Its turn: cells of the first fold come first."""
    work: Callable[[Any], Any]
    """What is called with the config; importable."""
    folder: Path
    """Its run directory, `out` of the config."""

    @property
    def title(self) -> str:
        """For a line of progress."""
        where = [f"fold {self.fold}"] * (self.fold is not None) + [f"seed {self.seed}"] * (self.seed is not None)
        return f"{self.recipe} ({', '.join(where)})" if where else self.recipe


Fold = int | Literal["none"]
Question = tuple[str, int, int, int]
"""Variant, candidate, fold, seed: what one run answers."""


class CellPlanner:
    """Makes cells of recipes, each once."""

    def __init__(self, study: StudyConfig, *, shards: str, epochs: Mapping[str, int] | None = None) -> None:
        """Args:
        epochs: of recipes that train on every fold, where they are not the config's.
        """
        self._epochs = epochs or {}
        self._study, self._shards = study, shards
        self._home = cells_folder(study)
        self.cells: dict[str, Cell] = {}
        self._made: dict[str, Cell] = {}

    def cell(self, recipe: str, *, fold: Fold, seed: int, change: Changes | None = None) -> Cell:
        """The cell of a recipe, and of everything before it.

        Args:
            fold: the test fold; "none" trains on every fold.

        Raises:
            PrimaError: its config is wrong, or names a run that the study does not make.
        """
        known = canonical_json([recipe, fold, seed, change or {}])
        if known not in self._made:
            self._made[known] = self._make(recipe, fold, seed, change or {})
        return self._made[known]

    def _make(self, name: str, fold: Fold, seed: int, change: Changes) -> Cell:
        recipe = self._study.recipes[name]
        if not recipe.vary:
            seed = self._study.seeds[0]
        cls = config_class(recipe.stage)
        parents = {role: self.cell(parent, fold=fold, seed=seed) for role, parent in recipe.parents.items()}
        common = self._study.change if issubclass(cls, LoopConfig) else {}
        given = {
            **common,
            **recipe.change,
            **change,
            **{f"inputs.{role}": str(cell.folder) for role, cell in parents.items()},
        }
        has_fold, has_seed = "fold" in cls.model_fields, "seed" in cls.model_fields
        if has_fold:
            given |= {"fold": fold, "split": self._study.split}
        if has_seed:
            given["seed"] = seed
        if fold == "none" and name in self._epochs:
            given["epochs"] = self._epochs[name]
        if _reads_shards(cls):
            given["inputs.shards"] = self._shards
        overrides = [f"{key}={json.dumps(value)}" for key, value in given.items()]
        try:
            config = load_config(cls, recipe.config, [*overrides, f"out={json.dumps('-')}"])
        except PrimaError as error:
            raise PrimaError(f"recipes.{name}: {error.what}", where=recipe.config, mend=error.mend) from None
        _refuse_strangers(name, config, parents)
        key = _key(recipe.stage, config, {str(cell.folder): cell.key for cell in parents.values()})
        if key not in self.cells:
            folder = self._home / f"{recipe.stage}-{key}"
            self.cells[key] = Cell(
                key=key,
                recipe=name,
                stage=recipe.stage,
                config=config.model_copy(update={"out": str(folder)}),
                parents=tuple(dict.fromkeys(cell.key for cell in parents.values())),
                fold=fold if has_fold and fold != "none" else None,
                seed=seed if has_seed else None,
                place=len(self.cells),
                work=run_of(recipe.stage),
                folder=folder,
            )
        return self.cells[key]


def cells_folder(study: StudyConfig) -> Path:
    """Where a study's runs are, absolute.

    Raises:
        PrimaError: it is on an object store.
    """
    named = study.cells or str(Path(study.out).absolute().parent / "cells")
    if is_uri(named) or is_uri(study.out):
        raise PrimaError(
            "a study is kept on a disk", where=named, mend="Name in `out` and `cells` folders that every node mounts."
        )
    return Path(named).absolute()


def plan_study(study: StudyConfig, index: ExamIndex) -> tuple[dict[str, Cell], dict[Question, str]]:
    """All cells, by key, in their order; and which of them answers what.

    Raises:
        PrimaError: a config is wrong, there is no such fold, or what a fold tests leaks into what it trains on.
    """
    check_folds(study, index)
    planner = CellPlanner(study, shards=index.shards)
    answers: dict[Question, str] = {}
    for seed in study.seeds:
        for fold in folds_of(study, index):
            for name, variant in study.variants.items():
                if isinstance(variant, TrainedVariant):
                    for number, change in enumerate(variant.candidates):
                        cell = planner.cell(variant.recipe, fold=fold, seed=seed, change=change)
                        answers[name, number, fold, seed] = cell.key
    return planner.cells, answers


def folds_of(study: StudyConfig, index: ExamIndex) -> tuple[int, ...]:
    """The test folds of a study."""
    return tuple(range(index.manifest.num_folds)) if study.folds is None else study.folds


def check_folds(study: StudyConfig, index: ExamIndex) -> None:
    """No exam, and where the split is by patient no patient, may be on both sides of a fold.

    Raises:
        PrimaError: there is no such fold, one is named twice, or one leaks.
    """
    folds = folds_of(study, index)
    if len(set(folds)) < len(folds):
        raise PrimaError("folds: one is named twice", mend="Name each test fold once.")
    for fold in folds:
        roles = split_roles(index, fold=fold, val_fold=None, split=study.split)
        for what, sides in (
            ("test", (roles.test, np.concatenate([roles.train, roles.val]))),
            ("validation", (roles.val, roles.train)),
        ):
            held, learned = sides
            where = f"{index.shards}, {what} fold of fold {fold}"
            check_unseen(index.exam_ids[learned], index.exam_ids[held], what="exam", where=where)
            if study.split == "patient":
                check_unseen(index.patient_ids[learned], index.patient_ids[held], what="patient", where=where)


def _reads_shards(cls: type[StrictConfig]) -> bool:
    if "inputs" not in cls.model_fields:
        return False
    inputs: Any = cls.model_fields["inputs"].annotation
    return isinstance(inputs, type) and issubclass(inputs, StrictConfig) and "shards" in inputs.model_fields


def _refuse_strangers(name: str, config: StrictConfig, parents: Mapping[str, Cell]) -> None:
    """A run that the study does not make was trained on some fold: perhaps on the one that is tested."""
    inputs = getattr(config, "inputs", None)
    for role in ("align", "finetune", "photos"):
        path = getattr(inputs, role, None)
        if path is not None and role not in parents:
            raise PrimaError(
                f"recipes.{name}: inputs.{role} names a run that is none of this study's, which may have been trained "
                "on what is tested here",
                where=path,
                mend=f"Name the recipe that makes it in parents.{role}, or change inputs.{role} to null.",
            )


def _key(stage: str, config: StrictConfig, keys: Mapping[str, str]) -> str:
    described = config.model_dump(mode="json")
    literature = sources_by_key(config)
    for dotted, path in input_paths(config):
        node, last = _holder(described, dotted)
        source = literature.get(dotted)
        node[last] = keys.get(path) or (_literature(path, source.suffixes) if source else _content(path))
    for dotted in _BESIDE | execution_keys(stage):
        node, last = _holder(described, dotted)
        if isinstance(node, dict):
            node.pop(last, None)
    return hash_json([stage, described])[:_KEY_LENGTH]


def _holder(described: Any, dotted: str) -> tuple[Any, Any]:
    """What holds a key of a plain config, and the key or place there; nothing where there is no such section."""
    *above, last = (int(part) if part.isdecimal() else part for part in dotted.split("."))
    for part in above:
        described = described[part] if isinstance(part, int) else (described or {}).get(part)
    return described, last


@lru_cache(maxsize=256)
def _literature(path: str, suffixes: tuple[str, ...]) -> str:
    """A hash of the files that a source reads. One on a store is known by its address: it may be much to read."""
    if is_uri(path):
        return path
    try:
        found = find_files(path, suffixes)
    except PrimaError:
        return path
    return hash_json({file.name: hash_file(file.inner) for file in found})


@lru_cache(maxsize=256)
def _content(path: str) -> str:
    """A hash of what is there; of what is not, or is a name, the text itself."""
    local = Path(path)
    if local.is_file():
        return hash_file(local)
    return input_hash(path) if local.is_dir() or is_uri(path) else path
