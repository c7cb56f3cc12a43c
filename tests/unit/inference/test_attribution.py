from __future__ import annotations

import math
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch

from prima_ray.base import PrimaError
from prima_ray.inference.attribution import (
    Subject,
    cells_of,
    check_installed,
    delete_attributes,
    delete_cells,
    occlusion,
    on_cells,
    shapley,
)
from prima_ray.inference.predictor import Exam, Predictor
from tests.conftest import jpeg

GIVEN = {"region": "FACE", "itch": "true", "age": "61"}


@pytest.fixture(scope="module")
def subject(tiny_fuse: Path) -> Subject:
    """An exam of two photos."""
    predictor = Predictor.load(tiny_fuse)
    exam = Exam(tuple(jpeg(np.random.default_rng(seed), 50, 40) for seed in (3, 4)), GIVEN)
    batch = predictor.collate(predictor.exam_table(exam))
    encoded = predictor.encode(batch)
    return Subject(predictor, batch, encoded, GIVEN, target=int(predictor.logits(encoded)[0].argmax()))


def test_cells_cover_the_picture_row_by_row() -> None:
    cells = cells_of(7, 3)
    assert cells.shape == (7, 7)
    assert np.unique(cells).tolist() == list(range(9))
    assert cells[0].tolist() == [0, 0, 0, 1, 1, 2, 2]
    assert cells[-1, 0] == 6


def test_a_map_is_read_at_the_centres_of_the_cells() -> None:
    grid = np.array([[0.0, 1.0], [2.0, 3.0]])
    assert on_cells(grid, 2).tolist() == [0, 1, 2, 3]
    assert on_cells(grid, 1).tolist() == [1.5]
    assert on_cells(grid, 4).reshape(4, 4)[0].tolist() == [0, 0.25, 0.75, 1]
    assert on_cells(np.array([[5.0]]), 3).tolist() == [5.0] * 9


def test_occlusion_is_the_fall_that_a_grey_cell_makes(subject: Subject) -> None:
    found = occlusion(subject, 1, cells=3)
    assert subject.batch.images is not None
    mask = torch.from_numpy(cells_of(subject.batch.images.shape[-1], 3))
    whole = subject.odds(subject.predictor.logits(subject.encoded))[0]
    for cell in range(9):
        image = subject.batch.images[:1, 1].clone()
        image[:, :, mask == cell] = 0.0
        assert found[cell] == pytest.approx(whole - subject.odds(subject.with_photo(image, 1))[0], abs=1e-5)
    assert np.abs(found).max() > 1e-5


def test_shapley_values_are_those_of_the_definition(subject: Subject) -> None:
    worth: dict[tuple[int, ...], float] = {}
    for size in range(4):
        for kept in combinations(range(3), size):
            row = np.isin(np.arange(3), kept)[None]
            worth[kept] = subject.odds(subject.with_attributes(row))[0]
    wanted = []
    for one in range(3):
        total = 0.0
        for kept, before in worth.items():
            if one not in kept:
                share = math.factorial(len(kept)) * math.factorial(2 - len(kept)) / math.factorial(3)
                total += share * (worth[tuple(sorted((*kept, one)))] - before)
        wanted.append(total)
    assert shapley(subject, permutations=2, seed=0) == pytest.approx(np.array(wanted), abs=1e-6)
    # Asking about every subset would take more than one walk.
    walked = [shapley(subject, permutations=1, seed=seed) for seed in (0, 0, 1, 2, 3)]
    assert np.array_equal(walked[0], walked[1])
    assert any(not np.allclose(walked[0], other, atol=1e-9) for other in walked[2:])
    for found in walked:
        assert found.sum() == pytest.approx(worth[0, 1, 2] - worth[()], abs=1e-6)


def test_the_global_generator_is_left_as_it_was(subject: Subject) -> None:
    np.random.seed(5)
    wanted = np.random.random(4)
    np.random.seed(5)
    shapley(subject, permutations=1, seed=0)
    assert np.array_equal(np.random.random(4), wanted)


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prima_ray.inference.attribution.find_spec", lambda name: None if name == "shap" else name)
    with pytest.raises(PrimaError) as caught:
        check_installed()
    assert str(caught.value) == (
        "checks on explanations need shap, which is not installed\n  Install `prima-ray[explain]`."
    )


def test_one_attribute_alone_has_the_whole_difference(subject: Subject) -> None:
    alone = Subject(subject.predictor, subject.batch, subject.encoded, {"age": "61"}, subject.target)
    with_it, without = alone.odds(alone.with_attributes(np.array([[True], [False]])))
    assert shapley(alone, permutations=1, seed=0) == pytest.approx([with_it - without])


def test_deletion_begins_with_the_answer_and_ends_with_nothing(subject: Subject) -> None:
    orders = [np.arange(4), np.arange(4)[::-1]]
    curves = delete_cells(subject, 0, orders, cells=2)
    assert curves.shape == (2, 5)
    probabilities = subject.predictor.calibration.probabilities(subject.predictor.logits(subject.encoded))
    assert curves[:, 0] == pytest.approx(probabilities[0, subject.target], abs=1e-6)
    assert curves[0, -1] == pytest.approx(curves[1, -1], abs=1e-6)
    spoken = delete_attributes(subject, [np.array([2, 0, 1])])
    bare = subject.predictor.calibration.probabilities(subject.with_attributes(np.zeros((1, 3), dtype=bool)))
    assert spoken[0, 0] == pytest.approx(probabilities[0, subject.target], abs=1e-6)
    assert spoken[0, -1] == pytest.approx(bare[0, subject.target], abs=1e-6)
    without_age = subject.predictor.calibration.probabilities(subject.with_attributes(np.array([[True, True, False]])))
    assert spoken[0, 1] == pytest.approx(without_age[0, subject.target], abs=1e-6)
