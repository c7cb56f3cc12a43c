"""The rivals to beat: logistic regressions on the attributes alone, on the same folds.

Three of them, because missingness may tell the label: with everything, without the blocks that go missing together,
and without them but with one bit that says they were missing (the "shadow" of the leak).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prima_ray.data.description import DataSetConfig, NumericAttribute, TextAttribute

BASELINES = {
    "all attributes": "logistic regression, all attributes",
    "without blocks": "logistic regression, without the blocks",
    "blocks as one bit": "logistic regression, blocks as one bit",
}
"""Name -> title; without declared blocks only the first differs from the others."""


def metadata_baselines(
    train: Sequence[Mapping[str, str]],
    labels: NDArray[np.int64],
    test: Sequence[Mapping[str, str]],
    data_set: DataSetConfig,
) -> dict[str, NDArray[np.float64]]:
    """Probabilities (N, C) of every baseline for the test exams.

    Args:
        train: attributes of the training exams.
        labels: their class indices, none negative.
        test: attributes of the exams to predict.
    """
    found = {"all attributes": _fit_predict(train, labels, test, data_set, frozenset(), bit=False)}
    blocks = data_set.block_attributes
    if blocks:
        found["without blocks"] = _fit_predict(train, labels, test, data_set, blocks, bit=False)
        found["blocks as one bit"] = _fit_predict(train, labels, test, data_set, blocks, bit=True)
    return found


def mask_blocks(rows: Sequence[Mapping[str, str]], data_set: DataSetConfig) -> list[dict[str, str]]:
    """The same exams with every block's attributes missing."""
    blocks = data_set.block_attributes
    return [{name: value for name, value in row.items() if name not in blocks} for row in rows]


def _fit_predict(
    train: Sequence[Mapping[str, str]],
    labels: NDArray[np.int64],
    test: Sequence[Mapping[str, str]],
    data_set: DataSetConfig,
    without: frozenset[str],
    *,
    bit: bool,
) -> NDArray[np.float64]:
    from sklearn.compose import make_column_transformer
    from sklearn.impute import SimpleImputer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import OneHotEncoder, StandardScaler

    used = [item for item in data_set.attributes if item.name not in without and not isinstance(item, TextAttribute)]
    numeric = [index for index, item in enumerate(used) if isinstance(item, NumericAttribute)]
    others = [index for index in range(len(used)) if index not in numeric]
    if bit:
        others.append(len(used))
    columns = make_column_transformer(
        (
            make_pipeline(
                SimpleImputer(strategy="median", add_indicator=True, keep_empty_features=True), StandardScaler()
            ),
            numeric,
        ),
        (OneHotEncoder(handle_unknown="ignore"), others),
    )
    model = make_pipeline(columns, LogisticRegression(class_weight="balanced", max_iter=5000))
    model.fit(_table(train, used, without, bit=bit), labels)
    predicted = model.predict_proba(_table(test, used, without, bit=bit))
    # A class without training exams has no column of its own.
    whole = np.zeros((len(test), len(data_set.classes)))
    whole[:, model.classes_] = predicted
    return whole


def _table(
    rows: Sequence[Mapping[str, str]], used: Sequence[Any], without: frozenset[str], *, bit: bool
) -> NDArray[np.object_]:
    table = np.empty((len(rows), len(used) + bit), dtype=object)
    for position, row in enumerate(rows):
        for column, item in enumerate(used):
            value = row.get(item.name)
            if isinstance(item, NumericAttribute):
                table[position, column] = np.nan if value is None else float(value)
            else:
                table[position, column] = "missing" if value is None else value
        if bit:
            table[position, -1] = "missing" if all(name not in row for name in without) else "there"
    return table
