"""Where a run is written: there when the job is over, writable by every node, with room."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from prima_ray.base import PrimaError, is_uri
from prima_ray.training.checks import Check, Finding, Subject
from prima_ray.training.facts import FolderState
from prima_ray.training.shared_folder import not_shared

_RUNTIME = "runtime_resources"
"""Ray's folder of what runtime environments bring to a node."""
_SPILL_LIMIT = 0.95
"""Of a disk: Ray writes no objects out beyond it (`local_fs_capacity_threshold`)."""
_LEAST_FREE = 1 << 30
"""Less than a checkpoint of any preset's."""


def kept_after_the_job(subject: Subject) -> Iterator[Finding]:
    """`ray job submit --working-dir` runs in a copy of the folder, which Ray deletes some time after the job."""
    refuse_lost(subject.out or "")
    yield from ()


def refuse_lost(out: str) -> None:
    """Refuse a folder that would not outlive the job.

    Raises:
        PrimaError: it lies in Ray's copy of the working directory.
    """
    if out and not is_uri(out) and _RUNTIME in Path(out).absolute().parts:
        raise PrimaError(
            "`out` lies in Ray's copy of the working directory, which goes with the job",
            where=Path(out).absolute(),
            mend="Name a folder that stays: --set out=/shared/runs/NAME, or s3://bucket/NAME.",
        )


def writable(subject: Subject) -> Iterator[Finding]:
    """This machine and every node can write where the run is written, and see each other's files."""
    for state in subject.here.folders:
        if state.error:
            mend = "Change its owner or mode, or name another folder."
            yield Finding("error", f"cannot be written to ({state.error})", state.address, mend)
        elif state.address in subject.blind:
            wrong = not_shared(state.address, subject.blind[state.address])
            yield Finding("error", wrong.what, wrong.where, wrong.mend)
        else:
            who = f"{len(subject.nodes)} nodes" if len(subject.nodes) > 1 else "this machine"
            yield Finding("ok", f"{who} can write here", state.address)


def disk_space(subject: Subject) -> Iterator[Finding]:
    """Room for checkpoints, and for what Ray writes out when memory is short."""
    for name, facts in subject.machines():
        for state in facts.folders:
            where = state.address if name is None else f"{name}: {state.address}"
            yield from _space(state, where)


def _space(state: FolderState, where: str) -> Iterator[Finding]:
    if state.free_bytes is None or state.total_bytes is None:
        return
    text = f"{state.free_bytes / (1 << 30):.1f} of {state.total_bytes / (1 << 30):.1f} GiB are free"
    if state.free_bytes < _LEAST_FREE:
        yield Finding("error", f"{text}, less than a checkpoint may need", where, "Make room, or name another folder.")
    elif 1 - state.free_bytes / state.total_bytes > _SPILL_LIMIT:
        mend = "Make room: a full disk stops a run, which goes on from its last checkpoint afterwards."
        yield Finding("warning", f"{text}: Ray writes no objects out where {_SPILL_LIMIT:.0%} are used", where, mend)
    else:
        yield Finding("ok", text, where)


def inputs_on_every_node(subject: Subject) -> Iterator[Finding]:
    """Workers read shards and weights themselves."""
    for name, facts in subject.nodes.items():
        for path in facts.missing:
            mend = "Put it where every node finds it under this path, or use an address such as s3://bucket/folder."
            yield Finding("error", "is not there on this node", f"{name}: {path}", mend)


def temp_folder() -> str:
    """Where Ray keeps its logs and what it writes out."""
    return os.environ.get("RAY_TMPDIR", "/tmp")  # noqa: S108 - Ray's own default


STORAGE: tuple[Check, ...] = (kept_after_the_job, writable, disk_space, inputs_on_every_node)
