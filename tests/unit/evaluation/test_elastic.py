from __future__ import annotations

from typing import Any

import pytest

from prima_ray.evaluation.elastic import (
    find_coverage,
    find_pauses,
    goodput,
    largest_difference,
    relative_differences,
    same_batches,
)
from prima_ray.evaluation.elastic_plots import loss_plot, pause_plot, timeline_plot


def step(number: int, at: float, *, exams: str = "ab", epoch: int = 0, loss: float = 2.0, workers: int = 2) -> Any:
    return {"step": number, "epoch": epoch, "time": at, "seconds": 1.0, "loss": loss, "world_size": workers,
            "exam_ids": list(exams)}  # fmt: skip


def start(at: float, from_step: int, replayed: int, workers: int = 2, **timeline: float) -> Any:
    engine = {"kind": "torch", "world_size": workers}
    return {"time": at, "from_step": from_step, "replayed_steps": replayed, "engine": engine, "timeline": timeline}


STEPS = [step(1, 1), step(2, 2, exams="cd"), step(3, 20, exams="ba", epoch=1), step(4, 21, exams="dc", epoch=1)]
REPLAYED = [step(3, 3, epoch=1)]
STARTS = [start(0, 0, 0), start(15, 2, 1, process=8, context=10, train=10, prepared=11, engine=14)]


def test_a_pause_is_from_the_last_step_of_one_group_to_the_first_of_the_next():
    (pause,) = find_pauses(STEPS, REPLAYED, STARTS)
    assert (pause.start, pause.began, pause.seconds, pause.from_step, pause.replayed, pause.world_size) == (
        1,
        3,
        17,
        2,
        1,
        2,
    )
    assert pause.phases == {"process": 5, "context": 2, "prepared": 1, "engine": 3, "noted": 1, "step": 5}


def test_a_start_that_took_no_step_is_no_pause():
    assert find_pauses(STEPS, REPLAYED, [*STARTS, start(30, 4, 0)]) == find_pauses(STEPS, REPLAYED, STARTS)


def test_exams_that_are_missing_or_come_twice_are_counted_by_epoch():
    found = find_coverage([step(1, 1, exams="ab"), step(2, 2, exams="bx", epoch=0)], STEPS[:2])
    assert [(row.epoch, row.expected, row.lost, row.doubled) for row in found] == [(0, 4, 2, 2)]
    assert [(row.lost, row.doubled) for row in find_coverage(STEPS, STEPS)] == [(0, 0), (0, 0)]


def test_the_curves_are_compared_step_by_step():
    other = [step(1, 1), step(2, 2, exams="dc"), step(3, 3, exams="ab", loss=2.002), step(4, 4, exams="cd")]
    assert same_batches(STEPS, other)
    assert largest_difference(STEPS, other) == pytest.approx(0.002 / 2.002)
    assert [number for number, value in relative_differences(STEPS, other) if value] == [3]
    assert largest_difference(STEPS, other[:3]) == float("inf")
    assert not same_batches(STEPS, [*other[:3], step(4, 4, exams="ce")])


def test_goodput_is_what_neither_pauses_nor_lost_steps_took():
    pauses = find_pauses(STEPS, REPLAYED, STARTS)
    assert goodput(STEPS, REPLAYED, pauses) == pytest.approx(1 - (17 + 1) / 20)
    assert goodput(STEPS[:2], [], []) == 1.0


def test_the_pictures_are_drawn():
    pauses = find_pauses(STEPS, REPLAYED, STARTS)
    events = [{"event": "kill_worker", "time": 3.5}]
    for picture in (
        timeline_plot(STEPS, REPLAYED, pauses, events, global_batch=2),
        pause_plot(pauses, ["kill worker"]),
        loss_plot(STEPS, STEPS, relative_differences(STEPS, STEPS), tolerance=1e-4),
    ):
        assert picture.startswith(b"\x89PNG")
