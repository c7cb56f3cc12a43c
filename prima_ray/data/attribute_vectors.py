"""Attributes of an exam -> vectors: y of the soft targets, and what a fusion model reads beside the text.

Everything here follows the data set's description alone. To add a kind of attribute, give it a block in `_fit_block`
and `_positions`. Labels of training rows enter y only by a key (`include_label`, `targets: labels`), and only where
the caller passes them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from prima_ray.base import PrimaError, StrictConfig, hash_key
from prima_ray.data.description import (
    AttributeConfig,
    BooleanAttribute,
    CategoricalAttribute,
    DataSetConfig,
    NumericAttribute,
    OrdinalAttribute,
    TextAttribute,
)
from prima_ray.data.metadata import MetadataTextConfig, expand_names, text_attributes


class SoftTargetConfig(StrictConfig):
    """The vector y of an exam: one-hot blocks, an attribute a block; a missing value is a zero block."""

    targets: Literal["attributes", "labels"] = "attributes"
    """``labels``: y is the one-hot class alone (the ablation `sup_con`)."""
    attributes: tuple[str, ...] | None = None
    """None: every attribute but free text."""
    masked: tuple[str, ...] = ()
    """Attributes or blocks to leave out of y."""
    disease_weight: float = Field(default=3.0, gt=0.0)
    """Factor of disease-related blocks, and of the label's; it enters a product of two y squared."""
    bins: int = Field(default=4, ge=2)
    """Quantile bins of a numeric attribute."""
    include_label: bool = False
    """Append the class of training rows."""
    temperature: float | None = Field(default=None, gt=0.0)
    """tau_label. None: chosen on training rows so that the mean target of an exam for itself is about 0.5."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.targets == "labels" and self.attributes is not None:
            raise ValueError("targets: labels leaves no use for `attributes`")
        return self

    @property
    def uses_labels(self) -> bool:
        return self.include_label or self.targets == "labels"


Numbers = Literal["standard", "bins"]
_FARTHEST = 3.0
"""Standard deviations that a number may lie from the mean: a slip of the pen must not outweigh all else."""


class _Block(StrictConfig):
    name: str
    kind: Literal["values", "bins", "number", "label"]
    values: tuple[str, ...] = ()
    """One dimension a value; another value is a zero block."""
    edges: tuple[float, ...] = ()
    """Inner edges: len(edges) + 1 bins; a value on an edge belongs to the upper one."""
    mean: float = 0.0
    spread: float = 1.0
    """Of a number's training rows: it is (value - mean) / spread, and beside it 1 for "known"."""
    weight: float = 1.0

    @property
    def width(self) -> int:
        match self.kind:
            case "bins":
                return len(self.edges) + 1
            case "number":
                return 2
            case _:
                return len(self.values)

    @property
    def dimensions(self) -> list[str]:
        match self.kind:
            case "bins":
                return [f"{self.name}:bin {index}" for index in range(self.width)]
            case "number":
                return [f"{self.name}:standard", f"{self.name}:known"]
            case _:
                return [f"{self.name}={value}" for value in self.values]


class SoftTargetEncoder(StrictConfig):
    """Fitted on training rows; encodes any row. Serialisable as JSON (`to_dict`, `from_dict`)."""

    blocks: tuple[_Block, ...]

    @classmethod
    def fit(
        cls,
        rows: Sequence[Mapping[str, str]],
        data_set: DataSetConfig,
        config: SoftTargetConfig,
    ) -> Self:
        """Choose the blocks; numeric bins and open value sets come from ``rows``, the training rows.

        Raises:
            PrimaError: `config` names an attribute or block that the data set does not have, or nothing is left of y.
        """
        blocks: list[_Block] = []
        if config.targets == "attributes":
            names = data_set.attribute_names if config.attributes is None else config.attributes
            chosen = expand_names(names, data_set, what="soft targets: attributes")
            masked = set(expand_names(config.masked, data_set, what="soft targets: masked"))
            by_name = {item.name: item for item in data_set.attributes}
            for name in chosen:
                attribute = by_name[name]
                if name in masked or isinstance(attribute, TextAttribute):
                    continue
                weight = config.disease_weight if attribute.disease_related else 1.0
                block = _fit_block(attribute, rows, bins=config.bins, weight=weight)
                if block.width:
                    blocks.append(block)
        if config.uses_labels:
            blocks.append(_Block(name="label", kind="label", values=data_set.class_names, weight=config.disease_weight))
        if not blocks:
            raise PrimaError(
                f"soft targets: {data_set.name} has no attribute to build them from",
                mend="Describe attributes, set `targets: labels`, or give the soft loss the weight 0.",
            )
        return cls(blocks=tuple(blocks))

    @classmethod
    def fit_vector(
        cls,
        rows: Sequence[Mapping[str, str]],
        data_set: DataSetConfig,
        text: MetadataTextConfig,
        *,
        numbers: Numbers,
        bins: int,
    ) -> Self:
        """The attributes that a text speaks of as a vector to be read, weights 1; of a missing value all zeros.

        Args:
            rows: the training rows.
            numbers: standardised, with a 1 beside them where they are known; or one-hot by quantile bins.
            bins: how many of these.

        Raises:
            PrimaError: nothing is left of it.
        """
        names = tuple(item.name for item in text_attributes(data_set, text))
        config = SoftTargetConfig(attributes=names, masked=text.masked, disease_weight=1.0, bins=bins)
        found = cls.fit(rows, data_set, config)
        if numbers == "bins":
            return found
        return cls(blocks=tuple(_as_number(block, rows) if block.kind == "bins" else block for block in found.blocks))

    @property
    def dimensions(self) -> tuple[str, ...]:
        """What each of the A dimensions stands for: ``region=FACE``, ``age:bin 2``, ``age:standard``."""
        return tuple(name for block in self.blocks for name in block.dimensions)

    @property
    def width(self) -> int:
        return sum(block.width for block in self.blocks)

    def encode(
        self, rows: Sequence[Mapping[str, str]], labels: Sequence[str | None] | None = None
    ) -> NDArray[np.float32]:
        """The vectors y, (N, A) float32, already weighted.

        Args:
            rows: canonical attribute values, one mapping an exam.
            labels: class names, for training rows only; without them the label's block is zero.
        """
        encoded = np.zeros((len(rows), self.width), dtype=np.float32)
        start = 0
        for block in self.blocks:
            column: Sequence[str | None] = [row.get(block.name) for row in rows]
            if block.kind == "label":
                column = labels if labels is not None else [None] * len(rows)
            part = encoded[:, start : start + block.width]
            if block.kind == "number":
                part[:] = block.weight * _standard(block, column)
            else:
                positions = _positions(block, column)
                known = np.flatnonzero(positions >= 0)
                part[known, positions[known]] = block.weight
            start += block.width
        return encoded

    def to_dict(self) -> dict[str, Any]:
        return self.model_dump(mode="json")

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Self:
        return cls.model_validate(raw)


def _fit_block(attribute: AttributeConfig, rows: Sequence[Mapping[str, str]], *, bins: int, weight: float) -> _Block:
    seen = [row[attribute.name] for row in rows if attribute.name in row]
    match attribute:
        case NumericAttribute():
            if not seen:
                return _Block(name=attribute.name, kind="values", weight=weight)
            quantiles = np.quantile([float(value) for value in seen], np.arange(1, bins) / bins)
            # Many equal values make equal quantiles; a bin that nothing can fall into is no bin.
            edges = tuple(float(edge) for edge in np.unique(quantiles))
            return _Block(name=attribute.name, kind="bins", edges=edges, weight=weight)
        case BooleanAttribute():
            values: tuple[str, ...] = ("false", "true")
        case OrdinalAttribute():
            values = tuple(attribute.values)
        case CategoricalAttribute() if attribute.values:
            values = tuple(attribute.values)
        case _:
            values = tuple(sorted(set(seen)))
    return _Block(name=attribute.name, kind="values", values=values, weight=weight)


def _as_number(block: _Block, rows: Sequence[Mapping[str, str]]) -> _Block:
    seen = np.array([float(row[block.name]) for row in rows if block.name in row])
    # Of one value all the same, no more can be told than that it is known.
    return _Block(
        name=block.name, kind="number", mean=float(seen.mean()), spread=float(seen.std()) or 1.0, weight=block.weight
    )


def _standard(block: _Block, column: Sequence[str | None]) -> NDArray[np.float64]:
    """(N, 2): the standardised value and 1 where it is known, else zeros."""
    found = np.zeros((len(column), 2))
    for row, value in enumerate(column):
        if value is not None:
            found[row] = (float(value) - block.mean) / block.spread, 1.0
    return np.clip(found, -_FARTHEST, _FARTHEST)


def _positions(block: _Block, column: Sequence[str | None]) -> NDArray[np.int64]:
    """The hot dimension of each row within the block, -1 for a zero block."""
    if block.kind != "bins":
        order = {value: index for index, value in enumerate(block.values)}
        return np.array([-1 if value is None else order.get(value, -1) for value in column], dtype=np.int64)
    edges = np.asarray(block.edges)
    return np.array(
        [-1 if value is None else int(np.searchsorted(edges, float(value), side="right")) for value in column],
        dtype=np.int64,
    )


def mean_self_target(vectors: NDArray[np.floating[Any]], batches: NDArray[np.int64], temperature: float) -> float:
    """Mean over batches and exams of s_ii = softmax_j(<y_i, y_j> / temperature) at j = i.

    Exams whose y is zero are left out: their target is themselves at any temperature.
    """
    total, count = 0.0, 0
    for batch in batches:
        y = np.asarray(vectors[batch], dtype=np.float64)
        known = y.any(axis=1)
        scores = (y @ y.T) / temperature
        scores -= scores.max(axis=1, keepdims=True)
        weights = np.exp(scores)
        own = np.diagonal(weights) / weights.sum(axis=1)
        total += float(own[known].sum())
        count += int(known.sum())
    return total / count if count else 1.0


def choose_label_temperature(
    vectors: NDArray[np.floating[Any]],
    *,
    batch_size: int,
    target: float = 0.5,
    seed: int,
    num_batches: int = 16,
) -> float:
    """tau_label at which an exam's mean soft target for itself, in random training batches, is about ``target``.

    Bisection on log tau; the mean falls steadily from its limit at tau = 0 (below 1 where exams share y: `sup_con`)
    to 1 / N at infinity. A target outside of that span is moved a tenth of the span inside it.

    Args:
        vectors: (rows, A), the weighted y of the training rows.
        batch_size: the global batch: N of the softmax.
        seed: of the random batches; the result depends on the arguments alone.
    """
    size = min(batch_size, len(vectors))
    if size < 2:
        return 1.0
    rng = np.random.default_rng(hash_key(seed, "label temperature"))
    batches = np.stack([rng.permutation(len(vectors))[:size] for _ in range(num_batches)])
    low, high = 1e-4, 1e6
    most, least = mean_self_target(vectors, batches, low), mean_self_target(vectors, batches, high)
    if most - least < 1e-6:
        return 1.0
    margin = 0.1 * (most - least)
    aim = min(max(target, least + margin), most - margin)
    low, high = np.log(low), np.log(high)
    for _ in range(50):
        middle = 0.5 * (low + high)
        if mean_self_target(vectors, batches, float(np.exp(middle))) > aim:
            low = middle
        else:
            high = middle
    return float(f"{np.exp(0.5 * (low + high)):.6g}")
