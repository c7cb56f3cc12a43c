"""Checkpoints: a folder a checkpoint, written aside, checksummed, and committed by its manifest, which is written last.

    checkpoints/step-00000120/state.safetensors    what `Engine.export_state` gave
    checkpoints/step-00000120/checkpoint.json      the cursor, the metrics, the hash of the state: the commit

A folder without a readable manifest, or whose state does not match its hash, is torn: the one before it is used. The
newest whole manifest also says which step is the best so far, so that one file commits both.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prima_ray.base import PrimaError, hash_file, read_json, write_json
from prima_ray.training.engine import State

_log = logging.getLogger(__name__)
_STATE = "state.safetensors"
_MANIFEST = "checkpoint.json"


@dataclass(frozen=True)
class Progress:
    """Where training stands: everything but the weights and the moments."""

    step: int = 0
    """Optimizer steps taken. The cursor inside the epoch follows: step = epoch * steps_per_epoch + batch."""
    best_value: float | None = None
    best_step: int | None = None
    epochs_since_best: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    """The last validation's."""
    done: bool = False
    """Early stopping or the last step was reached."""


def save_checkpoint(folder: Path, state: State, progress: Progress, *, keep_last: int) -> Path:
    """Commit a checkpoint and drop the superseded ones.

    Args:
        folder: the run's `checkpoints/`.
        state: from `Engine.export_state`.
        keep_last: how many of the newest stay, besides `progress.best_step`.
    """
    from safetensors.torch import save_file

    target = folder / _name(progress.step)
    # A torn attempt at the same step may lie there; it never had a manifest that matched.
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, target / _STATE)
    write_json(target / _MANIFEST, {"progress": vars(progress), "sha256": hash_file(target / _STATE)})
    _drop_others(folder, progress, keep_last)
    return target


def load_last(folder: Path) -> tuple[State, Progress] | None:
    """The newest whole checkpoint, or None where there is none. Torn ones are passed over with a warning."""
    for target in _newest_first(folder):
        try:
            return load_checkpoint(target)
        except PrimaError as error:
            _log.warning("passing over a torn checkpoint: %s", error)
    return None


def load_best(folder: Path) -> tuple[State, Progress]:
    """The checkpoint that validation chose.

    Raises:
        PrimaError: there is none, or it is damaged.
    """
    last = load_last(folder)
    if last is None or last[1].best_step is None:
        raise PrimaError("no checkpoint here has been chosen yet", where=folder, mend="Run the stage again.")
    step = last[1].best_step
    return last if step == last[1].step else load_checkpoint(folder / _name(step))


def load_checkpoint(target: Path) -> tuple[State, Progress]:
    """Read one checkpoint and verify it.

    Raises:
        PrimaError: a file is missing, unreadable or does not match its checksum.
    """
    from safetensors.torch import load_file

    manifest: Any = read_json(target / _MANIFEST)
    progress = _progress(manifest.get("progress") if isinstance(manifest, dict) else None, where=target / _MANIFEST)
    try:
        found = hash_file(target / _STATE)
    except FileNotFoundError:
        raise PrimaError("no such file", where=target / _STATE) from None
    if found != manifest.get("sha256"):
        raise PrimaError(
            f"checksum is {found[:12]}, its manifest says {str(manifest.get('sha256'))[:12]}", where=target
        )
    return load_file(target / _STATE), progress


def _progress(found: Any, *, where: Path) -> Progress:
    try:
        progress = Progress(**found)
        whole = (
            isinstance(progress.step, int) and isinstance(progress.done, bool) and isinstance(progress.metrics, dict)
        )
        whole = whole and isinstance(progress.best_step, int | None) and isinstance(progress.epochs_since_best, int)
        whole = whole and isinstance(progress.best_value, int | float | None)
    except TypeError:
        whole = False
    if not whole:
        raise PrimaError("damaged: it does not say where training stood", where=where)
    return progress


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _newest_first(folder: Path) -> Iterator[Path]:
    # Nothing else is ours, whatever its name begins with.
    ours = (item for item in folder.glob("step-*") if item.name[5:].isdecimal() and item.is_dir())
    yield from sorted(ours, reverse=True)


def _drop_others(folder: Path, progress: Progress, keep_last: int) -> None:
    newest = list(_newest_first(folder))
    current = newest.index(folder / _name(progress.step))
    # What lies beyond the step that was just taken is torn, or training would have gone on from it.
    for target in newest[:current] + newest[current + keep_last :]:
        if progress.best_step is None or target.name != _name(progress.best_step):
            # The manifest goes first, so that a half-removed checkpoint is a torn one.
            (target / _MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(target, ignore_errors=True)
