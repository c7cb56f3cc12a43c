"""Rendered skin lesions: the pictures of the phantoms. Pure functions of numpy and Pillow; no two look the same.

A picture depends on a `Look` and on two random generators: the lesion's, so that two photos of one exam show one
lesion, and the photo's, which moves the camera, the light and the hair. Nothing else enters, which is what the exact
bounds in `prima_ray.data.phantoms` rest on. To add a visible trait, give `Look` a field and draw it in one function
that `render` calls; a trait that tells the class must then be counted in `phantoms.bayes_accuracy`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Plane = NDArray[np.float32]
"""(H, W) or (H, W, 3); colours in 0-1."""

SKIN_TONES = np.array(
    [(241, 208, 190), (230, 187, 163), (211, 162, 131), (180, 128, 95), (141, 95, 69), (104, 70, 53)], np.float32
)
"""RGB of the six skin types, lightest first."""
_PIGMENT = np.array([0.62, 1.0, 1.18], np.float32)  # melanin takes more of the blue than of the red
_VEIL = np.array([104, 122, 152], np.float32) / 255
_NUM_WAVES = 10


@dataclass(frozen=True, slots=True)
class Look:
    """What a photo shows. Only `veiled` has to do with the class."""

    veiled: bool
    """A blue-grey veil over one side of the lesion and a ragged outline, against an even brown lesion."""
    skin_type: int
    """1 (lightest) to 6."""
    diameter_mm: float
    """3 to 18; the camera's distance is the same for all."""
    num_hairs: int


def render(look: Look, *, side: int, lesion: np.random.Generator, photo: np.random.Generator) -> Image.Image:
    """Draw one photo.

    Args:
        look: what to show.
        side: width and height in pixels; the same generators give the same scene at any side.
        lesion: state that is fresh for the exam, the same for each of its photos.
        photo: state that is fresh for the photo.

    Returns:
        an RGB picture of ``side`` by ``side`` pixels.
    """
    axis: Plane = ((np.arange(side) + 0.5) / side * 2 - 1).astype(np.float32)
    y: Plane = np.repeat(axis[:, None], side, axis=1)
    x: Plane = y.T
    scene = _skin(look, side, photo)
    scene = _lesion(scene, look, *_camera(x, y, photo), lesion)
    scene = _hairs(scene, look, photo)
    scene *= _light(x, y, photo)[..., None]
    scene += photo.normal(0, 0.008, scene.shape).astype(np.float32)
    return Image.fromarray((np.clip(scene, 0, 1) * 255 + 0.5).astype(np.uint8))


def _camera(x: Plane, y: Plane, photo: np.random.Generator) -> tuple[Plane, Plane]:
    """Picture coordinates -> lesion coordinates: the photographer's turn, shift and small change of distance."""
    turn, zoom = photo.uniform(0, 2 * np.pi), photo.uniform(0.94, 1.06)
    right, down = photo.uniform(-0.13, 0.13, 2)
    cos, sin = np.cos(turn) / zoom, np.sin(turn) / zoom
    return (
        ((x - right) * cos - (y - down) * sin).astype(np.float32),
        ((x - right) * sin + (y - down) * cos).astype(np.float32),
    )


def _clouds(rng: np.random.Generator, cells: int, side: int) -> Plane:
    """Smooth noise, about unit variance, with ``cells`` bumps across the picture."""
    grid = rng.standard_normal((cells, cells)).astype(np.float32)
    return np.asarray(Image.fromarray(grid).resize((side, side), Image.Resampling.BICUBIC))


def _waves(rng: np.random.Generator, u: Plane, v: Plane, frequency: float) -> Plane:
    """Smooth noise of about unit variance that is fixed to the lesion's coordinates, so that it turns with it."""
    angle, phase = rng.uniform(0, 2 * np.pi, (2, _NUM_WAVES)).astype(np.float32)
    speed = (frequency * rng.uniform(0.5, 1.5, _NUM_WAVES)).astype(np.float32)
    field = sum(np.cos(speed[i] * (np.cos(angle[i]) * u + np.sin(angle[i]) * v) + phase[i]) for i in range(_NUM_WAVES))
    return np.asarray(field * np.float32((2 / _NUM_WAVES) ** 0.5), np.float32)


def _soft_step(value: Plane, softness: float) -> Plane:
    """0 far below zero, 1 far above, over about ``softness``."""
    return np.asarray(0.5 * (1 + np.tanh(value / softness)), np.float32)


def _skin(look: Look, side: int, photo: np.random.Generator) -> Plane:
    tone = SKIN_TONES[look.skin_type - 1] / 255 + photo.normal(0, 0.015, 3).astype(np.float32)
    grain = 0.020 * _clouds(photo, 7, side) + 0.022 * _clouds(photo, 26, side) + 0.016 * _clouds(photo, 60, side)
    # Fine creases: dark lines where a smooth field crosses zero.
    creases = np.exp(-((_clouds(photo, 16, side) / 0.10) ** 2)) + np.exp(-((_clouds(photo, 22, side) / 0.10) ** 2))
    flush = 0.020 * _clouds(photo, 4, side)
    skin = tone * (1 + grain - 0.028 * creases)[..., None]
    return np.asarray(skin * (1 + flush[..., None] * np.array([1, -0.7, -0.7], np.float32)), np.float32)


def _lesion(scene: Plane, look: Look, u: Plane, v: Plane, lesion: np.random.Generator) -> Plane:
    """Pigment over the skin; ``u``, ``v`` are the lesion's own coordinates."""
    radius = 0.29 + 0.022 * (look.diameter_mm - 3)
    stretch = lesion.uniform(1.0, 1.3)
    u, v = u * np.float32(stretch**0.5), v / np.float32(stretch**0.5)
    r, theta = np.hypot(u, v), np.arctan2(v, u)

    ragged = lesion.uniform(0.07, 0.12) if look.veiled else lesion.uniform(0.01, 0.035)
    outline = np.full_like(r, radius)
    for order in range(2, 8):
        outline += radius * ragged * lesion.normal() * np.cos(order * theta + lesion.uniform(0, 2 * np.pi)) / order**0.4
    inside = _soft_step(outline - r, lesion.uniform(0.025, 0.06))

    density = lesion.uniform(0.75, 1.15) * (1 + 0.13 * _waves(lesion, u, v, 7))
    density *= 1 + 0.3 * lesion.uniform(-1, 1) * np.clip(1 - r / radius, 0, 1)  # a darker or a lighter middle
    density *= 1 + _structure(u, v, lesion)
    skin = scene * np.exp(-(inside * density)[..., None] * _PIGMENT)
    return _veil(skin, inside, (u, v, radius), lesion) if look.veiled else np.asarray(skin, np.float32)


def _structure(u: Plane, v: Plane, lesion: np.random.Generator) -> Plane:
    """A pigment network or globules, by the toss of a coin: a beautiful detail that tells nothing."""
    network = lesion.random() < 0.5
    field = _waves(lesion, u, v, 26)
    if network:
        return np.asarray(0.30 * np.exp(-((field / 0.35) ** 2)) - 0.10, np.float32)
    return np.asarray(0.38 * _soft_step(field - 1.1, 0.25) - 0.06, np.float32)


def _veil(scene: Plane, inside: Plane, place: tuple[Plane, Plane, float], lesion: np.random.Generator) -> Plane:
    """The visible sign: a blue-grey haze over one side, with small dark blots about its edge."""
    u, v, radius = place
    towards, reach = lesion.uniform(0, 2 * np.pi), radius * lesion.uniform(0.60, 0.80)
    far = radius * lesion.uniform(0.35, 0.5)
    distance = np.hypot(u - far * np.cos(towards), v - far * np.sin(towards))
    haze = inside * _soft_step(reach + 0.04 * _waves(lesion, u, v, 9) - distance, 0.06)
    haze *= np.clip(0.75 + 0.2 * _waves(lesion, u, v, 10), 0, 1)  # torn here and there
    colour = _VEIL * (0.95 + 0.12 * _waves(lesion, u, v, 12)[..., None])
    brightness = 0.55 + 0.45 * float(scene[0, 0].mean())  # a veil on dark skin is darker, too
    veiled = scene + (0.9 * haze)[..., None] * (colour * brightness - scene)
    for _ in range(9):
        around = towards + lesion.uniform(-2.2, 2.2)
        away = lesion.uniform(0.1, 0.95) * radius
        blot = np.hypot(u - away * np.cos(around), v - away * np.sin(around)) + 0.02 * _waves(lesion, u, v, 20)
        veiled *= 1 - (0.5 * inside * _soft_step(lesion.uniform(0.005, 0.055) - blot, 0.03))[..., None]
    return np.asarray(veiled, np.float32)


def _hairs(scene: Plane, look: Look, photo: np.random.Generator) -> Plane:
    """Curved dark strokes, combed roughly one way."""
    if not look.num_hairs:
        return scene
    side, fine = len(scene), 3
    mask = Image.new("L", (side * fine, side * fine))
    pen = ImageDraw.Draw(mask)
    combed = photo.uniform(0, 2 * np.pi)
    t = np.linspace(0, 1, 12)[:, None]
    for _ in range(look.num_hairs):
        root, angle = photo.uniform(-0.1, 1.1, 2), combed + photo.normal(0, 0.35)
        along = np.array([np.cos(angle), np.sin(angle)]) * photo.uniform(0.25, 0.7)
        bend = np.array([-along[1], along[0]]) * photo.normal(0, 0.22)
        curve = root + t * along + 4 * t * (1 - t) * bend
        width = max(1, round(side * fine / 96 * photo.uniform(0.25, 0.55)))
        pen.line([(px * side * fine, py * side * fine) for px, py in curve], int(photo.uniform(120, 215)), width)
    cover = np.asarray(mask.resize((side, side), Image.Resampling.BOX), np.float32)[..., None] / 255
    shade = np.array([0.17, 0.12, 0.09], np.float32) * np.float32(photo.uniform(0.7, 1.8))
    return np.asarray(scene + cover * (shade - scene), np.float32)


def _light(x: Plane, y: Plane, photo: np.random.Generator) -> Plane:
    """One lamp to the side, and the lens's darker corners."""
    angle, slope = photo.uniform(0, 2 * np.pi), photo.uniform(0.02, 0.12)
    lamp = slope * (np.cos(angle) * x + np.sin(angle) * y)
    return np.asarray(photo.uniform(0.92, 1.06) * (1 + lamp) * (1 - 0.06 * (x * x + y * y)), np.float32)
