from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from prima_ray.evaluation.metrics import per_class
from prima_ray.evaluation.plots import confusion_plot, per_class_plot, training_plot


def size(png: bytes) -> tuple[int, int]:
    with Image.open(io.BytesIO(png)) as image:
        image.load()
        assert image.format == "PNG"
        return image.size


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("num_classes", [2, 6, 12])
def test_every_number_of_classes_is_drawn_without_complaint(num_classes: int) -> None:
    names = [f"CLASS{index}" for index in range(num_classes)]
    counts = np.arange(num_classes**2).reshape(num_classes, num_classes)
    width, height = size(confusion_plot(counts, names))
    assert width > 200
    assert height > 200
    labels = np.arange(num_classes - 1)  # the last class does not occur
    rows = per_class(labels, np.eye(num_classes)[:-1], names)
    models = dict.fromkeys(("ours", *(f"logistic regression, number {index}" for index in range(3))), rows)
    assert size(per_class_plot(models))[0] >= 700


@pytest.mark.filterwarnings("error")
def test_the_same_figures_give_the_same_bytes() -> None:
    steps = [{"step": 1, "loss": 2.0}]
    assert size(training_plot(steps))
    assert training_plot(steps) == training_plot(steps)
    empty = np.zeros((2, 2), dtype=np.int64)
    assert confusion_plot(empty, ["A", "B"]) == confusion_plot(empty, ["A", "B"])
