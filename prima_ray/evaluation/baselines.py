"""The rivals to beat: logistic regressions on the attributes alone, on the same folds.

Three of them, because missingness may tell the label: with everything, without the blocks that go missing together,
and without them but with one bit a block that says it was missing (the "shadow" of the leak). To add one: a line in
`_variants`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prima_ray.data.description import AttributeConfig, BlockConfig, DataSetConfig, NumericAttribute, TextAttribute

Rows = Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class Baseline:
    """One logistic regression (L2, balanced class weights), and what it reads."""

    title: str
    attributes: tuple[AttributeConfig, ...]
    blocks: tuple[BlockConfig, ...] = ()
    """A bit each: 1 where the block is missing as a whole."""

    @property
    def inputs(self) -> str:
        """What it reads, in words."""
        bits = f", and whether {_names(block.name for block in self.blocks)} was missing" if self.blocks else ""
        return f"{len(self.attributes)} attributes: {_names(item.name for item in self.attributes)}{bits}"

    def fit_predict(self, train: Rows, labels: NDArray[np.int64], test: Rows, num_classes: int) -> NDArray[np.float64]:
        """Probabilities (N, C) for the test exams.

        Args:
            train: attributes of the training exams.
            labels: their class indices, none negative. A class that none of them has gets the probability 0.
            test: attributes of the exams to predict.
        """
        whole = np.zeros((len(test), num_classes))
        classes = np.unique(labels)
        if len(classes) == 1:
            whole[:, classes[0]] = 1.0
        elif len(test):
            model = self._pipeline().fit(self._table(train), labels)
            whole[:, model.classes_] = model.predict_proba(self._table(test))
        return whole

    def _pipeline(self) -> Any:
        from sklearn.compose import make_column_transformer
        from sklearn.impute import SimpleImputer
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import OneHotEncoder, StandardScaler

        numeric = [index for index, item in enumerate(self.attributes) if isinstance(item, NumericAttribute)]
        others = [index for index in range(len(self.attributes)) if index not in numeric]
        bits = list(range(len(self.attributes), len(self.attributes) + len(self.blocks)))
        # Numbers are imputed by the training median beside a bit that says so; elsewhere "missing" is a value.
        imputer = SimpleImputer(strategy="median", add_indicator=True, keep_empty_features=True)
        columns = make_column_transformer(
            (make_pipeline(imputer, StandardScaler()), [*numeric, *bits]),
            (OneHotEncoder(handle_unknown="ignore"), others),
        )
        return make_pipeline(columns, LogisticRegression(class_weight="balanced", max_iter=5000))

    def _table(self, rows: Rows) -> NDArray[np.object_]:
        table = np.empty((len(rows), len(self.attributes) + len(self.blocks)), dtype=object)
        for position, row in enumerate(rows):
            for column, item in enumerate(self.attributes):
                value = row.get(item.name)
                if isinstance(item, NumericAttribute):
                    table[position, column] = np.nan if value is None else float(value)
                else:
                    table[position, column] = "missing" if value is None else value
            for column, block in enumerate(self.blocks, start=len(self.attributes)):
                table[position, column] = float(not _recorded(row, block))
        return table


def metadata_baselines(data_set: DataSetConfig) -> list[Baseline]:
    """The baselines of a data set: one where it declares no blocks, none where it has no attributes to read."""
    usable = tuple(item for item in data_set.attributes if not isinstance(item, TextAttribute))
    rest = tuple(item for item in usable if item.name not in data_set.block_attributes)
    found = [Baseline("logistic regression, all attributes", usable)]
    if data_set.blocks:
        found += [
            Baseline("logistic regression, without the blocks", rest),
            Baseline("logistic regression, blocks as one bit", rest, data_set.blocks),
        ]
    return [item for item in found if item.attributes or item.blocks]


def has_blocks(rows: Rows, data_set: DataSetConfig) -> NDArray[np.bool_]:
    """(N,) true where no block is missing as a whole: the exams with complete metadata.

    A recorded block may have gaps (on PAD-UFES-20 some origins of a parent are `UNK`): what tells the label is that
    nothing of it was recorded.
    """
    return np.array([all(_recorded(row, block) for block in data_set.blocks) for row in rows], dtype=bool)


def mask_blocks(rows: Rows, data_set: DataSetConfig) -> list[dict[str, str]]:
    """The same exams with every block's attributes missing."""
    blocks = data_set.block_attributes
    return [{name: value for name, value in row.items() if name not in blocks} for row in rows]


def _recorded(row: Collection[str], block: BlockConfig) -> bool:
    return any(name in row for name in block.attributes)


def _names(names: Any) -> str:
    return ", ".join(names)
