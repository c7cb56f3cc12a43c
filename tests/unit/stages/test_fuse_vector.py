"""Fuse that reads the attributes as a vector beside the text: from training to an answer."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from prima_ray.base import PrimaError
from prima_ray.config import validate_config
from prima_ray.data.attribute_vectors import SoftTargetEncoder
from prima_ray.data.collate import Collator
from prima_ray.data.description import DataSetConfig
from prima_ray.data.metadata import MetadataTextConfig
from prima_ray.data.plan import ExamIndex
from prima_ray.inference.predictor import Predictor
from prima_ray.models.fusion import FusionInputs, Qwen3FusionConfig
from prima_ray.models.tokenizer import OFFLINE_TEXT_MODEL, TextTokenizer
from prima_ray.stages.fuse import FuseConfig
from prima_ray.stages.row_sets import read_predictions, shard_tables
from tests.conftest import TOY, tiny_config, train_tiny
from tests.unit.models.conftest import QWEN3, feature_batch

DATA_SET = DataSetConfig.model_validate(TOY)
MLP = {"kind": "mlp", "reads": "attributes"}
KNOWN = {"region": "FACE", "itch": "true", "age": "61"}


def collator(train: bool, **text: Any) -> Collator:
    config = MetadataTextConfig(**text)
    encoder = SoftTargetEncoder.fit_vector([KNOWN, {**KNOWN, "age": "30"}], DATA_SET, config, numbers="bins", bins=2)
    tokenizer = TextTokenizer(OFFLINE_TEXT_MODEL, max_tokens=48)
    return Collator(data_set=DATA_SET, seed=0, train=train, text=config, tokenizer=tokenizer, vector=encoder)


def row(attributes: dict[str, str], epoch: int = 0) -> pa.Table:
    return pa.table(
        {
            "exam_id": ["e"], "label": pa.array([None], pa.string()), "epoch": [epoch],
            "attributes": pa.array([list(attributes.items())], pa.map_(pa.string(), pa.string())),
        }
    )  # fmt: skip


def test_the_vector_is_one_hot_and_zero_where_nothing_is_known() -> None:
    collate = collator(train=False)
    assert collate.vector is not None
    found = collate(row({"region": "FACE", "age": "61"})).attributes
    assert found is not None
    said = [name for name, value in zip(collate.vector.dimensions, found[0].tolist(), strict=True) if value]
    assert said == ["region=FACE", "age:bin 1"]
    assert set(found[0].tolist()) == {0.0, 1.0}


def test_numbers_are_standardised_and_known_or_not() -> None:
    """Against float64: numpy's mean and standard deviation of the rows that have a value; far ones are held."""
    ages = [30.0, 42.0, 61.0]
    rows = [{"age": f"{age:g}", "region": "ARM"} for age in ages] + [{"region": "FACE"}]
    encoder = SoftTargetEncoder.fit_vector(rows, DATA_SET, MetadataTextConfig(), numbers="standard", bins=8)
    at = {name: place for place, name in enumerate(encoder.dimensions)}
    assert len(at) == encoder.width
    assert not any(":bin" in name for name in at)
    found = encoder.encode([*rows, {"age": "120"}])
    wanted = [(age - np.mean(ages)) / np.std(ages) for age in ages]
    np.testing.assert_allclose(found[:, at["age:standard"]], [*wanted, 0.0, 3.0], rtol=1e-6)
    assert found[:, at["age:known"]].tolist() == [1.0, 1.0, 1.0, 0.0, 1.0]
    assert found[3, at["region=FACE"]] == 1.0
    again = SoftTargetEncoder.from_dict(json.loads(json.dumps(encoder.to_dict())))
    np.testing.assert_array_equal(again.encode(rows), found[:4])


@pytest.mark.parametrize(("ages", "wanted"), [(["61", "61"], ["age:standard", "age:known"]), ([], [])])
def test_a_number_that_never_varies_or_is_never_known(ages: list[str], wanted: list[str]) -> None:
    rows = [{"age": age} for age in ages] or [{"itch": "true"}]
    encoder = SoftTargetEncoder.fit_vector(rows, DATA_SET, MetadataTextConfig(), numbers="standard", bins=8)
    assert [name for name in encoder.dimensions if name.startswith("age")] == wanted
    assert np.isfinite(encoder.encode([{"age": "30"}, {}])).all()


def test_what_the_text_does_without_the_vector_does_without_too() -> None:
    collate = collator(train=True, attribute_dropout=0.5)
    decode = TextTokenizer(OFFLINE_TEXT_MODEL, max_tokens=48).loaded.decode
    lengths = set()
    for epoch in range(20):
        batch = collate(row(KNOWN, epoch))
        assert batch.attributes is not None
        assert batch.input_ids is not None
        text = decode(batch.input_ids[0])
        told = [phrase in text for phrase in ("on the face", "it itches", "age 61")]
        assert batch.attributes[0].sum() == sum(told), text
        lengths.add(sum(told))
    assert len(lengths) > 2
    assert collator(train=False, masked=("history",))(row(KNOWN)).attributes.sum() == 2  # type: ignore[union-attr]


@pytest.fixture(scope="module")
def runs(labelled_shards: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two runs that read the vector: do not write into them."""
    root = tmp_path_factory.mktemp("vector")
    fusion = tiny_config("fuse", labelled_shards, "unused")["fusion"]
    return {
        "qwen3": train_tiny("fuse", labelled_shards, root / "qwen3", vector={}, fusion={**fusion, "shortcut": True}),
        "mlp": train_tiny(
            "fuse", labelled_shards, root / "mlp", vector={}, fusion={"kind": "mlp", "reads": "attributes"}
        ),
    }


@pytest.mark.parametrize("kind", ["qwen3", "mlp"])
def test_an_exam_gets_what_the_run_wrote_of_it(kind: str, runs: dict[str, Path], labelled_shards: str) -> None:
    index = ExamIndex.read(labelled_shards)
    rows = np.flatnonzero(index.folds("patient") == 0)
    predictor = Predictor.load(runs[kind])
    found = predictor.predict_tables(shard_tables(index, rows))
    np.testing.assert_allclose(found, read_predictions(runs[kind], index, rows), atol=1e-6)
    hidden = predictor.predict_tables(shard_tables(index, rows), masked=["age", "itch", "region"])
    assert np.abs(hidden - found).max() > 1e-4


def test_a_vector_is_needed_where_it_is_read(labelled_shards: str) -> None:
    raw = {**tiny_config("fuse", labelled_shards, "out"), "fusion": MLP}
    with pytest.raises(PrimaError, match="fusion.reads is attributes: give `vector`"):
        validate_config(FuseConfig, raw, where="fuse.yaml")


def test_a_shortcut_of_zeros_changes_nothing_until_it_has_learned() -> None:
    inputs = FusionInputs(
        image_width=6, text_width=6, grid=(4, 4), attribute_width=5,
        class_phrases=("one", "two", "three"), subject="a skin lesion",
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen3FusionConfig(config=QWEN3, trainable="full", shortcut=True).build(inputs).eval()
    batch = replace(feature_batch(3), attributes=torch.eye(5)[:3])
    assert model.shortcut is not None
    with torch.no_grad():
        plain = model(batch)["logits"]
        model.shortcut.metadata.weight[1, 2] = 2.0
        model.shortcut.image.bias[0] = 0.5
        moved = model(batch)["logits"]
    wanted = torch.tensor([[0.5, 0, 0], [0.5, 0, 0], [0.5, 2.0, 0]])
    torch.testing.assert_close(moved - plain, wanted, atol=1e-5, rtol=0)
