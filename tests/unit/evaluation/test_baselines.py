from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from prima_ray.config import load_config
from prima_ray.data.description import DataSetConfig
from prima_ray.data.sources import read_source
from prima_ray.data.splits import assign_folds
from prima_ray.evaluation.baselines import has_blocks, mask_blocks, metadata_baselines
from prima_ray.evaluation.metrics import headline
from prima_ray.evaluation.statistics import mean_sd
from prima_ray.stages.ingest import IngestConfig
from tests.conftest import TOY

ROOT = Path(__file__).parents[3]
SHARED = Path(os.environ.get("PRIMA_SHARED", ROOT.parent / "shared"))
PUBLISHED = {
    "logistic regression, all attributes": ((60.27, 66.19, 63.96), (5.97, 5.42, 4.86), (47.25, 57.09, 50.74)),
    "logistic regression, without the blocks": ((57.73, 63.77, 63.67), (4.26, 3.20, 3.84), (49.07, 55.67, 57.81)),
    "logistic regression, blocks as one bit": ((61.15, 66.41, 67.79), (4.66, 4.40, 3.77), (49.70, 57.80, 54.96)),
}
"""The data's README: macro F1, accuracy, balanced accuracy; mean and SD over folds; pooled on complete exams."""


@pytest.fixture
def toy() -> DataSetConfig:
    return DataSetConfig.model_validate(TOY)


def without(data_set: DataSetConfig, **changes: object) -> DataSetConfig:
    return DataSetConfig.model_validate({**data_set.model_dump(), **changes})


def test_the_three_say_what_they_read(toy: DataSetConfig) -> None:
    assert {item.title: item.inputs for item in metadata_baselines(toy)} == {
        "logistic regression, all attributes": "3 attributes: region, itch, age",
        "logistic regression, without the blocks": "2 attributes: region, itch",
        "logistic regression, blocks as one bit": "2 attributes: region, itch, and whether history was missing",
    }


def test_without_blocks_there_is_one_and_without_attributes_none(toy: DataSetConfig) -> None:
    assert [item.title for item in metadata_baselines(without(toy, blocks=()))] == [
        "logistic regression, all attributes"
    ]
    assert metadata_baselines(without(toy, blocks=(), attributes=())) == []
    # All attributes in blocks: there is nothing to read without them but the bit.
    every = without(toy, blocks=[{"name": "all", "attributes": ["region", "itch", "age"]}])
    assert [item.title for item in metadata_baselines(every)] == [
        "logistic regression, all attributes",
        "logistic regression, blocks as one bit",
    ]


def test_each_reads_what_it_says_and_nothing_else(toy: DataSetConfig) -> None:
    """The class is whether the age is there: the bit tells it, the rest does not."""
    rows = [{"itch": "true", **({"age": "50"} if number % 2 else {})} for number in range(20)]
    labels = np.arange(20) % 2
    found = {item.title: item.fit_predict(rows, labels, rows[:2], 3) for item in metadata_baselines(toy)}
    assert found["logistic regression, all attributes"].argmax(axis=1).tolist() == [0, 1]
    assert found["logistic regression, blocks as one bit"].argmax(axis=1).tolist() == [0, 1]
    assert found["logistic regression, without the blocks"][:, :2] == pytest.approx(np.full((2, 2), 0.5))
    assert all((item[:, 2] == 0).all() for item in found.values())  # no training exam is of the third class


def test_odd_tables(toy: DataSetConfig) -> None:
    everything, *_ = metadata_baselines(toy)
    # One class alone; an age that nobody has; a value that training never saw; nothing to predict.
    assert everything.fit_predict([{}, {}], np.array([2, 2]), [{}], 3).tolist() == [[0, 0, 1]]
    rows: list[dict[str, str]] = [{"region": "FACE"}, {"region": "ARM"}, {"region": "FACE"}]
    found = everything.fit_predict(rows, np.array([0, 1, 0]), [{"region": "LIP", "age": "40"}, {}], 3)
    assert found.sum(axis=1) == pytest.approx([1, 1])
    assert everything.fit_predict(rows, np.array([0, 1, 0]), [], 3).shape == (0, 3)


def test_a_block_with_gaps_is_recorded_and_masking_takes_all_of_it(toy: DataSetConfig) -> None:
    data_set = without(toy, blocks=[{"name": "history", "attributes": ["age", "itch"]}])
    rows = [{"age": "1", "itch": "true", "region": "FACE"}, {"itch": "true"}, {"region": "ARM"}, {}]
    assert has_blocks(rows, data_set).tolist() == [True, True, False, False]
    assert mask_blocks(rows, data_set) == [{"region": "FACE"}, {}, {"region": "ARM"}, {}]


@pytest.mark.skipif(not (SHARED / "data" / "pad_ufes_20").is_dir(), reason="PAD-UFES-20 is not in $PRIMA_SHARED")
def test_pad_ufes_20_gives_the_published_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within 0.5 points; two of the three are exact, "all attributes" encodes gaps in a block in its own way."""
    monkeypatch.setenv("PRIMA_SHARED", str(SHARED))
    config = load_config(IngestConfig, ROOT / "jobs" / "configs" / "pad_ufes_20" / "ingest.yaml")
    exams = read_source(config.source, config.data_set).exams
    rows, names = [exam.attributes for exam in exams], config.data_set.class_names
    labels = np.array([names.index(exam.label or "") for exam in exams])
    folds = assign_folds(
        [exam.label for exam in exams],
        [exam.patient_id for exam in exams],
        num_folds=config.folds.count,
        seed=config.seed,
    )
    complete = has_blocks(rows, config.data_set)
    assert (len(exams), int(complete.sum())) == (908, 564)
    for baseline in metadata_baselines(config.data_set):
        pooled = np.zeros((len(exams), len(names)))
        by_fold = []
        for fold in range(config.folds.count):
            train, test = np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)
            pooled[test] = baseline.fit_predict(
                [rows[row] for row in train], labels[train], [rows[row] for row in test], len(names)
            )
            by_fold.append(headline(labels[test], pooled[test]))
        whole = headline(labels[complete], pooled[complete])
        for position, figure in enumerate(("macro_f1", "accuracy", "balanced_accuracy")):
            mean, deviation = mean_sd([100 * item[figure] for item in by_fold])
            found = (mean, deviation, 100 * whole[figure])
            assert found == pytest.approx([column[position] for column in PUBLISHED[baseline.title]], abs=0.5), figure
