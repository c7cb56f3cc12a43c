"""Whether those who ask now are like those the model was trained on: the last answers against its reference."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping

from prima_ray.inference.reference import Reference

WINDOW = 1000
"""Exams that are looked back at."""
LEAST = 100
"""Of fewer a stability index says more of chance than of patients."""


class DriftMonitor:
    """Of one model. What it keeps of an exam is which bin each value fell into, for as long as it is among the last."""

    def __init__(self, reference: Reference | None, *, window: int = WINDOW, least: int = LEAST) -> None:
        self._reference, self._least = reference, least
        self._last: deque[Mapping[str, str]] = deque(maxlen=window)

    def add(self, answers: Mapping[str, str]) -> None:
        """Count one exam, by `Answer.drift`."""
        if answers:
            self._last.append(answers)

    def distances(self) -> dict[str, float]:
        """Variable -> population stability index; empty until enough exams were seen."""
        if self._reference is None or len(self._last) < self._least:
            return {}
        counts: dict[str, Counter[str]] = {}
        for answers in self._last:
            for name, answer in answers.items():
                counts.setdefault(name, Counter())[answer] += 1
        return {name: self._reference.stability(name, counted) for name, counted in sorted(counts.items())}
