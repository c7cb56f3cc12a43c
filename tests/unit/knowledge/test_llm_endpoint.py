"""The config of an endpoint, what is sent to it, and mistakes that the user must mend."""

from __future__ import annotations

import json
import socket
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest

from prima_ray.base import PrimaError
from prima_ray.config import dump_config, validate_config
from prima_ray.knowledge.llm_answer import answer_schema
from prima_ray.knowledge.llm_endpoint import OpenAiLikeConfig, _retry_after_s
from tests.unit.knowledge.llm_job import make_writer, writer_config
from tests.unit.knowledge.llm_server import failing, first, honest, serving

pytest.importorskip("llama_index.llms.openai_like", reason="the extra `llm` is not installed")

PAIRS = [("dust", "ASTHMA")]
KEY = "sk-not-to-be-seen"


def endpoint(**keys: Any) -> OpenAiLikeConfig:
    raw = {"api_base": "http://127.0.0.1:1/v1", "model": "m", **keys}
    return validate_config(OpenAiLikeConfig, raw, where="corpus.yaml")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"api_base": "127.0.0.1:8000"}, "is no address; it looks like http://127.0.0.1:8000/v1"),
        ({"api_base": "http://me:secret@host/v1"}, "holds a name, a password or a query"),
        ({"api_base": "http://host/v1?key=secret"}, "holds a name, a password or a query"),
        ({"api_key_env": "sk-123"}, "api_key_env"),
        ({"api_key": "sk-123"}, "unknown key 'api_key', did you mean 'api_key_env'?"),
        ({"prompt_price": 1}, "prompt_price and completion_price: give both or neither"),
        ({"max_tokens": 8000}, "context_window 8192 leaves no room beside max_tokens 8000: it is at least twice"),
    ],
)
def test_mistakes_in_the_config(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(PrimaError) as caught:
        endpoint(**keys)
    assert message in str(caught.value)


def test_the_key_comes_from_the_environment_and_is_seen_nowhere(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("LLM_KEY", KEY)
    caplog.set_level(0)
    with serving() as server:
        writer = make_writer(server.api_base, cache=tmp_path, llm={"api_key_env": "LLM_KEY"})
        list(writer.write(PAIRS))
        assert server.requests[0].headers["Authorization"] == f"Bearer {KEY}"
    (kept,) = tmp_path.rglob("*.json")
    config = writer_config(server.api_base, llm={"api_key_env": "LLM_KEY"})
    for text in (kept.read_text(), dump_config(config), repr(writer._model), caplog.text):
        assert KEY not in text
    record = json.loads(kept.read_text())
    assert record["note"] == {"factor": "dust", "diagnosis": "ASTHMA", "attempt": 1}
    assert (record["where"], record["model"]["model"]) == (server.api_base, "tests-own")


def test_no_other_key_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with serving() as server:
        list(make_writer(server.api_base).write(PAIRS))
        assert KEY not in str(server.requests[0].headers)


def test_a_key_that_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLM_KEY", raising=False)
    with pytest.raises(PrimaError, match="the environment variable LLM_KEY is not set") as caught:
        endpoint(api_key_env="LLM_KEY").load()
    assert caught.value.mend == "Set LLM_KEY to the endpoint's key, or leave api_key_env out."


@pytest.mark.parametrize("status", [401, 403])
def test_a_key_that_does_not_open(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM_KEY", KEY)

    def complaining(request: Any) -> Any:
        response = failing(status)(request)
        response.error = f"Incorrect API key provided: {KEY}"
        return response

    with serving(complaining) as server:
        with pytest.raises(PrimaError, match="the endpoint does not let us in") as caught:
            list(make_writer(server.api_base, llm={"api_key_env": "LLM_KEY"}).write(PAIRS))
        assert (caught.value.mend, caught.value.where) == ("Check the key in LLM_KEY.", server.api_base)
        assert KEY not in str(caught.value)
        assert len(server.requests) == 1
        with pytest.raises(PrimaError) as caught:
            list(make_writer(server.api_base).write(PAIRS))
        assert caught.value.mend == "Name the variable with its key in api_key_env."


def test_a_model_that_there_is_not() -> None:
    with serving(failing(404)) as server:
        with pytest.raises(PrimaError, match="no such model or address: .*trouble 404") as caught:
            list(make_writer(server.api_base).write(PAIRS))
        assert "Check model (tests-own) and api_base" in (caught.value.mend or "")
        assert len(server.requests) == 1


def test_nobody_there() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(PrimaError, match="no connection .*refused") as caught:
        list(make_writer(address).write(PAIRS))
    assert caught.value.where == address
    assert caught.value.mend == "Start the model's server there, or mend writer.llm.api_base."


def test_a_server_that_goes_away_is_waited_for() -> None:
    with serving() as server:
        writer = make_writer(server.api_base, calls={"max_retries": 2, "give_up_after": 1, "concurrency": 1})
        writing = writer.write([("dust", "ASTHMA"), ("tea", "CROUP"), ("mask", "COLD")])
        next(writing)
    with pytest.raises(PrimaError, match="no answer to 1 calls in a row, the last time: no connection"):
        list(writing)
    assert writer.usage.retries == 2


@pytest.mark.parametrize("answer_format", ["text", "json_object", "json_schema"])
def test_what_the_endpoint_holds_the_model_to(answer_format: str) -> None:
    extra = {"chat_template_kwargs": {"enable_thinking": False}}
    with serving() as server:
        list(make_writer(server.api_base, llm={"answer_format": answer_format, "extra_body": extra}).write(PAIRS))
        body = server.requests[0].body
    assert body["chat_template_kwargs"] == {"enable_thinking": False}
    wanted = body.get("response_format")
    if answer_format == "text":
        assert wanted is None
    elif answer_format == "json_object":
        assert wanted == {"type": "json_object"}
    else:
        assert wanted["json_schema"]["schema"] == answer_schema()


def test_the_schema_is_one_that_endpoints_can_enforce() -> None:
    schema = answer_schema()
    assert schema["required"] == ["direction", "strength", "summary", "statements"]
    parts = [schema, *schema["$defs"].values()]
    assert all(
        part["additionalProperties"] is False and set(part["required"]) == set(part["properties"]) for part in parts
    )
    assert "Length" not in json.dumps(schema)


def test_retry_after_is_a_number_or_a_date() -> None:
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)
    assert _retry_after_s({"retry-after": "2.5"}) == 2.5
    assert 25 < (_retry_after_s({"retry-after": soon}) or 0) <= 30
    for said in ("", "soon", "nan", "Mon, 99 Foo"):
        assert _retry_after_s({"retry-after": said}) is None
    assert _retry_after_s({"retry-after": "-5"}) == 0.0


def test_the_first_trouble_is_no_reason_to_despair() -> None:
    with serving(first(1, failing(502), then=honest)) as server:
        assert len(list(make_writer(server.api_base).write(PAIRS))) == 1
