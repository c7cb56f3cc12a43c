from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from prima_ray.data.batch import ImageTextBatch
from prima_ray.models.dual_encoder import (
    DualEncoder,
    FeatureEncoder,
    ProjectionConfig,
    ProjectionHeads,
    TemperatureConfig,
    image_features,
    text_features,
)
from prima_ray.models.image_tower import ImageTower, ImageTowerConfig
from prima_ray.models.text_tower import TextTower, TextTowerConfig
from tests.unit.models.conftest import BERT


@pytest.fixture(scope="module")
def towers() -> tuple[ImageTower, TextTower]:
    torch.manual_seed(0)
    options = {"depth": 1, "embed_dim": 24, "num_heads": 2}
    image = ImageTowerConfig(name="vit_tiny_patch16_224", image_size=32, options=options).build()
    text = TextTowerConfig(config={"model_type": "bert", **BERT}, trainable="full", max_tokens=16).build()
    return image.eval(), text.eval()


def heads(kind: str = "linear") -> ProjectionHeads:
    torch.manual_seed(1)
    return ProjectionHeads(ProjectionConfig.model_validate({"width": 8, "kind": kind}), image_width=24, text_width=32)


def raw_batch(count: int = 3) -> ImageTextBatch:
    generator = torch.Generator().manual_seed(0)
    return ImageTextBatch(
        exam_ids=tuple(str(number) for number in range(count)),
        weights=torch.ones(count),
        labels=torch.zeros(count, dtype=torch.int64),
        images=torch.randn(count, 2, 3, 32, 32, generator=generator),
        input_ids=torch.randint(5, 99, (count, 6), generator=generator),
        attention_mask=torch.ones(count, 6, dtype=torch.bool),
    )


def test_projections_of_both_modalities_exams_first(towers: tuple[ImageTower, TextTower]) -> None:
    model = DualEncoder(*towers, heads(), TemperatureConfig())
    batch = raw_batch()
    outputs = model(batch)
    assert {name: tuple(value.shape) for name, value in outputs.items()} == {
        "image_cls": (3, 2, 8),
        "image_seq": (3, 2, 4, 8),
        "text_cls": (3, 8),
        "text_seq": (3, 6, 8),
        "temperature": (1,),
    }
    assert batch.images is not None
    cls, _ = towers[0](batch.images[:, 1])
    assert torch.allclose(outputs["image_cls"][:, 1], model.heads.image(cls), atol=1e-5)
    assert not torch.allclose(outputs["image_cls"].norm(dim=-1), torch.ones(3, 2), atol=1e-2), "un-normalised"


def test_cached_features_stand_in_for_a_tower(towers: tuple[ImageTower, TextTower]) -> None:
    whole = DualEncoder(*towers, heads(), TemperatureConfig())
    batch = raw_batch()
    text_cls, text_seq = text_features(towers[1], batch)
    cached = ImageTextBatch(
        exam_ids=batch.exam_ids,
        weights=batch.weights,
        labels=batch.labels,
        images=batch.images,
        text_cls=text_cls,
        text_seq=text_seq,
    )
    without = DualEncoder(towers[0], None, whole.heads, TemperatureConfig())
    found, wanted = without(cached), whole(batch)
    assert all(torch.allclose(found[name], wanted[name], atol=1e-6) for name in wanted)
    with pytest.raises(ValueError, match="neither tokens for a tower nor cached text features"):
        without(batch)
    with pytest.raises(ValueError, match="neither images for a tower nor cached image features"):
        image_features(None, cached)


def test_a_head_serves_global_features_and_tokens_alike() -> None:
    for kind in ("linear", "mlp"):
        module = heads(kind)
        tokens = torch.randn(2, 5, 24)
        assert torch.allclose(module.image(tokens)[:, 3], module.image(tokens[:, 3]), atol=1e-6)
        assert sum(isinstance(layer, nn.Linear) for layer in module.image.modules()) == (1 if kind == "linear" else 2)


def temperature_model(initial: float, **fields: float | bool) -> DualEncoder:
    return DualEncoder(None, None, heads(), TemperatureConfig.model_validate({"initial": initial, **fields}))


def temperature_of(model: DualEncoder) -> torch.Tensor:
    features = {"image_cls": torch.zeros(1, 1, 24), "image_seq": torch.zeros(1, 1, 1, 24)}
    batch = ImageTextBatch(
        exam_ids=("a",),
        weights=torch.ones(1),
        labels=torch.zeros(1, dtype=torch.int64),
        text_cls=torch.zeros(1, 32),
        text_seq=torch.zeros(1, 1, 32),
        **features,
    )
    temperature: torch.Tensor = model(batch)["temperature"]
    return temperature


def test_the_temperature_starts_where_it_is_told_and_learns() -> None:
    model = temperature_model(0.07)
    value = temperature_of(model)
    assert value.item() == pytest.approx(0.07)
    value.sum().backward()
    assert model.log_temperature.shape == (1,), "a scalar would crash DeepSpeed"
    assert float(model.log_temperature.grad or 0) == pytest.approx(0.07)
    assert not temperature_model(0.07, learnable=False).log_temperature.requires_grad


@pytest.mark.parametrize(("outside", "bound"), [(0.001, 0.01), (3.0, 1.0)])
def test_the_temperature_is_clamped_and_finds_its_way_back(outside: float, bound: float) -> None:
    model = temperature_model(0.07)
    nn.init.constant_(model.log_temperature, math.log(outside))
    inwards = 1.0 if outside < bound else -1.0
    for direction, moves in ((inwards, True), (-inwards, False)):
        model.log_temperature.grad = None
        value = temperature_of(model)
        assert value.item() == pytest.approx(bound)
        # Descent on -direction * value wants the value to move in that direction.
        (-direction * value).sum().backward()
        assert bool(model.log_temperature.grad) is moves


def test_a_start_outside_its_bounds_is_a_mistake() -> None:
    with pytest.raises(ValidationError, match="initial 2 is not between 0.01 and 1"):
        TemperatureConfig(initial=2.0)


@pytest.mark.parametrize("projected", [False, True])
def test_frozen_towers_as_eyes_of_the_fusion_model(towers: tuple[ImageTower, TextTower], projected: bool) -> None:
    encoder = FeatureEncoder(*towers, heads() if projected else None)
    batch = raw_batch()
    outputs = encoder(batch)
    assert (encoder.image_width, encoder.text_width) == ((8, 8) if projected else (24, 32))
    assert outputs["image_seq"].shape == (3, 2, 4, encoder.image_width)
    assert outputs["text_seq"].shape == (3, 6, encoder.text_width)
    assert not any(item.requires_grad for item in encoder.parameters())
    if not projected:
        assert torch.allclose(outputs["text_cls"], text_features(towers[1], batch)[0], atol=1e-5)
