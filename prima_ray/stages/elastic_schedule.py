"""What happens to the workers of an elastic experiment, and when: written down, or drawn from a seed.

To add an event: its name in `EVENTS`, what it does to the number of nodes in `_CHANGE`, and what is done in
`elastic_drive.Drive`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal, get_args

import numpy as np
from pydantic import Field

from prima_ray.base import PrimaError, StrictConfig, hash_key

EventKind = Literal["add_node", "remove_node", "kill_worker", "drain_node", "kill_driver"]
EVENTS: tuple[EventKind, ...] = get_args(EventKind)
_CHANGE: dict[EventKind, int] = {"add_node": 1, "remove_node": -1, "drain_node": -1}


class EventConfig(StrictConfig):
    """One thing that happens."""

    at_step: int = Field(gt=0)
    """When the run has taken so many steps, and has recovered from the event before."""
    event: EventKind
    after_checkpoint: int = Field(default=0, ge=0)
    """And so many steps since the last checkpoint: what a sudden loss costs, at least."""
    deadline_s: float = Field(default=30.0, gt=0)
    """Of `drain_node`: the notice, after which the node is gone."""


class ListedScheduleConfig(StrictConfig):
    """Events one by one."""

    kind: Literal["listed"] = "listed"
    events: tuple[EventConfig, ...]


class RandomScheduleConfig(StrictConfig):
    """Events drawn from the experiment's seed, evenly over the run."""

    kind: Literal["random"] = "random"
    num_events: int = Field(gt=0)
    choose_from: tuple[EventKind, ...] = EVENTS
    deadline_s: float = Field(default=30.0, gt=0)


ScheduleConfig = Annotated[ListedScheduleConfig | RandomScheduleConfig, Field(discriminator="kind")]


def resolve_schedule(
    schedule: ScheduleConfig, *, start: int, low: int, high: int, total_steps: int, seed: int
) -> tuple[EventConfig, ...]:
    """The events, checked.

    Args:
        start: nodes at the beginning; each carries one worker.
        low, high: the fewest and the most workers of the run.
        total_steps: optimizer steps of the run.

    Raises:
        PrimaError: an event is out of order, after the end, or leaves too few or too many nodes.
    """
    if not low <= start <= high:
        raise PrimaError(f"start_nodes is {start}, but num_workers is [{low}, {high}]")
    if isinstance(schedule, RandomScheduleConfig):
        events = _draw(schedule, start=start, low=low, high=high, total_steps=total_steps, seed=seed)
    else:
        events = schedule.events
    if not events:
        raise PrimaError("schedule.events is empty: nothing would happen", mend="Name at least one event.")
    _check(events, start=start, low=low, high=high, total_steps=total_steps)
    return events


def _check(events: Sequence[EventConfig], *, start: int, low: int, high: int, total_steps: int) -> None:
    nodes, before = start, 0
    for number, item in enumerate(events):
        name = f"schedule.events[{number}] ({item.event} at step {item.at_step})"
        if item.at_step <= before:
            raise PrimaError(f"{name} is not after the event before it, at step {before}", mend="Sort them by at_step.")
        if item.at_step >= total_steps:
            raise PrimaError(
                f"{name} is after the end: the run has {total_steps} steps", mend="Lower at_step, or train longer."
            )
        nodes, before = nodes + _CHANGE.get(item.event, 0), item.at_step
        if not low <= nodes <= high:
            raise PrimaError(
                f"{name} would leave {nodes} nodes, but num_workers is [{low}, {high}]",
                mend="Change the schedule, start_nodes or num_workers.",
            )


def _draw(
    schedule: RandomScheduleConfig, *, start: int, low: int, high: int, total_steps: int, seed: int
) -> tuple[EventConfig, ...]:
    rng = np.random.default_rng(hash_key(seed, "elastic schedule"))
    gap = total_steps / (schedule.num_events + 1)
    if gap < 2:
        raise PrimaError(
            f"schedule.num_events is {schedule.num_events}, too many for {total_steps} steps",
            mend="Lower it, or train longer.",
        )
    nodes, events = start, []
    for number in range(schedule.num_events):
        possible = [kind for kind in schedule.choose_from if low <= nodes + _CHANGE.get(kind, 0) <= high]
        if not possible:
            raise PrimaError(
                f"schedule.choose_from: none of {', '.join(schedule.choose_from)} is possible with {nodes} nodes",
                mend="Allow more kinds of events.",
            )
        kind = possible[int(rng.integers(len(possible)))]
        at_step = int((number + 1) * gap + rng.uniform(-0.25, 0.25) * gap)
        events.append(EventConfig(at_step=at_step, event=kind, deadline_s=schedule.deadline_s))
        nodes += _CHANGE.get(kind, 0)
    return tuple(events)
