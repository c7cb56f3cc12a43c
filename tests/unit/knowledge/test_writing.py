"""What writers have in common."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from pydantic import TypeAdapter

from prima_ray.base import PrimaError
from prima_ray.config import validate_config
from prima_ray.knowledge.entries import Entry
from prima_ray.knowledge.extractive import ExtractiveConfig, write_entry
from prima_ray.knowledge.llm_writer import LlmWriterConfig
from prima_ray.knowledge.writing import WriterConfig, check_writer, make_writer
from tests.unit.knowledge.writing import Shelf, chunk, vocabulary

SHELF = (chunk("Dust raises the risk of asthma."), chunk("Dust lowers the risk of croup.", doc="b", source="elsewhere"))
PAIRS = [("dust", "ASTHMA"), ("dust", "CROUP"), ("tea", "COLD")]


def test_the_kind_decides() -> None:
    adapter: TypeAdapter[WriterConfig] = TypeAdapter(WriterConfig)
    assert adapter.validate_python({"kind": "extractive"}) == ExtractiveConfig()
    llm = {"kind": "openai_like", "api_base": "http://127.0.0.1:8000/v1", "model": "m"}
    found = adapter.validate_python({"kind": "llm", "llm": llm})
    assert isinstance(found, LlmWriterConfig)
    assert adapter.validate_python(found.model_dump(mode="json")) == found


def test_the_writer_without_a_model() -> None:
    told: list[int] = []
    writer = make_writer(ExtractiveConfig(), vocabulary(), Shelf(*SHELF), allow=["here"])
    written = list(writer.write(PAIRS, progress=told.append))
    assert written == [
        write_entry(factor, diagnosis, ExtractiveConfig(), vocabulary(), Shelf(*SHELF), allow=["here"])
        for factor, diagnosis in PAIRS
    ]
    assert [item.direction for item in written if isinstance(item, Entry)] == ["raises", "no_evidence", "no_evidence"]
    assert (told, writer.usage) == ([1, 1, 1], None)


def test_what_is_missing_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llama_index.llms.openai_like", None)
    raw = {"kind": "llm", "llm": {"kind": "openai_like", "api_base": "http://127.0.0.1:1/v1", "model": "m"}}
    config = validate_config(LlmWriterConfig, raw, where="corpus.yaml")
    for load in (lambda: check_writer(config), lambda: make_writer(config, vocabulary(), Shelf())):
        with pytest.raises(PrimaError) as caught:
            load()
        assert str(caught.value) == (
            "llama-index-llms-openai-like is not installed\n  Install prima-ray[llm], or take another model."
        )


def test_the_writer_with_one(tmp_path: Path) -> None:
    pytest.importorskip("llama_index.llms.openai_like", reason="the extra `llm` is not installed")
    from tests.unit.knowledge.llm_job import writer_config
    from tests.unit.knowledge.llm_server import serving

    with serving() as server:
        config = writer_config(server.api_base)
        writer = make_writer(config, vocabulary(), Shelf(*SHELF), allow=["here"], cache=tmp_path)
        written = {(item.factor, item.diagnosis): item for item in writer.write(PAIRS)}
    assert {pair: item.direction for pair, item in written.items() if isinstance(item, Entry)} == dict(
        zip(PAIRS, ("raises", "no_evidence", "no_evidence"), strict=True)
    )
    assert writer.usage is not None
    assert writer.usage.calls == len(list(tmp_path.rglob("*.json"))) == 3
