"""The rivals to beat: classifiers of the attributes alone, on the same folds.

Three logistic regressions, because missingness may tell the label: with everything, without the blocks that go missing
together, and without them but with one bit a block that says it was missing (the "shadow" of the leak). To add one: a
line in `metadata_baselines`; another classifier: a line in `ClassifierKind` and in `_classifier`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from prima_ray.base import PrimaError
from prima_ray.data.description import AttributeConfig, BlockConfig, DataSetConfig, NumericAttribute, TextAttribute

Rows = Sequence[Mapping[str, str]]
ClassifierKind = Literal["logistic_regression", "gradient_boosting"]
BlockUse = Literal["keep", "leave_out", "one_bit"]
"""Blocks of attributes that go missing together: read, not read, or one bit each that says whether it was missing."""


@dataclass(frozen=True)
class Baseline:
    """One classifier (balanced class weights), and what it reads."""

    title: str
    attributes: tuple[AttributeConfig, ...]
    blocks: tuple[BlockConfig, ...] = ()
    """A bit each: 1 where the block is missing as a whole."""
    classifier: ClassifierKind = "logistic_regression"
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of scikit-learn's class."""

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
            from threadpoolctl import threadpool_limits

            # Threads of a few hundred rows each mostly wait for one another, for minutes where cores are busy.
            with threadpool_limits(limits=1):
                model = self._pipeline().fit(self._table(train), labels)
                whole[:, model.classes_] = model.predict_proba(self._table(test))
        return whole

    def _pipeline(self) -> Any:
        from sklearn.compose import make_column_transformer
        from sklearn.impute import SimpleImputer
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import OneHotEncoder, StandardScaler

        numeric = [index for index, item in enumerate(self.attributes) if isinstance(item, NumericAttribute)]
        others = [index for index in range(len(self.attributes)) if index not in numeric]
        bits = list(range(len(self.attributes), len(self.attributes) + len(self.blocks)))
        # Numbers are imputed by the training median beside a bit that says so; elsewhere "missing" is a value.
        imputer = SimpleImputer(strategy="median", add_indicator=True, keep_empty_features=True)
        columns = make_column_transformer(
            (make_pipeline(imputer, StandardScaler()), [*numeric, *bits]),
            (OneHotEncoder(handle_unknown="ignore", sparse_output=False), others),
        )
        return make_pipeline(columns, _classifier(self.classifier, self.options))

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


def _classifier(kind: ClassifierKind, options: Mapping[str, Any]) -> Any:
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.linear_model import LogisticRegression

    defaults: dict[ClassifierKind, tuple[Any, dict[str, Any]]] = {
        "logistic_regression": (LogisticRegression, {"max_iter": 5000}),
        "gradient_boosting": (HistGradientBoostingClassifier, {"early_stopping": False, "random_state": 0}),
    }
    make, given = defaults[kind]
    return make(**{"class_weight": "balanced", **given, **options})


def check_options(kind: ClassifierKind, options: Mapping[str, Any]) -> None:
    """Options must be the class's.

    Raises:
        PrimaError: one is not.
    """
    try:
        _classifier(kind, options)
    except TypeError:
        known = sorted(_classifier(kind, {}).get_params())
        wrong = next(name for name in options if name not in known)
        raise PrimaError(f"{kind} has no option {wrong!r}", mend=f"Known: {', '.join(known)}.") from None


def metadata_baseline(
    title: str,
    data_set: DataSetConfig,
    *,
    blocks: BlockUse = "keep",
    classifier: ClassifierKind = "logistic_regression",
    options: Mapping[str, Any] | None = None,
) -> Baseline | None:
    """One baseline; None where the data set has nothing that it could read."""
    usable = tuple(item for item in data_set.attributes if not isinstance(item, TextAttribute))
    if blocks != "keep":
        usable = tuple(item for item in usable if item.name not in data_set.block_attributes)
    bits = data_set.blocks if blocks == "one_bit" else ()
    if not (usable or bits):
        return None
    return Baseline(title, usable, bits, classifier, options or {})


def metadata_baselines(data_set: DataSetConfig) -> list[Baseline]:
    """The baselines of a data set: one where it declares no blocks, none where it has no attributes to read."""
    titles: dict[BlockUse, str] = {
        "keep": "all attributes",
        "leave_out": "without the blocks",
        "one_bit": "blocks as one bit",
    }
    wanted = get_args(BlockUse) if data_set.blocks else ("keep",)
    found = [metadata_baseline(f"logistic regression, {titles[use]}", data_set, blocks=use) for use in wanted]
    return [item for item in found if item is not None]


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
