from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from prima_ray.data.views import (
    AugmentConfig,
    ViewConfig,
    apply_augmentation,
    augmented_side,
    choose_photos,
    draw_augmentation,
    evaluation_view,
    normalise,
    view_generator,
)

OFF = {"crop_area": (1.0, 1.0), "crop_ratio": (1.0, 1.0), "horizontal_flip": 0.0, "vertical_flip": 0.0,
       "quarter_turns": False, "rotation": 0.0, "color": 0.0, "blur": 0.0, "erase": 0.0}  # fmt: skip
FILL = (1, 2, 3)


def picture(width: int = 80, height: int = 60, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def view(image: Image.Image, *key: object, size: int = 32, **config: object) -> np.ndarray:
    draw = draw_augmentation(view_generator(*key), AugmentConfig.model_validate(config))
    return apply_augmentation(image, draw, size=size, fill=FILL)


def test_a_view_depends_on_its_key_alone() -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    first = view(picture(), 7, 0, "exam", 0)
    torch.manual_seed(1)
    np.random.seed(1)
    assert np.array_equal(first, view(picture(), 7, 0, "exam", 0))
    for other in [(8, 0, "exam", 0), (7, 1, "exam", 0), (7, 0, "exan", 0), (7, 0, "exam", 1)]:
        assert not np.array_equal(first, view(picture(), *other))
    assert first.shape == (32, 32, 3)
    assert first.dtype == np.uint8


def test_with_everything_off_a_square_photo_is_only_resized() -> None:
    image = picture(64, 64)
    expected = np.asarray(image.resize((32, 32), Image.Resampling.BICUBIC, reducing_gap=3.0))
    assert np.array_equal(view(image, "any", **OFF), expected)
    assert np.array_equal(evaluation_view(image, size=32, resize="crop"), expected)


def test_switching_one_distortion_off_leaves_the_others_as_they_were() -> None:
    with_color = draw_augmentation(view_generator(1), AugmentConfig(color=1.0))
    without = draw_augmentation(view_generator(1), AugmentConfig(color=0.0))
    assert (with_color.area, with_color.left, with_color.degrees, with_color.flip_horizontal) == (
        without.area, without.left, without.degrees, without.flip_horizontal)  # fmt: skip
    assert without.brightness == without.contrast == without.saturation == 1.0


def test_flips_and_turns_move_pixels_without_changing_them() -> None:
    image = picture(32, 32)
    plain = view(image, 0, **OFF)
    assert np.array_equal(view(image, 0, **{**OFF, "horizontal_flip": 1.0}), plain[:, ::-1])
    assert np.array_equal(view(image, 0, **{**OFF, "vertical_flip": 1.0}), plain[::-1])
    turned = {view(image, key, **{**OFF, "quarter_turns": True}).tobytes() for key in range(40)}
    assert turned == {np.rot90(plain, k).tobytes() for k in range(4)}


def test_brightness_contrast_and_saturation_are_what_they_say() -> None:
    image = picture(32, 32)
    plain = view(image, 0, **OFF).astype(float)
    off = {**OFF, "color": 1.0, "brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue_degrees": 0.0}
    factor = draw_augmentation(view_generator(5), AugmentConfig(color=1.0, brightness=0.4)).brightness
    bright = view(image, 5, **{**off, "brightness": 0.4})
    assert np.abs(bright - np.clip(plain * factor, 0, 255)).max() <= 1
    gray = plain @ [0.299, 0.587, 0.114]
    factor = draw_augmentation(view_generator(5), AugmentConfig(color=1.0, saturation=0.9)).saturation
    expected = factor * plain + (1 - factor) * gray[..., None]
    assert np.abs(view(image, 5, **{**off, "saturation": 0.9}) - np.clip(expected, 0, 255)).max() <= 1
    factor = draw_augmentation(view_generator(5), AugmentConfig(color=1.0, contrast=0.5)).contrast
    expected = factor * plain + (1 - factor) * gray.mean()
    assert np.abs(view(image, 5, **{**off, "contrast": 0.5}) - np.clip(expected, 0, 255)).max() <= 1.5


def test_hue_keeps_the_luma() -> None:
    image = Image.new("RGB", (16, 16), (150, 100, 80))
    config = {**OFF, "color": 1.0, "brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue_degrees": 60.0}
    turned = view(image, 3, size=16, **config)[0, 0]
    assert tuple(turned) != (150, 100, 80)
    assert turned @ [0.299, 0.587, 0.114] == pytest.approx(np.dot([150, 100, 80], [0.299, 0.587, 0.114]), abs=1.5)


def test_rotation_leaves_no_black_wedges() -> None:
    image = Image.new("RGB", (64, 64), (200, 150, 100))
    rotated = view(image, 1, **{**OFF, "rotation": 1.0, "rotation_degrees": 45.0})
    assert np.abs(rotated.astype(int) - [200, 150, 100]).max() <= 1


def test_an_erased_patch_has_the_mean_colour() -> None:
    erased = view(picture(), 1, **{**OFF, "erase": 1.0, "erase_area": (0.1, 0.1)})
    share = (erased == FILL).all(axis=-1).mean()
    assert 0.07 < share < 0.13


def test_a_reduced_decode_gives_nearly_the_same_view() -> None:
    large = picture(1600, 1200)
    buffer = io.BytesIO()
    large.save(buffer, "JPEG", quality=95)
    draw = draw_augmentation(view_generator(4), AugmentConfig(color=0.0, blur=0.0, rotation=0.0))
    side = augmented_side(draw, 1600 / 1200, 64)
    assert 64 <= side <= 64 / min(draw.crop_shares(1600 / 1200)) + 1
    whole, reduced = Image.open(buffer), Image.open(buffer)
    reduced.draft("RGB", (side, side))
    assert reduced.width < 1600
    views = [apply_augmentation(image, draw, size=64, aspect=4 / 3, fill=FILL) for image in (whole, reduced)]
    assert np.abs(views[0].astype(int) - views[1]).mean() < 2


def test_two_views_show_two_photos_when_there_are_two() -> None:
    assert choose_photos(1, 2, view_generator(0)) == [0, 0]
    pairs = [choose_photos(3, 2, view_generator(key)) for key in range(60)]
    assert all(first != second for first, second in pairs)
    assert {first for first, _ in pairs} == {0, 1, 2}
    assert sorted(choose_photos(2, 4, view_generator(0))) == [0, 0, 1, 1]


def test_the_crop_is_central_and_squash_keeps_everything() -> None:
    pixels = np.zeros((40, 80, 3), dtype=np.uint8)
    pixels[:, 20:60] = 255
    image = Image.fromarray(pixels)
    assert (evaluation_view(image, size=16, resize="crop")[:, 1:-1] == 255).all()
    assert (evaluation_view(image, size=16, resize="squash")[:, :3] == 0).all()


def test_normalised_pixels_have_channels_first_and_the_towers_statistics() -> None:
    config = ViewConfig(image_size=8, mean=(0.5, 0.25, 0.0), std=(0.5, 0.25, 1.0))
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 8, 8, 3), dtype=np.uint8)
    images = normalise(pixels, config)
    assert images.shape == (2, 3, 3, 8, 8)
    assert images.is_contiguous()
    expected = (pixels / 255.0 - [0.5, 0.25, 0.0]) / [0.5, 0.25, 1.0]
    np.testing.assert_allclose(images.numpy(), np.moveaxis(expected, -1, -3), atol=1e-6)


def test_a_range_must_rise_from_above_zero() -> None:
    with pytest.raises(ValidationError, match=r"crop_area: 0\.8, 0\.5 is not a range of positive numbers"):
        AugmentConfig(crop_area=(0.8, 0.5))
    with pytest.raises(ValidationError, match="are shares of an area, at most 1"):
        AugmentConfig(crop_area=(0.5, 2.0))
