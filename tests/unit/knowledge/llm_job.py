"""Entries by an endpoint, as a process that can be killed: `python -m tests.unit.knowledge.llm_job ADDRESS CACHE`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from prima_ray.config import validate_config
from prima_ray.knowledge.entries import Entry, Failure
from prima_ray.knowledge.llm_writer import LlmWriter, LlmWriterConfig
from tests.unit.knowledge.writing import Shelf, chunk, vocabulary

YES = chunk("Dust raises the risk of asthma.", doc="a")
YES_TOO = chunk("It was found that coal dust raises the risk of asthma in miners.", doc="b")
NO = chunk("Tea lowers the risk of croup.", doc="c")
CHUNKS = (YES, YES_TOO, NO)
PAIR = ("dust", "ASTHMA")
PAIRS = [(factor, diagnosis) for factor in ("dust", "tea", "mask") for diagnosis in ("ASTHMA", "CROUP", "COLD")]


def writer_config(api_base: str, *, llm: dict[str, Any] | None = None, **keys: Any) -> LlmWriterConfig:
    calls = {"backoff_s": 0.01, **keys.pop("calls", {})}
    raw = {
        "kind": "llm",
        "llm": {"kind": "openai_like", "api_base": api_base, "model": "tests-own", **(llm or {})},
        "calls": calls,
        **keys,
    }
    return validate_config(LlmWriterConfig, raw, where="corpus.yaml")


def make_writer(api_base: str, *chunks: Any, cache: Path | None = None, **keys: Any) -> LlmWriter:
    return LlmWriter.load(writer_config(api_base, **keys), vocabulary(), Shelf(*(chunks or CHUNKS)), cache=cache)


def only(writer: LlmWriter) -> Entry | Failure:
    """What is written on `PAIR`."""
    (written,) = writer.write([PAIR])
    return written


def main() -> None:
    writer = make_writer(sys.argv[1], cache=Path(sys.argv[2]), calls={"concurrency": 1})
    for written in writer.write(PAIRS):
        print(json.dumps([written.factor, written.diagnosis]), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
