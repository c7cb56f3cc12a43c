"""Subgroups: figures of the exams that share a value of an attribute, beside those of all other exams.

A difference is that between two sets of patients, so it holds whatever else the groups differ in, their mix of
diagnoses above all. Of a group of too few exams the figures are not told.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator

from prima_ray.base import PrimaError, StrictConfig
from prima_ray.data.description import (
    AttributeConfig,
    BooleanAttribute,
    CategoricalAttribute,
    DataSetConfig,
    NumericAttribute,
    OrdinalAttribute,
    TextAttribute,
)
from prima_ray.data.metadata import expand_names
from prima_ray.evaluation.baselines import has_blocks
from prima_ray.evaluation.metrics import Draws, Figures, Labels, Probabilities, Weights, headline_draws
from prima_ray.evaluation.statistics import bootstrap, verdict

NOT_RECORDED = "not recorded"
_REST = "|rest"
Rows = Sequence[Mapping[str, str]]


class SubgroupsConfig(StrictConfig):
    """By what an evaluation parts its exams."""

    attributes: tuple[str, ...] | None = None
    """Attributes, or blocks by name. None: those of the text that are numbers, ordinal or categorical."""
    bands: dict[str, tuple[float, ...]] = Field(default_factory=dict)
    """Numeric attribute -> where its bands part; the value itself begins the next band. Elsewhere: thirds of the exams
    that are not scored."""
    min_exams: int = Field(default=30, ge=1)
    """Of a smaller group, or where fewer are left outside of it, only the count is told."""

    @field_validator("bands")
    @classmethod
    def _rising(cls, bands: dict[str, tuple[float, ...]]) -> dict[str, tuple[float, ...]]:
        for name, edges in bands.items():
            if not edges or any(low >= high for low, high in pairwise(edges)):
                raise ValueError(f"the edges of {name} must rise, and be one at least")
        return bands


@dataclass(frozen=True)
class Subgroup:
    """Exams that share something."""

    attribute: str
    value: str
    """In words."""
    members: NDArray[np.bool_]
    """(N,)"""


def find_subgroups(rows: Rows, others: Rows, data_set: DataSetConfig, config: SubgroupsConfig) -> list[Subgroup]:
    """The groups of some exams, in the description's order; a group without exams is not one.

    Args:
        rows: attributes of the N exams.
        others: attributes of exams that are not scored: bands that are not configured are thirds of these.

    Raises:
        PrimaError: the config names what the data set does not have, or bands of what is no number.
    """
    by_name = {item.name: item for item in data_set.attributes}
    for name in expand_names(tuple(config.bands), data_set, what="subgroups.bands"):
        if not isinstance(by_name[name], NumericAttribute):
            raise PrimaError(
                f"subgroups.bands: {name} is no numeric attribute", mend="Leave it out: values are groups."
            )
    if config.attributes is None:
        kinds = NumericAttribute | OrdinalAttribute | CategoricalAttribute
        names = [item.name for item in data_set.attributes if isinstance(item, kinds) and item.relevant]
    else:
        names = list(expand_names(config.attributes, data_set, what="subgroups.attributes"))
        texts = [name for name in names if isinstance(by_name[name], TextAttribute)]
        if texts:
            raise PrimaError(f"subgroups.attributes: {texts[0]} is free text", mend="Leave it out.")
    found = [group for name in names for group in _groups_of(by_name[name], rows, others, config)]
    if data_set.blocks:
        complete = has_blocks(rows, data_set)
        found += [
            Subgroup("metadata", "complete", complete),
            Subgroup("metadata", "a block is missing", ~complete),
        ]
    return [group for group in found if group.members.any()]


def _groups_of(attribute: AttributeConfig, rows: Rows, others: Rows, config: SubgroupsConfig) -> list[Subgroup]:
    values = [row.get(attribute.name) for row in rows]
    missing = Subgroup(attribute.name, NOT_RECORDED, np.array([value is None for value in values], dtype=bool))
    if isinstance(attribute, NumericAttribute):
        known = [float(row[attribute.name]) for row in others if attribute.name in row]
        edges = config.bands.get(attribute.name) or _thirds(known)
        return [*_bands(attribute, values, edges), missing]
    return [
        Subgroup(attribute.name, words, np.array([value == name for value in values], dtype=bool))
        for name, words in _values(attribute, values).items()
    ] + [missing]


def _thirds(values: Sequence[float]) -> tuple[float, ...]:
    if not values:
        return ()
    return tuple(sorted({float(f"{edge:.3g}") for edge in np.quantile(values, [1 / 3, 2 / 3])}))


def _bands(attribute: NumericAttribute, values: Sequence[str | None], edges: Sequence[float]) -> list[Subgroup]:
    numbers = np.array([np.nan if value is None else float(value) for value in values])
    place = np.where(np.isfinite(numbers), np.searchsorted(np.asarray(edges), numbers, side="right"), -1)
    unit = f" {attribute.unit}" if attribute.unit else ""
    names = ["all values"]
    if edges:
        middle = [f"{low:g} to below {high:g}{unit}" for low, high in pairwise(edges)]
        names = [f"below {edges[0]:g}{unit}", *middle, f"{edges[-1]:g}{unit} or more"]
    return [Subgroup(attribute.name, name, place == index) for index, name in enumerate(names)]


def _values(attribute: AttributeConfig, values: Sequence[str | None]) -> dict[str, str]:
    """Canonical value -> its words."""
    if isinstance(attribute, BooleanAttribute):
        return {"true": "yes", "false": "no"}
    if isinstance(attribute, CategoricalAttribute | OrdinalAttribute) and attribute.values:
        return dict(attribute.values)
    return {value: value.lower() for value in sorted({value for value in values if value is not None})}


def subgroup_evidence(
    labels: Labels,
    probabilities: Probabilities,
    patients: Sequence[str],
    groups: Sequence[Subgroup],
    *,
    min_exams: int = 30,
    num_resamples: int = 1000,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """A record a group: `attribute, value, num_exams, num_patients`, and `figures` (value, low, high), `differences`
    (the group minus all other exams) and `verdicts`; these are null where there are too few exams.

    Patients are drawn from all exams, so that both sides of a difference are of the same resample.
    """
    names, found = np.asarray(patients, dtype=object), []
    for group in groups:
        count = int(group.members.sum())
        record: dict[str, Any] = {
            "attribute": group.attribute,
            "value": group.value,
            "num_exams": count,
            "num_patients": len(set(names[group.members])),
            "figures": None,
            "differences": None,
            "verdicts": None,
        }
        found.append(record)
        if count < min_exams:
            continue
        models, apart = {"ours": probabilities}, len(labels) - count >= min_exams
        figures = _inside_and_outside(group.members)
        scores = bootstrap(figures, labels, models, patients, num_resamples=num_resamples, seed=seed)["ours"]
        told = scores.intervals()
        inside = [name for name in told if not name.endswith((_REST, "|gap"))]
        record["figures"] = {name: asdict(told[name]) for name in inside}
        if apart:
            record["differences"] = {name: asdict(told[f"{name}|gap"]) for name in inside}
            record["verdicts"] = {name: verdict(told[f"{name}|gap"]) for name in inside}
    return found


def _inside_and_outside(members: NDArray[np.bool_]) -> Figures:
    def figures(labels: Labels, probabilities: Probabilities, weights: Weights) -> Draws:
        inside = headline_draws(labels, probabilities, weights * members)
        outside = headline_draws(labels, probabilities, weights * ~members)
        gaps = {f"{name}|gap": inside[name] - outside[name] for name in inside}
        return {**inside, **{f"{name}{_REST}": values for name, values in outside.items()}, **gaps}

    return figures
