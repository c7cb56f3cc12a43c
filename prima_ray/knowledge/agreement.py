"""Entries against pairs labelled by hand: precision, recall, coverage, and how often a trap is cited."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from prima_ray.base import PrimaError, StrictConfig, hash_key
from prima_ray.knowledge.entries import Direction, Entry

DIRECTIONS: tuple[Direction, ...] = ("raises", "lowers", "none", "no_evidence")


class LabelledPair(StrictConfig):
    """A factor, a diagnosis, and what a person found that the literature says."""

    factor: str
    diagnosis: str
    direction: Direction
    arguable: bool = False
    locator: tuple[str, ...] = ()
    """Passages in which the evidence stands."""
    traps: tuple[str, ...] = ()
    """Passages that look like evidence and are none."""


@dataclass(frozen=True, slots=True)
class DirectionScore:
    """How well one direction is told."""

    labelled: int
    written: int
    right: int

    @property
    def precision(self) -> float | None:
        """Of the pairs written so, the part that is so; None where none is."""
        return self.right / self.written if self.written else None

    @property
    def recall(self) -> float | None:
        """Of the pairs that are so, the part written so."""
        return self.right / self.labelled if self.labelled else None


@dataclass(frozen=True, slots=True)
class Agreement:
    """Entries compared with labels."""

    num_pairs: int
    by_direction: Mapping[Direction, DirectionScore]
    with_evidence: int
    """Pairs with evidence by the labels."""
    covered: int
    """Of these, those with an entry that cites some."""
    statements: int
    located: int
    """Statements whose quotes all stand in passages that the labels list for the pair. The lists may be incomplete."""
    trapped: int
    """Statements that cite a trap."""
    wrong: tuple[tuple[str, str, Direction, Direction], ...]
    """Factor, diagnosis, label, what was written."""

    @property
    def accuracy(self) -> float:
        return 1 - len(self.wrong) / self.num_pairs

    @property
    def coverage(self) -> float | None:
        return self.covered / self.with_evidence if self.with_evidence else None

    @property
    def false_citations(self) -> float | None:
        """Statements that cite a trap, as a part of all."""
        return self.trapped / self.statements if self.statements else None


def compare(
    entries: Sequence[Entry], pairs: Sequence[LabelledPair], passages_of: Callable[[str, str], Collection[str]]
) -> Agreement:
    """Hold entries against labels.

    Args:
        passages_of: chunk id and quote -> the ids, as in `locator`, of the passages that hold it.

    Raises:
        PrimaError: a labelled pair has no entry, or there is no pair.
    """
    if not pairs:
        raise PrimaError("no labelled pair to compare with")
    by_pair = {(entry.factor, entry.diagnosis): entry for entry in entries}
    count = {direction: [0, 0, 0] for direction in DIRECTIONS}
    with_evidence = covered = statements = located = trapped = 0
    wrong: list[tuple[str, str, Direction, Direction]] = []
    for pair in pairs:
        entry = by_pair.get((pair.factor, pair.diagnosis))
        if entry is None:
            raise PrimaError(f"no entry for {pair.factor} x {pair.diagnosis}", mend="Write the pair before comparing.")
        count[pair.direction][0] += 1
        count[entry.direction][1] += 1
        if entry.direction == pair.direction:
            count[pair.direction][2] += 1
        else:
            wrong.append((pair.factor, pair.diagnosis, pair.direction, entry.direction))
        if pair.direction != "no_evidence":
            with_evidence += 1
            covered += entry.direction != "no_evidence"
        for statement in entry.statements:
            cited = [set(passages_of(quote.chunk_id, quote.quote)) for quote in statement.quotes]
            statements += 1
            located += all(found & set(pair.locator) for found in cited)
            trapped += any(found and found <= set(pair.traps) for found in cited)
    return Agreement(
        num_pairs=len(pairs),
        by_direction={direction: DirectionScore(*numbers) for direction, numbers in count.items()},
        with_evidence=with_evidence,
        covered=covered,
        statements=statements,
        located=located,
        trapped=trapped,
        wrong=tuple(wrong),
    )


def is_development(factor: str, *, seed: int = 42) -> bool:
    """True for the half of the factors that rules may be tuned on; all pairs of a factor are in the same half."""
    return hash_key(seed, "risk pairs", factor) % 2 == 0
