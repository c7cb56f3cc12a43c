"""What a writer asks of an index."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from prima_ray.knowledge.chunks import Chunk


@dataclass(frozen=True, slots=True)
class Hit:
    """A chunk that was found; a higher score is a better match, comparable within one answer only."""

    chunk: Chunk
    score: float


class Retriever(Protocol):
    """Finds passages. To add one: a class with this method."""

    def search(self, query: str, *, k: int, sources: tuple[str, ...] | None = None) -> list[Hit]:
        """The best ``k`` chunks, best first, of the named sources only where some are named."""
        ...
