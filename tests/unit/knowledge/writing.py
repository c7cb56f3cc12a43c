"""What the tests of writing share: a small vocabulary far from any real one, passages, and an index over them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prima_ray.config import validate_config
from prima_ray.data.description import DataSetConfig
from prima_ray.knowledge.chunks import Chunk, chunk_id
from prima_ray.knowledge.entries import Entry
from prima_ray.knowledge.extractive import ExtractiveConfig, write_entry
from prima_ray.knowledge.factors import VocabularyConfig
from prima_ray.knowledge.retrieval import Hit
from prima_ray.knowledge.vocabulary import Vocabulary

CONFIGS = Path(__file__).parents[3] / "jobs" / "configs" / "pad_ufes_20"

DATA_SET: dict[str, Any] = {
    "name": "airways",
    "classes": [
        {"name": "ASTHMA", "phrase": "asthma"},
        {"name": "CROUP", "phrase": "croup"},
        {"name": "COLD", "phrase": "common cold", "synonyms": ["head cold"]},
    ],
    "attributes": [
        {"name": "dusty", "kind": "boolean", "phrase": "dusty work", "phrase_false": "no dusty work"},
        {"name": "years", "kind": "numeric", "phrase": "{value} years", "minimum": 0, "maximum": 120},
        {"name": "noise", "kind": "categorical", "phrase": "{value}", "values": {"WHEEZE": "wheeze", "HUM": "hum"}},
        {"name": "town", "kind": "categorical", "phrase": "{value}"},
    ],
}
VOCABULARY: dict[str, Any] = {
    "factors": [
        {
            "key": "dust",
            "phrase": "dust at work",
            "terms": ["coal dust", "dust"],
            "attribute": "dusty",
            "values": [True],
        },
        {"key": "tea", "phrase": "drinks tea", "terms": ["tea"]},
        {"key": "mask", "phrase": "wears a mask", "terms": ["mask"]},
        {"key": "men", "phrase": "a man", "terms": ["men", "man"], "opposites": ["women", "woman"]},
        {"key": "cold_before", "phrase": "a cold before", "terms": ["earlier cold", "history of common cold"]},
        {"key": "wheeze", "phrase": "it wheezes", "role": "sign", "terms": ["wheez*"], "opposites": ["silent"]},
        {"key": "larynx", "phrase": "in the larynx", "role": "site", "terms": ["larynx"]},
    ],
    "diagnoses": [
        {"name": "ASTHMA", "terms": ["AST"], "but_not": ["cardiac asthma"]},
        {"name": "CROUP", "not_under": ["horses"]},
    ],
    "umbrellas": [
        {"terms": ["reactive airways"], "means": ["ASTHMA", "CROUP"]},
        {"terms": ["airway disease"], "means": ["ASTHMA", "CROUP", "COLD"], "alone": False},
    ],
    "unspecific": ["the disease", "it"],
}


def vocabulary(**changes: Any) -> Vocabulary:
    config = validate_config(VocabularyConfig, {**VOCABULARY, **changes}, where="factors.yaml")
    return Vocabulary(config, DataSetConfig.model_validate(DATA_SET))


def chunk(
    text: str, *, doc: str = "d1", heading: tuple[str, ...] = (), title: str = "A page", source: str = "here"
) -> Chunk:
    return Chunk(
        chunk_id=chunk_id(doc, heading, text),
        doc_id=doc,
        text=text,
        url=None,
        source=source,
        title=title,
        heading=heading,
        date=None,
        licence=None,
    )


class Shelf:
    """An index that gives every chunk it has, whatever is asked."""

    def __init__(self, *chunks: Chunk, obeys: bool = True) -> None:
        self.chunks = chunks
        self.obeys = obeys
        self.queries: list[tuple[str, int, tuple[str, ...] | None]] = []

    def search(self, query: str, *, k: int, sources: tuple[str, ...] | None = None) -> list[Hit]:
        self.queries.append((query, k, sources))
        allowed = [item for item in self.chunks if not self.obeys or sources is None or item.source in sources]
        return [Hit(item, 1.0) for item in allowed][:k]


def written(factor: str, diagnosis: str, *chunks: Chunk, allow: tuple[str, ...] | None = None, **keys: Any) -> Entry:
    return write_entry(factor, diagnosis, ExtractiveConfig(**keys), vocabulary(), Shelf(*chunks), allow=allow)
