"""How much of what is usually known of an exam is known of this one; where that is little, it is calibrated otherwise.

A model that learned from photos and attributes answers as surely without the attributes as with them. So its validation
exams are asked anew with a share of their attributes, and a temperature and limits of prediction sets and of confidence
are fitted to these answers. Which of them an exam takes depends on its completeness.

**Completeness.** Let S_i be the attributes that are known of training exam i, and G those that are given, of what the
model reads. The completeness is the largest c such that |G & S_i| >= c |S_i| for one in twenty of the training
exams at least. So an exam is complete that lacks what exams of the data lack, a whole block or a value here and there,
and a photo alone has 0 wherever something is recorded of nearly every patient.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable
from functools import cached_property
from typing import Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from prima_ray.base import StrictConfig

SHARES = (0.0, 0.25, 0.5, 0.75)
"""Of their attributes, with which validation exams are asked anew."""
_ENOUGH = 0.9
"""From this completeness on an exam is one like those of the validation fold."""
_RARE = 0.05
"""The share of the training exams that makes something usual."""


class Level(StrictConfig):
    """The calibration of exams from this completeness on, up to the next level's."""

    completeness: float = Field(ge=0.0, lt=1.0)
    """The share of their attributes with which the validation exams were asked."""
    temperature: float = Field(gt=0.0)
    set_threshold: float | None
    """The largest 1 - p that is in a prediction set; null: every class is."""
    min_confidence: float
    """Below it the answer abstains; above 1: always."""


class Scarcity(StrictConfig):
    """What is usually known, and the calibration where less is."""

    attributes: tuple[str, ...]
    """What the model reads."""
    patterns: dict[str, int]
    """A digit an attribute, 1 where it is known -> how many of the training exams."""
    levels: tuple[Level, ...] = Field(min_length=1)
    """By completeness, the least first."""

    @classmethod
    def learn(cls, attributes: Iterable[str], exams: Iterable[Collection[str]], levels: Iterable[Level]) -> Self:
        """From the names of the attributes that are known of each exam."""
        read = tuple(attributes)
        patterns = Counter("".join("01"[name in known] for name in read) for known in exams)
        return cls(attributes=read, patterns=dict(sorted(patterns.items())), levels=tuple(levels))

    @cached_property
    def _known(self) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
        """(P, A) patterns and (P,) counts."""
        found = np.array([[digit == "1" for digit in pattern] for pattern in self.patterns], dtype=bool)
        return found.reshape(len(self.patterns), len(self.attributes)), np.array(list(self.patterns.values()))

    def completeness(self, given: Collection[str]) -> float:
        """Of an exam of which these attributes are known, 0 to 1."""
        patterns, counts = self._known
        if not len(counts):
            return 1.0
        mine = np.array([name in given for name in self.attributes], dtype=bool)
        sizes = patterns.sum(axis=1)
        shares = np.where(sizes > 0, (patterns & mine).sum(axis=1) / np.maximum(sizes, 1), 1.0)
        order = np.argsort(-shares, kind="stable")
        enough = np.cumsum(counts[order]) >= math.ceil(_RARE * counts.sum())
        return float(shares[order[int(enough.argmax())]])

    def level(self, completeness: float) -> Level | None:
        """Of such exams; None where the usual calibration is theirs."""
        if completeness >= _ENOUGH:
            return None
        below = [level for level in self.levels if level.completeness <= completeness]
        return below[-1] if below else self.levels[0]
