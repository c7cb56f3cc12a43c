from __future__ import annotations

import numpy as np
import pytest
import torch

from prima_ray.data.views import ViewConfig, normalise
from prima_ray.inference.appearance import NAMES, PhotoBounds, fit_bounds, measure, pixels_of


def looks(*views: np.ndarray) -> list[dict[str, float]]:
    return [dict(zip(NAMES, row, strict=True)) for row in measure(np.stack(views))]


def test_numbers_by_hand() -> None:
    flat = np.full((16, 16, 3), 0.5)
    red = np.zeros((16, 16, 3))
    red[..., 0] = 1.0
    ramp = np.repeat(np.repeat(np.arange(16.0)[None, :, None] / 16, 16, axis=0), 3, axis=2)
    one, two, three = looks(flat, red, ramp)
    assert one["brightness"] == pytest.approx(0.5)
    assert one["contrast"] == pytest.approx(0.0, abs=1e-12)
    assert one["detail_0"] == pytest.approx(np.log(1e-3))
    assert two["brightness"] == pytest.approx(0.299)
    # ITU-R BT.601: full red has Cr = 0.713 * (1 - 0.299), Cb = 0.564 * (0 - 0.299).
    assert (two["red"], two["blue"]) == (pytest.approx(0.713 * 0.701), pytest.approx(-0.564 * 0.299))
    # A step of 1/16 from pixel to pixel; of 1/8 at half the size.
    assert three["detail_0"] == pytest.approx(np.log(1e-3 + 1 / 16))
    assert three["detail_1"] == pytest.approx(np.log(1e-3 + 1 / 8))
    assert three["contrast"] == pytest.approx(np.std(np.arange(16) / 16))
    assert measure(np.random.default_rng(0).random((2, 8, 8, 3))).shape == (2, len(NAMES))


def test_a_view_comes_back_from_the_models_input() -> None:
    config = ViewConfig(image_size=8, mean=(0.4, 0.5, 0.6), std=(0.1, 0.2, 0.3))
    pixels = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    assert pixels_of(normalise(pixels, config), config) == pytest.approx(pixels / 255, abs=1e-6)
    assert pixels_of(torch.full((1, 3, 8, 8), 99.0), config).max() == 1.0


@pytest.fixture(scope="module")
def bounds() -> PhotoBounds:
    """Of soft pictures of medium light, the shorter side 60 to 100 pixels."""
    rng = np.random.default_rng(0)
    views = []
    for _ in range(200):
        waves = np.add.outer(np.sin(np.arange(32) / rng.uniform(2, 5)), np.cos(np.arange(32) / rng.uniform(2, 5)))
        views.append(np.clip(rng.uniform(0.4, 0.6) + 0.15 * waves[..., None] + rng.normal(0, 0.01, (32, 32, 3)), 0, 1))
    return fit_bounds(measure(np.stack(views)), rng.integers(60, 100, 200), view_side=64)


def test_what_is_wrong_with_a_photo_is_said(bounds: PhotoBounds) -> None:
    rng = np.random.default_rng(1)
    wave = np.repeat(0.5 + 0.2 * np.add.outer(np.sin(np.arange(32) / 3), np.cos(np.arange(32) / 3))[..., None], 3, 2)

    def complaints(view: np.ndarray, width: int = 80, height: int = 90) -> list[str]:
        return list(bounds.complaints(measure(view[None])[0], width=width, height=height))

    assert complaints(np.clip(wave, 0, 1)) == []
    low = round(100 * bounds.brightness[0])
    assert complaints(wave * 0.2)[0] == f"too dark (mean 10% of white; those of training have {low}% of white at least)"
    assert complaints(1 - wave * 0.2)[0].startswith("too bright (mean 9")
    blank = ["blank or far out of focus: it shows next to no structure"]
    assert complaints(np.full((32, 32, 3), 0.5)) == blank
    assert complaints(rng.random((32, 32, 3))) == [
        "noise rather than a picture: neighbouring pixels have nothing in common"
    ]
    assert complaints(np.clip(wave, 0, 1), width=400, height=20) == [
        f"too small (400 x 20 pixels; those of training have {bounds.side} at least)"
    ]
    assert bounds.side == 60
