"""What the corpus says of one factor and one diagnosis, and what it rests on; or why nothing could be written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Self

from pydantic import Field, model_validator

from prima_ray.base import StrictConfig

Direction = Literal["raises", "lowers", "none", "no_evidence"]
"""`none`: looked into, without a clear relation. `no_evidence`: the literature at hand does not say."""
Strength = Literal["strong", "moderate", "weak"]
Status = Literal["proposed", "accepted", "rejected", "edited"]
Pair = tuple[str, str]
"""Key of a factor, name of a diagnosis."""
FailureReason = Literal["malformed", "contradictory", "refused", "unanswered"]
"""`malformed`: the last answer is no entry. `contradictory`: its direction is not what it quotes. `refused`: the
endpoint would not take the request. `unanswered`: it did not answer it, however often it was asked."""


class Quote(StrictConfig):
    """Words of a chunk, letter for letter up to white space."""

    chunk_id: str
    quote: str = Field(min_length=1)


class Statement(StrictConfig):
    """One thing that is said, and the words it rests on."""

    text: str = Field(min_length=1)
    quotes: tuple[Quote, ...] = Field(min_length=1)


class Entry(StrictConfig):
    """A line of `corpus.jsonl`."""

    factor: str
    diagnosis: str
    direction: Direction
    strength: Strength | None
    """None where nothing supports a direction."""
    summary: str
    status: Status = "proposed"
    statements: tuple[Statement, ...] = ()

    @model_validator(mode="after")
    def _evidence(self) -> Self:
        silent = self.direction == "no_evidence"
        if silent and self.statements:
            raise ValueError("no_evidence: an entry with statements has some")
        if not silent and not self.statements:
            raise ValueError(f"direction {self.direction}: an entry without statements is no_evidence")
        if silent != (self.strength is None):
            raise ValueError("strength: given exactly where there is evidence")
        return self

    @property
    def entry_id(self) -> str:
        return f"{self.factor}:{self.diagnosis}"


@dataclass(frozen=True, slots=True)
class Failure:
    """A pair on which a writer came to no entry. That is not `no_evidence`: nobody knows what the literature says."""

    factor: str
    diagnosis: str
    reason: FailureReason
    detail: str
    """What was wrong with the last attempt."""
    attempts: int
    """Answers that were had."""
    answer: str | None
    """The last of them."""
