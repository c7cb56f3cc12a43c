from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from prima_ray.base import PrimaError
from prima_ray.inference.appearance import NAMES
from prima_ray.inference.familiarity import (
    Familiarity,
    FamiliarityConfig,
    Gaussian,
    fit_familiarity,
    load_familiarity,
    save_arrays,
)

WIDTH = 6


def fitted(num_val: int = 300, *, num_train: int = 500, familiar: float = 0.9) -> Familiarity:
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(WIDTH, WIDTH))

    def photos(count: int) -> tuple[np.ndarray, np.ndarray]:
        return rng.normal(size=(count, WIDTH)) @ mix, rng.normal(size=(count, len(NAMES)))

    train, val = photos(num_train), photos(num_val)
    return fit_familiarity(
        (*train, np.full(num_train, 100)),
        (*val, np.arange(num_val)),
        FamiliarityConfig(familiar=familiar),
        view_side=64,
    )


def test_the_distance_is_mahalanobis() -> None:
    rng = np.random.default_rng(0)
    points = rng.normal(size=(5000, 3)) @ np.array([[2.0, 0, 0], [1, 1, 0], [0, 0, 30]]) + 7
    found = Gaussian.fit(points).distance(points[:50])
    away = points[:50] - points.mean(axis=0)
    exact = np.sqrt(np.einsum("ij,jk,ik->i", away, np.linalg.inv(np.cov(points.T)), away) / 3)
    # Shrinkage of thousands of points is slight.
    assert found == pytest.approx(exact, rel=0.02)


def test_a_dimension_that_never_varies_says_nothing() -> None:
    points = np.column_stack([np.random.default_rng(0).normal(size=(50, 2)), np.full(50, 3.0)])
    space = Gaussian.fit(points)
    there, elsewhere = points[:1], points[:1] + np.array([0, 0, 9])
    assert space.distance(there) == pytest.approx(space.distance(elsewhere))


@pytest.mark.parametrize("familiar", [0.8, 0.95])
def test_as_many_familiar_exams_pass_as_is_said(familiar: float) -> None:
    known, rng = fitted(familiar=familiar), np.random.default_rng(0)
    mix = rng.normal(size=(WIDTH, WIDTH))
    rng = np.random.default_rng(5)
    novelty = [known.novelty(rng.normal(size=(1, WIDTH)) @ mix, rng.normal(size=(1, len(NAMES)))) for _ in range(2000)]
    passed = np.mean([max(item.values()) <= 1 for item in novelty])
    # The two limits are independent here, so that they are passed together a little more often than promised.
    assert familiar - 0.03 <= passed <= familiar + 0.04


def test_an_exam_is_as_strange_as_its_strangest_photo() -> None:
    known = fitted()
    usual = np.zeros((1, WIDTH)), np.zeros((1, len(NAMES)))
    far = np.vstack([usual[0], np.full((1, WIDTH), 40.0)])
    assert max(known.novelty(*usual).values()) < 1
    found = known.novelty(far, np.zeros((2, len(NAMES))))
    assert found["features"] > 5
    assert found["appearance"] < 1
    found = known.novelty(usual[0], np.full((1, len(NAMES)), 9.0))
    assert found["appearance"] > 5
    assert found["features"] < 1


def test_few_exams_set_no_limit_and_say_so() -> None:
    known = fitted(num_val=20, familiar=0.98)
    assert known.record.limits == {"features": None, "appearance": None}
    assert known.record.notes == ("20 validation exams are too few to tell strange photos (familiar: 0.98)",)
    assert known.novelty(np.full((1, WIDTH), 99.0), np.zeros((1, len(NAMES)))) == {}
    assert known.record.bounds is not None
    nothing = fitted(num_train=12)
    assert nothing.record.bounds is None
    assert nothing.record.notes == ("12 training photos are too few to tell strange photos or unusable ones",)


def test_it_is_read_as_it_was_written(tmp_path: Path) -> None:
    known = fitted()
    save_arrays(tmp_path / "a.safetensors", known)
    found = load_familiarity(tmp_path / "a.safetensors", known.record)
    point = np.full((1, WIDTH), 2.0), np.full((1, len(NAMES)), 0.5)
    assert found.novelty(*point) == known.novelty(*point)
    save_arrays(tmp_path / "b.safetensors", fitted(num_train=12))
    with pytest.raises(PrimaError) as caught:
        load_familiarity(tmp_path / "b.safetensors", known.record)
    assert str(caught.value) == (
        f"{tmp_path / 'b.safetensors'}: these are not the arrays that familiarity.json speaks of\n"
        "  Copy the run again, or train it again."
    )
    (tmp_path / "a.safetensors").write_bytes(b"{")
    with pytest.raises(PrimaError, match="not a whole safetensors file"):
        load_familiarity(tmp_path / "a.safetensors", known.record)
