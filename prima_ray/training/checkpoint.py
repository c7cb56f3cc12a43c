"""Checkpoints: a folder a checkpoint, written aside, checksummed, and committed by its manifest, which is written last.

    checkpoints/step-00000120/state.safetensors    what `Engine.export_state` gave
    checkpoints/step-00000120/checkpoint.json      the cursor, the metrics, the hash of the state: the commit
    checkpoints/best.json                          the step of the best one

A folder without a readable manifest, or whose state does not match its hash, is torn: the one before it is used.
"""

from __future__ import annotations

import json
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


def save_checkpoint(folder: Path, state: State, progress: Progress, *, best: bool, keep_last: int) -> Path:
    """Commit a checkpoint, point `best.json` at it if ``best``, and drop the superseded ones.

    Args:
        folder: the run's `checkpoints/`.
        state: from `Engine.export_state`.
        keep_last: how many of the newest stay, besides the best.
    """
    from safetensors.torch import save_file

    target = folder / f"step-{progress.step:08d}"
    # A torn attempt at the same step may lie there; it never had a manifest that matched.
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, target / _STATE)
    write_json(target / _MANIFEST, {"progress": vars(progress), "sha256": hash_file(target / _STATE)})
    if best:
        write_json(folder / "best.json", {"step": progress.step})
    _drop_old(folder, keep_last)
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
    step = read_json(folder / "best.json")["step"]
    return load_checkpoint(folder / f"step-{step:08d}")


def load_checkpoint(target: Path) -> tuple[State, Progress]:
    """Read one checkpoint and verify it.

    Raises:
        PrimaError: a file is missing, unreadable or does not match its checksum.
    """
    from safetensors.torch import load_file

    manifest: dict[str, Any] = read_json(target / _MANIFEST)
    try:
        found = hash_file(target / _STATE)
    except FileNotFoundError:
        raise PrimaError("no such file", where=target / _STATE) from None
    if found != manifest.get("sha256"):
        raise PrimaError(
            f"checksum is {found[:12]}, its manifest says {str(manifest.get('sha256'))[:12]}", where=target
        )
    return load_file(target / _STATE), Progress(**manifest["progress"])


def _newest_first(folder: Path) -> Iterator[Path]:
    yield from sorted(folder.glob("step-*"), reverse=True)


def _drop_old(folder: Path, keep_last: int) -> None:
    try:
        best = json.loads((folder / "best.json").read_text())["step"]
    except (OSError, json.JSONDecodeError, KeyError):
        best = None
    for target in list(_newest_first(folder))[keep_last:]:
        if target.name != f"step-{best or -1:08d}":
            # The manifest goes first, so that a half-removed checkpoint is a torn one.
            (target / _MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(target, ignore_errors=True)
