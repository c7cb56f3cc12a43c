from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from prima_ray.data.collate import Collator
from prima_ray.data.feature_writer import FeatureConfig, compute_features
from prima_ray.data.features import FeatureSet
from prima_ray.data.plan import ExamIndex
from prima_ray.data.views import ViewConfig
from prima_ray.training.contexts import LocalContext
from prima_ray.training.feature_note import note_features, noted_features

CPU = LocalContext("cpu")


class Apart(LocalContext):
    """A rank whose neighbour finds no note."""

    def gather_objects(self, values: list[str]) -> list[str]:
        return [*values, ""]


@pytest.fixture
def features(tmp_path: Path, toy_shards: str) -> FeatureSet:
    data_set = ExamIndex.read(toy_shards).manifest.data_set
    collate = Collator(data_set=data_set, seed=0, train=False, views=ViewConfig(image_size=8, max_photos=1))

    def encode(batch: Any) -> dict[str, torch.Tensor]:
        return {"image_cls": batch.images.mean(dim=(-1, -2))}

    return compute_features(str(tmp_path), toy_shards, collate, encode, tower="mean", config=FeatureConfig())


def test_a_run_finds_its_features_where_it_noted_them(tmp_path: Path, toy_shards: str, features: FeatureSet):
    note = str(tmp_path / "note.json")
    assert noted_features(note, toy_shards, CPU) is None
    note_features(note, {"train": features}, CPU)
    found = noted_features(note, toy_shards, CPU)
    assert found == {"train": features}
    assert noted_features(note, toy_shards, Apart("cpu")) is None
    assert noted_features(None, toy_shards, CPU) is None


def test_a_note_of_features_that_are_gone_or_damaged_does_not_hold(
    tmp_path: Path, toy_shards: str, features: FeatureSet
):
    note = tmp_path / "note.json"
    note_features(str(note), {"train": features}, CPU)
    manifest = Path(features.path) / "features.json"
    kept = manifest.read_text()
    for text in ("", "{}"):
        manifest.write_text(text)
        assert noted_features(str(note), toy_shards, CPU) is None
    manifest.unlink()
    assert noted_features(str(note), toy_shards, CPU) is None
    manifest.write_text(kept)
    assert noted_features(str(note), toy_shards, CPU) is not None
    note.write_text("[1]")
    assert noted_features(str(note), toy_shards, CPU) is None
