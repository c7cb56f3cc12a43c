"""What an elastic run did, from the files it left: pauses, replayed steps, exams lost or doubled, distance from fixed.

Everything here is a function of records: lines of `steps.jsonl`, `replayed.jsonl` and `starts.jsonl`. The surviving
lineage are the steps that the final model has taken; those that were lost with their workers and taken again are the
replayed ones.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Record = Mapping[str, Any]

PHASES: Mapping[str, str] = {
    "process": "until the new processes",
    "context": "Ray Train's worker, imports",
    "prepared": "cached features",
    "engine": "model and engine",
    "noted": "checkpoint read",
    "step": "first batch and step",
}
"""What a pause is spent on, in order: the moment of a start's timeline that ends it -> in words."""


@dataclass(frozen=True)
class Pause:
    """From the last step of one group to the end of the first step of the next."""

    start: int
    """The number of the start that ended it; the run's own is 0."""
    began: float
    """In seconds since the epoch."""
    seconds: float
    phases: Mapping[str, float]
    """Key of `PHASES` -> seconds of it."""
    from_step: int
    replayed: int
    world_size: int


@dataclass(frozen=True)
class Coverage:
    """The exams of one epoch, on the surviving lineage."""

    epoch: int
    expected: int
    lost: int
    doubled: int


def find_pauses(steps: Sequence[Record], replayed: Sequence[Record], starts: Sequence[Record]) -> list[Pause]:
    """One for each start but the first that took a step."""
    taken = sorted([*steps, *replayed], key=lambda record: record["time"])
    pauses = []
    for number, start in enumerate(starts[1:], 1):
        before = [record["time"] for record in taken if record["time"] < start["time"]]
        after = [record["time"] for record in taken if record["time"] >= start["time"]]
        if not before or not after:
            continue
        marks = {**start["timeline"], "noted": start["time"], "step": after[0]}
        phases, last = {}, before[-1]
        for name in PHASES:
            moment = max(marks.get(name, last), last)
            phases[name], last = moment - last, moment
        pauses.append(
            Pause(
                start=number,
                began=before[-1],
                seconds=after[0] - before[-1],
                phases=phases,
                from_step=start["from_step"],
                replayed=start["replayed_steps"],
                world_size=start["engine"]["world_size"],
            )
        )
    return pauses


def find_coverage(steps: Sequence[Record], expected: Sequence[Record]) -> list[Coverage]:
    """Exams of each epoch beside those of another run of the same config; both with `exam_ids`."""
    found, wanted = _exams_by_epoch(steps), _exams_by_epoch(expected)
    rows = []
    for epoch in sorted(wanted | found):
        seen, due = found.get(epoch, Counter()), wanted.get(epoch, Counter())
        rows.append(
            Coverage(
                epoch=epoch,
                expected=len(due),
                lost=len(due.keys() - seen.keys()),
                doubled=sum(count - 1 for count in seen.values() if count > 1) + len(seen.keys() - due.keys()),
            )
        )
    return rows


def _exams_by_epoch(steps: Sequence[Record]) -> dict[int, Counter[str]]:
    found: dict[int, Counter[str]] = {}
    for record in steps:
        found.setdefault(record["epoch"], Counter()).update(record["exam_ids"])
    return found


def same_batches(steps: Sequence[Record], expected: Sequence[Record]) -> bool:
    """Did every step see the exams that the other run's step saw, in whatever order?"""
    return [sorted(record["exam_ids"]) for record in steps] == [sorted(record["exam_ids"]) for record in expected]


def largest_difference(steps: Sequence[Record], expected: Sequence[Record]) -> float:
    """Of the loss, relative; infinite where the runs are not equally long."""
    if [record["step"] for record in steps] != [record["step"] for record in expected]:
        return float("inf")
    return max((_relative(a["loss"], b["loss"]) for a, b in zip(steps, expected, strict=True)), default=0.0)


def relative_differences(steps: Sequence[Record], expected: Sequence[Record]) -> list[tuple[int, float]]:
    """(step, relative difference of the loss) of the steps that both have."""
    theirs = {record["step"]: record["loss"] for record in expected}
    return [(item["step"], _relative(item["loss"], theirs[item["step"]])) for item in steps if item["step"] in theirs]


def _relative(value: float, reference: float) -> float:
    return abs(value - reference) / max(abs(reference), 1e-12)


def goodput(steps: Sequence[Record], replayed: Sequence[Record], pauses: Sequence[Pause]) -> float:
    """The share of the time, from the first step to the last, that was neither a pause nor a step lost later."""
    taken = sorted([*steps, *replayed], key=lambda record: record["time"])
    if len(taken) < 2:
        return 1.0
    whole = taken[-1]["time"] - taken[0]["time"]
    # A step that ends a pause is counted with it.
    ordinary = statistics.median(record["seconds"] for record in taken)
    lost = sum(min(record["seconds"], 3 * ordinary) for record in replayed)
    return max(0.0, 1.0 - (sum(pause.seconds for pause in pauses) + lost) / whole) if whole > 0 else 1.0
