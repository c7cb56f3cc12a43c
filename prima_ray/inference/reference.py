"""What was usual when the model was trained: shares of values, against which a service can tell that its patients have
changed.

A `Variable` is a question with a few answers (an attribute's values, bins of a number) and the share of exams that gave
each. Of attributes the training rows are counted, of predictions, confidence and photos the validation fold. Only
shares are kept, nothing of any one exam; an answer that fewer than `min_count` exams gave is counted with the others of
its variable as `other`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from prima_ray.base import StrictConfig
from prima_ray.data.description import AttributeConfig, DataSetConfig, NumericAttribute, TextAttribute
from prima_ray.inference.appearance import NAMES

MISSING, OTHER = "missing", "other"
_NUM_BINS = 10
_MIN_COUNT = 5


class Variable(StrictConfig):
    """A question and the shares of its answers."""

    edges: tuple[float, ...] | None = None
    """Of a number: inner edges of its bins; a value on an edge belongs to the upper one. None: answers are texts."""
    shares: dict[str, float]
    """Answer -> share; they sum to 1."""

    def answer(self, value: object) -> str:
        """Which of the answers a value is. None is `missing`, what nobody or hardly anybody gave `other`."""
        if value is None:
            return MISSING
        if self.edges is None:
            return str(value) if str(value) in self.shares else OTHER
        return _bins(self.edges)[int(np.searchsorted(self.edges, float(str(value)), side="right"))]


class Reference(StrictConfig):
    """`model/reference.json`."""

    num_train: int
    num_val: int
    variables: dict[str, Variable]
    """`attribute:<name>`, `prediction`, `confidence`, `novelty`, and `photo:<name of appearance>`."""

    def answers(self, values: Mapping[str, object]) -> dict[str, str]:
        """The answers of one exam; what the reference does not know is left out."""
        return {name: self.variables[name].answer(value) for name, value in values.items() if name in self.variables}

    def stability(self, name: str, counts: Mapping[str, int]) -> float:
        """Population stability index of a variable: the sum over answers of (q - p) log(q / p), NaN where nothing was
        counted.

        p are the shares here, q those counted, half an exam added to every answer so that none is zero. By custom below
        0.1 little has changed, and above 0.25 much; of few exams it is large by chance, about (answers - 1) / exams on
        average.
        """
        shares = self.variables[name].shares
        total = sum(counts.values())
        if not total:
            return math.nan
        found = 0.0
        for answer in {*shares, *counts}:
            expected = (shares.get(answer, 0.0) * total + 0.5) / (total + 0.5 * len({*shares, *counts}))
            seen = (counts.get(answer, 0) + 0.5) / (total + 0.5 * len({*shares, *counts}))
            found += (seen - expected) * math.log(seen / expected)
        return found


def _bins(edges: Sequence[float]) -> list[str]:
    if not edges:
        return ["any"]
    inner = [f"{low:.6g} to {high:.6g}" for low, high in pairwise(edges)]
    return [f"below {edges[0]:.6g}", *inner, f"{edges[-1]:.6g} and more"]


def of_numbers(values: Iterable[float | None]) -> Variable:
    """Shares of bins of about equal size."""
    values = list(values)
    known = np.array([value for value in values if value is not None], dtype=np.float64)
    edges: tuple[float, ...] = ()
    if len(known) >= 2 * _MIN_COUNT:
        num_bins = min(_NUM_BINS, len(known) // _MIN_COUNT)
        quantiles = np.quantile(known, np.arange(1, num_bins) / num_bins)
        # As they are told, so that a reader of the file finds the bins of its names.
        edges = tuple(sorted({float(f"{edge:.6g}") for edge in quantiles if edge > known.min()}))
    empty = Variable(edges=edges, shares={})
    counts = Counter(empty.answer(value) for value in values)
    return Variable(edges=edges, shares=_shares({**dict.fromkeys(_bins(edges), 0), **counts}))


def of_texts(values: Iterable[str | None]) -> Variable:
    """Shares of texts; rare ones together."""
    counts = Counter(MISSING if value is None else value for value in values)
    kept = {name: count for name, count in counts.items() if count >= _MIN_COUNT}
    rare = sum(counts.values()) - sum(kept.values())
    return Variable(shares=_shares({**dict(sorted(kept.items())), **({OTHER: rare} if rare else {})}))


def _shares(counts: Mapping[str, int]) -> dict[str, float]:
    total = sum(counts.values())
    return {name: count / total for name, count in counts.items()} if total else {}


def attribute_variables(rows: Sequence[Mapping[str, str]], data_set: DataSetConfig) -> dict[str, Variable]:
    """Of canonical attribute values, a mapping an exam; of free text only whether there is any."""
    return {
        f"attribute:{attribute.name}": _attribute(attribute, [row.get(attribute.name) for row in rows])
        for attribute in data_set.attributes
    }


def _attribute(attribute: AttributeConfig, column: Sequence[str | None]) -> Variable:
    if isinstance(attribute, NumericAttribute):
        return of_numbers(None if value is None else float(value) for value in column)
    if isinstance(attribute, TextAttribute):
        return of_texts(None if value is None else OTHER for value in column)
    return of_texts(column)


_PHOTO = ("brightness", "contrast", "blue", "red", "detail_0")
"""Of `appearance.NAMES`: what is watched."""


def exam_values(
    data_set: DataSetConfig,
    attributes: Mapping[str, str],
    prediction: str,
    confidence: float,
    looks: NDArray[np.float64],
) -> dict[str, object]:
    """What is watched of one exam, by variable; of several photos the mean.

    Args:
        attributes: canonical values.
        looks: (V, A) of `appearance.measure`.
    """
    by_name: dict[str, object] = {
        f"attribute:{item.name}": OTHER
        if isinstance(item, TextAttribute) and item.name in attributes
        else attributes.get(item.name)
        for item in data_set.attributes
    }
    mean = looks.mean(axis=0)
    photos = {f"photo:{name}": float(mean[NAMES.index(name)]) for name in _PHOTO}
    return {**by_name, "prediction": prediction, "confidence": confidence, **photos}


def photo_variables(looks: Sequence[NDArray[np.float64]]) -> dict[str, Variable]:
    """Of the (V, A) looks of exams."""
    means = np.array([item.mean(axis=0) for item in looks])
    return {f"photo:{name}": of_numbers(means[:, NAMES.index(name)].tolist()) for name in _PHOTO}
