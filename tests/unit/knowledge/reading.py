"""What the tests of the readers share: a config of one source, and what reading it gives in plain values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prima_ray.config import validate_config
from prima_ray.knowledge.documents import Document
from prima_ray.knowledge.literature import LiteratureConfig, Reading, read_literature


def literature(*sources: dict[str, Any], **keys: Any) -> LiteratureConfig:
    """Sources with the name `here` where they have none; all of them are allowed unless `allow` is given."""
    named = [{"source": "here", **source} for source in sources]
    allow = list(dict.fromkeys(source["source"] for source in named))
    return validate_config(LiteratureConfig, {"sources": named, "allow": allow, **keys}, where="corpus.yaml")


def read(
    kind: str, path: Path | str, *, limits: dict[str, Any] | None = None, **keys: Any
) -> tuple[list[Document], Any]:
    """Documents of one source, and the locator, reason and detail of what was turned away."""
    reading = read_literature(literature({"kind": kind, "path": str(path), **keys}, limits=limits or {}))
    documents = list(reading)
    return documents, reasons(reading)


def reasons(reading: Reading) -> list[tuple[str | None, str, str]]:
    return [(item.locator, item.reason, item.detail) for item in reading.quarantined]


def sections(document: Document) -> list[tuple[tuple[str, ...], str]]:
    return [(item.heading, item.text) for item in document.sections]
