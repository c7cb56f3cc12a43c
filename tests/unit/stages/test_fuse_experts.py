"""Fuse that pools what each modality says by itself: from training to an answer and its reasons."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor, nn

from prima_ray.base import PrimaError
from prima_ray.config import validate_config
from prima_ray.data.batch import ImageTextBatch
from prima_ray.data.plan import ExamIndex
from prima_ray.evaluation.baselines import mask_blocks
from prima_ray.inference.contributions import leave_one_out
from prima_ray.inference.predictor import Exam, Predictor
from prima_ray.models.ensemble import Ensemble
from prima_ray.models.experts import AttributeExpert, ExpertsConfig, Pool
from prima_ray.stages.fuse import FuseConfig, make_task
from prima_ray.stages.row_sets import read_predictions, shard_tables
from prima_ray.stages.rundir import RunDir
from prima_ray.stages.training import Plan
from prima_ray.studies.folds import labelled_roles
from tests.conftest import jpeg, tiny_config, train_tiny
from tests.unit.models.conftest import feature_batch


class Fixed(nn.Module):
    """Says the same of every exam, and learns."""

    def __init__(self, logits: list[float]) -> None:
        super().__init__()
        self.said = nn.Parameter(torch.tensor(logits))

    def forward(self, batch: ImageTextBatch) -> dict[str, Tensor]:
        return {"logits": self.said.expand(len(batch), -1)}


@pytest.mark.parametrize("num_classes", [2, 3])
def test_the_regression_is_scikit_learns(num_classes: int) -> None:
    from sklearn.linear_model import LogisticRegression

    draw = np.random.default_rng(num_classes)
    vectors = draw.integers(0, 2, (60, 5)).astype(np.float32)
    labels, weights = draw.integers(0, num_classes, 60), draw.random(60)
    expert = AttributeExpert.fit(vectors, labels, weights, num_classes=num_classes, inverse_penalty=0.3)
    rival = LogisticRegression(C=0.3, max_iter=5000).fit(vectors, labels, sample_weight=weights)
    found = expert(torch.from_numpy(vectors)).softmax(dim=-1)
    np.testing.assert_allclose(found.numpy(), rival.predict_proba(vectors), atol=1e-4)
    assert not any(item.requires_grad for item in expert.parameters())


def test_the_pool_is_the_weighted_geometric_mean() -> None:
    expert = AttributeExpert(2, 3)
    with torch.no_grad():
        expert.layer.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]]))
        expert.layer.bias.zero_()
    pool = Pool(ExpertsConfig(fusion=2, photos=1, attributes=3), Fixed([1.0, 2.0, 3.0]), expert)
    photos = torch.tensor([[4.0, 0.0, 1.0], [0.0, 0.0, 7.0]])
    batch = replace(feature_batch(2), photo_logits=photos, attributes=torch.eye(2))
    found = pool.eval()(batch)
    parts = [torch.tensor([[1.0, 2.0, 3.0]]).expand(2, -1), photos, torch.tensor([[1.0, 0, 0], [0, 2.0, 0]])]
    p = [part.double().softmax(dim=-1) for part in parts]
    wanted = (p[0] ** 2 * p[1] * p[2] ** 3) ** (1 / 6)
    torch.testing.assert_close(
        found["logits"].softmax(dim=-1), (wanted / wanted.sum(dim=-1, keepdim=True)).float(), atol=1e-6, rtol=0
    )
    assert found.keys() == {"logits"}


def test_in_training_the_fusion_model_answers_alone() -> None:
    pool = Pool(ExpertsConfig(attributes=0), Fixed([1.0, 2.0]), None).train()
    found = pool(feature_batch(2))
    assert found["logits"].tolist() == [[1.0, 2.0]] * 2
    found["logits"].sum().backward()
    assert {name for name, item in pool.named_parameters() if item.grad is not None} == {"fusion.said"}


def test_an_expert_that_the_batch_knows_nothing_of_is_told() -> None:
    pool = Pool(ExpertsConfig(attributes=0), Fixed([1.0, 2.0]), None).eval()
    with pytest.raises(ValueError, match="reads photo_logits"):
        pool(feature_batch(2))


@pytest.fixture(scope="module")
def run(labelled_shards: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Do not write into it."""
    root = tmp_path_factory.mktemp("experts")
    photos = train_tiny("finetune", labelled_shards, root / "photos")
    config = tiny_config("fuse", labelled_shards, "unused")
    return train_tiny(
        "fuse", labelled_shards, root / "fuse", vector={}, experts={}, members=2,
        text={"block_dropout": 0.2}, inputs={**config["inputs"], "photos": str(photos)},
    )  # fmt: skip


@pytest.mark.parametrize(("asked", "share"), [(None, 0.2), (0.0, 0.0), (0.5, 0.5)])
def test_how_often_the_regression_does_without_the_blocks(
    asked: float | None, share: float, labelled_shards: str, tmp_path: Path
) -> None:
    raw = tiny_config("fuse", labelled_shards, "unused")
    changes = {"vector": {}, "experts": {"photos": 0, "block_dropout": asked}, "text": {"block_dropout": 0.2}}
    config = FuseConfig.model_validate({**raw, **changes})
    index = ExamIndex.read(labelled_shards)
    roles = labelled_roles(index, split="patient", fold=0)
    plan = Plan(run=RunDir(tmp_path, "fuse", finished=False), index=index, roles=roles)
    task = make_task(config, plan)
    assert task.vector is not None
    assert task.attribute_expert is not None
    labels, given = index.labels[roles.train], index.attribute_rows(roles.train)
    weight = np.asarray(task.class_weights)[labels]
    known, hidden = task.vector.encode(given), task.vector.encode(mask_blocks(given, task.data_set))
    wanted = AttributeExpert.fit(
        np.concatenate([known, hidden]),
        np.concatenate([labels, labels]),
        np.concatenate([weight * (1 - share), weight * share]),
        num_classes=3,
        inverse_penalty=1.0,
    )
    torch.testing.assert_close(task.attribute_expert.layer.weight, wanted.layer.weight)
    # The age is the block that goes missing.
    assert (hidden != known).any()


def test_an_exam_gets_what_the_run_wrote_of_it(run: Path, labelled_shards: str) -> None:
    index = ExamIndex.read(labelled_shards)
    rows = np.flatnonzero(index.folds("patient") == 0)
    predictor = Predictor.load(run)
    found = predictor.predict_tables(shard_tables(index, rows))
    np.testing.assert_allclose(found, read_predictions(run, index, rows), atol=1e-6)
    hidden = predictor.predict_tables(shard_tables(index, rows), masked=["age", "itch", "region"])
    assert np.abs(hidden - found).max() > 1e-4


def test_members_began_with_other_weights_and_answer_together(run: Path, labelled_shards: str) -> None:
    predictor = Predictor.load(run)
    ensemble = predictor.bundle.components["fusion"]
    assert isinstance(ensemble, Ensemble)
    batch = predictor.encode(predictor.collate(next(iter(shard_tables(ExamIndex.read(labelled_shards), np.arange(4))))))
    with torch.inference_mode():
        one, other = (member(batch)["logits"] for member in ensemble.members)
    assert not torch.allclose(one, other, atol=1e-3)


def test_the_photo_classifier_is_heard(run: Path, labelled_shards: str) -> None:
    index = ExamIndex.read(labelled_shards)
    predictor = Predictor.load(run)
    batch = predictor.encode(predictor.collate(next(iter(shard_tables(index, np.arange(4))))))
    assert batch.photo_logits is not None
    alone = Predictor.load(run.parent / "photos")
    said = alone.logits(alone.encode(alone.collate(next(iter(shard_tables(index, np.arange(4)))))))
    np.testing.assert_allclose(batch.photo_logits.numpy(), said, atol=1e-5)
    louder = replace(batch, photo_logits=batch.photo_logits + torch.tensor([9.0, 0.0, 0.0])[: said.shape[1]])
    assert (predictor.logits(louder)[:, 0] > predictor.logits(batch)[:, 0]).all()


def test_contributions_are_those_of_the_pool(run: Path) -> None:
    predictor = Predictor.load(run)
    exam = Exam((jpeg(np.random.default_rng(0), 50, 40),), {"region": "FACE", "age": "61"})
    encoded = predictor.encode(predictor.collate(predictor.exam_table(exam)))
    logits = predictor.logits(encoded)
    found = leave_one_out(predictor, encoded, [{"region": "FACE", "age": "61"}], logits)[0]
    whole = predictor.calibration.probabilities(logits)[0]
    for item in found.items:
        without = predictor.predict([exam], masked=[item.attribute])[0]
        assert item.probability == pytest.approx(whole.max() - without[whole.argmax()], abs=1e-6)


def test_a_model_without_one_of_its_experts_is_refused(run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    config = copy / "model" / "config.json"
    described = json.loads(config.read_text())
    del described["components"]["attributes"]
    config.write_text(json.dumps(described))
    with pytest.raises(PrimaError, match="its experts need the part 'attributes'"):
        Predictor.load(copy)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experts": {}, "vector": {}}, "experts.photos is the weight of the classifier of inputs.photos"),
        ({"experts": {"photos": 0}}, "experts.attributes reads the attributes' vector"),
        ({"experts": {"photos": 0, "attributes": 0}}, "there is nothing to pool"),
    ],
)
def test_experts_need_what_they_read(changes: dict[str, Any], message: str, labelled_shards: str) -> None:
    raw = {**tiny_config("fuse", labelled_shards, "out"), **changes}
    with pytest.raises(PrimaError, match=message):
        validate_config(FuseConfig, raw, where="fuse.yaml")


def test_only_a_run_of_finetune_speaks_of_photos(run: Path, labelled_shards: str, tmp_path: Path) -> None:
    config = tiny_config("fuse", labelled_shards, "unused")
    with pytest.raises(PrimaError, match="finetune"):
        train_tiny(
            "fuse", labelled_shards, tmp_path / "out", vector={}, experts={},
            inputs={**config["inputs"], "photos": str(run)},
        )  # fmt: skip


def test_a_classifier_of_other_classes_or_views_is_refused_before_the_work(
    run: Path, labelled_shards: str, tmp_path: Path
) -> None:
    config = tiny_config("fuse", labelled_shards, "unused")

    def fused(photos: Path, **changes: Any) -> None:
        train_tiny(
            "fuse", labelled_shards, tmp_path / "out", vector={}, experts={},
            inputs={**config["inputs"], "photos": str(photos)}, **changes,
        )  # fmt: skip

    with pytest.raises(PrimaError, match=r"views.resize is squash, inputs.photos reads crop"):
        fused(run.parent / "photos", views={**config["views"], "resize": "squash"})
    other = Path(shutil.copytree(run.parent / "photos", tmp_path / "other"))
    described = json.loads((other / "model" / "config.json").read_text())
    described["data_set"]["classes"].reverse()
    (other / "model" / "config.json").write_text(json.dumps(described))
    with pytest.raises(PrimaError, match="inputs.photos tells SEK, NEV, BCC apart, these shards have BCC, NEV, SEK"):
        fused(other)


def test_the_table_of_a_batch_carries_no_expert(run: Path, labelled_shards: str) -> None:
    index = ExamIndex.read(labelled_shards)
    predictor = Predictor.load(run)
    table: pa.Table = next(iter(shard_tables(index, np.arange(2))))
    assert predictor.encode(predictor.collate(table)).light().photo_logits is None
