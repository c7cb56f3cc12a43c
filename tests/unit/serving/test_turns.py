from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from prima_ray.serving.turns import Turns


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 20))


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_whoever_comes_while_a_batch_is_computed_waits_for_its_end() -> None:
    async def work() -> None:
        turns = Turns(max_size=4, linger=0.0)
        await turns.wait()
        turns.begin()
        waiting = [asyncio.create_task(turns.wait()) for _ in range(3)]
        await settle()
        assert not any(task.done() for task in waiting)
        turns.end(3, 60.0)
        await settle()
        assert all(task.done() for task in waiting)

    run(work())


def test_after_a_batch_of_one_nobody_is_held_back() -> None:
    async def work() -> None:
        turns = Turns(max_size=4, linger=1.0)
        turns.begin()
        turns.end(1, 3600.0)
        await turns.wait()

    run(work())


@pytest.mark.parametrize(("size", "waiting", "missing"), [(2, 0, 2), (2, 1, 2), (3, 2, 2), (4, 3, 1), (4, 4, 0)])
def test_the_next_batch_goes_in_once_as_many_are_there_as_were(size: int, waiting: int, missing: int) -> None:
    async def work() -> None:
        turns = Turns(max_size=4, linger=1.0)
        turns.begin()
        tasks = [asyncio.create_task(turns.wait()) for _ in range(waiting)]
        await settle()
        turns.end(size, 3600.0)
        for _ in range(missing):
            await settle()
            assert not any(task.done() for task in tasks)
            tasks.append(asyncio.create_task(turns.wait()))
        await settle()
        assert all(task.done() for task in tasks)

    run(work())


def test_who_does_not_come_back_is_not_waited_for_long() -> None:
    async def work() -> None:
        turns = Turns(max_size=4, linger=0.5)
        turns.begin()
        turns.end(2, 0.1)
        await turns.wait()
        # The next one finds an open door too: nothing is under way.
        await turns.wait()

    run(work())


def test_whoever_gives_up_does_not_count() -> None:
    async def work() -> None:
        turns = Turns(max_size=4, linger=1.0)
        turns.begin()
        first = asyncio.create_task(turns.wait())
        await settle()
        first.cancel()
        await settle()
        turns.end(2, 3600.0)
        second = asyncio.create_task(turns.wait())
        await settle()
        assert not second.done()
        third = asyncio.create_task(turns.wait())
        await settle()
        assert second.done()
        assert third.done()

    run(work())


def test_a_batch_that_goes_in_ends_the_wait_before_it() -> None:
    """Of more than a batch holds, the rest goes in without a turn of its own."""

    async def work() -> None:
        turns = Turns(max_size=4, linger=1.0)
        turns.begin()
        turns.end(4, 0.02)
        turns.begin()
        task = asyncio.create_task(turns.wait())
        await asyncio.sleep(0.1)
        assert not task.done()
        turns.end(1, 0.02)
        await settle()
        assert task.done()

    run(work())
