"""`prima corpus` with a language model: a server of the tests' own, which answers or misbehaves."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from prima_ray.base import PrimaError
from prima_ray.cli import main
from prima_ray.config import load_config
from prima_ray.knowledge.corpus import read_corpus
from prima_ray.stages import corpus
from prima_ray.stages.corpus import CorpusConfig
from prima_ray.stages.demo import config_file
from tests.unit.knowledge.llm_server import LlmServer, Request, Response, entry, saying, serving

pytest.importorskip("llama_index.llms.openai_like", reason="the extra `llm` is not installed")

SENTENCE = "Growth is a sign of a plain restless phantom."
GROWTH = [("growth", name) for name in ("PQ", "PR", "VQ", "VR")]


def knowing(request: Request) -> Response:
    """Knows one thing."""
    if request.factor == "the lesion has grown" and request.diagnosis == "plain restless phantom":
        label = next(label for label, text in request.passages.items() if SENTENCE in text)
        return Response(entry("raises", (SENTENCE, label, SENTENCE)))
    return Response(entry("no_evidence"))


def lost_on_growth(request: Request) -> Response:
    return Response("I would rather not.") if request.factor == "the lesion has grown" else knowing(request)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    shutil.copytree(config_file("corpus").parent, tmp_path / "configs")
    return tmp_path


def overrides(root: Path, server: LlmServer, **keys: Any) -> list[str]:
    llm = {"kind": "openai_like", "api_base": server.api_base, "model": "m", "prompt_price": 1, "completion_price": 1}
    writer = {"kind": "llm", "llm": llm, "calls": {"backoff_s": 0.01}}
    return [
        f"out={root / 'corpus'}",
        f"writer={json.dumps(writer)}",
        *(f"{key.replace('__', '.')}={value}" for key, value in keys.items()),
    ]


def run(root: Path, server: LlmServer, **keys: Any) -> Path:
    return corpus.run(load_config(CorpusConfig, root / "configs" / "corpus.yaml", overrides(root, server, **keys)))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def pairs(path: Path) -> list[tuple[str, str]]:
    return [(item["factor"], item["diagnosis"]) for item in lines(path)]


def test_entries_and_what_they_took(root: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO")
    with serving(knowing) as server:
        out = run(root, server)
        assert len(server.requests) == len(list((out / "calls").rglob("*.json"))) == 36
    assert {item.entry_id: item.direction for item in read_corpus(out).entries if item.statements} == {
        "growth:PR": "raises"
    }
    metrics = json.loads((out / "metrics.json").read_text())
    assert (metrics["failures"], metrics["usage"]["calls"]) == ({}, 36)
    assert metrics["usage"]["cost"] == pytest.approx(36 * 110 / 1e6)
    assert lines(out / "failures.jsonl") == []
    assert (
        "corpus: language model: 36 calls, 0 answers from earlier runs, 0 retries, "
        "3600 tokens of prompts and 360 of answers, cost 0.00396"
    ) in caplog.text
    # Another address, more calls at a time: the same corpus.
    with serving(knowing) as server:
        run(root, server, writer__calls__concurrency=2, writer__llm__timeout_s=9)
        assert "already finished, nothing to do" in caplog.text
        with pytest.raises(PrimaError, match="it differs in writer.llm.model"):
            run(root, server, writer__llm__model="another")
        assert server.requests == []


def test_pairs_that_failed_are_told_and_asked_anew_by_the_next_run(
    root: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
):
    out = root / "corpus"
    with serving(lost_on_growth) as server:
        sets = [item for key in overrides(root, server) for item in ("--set", key)]
        command = ["corpus", str(root / "configs" / "corpus.yaml"), *sets]
        assert main(command) == 2
        assert (
            f"{out / 'failures.jsonl'}: 4 of 36 pairs failed (4 malformed); the corpus is written without them, and "
            "the run is not finished\n"
            "  Run the same command again: these pairs alone are asked anew. To do without them, set max_failures=4."
        ) in capsys.readouterr().err
        assert "4 pairs have no entry, since their writing failed: 4 malformed (failures.jsonl)" in caplog.text
        assert not (out / "run.json").exists()
        assert pairs(out / "failures.jsonl") == GROWTH
        failed = lines(out / "failures.jsonl")[0]
        assert (failed["attempts"], failed["answer"]) == (3, "I would rather not.")
        written = [(item.factor, item.diagnosis) for item in read_corpus(out).entries]
        assert len(written) == 32
        assert not set(written) & set(GROWTH)
        metrics = json.loads((out / "metrics.json").read_text())
        assert (metrics["failures"], metrics["usage"]["calls"]) == ({"malformed": 4}, 32 + 4 * 3)

        server.behaviour = knowing
        server.requests.clear()
        assert main(command) == 0
        assert [request.factor for request in server.requests] == ["the lesion has grown"] * 4
    assert (out / "run.json").exists()
    assert lines(out / "failures.jsonl") == []
    assert pairs(out / "corpus.jsonl") == GROWTH + written
    metrics = json.loads((out / "metrics.json").read_text())
    assert (metrics["usage"]["calls"], metrics["usage"]["cached_calls"]) == (4, 32)


def test_failures_may_be_allowed(root: Path):
    with serving(lost_on_growth) as server:
        out = run(root, server, max_failures=4)
        assert json.loads((out / "run.json").read_text())["failed_pairs"] == 4
        server.requests.clear()
        run(root, server, max_failures=5)
        assert server.requests == []
        with pytest.raises(PrimaError, match="4 of 36 pairs failed"):
            run(root, server, max_failures=3)
        assert len(server.requests) == 4 * 3
        assert not (out / "run.json").exists()


def test_a_model_that_makes_no_sense_leaves_an_empty_corpus(root: Path):
    with serving(saying("no")) as server, pytest.raises(PrimaError, match="36 of 36 pairs failed"):
        run(root, server, writer__max_attempts=1)
    assert read_corpus(root / "corpus").entries == ()
    assert (root / "corpus" / "book.html").exists()


def test_a_key_that_is_not_set_is_told_before_anything_is_read(root: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("LLM_KEY", raising=False)
    with serving() as server, pytest.raises(PrimaError, match="the environment variable LLM_KEY is not set"):
        run(root, server, writer__llm__api_key_env="LLM_KEY")
    assert not (root / "corpus").exists()
