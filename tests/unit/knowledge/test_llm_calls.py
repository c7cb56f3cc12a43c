"""Calls of an endpoint: none twice, patience with a poor one, and an end of it, over HTTP."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from prima_ray.base import PrimaError
from prima_ray.knowledge.entries import Entry, Failure
from tests.unit.knowledge.llm_job import PAIRS, make_writer, only
from tests.unit.knowledge.llm_server import (
    Request,
    Response,
    failing,
    first,
    honest,
    serving,
    slow,
)

pytest.importorskip("llama_index.llms.openai_like", reason="the extra `llm` is not installed")


def test_a_finished_call_is_not_made_again_whatever_else_changes(tmp_path: Path) -> None:
    with serving() as server:
        before = list(make_writer(server.api_base, cache=tmp_path).write(PAIRS))
        asked = len(server.requests)
    with serving() as server:
        writer = make_writer(server.api_base, cache=tmp_path, calls={"concurrency": 1}, max_attempts=2)
        after = list(writer.write(PAIRS))
        assert server.requests == []
        assert (writer.usage.calls, writer.usage.cached_calls) == (0, asked)
        assert (writer.usage.prompt_tokens, writer.usage.cached_prompt_tokens) == (0, 100 * asked)
        key = lambda item: (item.factor, item.diagnosis)  # noqa: E731
        assert sorted(after, key=key) == sorted(before, key=key)
        # Another model is another answer, and so is another revision.
        only(make_writer(server.api_base, cache=tmp_path, llm={"model": "another"}))
        only(make_writer(server.api_base, cache=tmp_path, llm={"revision": "2"}))
        assert len(server.requests) == 2


def test_a_killed_job_repeats_no_finished_call(tmp_path: Path) -> None:
    with serving(first(4, honest, then=slow(60))) as server:
        command = [sys.executable, "-m", "tests.unit.knowledge.llm_job", server.api_base, str(tmp_path)]
        job = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[3])
        deadline = time.monotonic() + 300
        while len(server.requests) < 5 and time.monotonic() < deadline and job.poll() is None:
            time.sleep(0.05)
        job.kill()
        job.communicate()
        assert len(server.requests) == 5
        finished = set(server.answered)
        assert len(finished) == 4
        server.behaviour = honest
        writer = make_writer(server.api_base, cache=tmp_path)
        assert len(list(writer.write(PAIRS))) == len(PAIRS)
        assert (writer.usage.cached_calls, writer.usage.calls) == (4, len(PAIRS) - 4)
        asked_again = [text for text in server.answered[4:] if text in finished]
        assert asked_again == []


def test_a_damaged_file_of_the_cache_is_asked_again(tmp_path: Path) -> None:
    with serving() as server:
        only(make_writer(server.api_base, cache=tmp_path))
        (kept,) = tmp_path.rglob("*.json")
        for text in ("", "{}", kept.read_text()[:-40], kept.read_text().replace(kept.stem, "0" * 64)):
            kept.write_text(text)
            only(make_writer(server.api_base, cache=tmp_path))
        assert len(server.requests) == 5
        only(make_writer(server.api_base, cache=tmp_path))
        assert len(server.requests) == 5


def test_whoever_stops_early_keeps_what_is_under_way(tmp_path: Path) -> None:
    with serving(slow(0.3)) as server:
        writing = make_writer(server.api_base, cache=tmp_path, calls={"concurrency": 2}).write(PAIRS)
        next(writing)
        writing.close()
        num_asked = len(server.requests)
        assert num_asked < len(PAIRS)
        assert len(list(tmp_path.rglob("*.json"))) == len(server.answered) == num_asked


@pytest.mark.parametrize("status", [429, 500, 503, 408])
def test_trouble_that_passes_is_waited_for(status: int) -> None:
    with serving(first(2, failing(status))) as server:
        writer = make_writer(server.api_base)
        assert only(writer).direction == "raises"
        assert (writer.usage.calls, writer.usage.retries, len(server.requests)) == (1, 2, 3)


def test_retry_after_is_obeyed_by_all_threads() -> None:
    with serving(first(1, failing(429, Retry_After="1"))) as server:
        started = time.monotonic()
        writer = make_writer(server.api_base, calls={"concurrency": 1})
        assert len(list(writer.write(PAIRS[:3]))) == 3
        assert time.monotonic() - started >= 1.0
        assert writer.usage.retries == 1


def test_a_time_that_is_too_long_is_not_waited() -> None:
    with serving(failing(429, Retry_After="3600")) as server:
        written = only(make_writer(server.api_base))
    assert isinstance(written, Failure)
    assert (written.reason, written.attempts, written.answer) == ("unanswered", 0, None)
    assert "trouble 429" in written.detail
    assert "it asks to be left alone for 3600 s (attempt 1)" in written.detail


def test_a_slow_answer_is_given_up_and_asked_for_again() -> None:
    with serving(first(1, slow(1.5))) as server:
        writer = make_writer(server.api_base, llm={"timeout_s": 0.4})
        assert only(writer).direction == "raises"
        assert writer.usage.retries == 1
        server.behaviour = slow(1.5)
        written = only(make_writer(server.api_base, llm={"timeout_s": 0.2}, calls={"max_retries": 1}))
    assert isinstance(written, Failure)
    assert (written.reason, written.detail) == ("unanswered", "no answer within 0.2 s (attempt 2)")


@pytest.mark.parametrize("raw", [b"<html>busy</html>", b"{}", b'{"choices": []}', b"", b"null"])
def test_an_answer_that_is_no_completion_is_asked_for_again(raw: bytes) -> None:
    with serving(first(1, lambda _: Response(raw=raw))) as server:
        writer = make_writer(server.api_base)
        assert only(writer).direction == "raises"
        assert writer.usage.retries == 1


def test_an_unanswered_pair_is_recorded_and_asked_for_in_the_next_run(tmp_path: Path) -> None:
    def never_on_dust(request: Request) -> Response:
        return failing(500)(request) if request.factor == "dust at work" else honest(request)

    with serving(never_on_dust) as server:
        keys: dict[str, Any] = {"cache": tmp_path, "calls": {"max_retries": 1, "concurrency": 1}}
        written = list(make_writer(server.api_base, **keys).write(PAIRS[2:5]))
        failed = [item for item in written if isinstance(item, Failure)]
        assert [(item.factor, item.reason) for item in failed] == [("dust", "unanswered")]
        server.behaviour = honest
        writer = make_writer(server.api_base, **keys)
        assert all(isinstance(item, Entry) for item in writer.write(PAIRS[2:5]))
        assert (writer.usage.calls, writer.usage.cached_calls) == (1, 2)


def test_an_endpoint_that_answers_nothing_ends_the_work() -> None:
    with serving(failing(503)) as server:
        writer = make_writer(server.api_base, calls={"max_retries": 1, "give_up_after": 2, "concurrency": 1})
        with pytest.raises(PrimaError, match="no answer to 2 calls in a row, the last time: .*trouble 503") as caught:
            list(writer.write(PAIRS))
        assert len(server.requests) == 4
    assert caught.value.where == server.api_base
    assert "no finished call is repeated" in (caught.value.mend or "")


def test_a_request_that_is_not_taken() -> None:
    with serving(first(1, honest, then=failing(400))) as server:
        writer = make_writer(server.api_base, calls={"concurrency": 1})
        written = list(writer.write(PAIRS))
        # Not tried again; and since some are taken, the work goes on.
        assert [item.reason for item in written if isinstance(item, Failure)] == ["refused"] * (len(PAIRS) - 1)
        assert len(server.requests) == len(PAIRS)
        server.behaviour = failing(422)
        with pytest.raises(PrimaError, match="no answer to 5 calls in a row.*trouble 422"):
            list(make_writer(server.api_base, calls={"concurrency": 1}).write(PAIRS))
