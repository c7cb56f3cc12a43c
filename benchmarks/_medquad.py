"""MedQuAD's 16,407 answered questions, for the benchmarks of the index: an answer a document, without its question."""

from __future__ import annotations

import gzip
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from _harness import REPOSITORY

from prima_ray.base import hash_key
from prima_ray.data.rejection import RecordRejected
from prima_ray.knowledge.documents import Document, make_document

SHARED = Path(os.environ.get("PRIMA_SHARED") or REPOSITORY.parent / "shared")
MEDQUAD = SHARED / "data" / "literature" / "medquad" / "medquad_answered.jsonl.gz"


@dataclass(frozen=True)
class Question:
    """A question, and the text that answers it."""

    text: str
    answer: str
    """The document's content hash: equal for equal answers."""

    @property
    def half(self) -> int:
        """0: settings are chosen on it; 1: figures are reported on it. Equal answers are in one half."""
        return hash_key("half", self.answer) % 2


def medquad(limit: int | None = None) -> Iterator[tuple[Question, Document]]:
    """Questions and answers in the file's order.

    Args:
        limit: None: all.
    """
    found = 0
    with gzip.open(MEDQUAD, "rt", encoding="utf-8") as lines:
        for line in lines:
            if found == limit:
                return
            row = json.loads(line)
            try:
                document = make_document(
                    doc_id=f"{row['file']}#{row['id']}",
                    title="",
                    source="medquad",
                    url=row["url"],
                    sections=[((), row["answer"])],
                )
            except RecordRejected:
                continue
            found += 1
            yield Question(row["question"], document.content_hash), document


def absent(name: str) -> bool:
    """Say that the data are not here, where they are not."""
    if MEDQUAD.exists():
        return False
    print(f"{name}: no MedQuAD at {os.path.relpath(MEDQUAD)}; set PRIMA_SHARED", file=sys.stderr)
    return True
