from __future__ import annotations

from typing import Any

import pytest
from pydantic import TypeAdapter

from prima_ray.base import PrimaError
from prima_ray.stages.elastic_schedule import EVENTS, EventConfig, ScheduleConfig, resolve_schedule

ADAPTER: TypeAdapter[Any] = TypeAdapter(ScheduleConfig)


def resolve(*events: tuple[int, str], total_steps: int = 50, start: int = 2) -> tuple[EventConfig, ...]:
    schedule = {"kind": "listed", "events": [{"at_step": step, "event": event} for step, event in events]}
    return resolve_schedule(
        ADAPTER.validate_python(schedule), start=start, low=1, high=3, total_steps=total_steps, seed=0
    )


def draw(seed: int, num_events: int, **keys: Any) -> tuple[EventConfig, ...]:
    schedule = ADAPTER.validate_python({"kind": "random", "num_events": num_events, **keys})
    return resolve_schedule(schedule, start=2, low=1, high=3, total_steps=100, seed=seed)


def test_a_listed_schedule_is_what_it_says():
    found = resolve((5, "add_node"), (9, "kill_worker"), (12, "drain_node"), (20, "remove_node"), (30, "kill_driver"))
    assert [(item.at_step, item.event) for item in found] == [
        *((5, "add_node"), (9, "kill_worker"), (12, "drain_node"), (20, "remove_node"), (30, "kill_driver"))
    ]


def test_what_cannot_happen_is_refused():
    cases = {
        (
            (5, "add_node"),
            (9, "add_node"),
        ): "schedule.events[1] (add_node at step 9) would leave 4 nodes, but num_workers "
        "is [1, 3]\n  Change the schedule, start_nodes or num_workers.",
        ((5, "remove_node"), (9, "drain_node")): "schedule.events[1] (drain_node at step 9) would leave 0 nodes, but "
        "num_workers is [1, 3]\n  Change the schedule, start_nodes or num_workers.",
        ((50, "kill_worker"),): "schedule.events[0] (kill_worker at step 50) is after the end: the run has 50 steps\n"
        "  Lower at_step, or train longer.",
        (
            (9, "kill_worker"),
            (9, "add_node"),
        ): "schedule.events[1] (add_node at step 9) is not after the event before it, "
        "at step 9\n  Sort them by at_step.",
    }
    for events, text in cases.items():
        with pytest.raises(PrimaError) as caught:
            resolve(*events)
        assert str(caught.value) == text
    with pytest.raises(PrimaError) as caught:
        resolve((5, "kill_worker"), start=4)
    assert str(caught.value) == "start_nodes is 4, but num_workers is [1, 3]"


def test_a_drawn_schedule_is_possible_whatever_the_seed_and_the_same_for_one():
    drawn = [draw(seed, 8) for seed in range(20)]
    assert drawn[3] == draw(3, 8)
    assert len({tuple(events) for events in drawn}) == 20
    assert {item.event for events in drawn for item in events} == set(EVENTS)


def test_a_schedule_that_cannot_be_drawn_is_refused():
    with pytest.raises(PrimaError) as caught:
        draw(0, 60)
    assert str(caught.value) == "schedule.num_events is 60, too many for 100 steps\n  Lower it, or train longer."
    with pytest.raises(PrimaError) as caught:
        draw(0, 3, choose_from=["add_node"])
    assert str(caught.value) == (
        "schedule.choose_from: none of add_node is possible with 3 nodes\n  Allow more kinds of events."
    )
