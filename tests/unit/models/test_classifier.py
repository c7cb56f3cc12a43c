from __future__ import annotations

from dataclasses import replace

import torch

from prima_ray.data.batch import ImageTextBatch
from prima_ray.models.classifier import ImageClassifier, mean_over_views
from prima_ray.models.image_tower import ImageTowerConfig


def test_the_mean_is_over_real_views() -> None:
    values = torch.tensor([[[1.0], [3.0]], [[5.0], [100.0]], [[7.0], [8.0]]])
    mask = torch.tensor([[True, True], [True, False], [False, False]])
    assert mean_over_views(values, mask).tolist() == [[2.0], [5.0], [0.0]]
    assert mean_over_views(values, None).tolist() == [[2.0], [52.5], [7.5]]


def test_an_exams_logits_are_the_mean_of_its_photos_logits() -> None:
    torch.manual_seed(0)
    model = ImageClassifier(ImageTowerConfig(name="resnet10t", image_size=32).build(), num_classes=3).eval()
    batch = ImageTextBatch(
        exam_ids=("a", "b"),
        weights=torch.ones(2),
        labels=torch.zeros(2, dtype=torch.int64),
        images=torch.randn(2, 2, 3, 32, 32),
        image_mask=torch.tensor([[True, True], [True, False]]),
    )
    assert batch.images is not None
    logits = model(batch)["logits"]
    assert logits.shape == (2, 3)
    single = [
        model(replace(batch, images=batch.images[:, view : view + 1], image_mask=None))["logits"] for view in (0, 1)
    ]
    assert torch.allclose(logits[0], (single[0][0] + single[1][0]) / 2, atol=1e-5)
    assert torch.allclose(logits[1], single[0][1], atol=1e-5)
