"""Attributions that know nothing of attention, and what becomes of an answer when what they name is taken away.

Occlusion (Zeiler & Fergus 2014, by captum) and Shapley values (Strumbelj & Kononenko 2014, by shap) are what attention
maps and leave-one-out contributions are held to; deletion (RISE, Petsiuk et al. 2018) is what all of them are held to.
Everything is of one exam and of the class that was predicted for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prima_ray.base import PrimaError
from prima_ray.data.batch import ImageTextBatch
from prima_ray.inference.contributions import ask, log_odds
from prima_ray.inference.predictor import Predictor

Values = NDArray[np.float64]
_BATCH = 32
_MEND = "Install `prima-ray[explain]`."


def check_installed() -> None:
    """What occlusion and Shapley values are computed by.

    Raises:
        PrimaError: one of captum and shap is not installed.
    """
    for name in ("captum", "shap"):
        if find_spec(name) is None:
            raise PrimaError(f"checks on explanations need {name}, which is not installed", mend=_MEND)


@dataclass(frozen=True)
class Subject:
    """One exam, encoded by itself, and the class in question."""

    predictor: Predictor
    batch: ImageTextBatch
    """Collated, with its photos."""
    encoded: ImageTextBatch
    attributes: Mapping[str, str]
    """Canonical values that the model reads."""
    target: int

    def odds(self, logits: Values) -> Values:
        """(N, C) logits -> calibrated log-odds (N,) of the class, whatever was left out, on the scale of the whole
        exam."""
        found: Values = log_odds(self.predictor.calibration.scaled(logits, self._scale(logits)))[:, self.target]
        return found

    def probability(self, logits: Values) -> Values:
        """(N, C) logits -> the same of its probability, (N,)."""
        found: Values = self.predictor.calibration.probabilities(logits, self._scale(logits))[:, self.target]
        return found

    def _scale(self, logits: Values) -> Values:
        return self.predictor.calibration.completeness([self.attributes]).repeat(len(logits))

    @property
    def photos(self) -> Tensor:
        """(1, V, 3, S, S), normalised."""
        if self.batch.images is None:
            raise ValueError("the batch has no photos")
        return self.batch.images

    def with_photo(self, photos: Tensor, view: int) -> Values:
        """(N, C) logits where one view is another picture, one forward pass.

        Args:
            photos: (N, 3, S, S), normalised.
        """
        images = self.photos.repeat(len(photos), 1, 1, 1, 1)
        images[:, view] = photos
        texts = repeat(self.encoded, len(photos))
        encoded = replace(
            self.predictor.encode_images(replace(repeat(self.batch, len(photos)), images=images)),
            text_cls=texts.text_cls,
            text_seq=texts.text_seq,
            attention_mask=texts.attention_mask,
        )
        return self.predictor.logits(encoded)

    def with_attributes(self, kept: NDArray[np.bool_]) -> Values:
        """(N, C) logits where only some attributes are known.

        Args:
            kept: (N, A), in the order of `attributes`.
        """
        names = list(self.attributes)
        variants = [
            (0, {name: self.attributes[name] for name, known in zip(names, row, strict=True) if known}) for row in kept
        ]
        return np.concatenate(
            [ask(self.predictor, self.encoded, variants[at : at + _BATCH]) for at in range(0, len(variants), _BATCH)]
        )


def repeat(batch: ImageTextBatch, count: int) -> ImageTextBatch:
    """An exam's batch, so many times."""
    changes: dict[str, Any] = {"exam_ids": batch.exam_ids * count}
    for name in batch.__slots__:
        value = getattr(batch, name)
        if isinstance(value, Tensor):
            changes[name] = value.repeat(count, *[1] * (value.ndim - 1))
    return replace(batch, **changes)


def cells_of(size: int, count: int) -> NDArray[np.int64]:
    """(S, S) the number of the cell that each pixel is in, count x count of them, row by row."""
    places = np.minimum(np.arange(size) * count // size, count - 1)
    found: NDArray[np.int64] = places[:, None] * count + places[None, :]
    return found


def on_cells(grid: Values, count: int) -> Values:
    """A map of (rows, columns) -> the value at each cell's centre (count * count,), between centres linear."""
    rows, columns = grid.shape
    centres = (np.arange(count) + 0.5) / count

    def weights(sides: int) -> Values:
        places = np.clip(centres * sides - 0.5, 0, sides - 1)
        low = np.minimum(places.astype(np.int64), max(sides - 2, 0))
        share = places - low
        found = np.zeros((count, sides))
        found[np.arange(count), low] = 1 - share
        found[np.arange(count), np.minimum(low + 1, sides - 1)] += share
        return found

    spread: Values = (weights(rows) @ grid @ weights(columns).T).ravel()
    return spread


def occlusion(subject: Subject, view: int, *, cells: int) -> Values:
    """(cells * cells,) the fall of the class's log-odds when a cell of a view is grey: the mean colour, by captum."""
    from captum.attr import FeatureAblation

    image = subject.photos[:, view]
    mask = torch.from_numpy(cells_of(image.shape[-1], cells))[None, None]

    def score(images: Tensor) -> Tensor:
        return torch.from_numpy(subject.odds(subject.with_photo(images, view)))

    with torch.no_grad():
        found = FeatureAblation(score).attribute(image, baselines=0.0, feature_mask=mask, perturbations_per_eval=_BATCH)
    pixels = found[0, 0].double().cpu().numpy()
    flat = mask[0, 0].numpy().ravel()
    return np.array([pixels.ravel()[flat == cell][0] for cell in range(cells * cells)])


def shapley(subject: Subject, *, permutations: int, seed: int) -> Values:
    """(A,) Shapley values of the given attributes in log-odds of the class, against none of them known, by shap.

    They sum to the log-odds with all of them less those with none. Of few attributes they are exact.

    Args:
        permutations: walks from nothing to everything and back that are averaged, where asking about every subset would
            take more.
    """
    import shap

    count = len(subject.attributes)
    if count == 1:
        whole = subject.odds(subject.with_attributes(np.array([[True], [False]])))
        return np.array([whole[0] - whole[1]])

    def score(known: NDArray[Any]) -> Values:
        return subject.odds(subject.with_attributes(known > 0.5))

    asked = permutations * (2 * count + 1)
    nothing, everything = np.zeros((1, count)), np.ones((1, count))
    if 2**count <= asked:
        exact: Values = np.asarray(shap.ExactExplainer(score, nothing)(everything, silent=True).values)[0]
        return exact
    # The explainer seeds numpy's global generator, which is not ours to seed.
    state = np.random.get_state()
    try:
        explainer = shap.PermutationExplainer(score, nothing, seed=seed)
        found = explainer(everything, max_evals=asked, silent=True)
    finally:
        np.random.set_state(state)
    values: Values = np.asarray(found.values, dtype=np.float64)[0]
    return values


def delete_cells(subject: Subject, view: int, orders: Sequence[NDArray[np.int64]], *, cells: int) -> Values:
    """(O, K + 1) the class's probability while cells of a view turn grey one after the other, in each of O orders."""
    image = subject.photos[:, view]
    mask = torch.from_numpy(cells_of(image.shape[-1], cells))

    def score(gone: NDArray[np.bool_]) -> Values:
        parts = []
        for at in range(0, len(gone), _BATCH):
            grey = torch.from_numpy(gone[at : at + _BATCH])[:, mask]
            parts.append(subject.with_photo(torch.where(grey[:, None], 0.0, image), view))
        return np.concatenate(parts)

    return _delete(subject, orders, score)


def delete_attributes(subject: Subject, orders: Sequence[NDArray[np.int64]]) -> Values:
    """(O, A + 1) the same while attributes become unknown."""
    return _delete(subject, orders, lambda gone: subject.with_attributes(~gone))


def _delete(
    subject: Subject, orders: Sequence[NDArray[np.int64]], score: Callable[[NDArray[np.bool_]], Values]
) -> Values:
    count = len(orders[0])
    gone = np.zeros((len(orders), count + 1, count), dtype=bool)
    for number, order in enumerate(orders):
        for step, place in enumerate(order, start=1):
            gone[number, step:, place] = True
    # All orders begin and end alike.
    asked, place = np.unique(gone.reshape(-1, count), axis=0, return_inverse=True)
    found = subject.probability(score(asked))
    return found[place.reshape(-1)].reshape(len(orders), count + 1)
