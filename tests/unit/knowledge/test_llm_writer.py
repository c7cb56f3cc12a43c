"""The whole way of an entry by a language model, over HTTP: a server of the tests' own answers, or misbehaves."""

from __future__ import annotations

import pytest

from prima_ray.base import PrimaError
from prima_ray.knowledge.chunks import Chunk
from prima_ray.knowledge.entries import Entry, Failure
from prima_ray.knowledge.extractive import NO_EVIDENCE
from prima_ray.knowledge.grounding import Grounded, ground
from prima_ray.knowledge.llm_writer import LlmWriter
from tests.unit.knowledge.llm_job import CHUNKS, PAIRS, YES, YES_TOO, make_writer, only
from tests.unit.knowledge.llm_server import (
    Response,
    honest,
    serving,
    slow,
)
from tests.unit.knowledge.writing import Shelf, chunk, vocabulary

pytest.importorskip("llama_index.llms.openai_like", reason="the extra `llm` is not installed")


def grounded(written: Entry | Failure, *chunks: Chunk) -> Grounded:
    assert isinstance(written, Entry)
    return ground(written, {item.chunk_id: item for item in chunks or CHUNKS})


def test_an_entry_with_its_statements_quotes_and_chunks() -> None:
    with serving() as server:
        writer = make_writer(server.api_base)
        written = only(writer)
    assert isinstance(written, Entry)
    assert (written.direction, written.strength, written.status) == ("raises", "weak", "proposed")
    assert {(item.text, quote.chunk_id, quote.quote) for item in written.statements for quote in item.quotes} == {
        (YES.text, YES.chunk_id, YES.text),
        (YES_TOO.text, YES_TOO.chunk_id, YES_TOO.text),
    }
    assert grounded(written) == Grounded(written, ())
    (request,) = server.requests
    assert request.path == "/v1/chat/completions"
    assert (request.body["model"], request.body["temperature"], request.body["max_tokens"]) == ("tests-own", 0.0, 1024)
    assert (writer.usage.calls, writer.usage.prompt_tokens, writer.usage.completion_tokens) == (1, 100, 10)
    assert writer.usage.cost is None


def test_all_pairs_come_back_once_and_the_progress_is_told() -> None:
    told: list[int] = []
    with serving(slow(0.1)) as server:
        writer = make_writer(server.api_base, calls={"concurrency": 3})
        written = list(writer.write(iter(PAIRS), progress=told.append))
        assert {(item.factor, item.diagnosis) for item in written} == set(PAIRS)
        assert sum(told) == len(written) == len(PAIRS)
        assert server.most_at_once == 3
        directions = {(item.factor, item.diagnosis): item.direction for item in written if isinstance(item, Entry)}
        assert {pair: said for pair, said in directions.items() if said != "no_evidence"} == {
            ("dust", "ASTHMA"): "raises",
            ("tea", "CROUP"): "lowers",
        }
        # The same writer again.
        assert len(list(writer.write(PAIRS[:2]))) == 2


def test_where_nothing_is_found_nobody_is_asked() -> None:
    with serving() as server:
        writer = LlmWriter.load(make_writer(server.api_base)._config, vocabulary(), Shelf())
        written = only(writer)
    assert isinstance(written, Entry)
    assert (written.direction, written.summary, server.requests) == ("no_evidence", NO_EVIDENCE, [])


def test_only_allowed_sources_are_shown() -> None:
    planted = chunk("Dust lowers the risk of asthma.", doc="z", source="elsewhere")
    with serving() as server:
        config = make_writer(server.api_base)._config
        writer = LlmWriter.load(config, vocabulary(), Shelf(planted, YES, obeys=False), allow=("here",))
        assert only(writer).direction == "raises"
        assert list(server.requests[0].passages.values()) == [YES.text]


def test_cost_and_tokens() -> None:
    with serving() as server:
        prices = {"prompt_price": 2.0, "completion_price": 10.0}
        writer = make_writer(server.api_base, llm=prices)
        num = len(list(writer.write(PAIRS)))
        assert writer.usage.cost == pytest.approx(num * (100 * 2 + 10 * 10) / 1e6)
        assert writer.usage.as_dict()["completion_tokens"] == 10 * num
        server.behaviour = lambda request: Response(honest(request).content, usage=False)
        writer = make_writer(server.api_base, llm=prices)
        only(writer)
        assert (writer.usage.calls, writer.usage.uncounted_calls, writer.usage.prompt_tokens) == (1, 1, 0)


def test_a_small_context_window_shows_fewer_passages() -> None:
    many = [chunk(f"Dust raises the risk of asthma. {'It is said here. ' * 30}", doc=f"d{n}") for n in range(20)]
    with serving() as server:
        for window, most in ((2048, 3), (4096, 15), (16384, 20)):
            only(make_writer(server.api_base, *many, llm={"context_window": window, "max_tokens": 256}))
            request = server.requests[-1]
            letters = sum(len(item["content"]) for item in request.messages)
            assert 1 <= len(request.passages) <= most
            assert letters / 3 + 2 * 256 < window
        assert len(request.passages) == 20
        with pytest.raises(PrimaError, match="a context window of 1100 tokens has no room for passages") as caught:
            only(make_writer(server.api_base, llm={"context_window": 1100, "max_tokens": 500}))
    assert caught.value.mend == "Raise writer.llm.context_window, or lower writer.llm.max_tokens."
