"""Which stored features a run reads, noted in its directory.

A feature folder is found by a hash of its tower's weights, so finding it means loading the tower and the library that
it comes from: a good part of what it takes to start a group of workers again. A run has its features once and for all,
so the first group notes where they are, and those that take the run up look there.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from prima_ray.base import PrimaError, read_json, write_json
from prima_ray.data.features import FeatureSet
from prima_ray.data.schema import read_manifest
from prima_ray.training.contexts import WorkerContext


def noted_features(note: str | None, shards: str, context: WorkerContext) -> dict[str, FeatureSet] | None:
    """What `note_features` wrote: role -> features; None where there is no note, or one that no longer holds.

    Collective: the ranks go by the note only where all of them can.
    """
    found = _read(note, shards) if note else None
    verdicts = context.gather_objects(["" if found is None else "found"])
    return found if all(verdicts) else None


def note_features(note: str | None, sets: Mapping[str, FeatureSet], context: WorkerContext) -> None:
    """Rank 0 notes where a run's features are."""
    if note and context.rank == 0:
        write_json(note, {role: features.path for role, features in sets.items()})


def _read(note: str, shards: str) -> dict[str, FeatureSet] | None:
    if not Path(note).exists():
        return None
    try:
        manifest = read_manifest(shards)
        return {role: FeatureSet.open(path, shards=manifest) for role, path in read_json(note).items()}
    except (PrimaError, AttributeError, TypeError):
        # Removed, damaged, of other shards: they are computed again.
        return None
