"""The passage of a document that is indexed, retrieved and quoted."""

from __future__ import annotations

import pyarrow as pa
from pydantic import Field

from prima_ray.base import StrictConfig, hash_json

CHUNK_SCHEMA = pa.schema(
    [
        ("chunk_id", pa.string()),
        ("doc_id", pa.string()),
        ("text", pa.string()),
        ("url", pa.string()),
        ("source", pa.string()),
        ("title", pa.string()),
        ("heading", pa.list_(pa.string())),
        ("date", pa.string()),
        ("licence", pa.string()),
    ]
)
"""`chunks.parquet`."""


class Chunk(StrictConfig):
    """Whole sentences of one section, and where they come from."""

    chunk_id: str = Field(min_length=1)
    doc_id: str
    text: str
    url: str | None
    source: str
    title: str
    heading: tuple[str, ...]
    """The headings above the text, outermost first."""
    date: str | None
    licence: str | None


def chunk_id(doc_id: str, heading: tuple[str, ...], text: str) -> str:
    """The same for the same passage of the same document, wherever it stands and whenever it is read."""
    return hash_json([doc_id, list(heading), text])[:16]
