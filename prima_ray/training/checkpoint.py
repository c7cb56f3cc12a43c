"""Checkpoints: a folder a checkpoint, written aside, checksummed, and committed by its manifest, which is written last.

    checkpoints/step-00000120/state.safetensors    what `Engine.export_state` gave
    checkpoints/step-00000120/checkpoint.json      the cursor, the metrics, the config, the state's hash: the commit

They lie on a disk or on an object store, which has no rename. A folder without a readable manifest, or whose state
does not match its hash, is torn: the one before it is used. The newest whole manifest also says which step is the best
so far, so that one file commits both.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prima_ray.base import PrimaError, hash_file, json_text
from prima_ray.config import differing_keys
from prima_ray.data.storage import Folder, reaching, reason
from prima_ray.training.config import EXECUTION_KEYS
from prima_ray.training.engine import State

_log = logging.getLogger(__name__)
_STATE = "state.safetensors"
_MANIFEST = "checkpoint.json"
_UNREACHED = "the checkpoints cannot be read"


class TornError(PrimaError):
    """A checkpoint that is not whole: an earlier one is used instead. What cannot be reached is another matter."""


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


@dataclass(frozen=True)
class Origin:
    """What a checkpoint belongs to: the state is of no use to a run of another config or on other exams."""

    config: Mapping[str, Any] = field(default_factory=dict)
    """Resolved, as JSON."""
    exams: str = ""
    """A hash of the shards' content and of the rows that train and validate."""


def save_checkpoint(
    folder: str | Path, state: State, progress: Progress, *, keep_last: int, origin: Origin | None = None
) -> str:
    """Commit a checkpoint and drop the superseded ones; returns its address.

    Args:
        folder: the run's `checkpoints/`, a path or a URI.
        state: from `Engine.export_state`.
        keep_last: how many of the newest stay, besides `progress.best_step`.
        origin: what the state belongs to, for `check_origin`.

    Raises:
        PrimaError: it cannot be written. What was written of it is gone; earlier ones are untouched.
    """
    home = Folder.at(folder)
    name = step_name(progress.step)
    target = home.folder(name)
    try:
        # A torn attempt at the same step may lie there; it never had a manifest that matched.
        home.remove_folder(name)
        digest, size = _put_state(target, state)
        belongs = origin or Origin()
        manifest = {
            "progress": vars(progress),
            "sha256": digest,
            "bytes": size,
            "config": belongs.config,
            "exams": belongs.exams,
        }
        target.write(_MANIFEST, json_text(manifest).encode())
    except Exception as error:  # safetensors, Arrow and the system have each their own
        _sweep(home, name)
        raise PrimaError(
            f"the checkpoint of step {progress.step} cannot be written ({reason(error)})",
            where=target.address,
            mend=_kept(home),
        ) from error
    _drop_others(home, progress, keep_last)
    return target.address


def _put_state(target: Folder, state: State) -> tuple[str, int]:
    """Write the state; its SHA-256 and its size in bytes."""
    from safetensors.torch import save_file

    whole = {name: tensor.contiguous() for name, tensor in state.items()}
    if target.is_local:
        target.path.mkdir(parents=True)
        path = target.path / _STATE
        save_file(whole, path)
        # The manifest must not reach the disk before what it vouches for: the checkpoint before it is dropped next.
        with path.open("rb+") as file:
            os.fsync(file.fileno())
        return hash_file(path), path.stat().st_size
    with tempfile.TemporaryDirectory(prefix="prima-checkpoint-") as aside:
        path = Path(aside) / _STATE
        save_file(whole, path)
        target.upload(path, _STATE)
        return hash_file(path), path.stat().st_size


def _sweep(home: Folder, name: str) -> None:
    """Take away what a failed attempt left: on a full disk nobody could even write down why."""
    try:
        home.folder(name).remove(_MANIFEST)
        home.remove_folder(name)
    except OSError as error:
        _log.warning("%s: what is left of a failed checkpoint could not be removed (%s)", home.address, reason(error))


def _kept(home: Folder) -> str:
    try:
        steps = [name for name in newest_first(home) if home.folder(name).exists(_MANIFEST)]
    except (OSError, PrimaError):
        steps = []
    kept = f"The checkpoint of step {int(steps[0][5:])} is kept. " if steps else ""
    return f"{kept}Make room, or see that `out` can be written to, and run the same command again."


def load_last(folder: str | Path) -> tuple[State, Progress] | None:
    """The newest whole checkpoint, or None where there is none. Torn ones are passed over with a warning.

    Raises:
        PrimaError: the folder cannot be reached. That says nothing of what is in it, so no earlier one is taken.
    """
    home = Folder.at(folder)
    for name in newest_first(home):
        try:
            return load_checkpoint(home.folder(name).address)
        except TornError as error:
            _log.warning("passing over a torn checkpoint: %s", error)
    return None


def latest_step(folder: str | Path) -> int | None:
    """The step of the newest checkpoint that was committed; None where there is none. Its state is not looked at."""
    home = Folder.at(folder)
    steps = (int(name[5:]) for name in newest_first(home) if home.folder(name).exists(_MANIFEST))
    return next(steps, None)


def load_best(folder: str | Path) -> tuple[State, Progress]:
    """The checkpoint that validation chose.

    Raises:
        PrimaError: there is none, or it is damaged.
    """
    last = load_last(folder)
    if last is None or last[1].best_step is None:
        raise PrimaError("no checkpoint here has been chosen yet", where=folder, mend="Run the stage again.")
    step = last[1].best_step
    return last if step == last[1].step else load_step(folder, step)


def load_step(folder: str | Path, step: int) -> tuple[State, Progress]:
    """The checkpoint of a step; see `load_checkpoint`."""
    return load_checkpoint(Folder.at(folder).folder(step_name(step)).address)


def load_checkpoint(target: str | Path) -> tuple[State, Progress]:
    """Read one checkpoint and verify it.

    Raises:
        TornError: a file is missing, damaged or does not match its checksum.
        PrimaError: it cannot be reached.
    """
    from safetensors.torch import load_file

    home = Folder.at(target)
    manifest = _read_manifest(home)
    progress = _progress(manifest.get("progress") if isinstance(manifest, dict) else None, home.where(_MANIFEST))
    with _state_file(home) as (path, found):
        if found != manifest.get("sha256"):
            raise TornError(
                f"checksum is {found[:12]}, its manifest says {str(manifest.get('sha256'))[:12]}", where=home.address
            )
        return load_file(path), progress


@contextmanager
def _state_file(home: Folder) -> Iterator[tuple[Path, str]]:
    """The state as a local file, and its SHA-256."""
    with tempfile.TemporaryDirectory(prefix="prima-checkpoint-") as aside:
        with reaching(home.address, _UNREACHED):
            if not home.exists(_STATE):
                raise TornError("no such file", where=home.where(_STATE))
            path = home.path / _STATE if home.is_local else Path(aside) / _STATE
            digest = hash_file(path) if home.is_local else home.download(_STATE, path)
        yield path, digest


def check_origin(folder: str | Path, step: int, wanted: Origin) -> None:
    """A checkpoint must have been written by the same config, on the same exams; where it trained does not matter.

    Raises:
        PrimaError: it was written by another run.
    """
    home = Folder.at(folder).folder(step_name(step))
    manifest = _read_manifest(home)
    mend = "Resume with the config that wrote it, or choose another `out`."
    config, exams = manifest.get("config"), manifest.get("exams")
    # `out` led here: how it was written, or where the folder lay, does not matter.
    differing = differing_keys(config, dict(wanted.config), ignored=EXECUTION_KEYS | {"out"}) if config else ""
    if differing:
        raise PrimaError(
            f"this checkpoint was written by another config; it differs in {differing}", where=home.address, mend=mend
        )
    if exams and exams != wanted.exams:
        raise PrimaError(
            "this checkpoint was written on other exams: the shards, or the rows of its folds, are not the same",
            where=home.address,
            mend="Resume on the shards that it was written on, or choose another `out`.",
        )


def _read_manifest(home: Folder) -> Any:
    where = home.where(_MANIFEST)
    try:
        with reaching(home.address, _UNREACHED):
            if not home.exists(_MANIFEST):
                raise TornError("no such file", where=where)
            return json.loads(home.read(_MANIFEST))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise TornError(f"not valid JSON ({error})", where=where) from None


def _progress(found: Any, where: str) -> Progress:
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
        raise TornError("damaged: it does not say where training stood", where=where)
    return progress


def step_name(step: int) -> str:
    """The folder of a step's checkpoint."""
    return f"step-{step:08d}"


def newest_first(home: Folder) -> list[str]:
    """Names of the checkpoints' folders, whole or torn.

    Raises:
        PrimaError: the folder cannot be reached.
    """
    with reaching(home.address, _UNREACHED):
        # Nothing else is ours, whatever its name begins with.
        ours = [name for name in home.folders() if name.startswith("step-") and name[5:].isdecimal()]
    return sorted(ours, reverse=True)


def _drop_others(home: Folder, progress: Progress, keep_last: int) -> None:
    try:
        newest = newest_first(home)
        current = newest.index(step_name(progress.step))
        # What lies beyond the step that was just taken is torn, or training would have gone on from it.
        for name in newest[:current] + newest[current + keep_last :]:
            if progress.best_step is None or name != step_name(progress.best_step):
                # The manifest goes first, so that a half-removed checkpoint is a torn one.
                home.folder(name).remove(_MANIFEST)
                home.remove_folder(name)
    except (OSError, PrimaError) as error:
        # The new one stands; the next tries again.
        _log.warning("%s: a superseded checkpoint could not be removed (%s)", home.address, reason(error))
