from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter

from prima_ray.data.schema import SHARD_SCHEMA
from prima_ray.evaluation.metrics import headline
from prima_ray.evaluation.robustness import Alteration, RobustnessConfig, alterations, altered, robustness_evidence
from tests.conftest import jpeg

NAMES = tuple(f"a{number}" for number in range(20))


def table(count: int = 60) -> pa.Table:
    rng = np.random.default_rng(0)
    rows = [
        {
            "exam_id": f"e{number}",
            "patient_id": f"p{number}",
            "images": [{"image_id": "i", "bytes": jpeg(rng, 50, 40), "width": 50, "height": 40}],
            "attributes": [(name, "v") for name in NAMES],
            "label": None,
        }
        for number in range(count)
    ]
    return pa.Table.from_pylist(rows, schema=SHARD_SCHEMA)


@pytest.fixture(scope="module")
def found() -> dict[str, Alteration]:
    recorded = [NAMES[:2], NAMES[5:], ()]
    return {item.name: item for item in alterations(RobustnessConfig(), reads_attributes=True, recorded=recorded)}


def attributes(rows: pa.Table, item: Alteration) -> dict[str, set[str]]:
    (changed,) = altered([rows], item)
    assert changed["images"].to_pylist() == rows["images"].to_pylist()
    return {row["exam_id"]: {name for name, _ in row["attributes"]} for row in changed.to_pylist()}


def test_attributes_are_left_out_by_rate_and_the_same_in_every_order(found: dict[str, Alteration]) -> None:
    rows = table()
    kept = {rate: attributes(rows, found[f"drop_{rate}"]) for rate in (0.25, 0.5, 0.75)}
    for rate, left in kept.items():
        assert np.mean([len(names) for names in left.values()]) == pytest.approx(20 * (1 - rate), abs=1)
    # More is left out of what was left.
    assert all(kept[0.75][exam] <= kept[0.5][exam] <= kept[0.25][exam] for exam in kept[0.5])
    shuffled = rows.take(np.random.default_rng(1).permutation(60))
    assert attributes(shuffled, found["drop_0.5"]) == kept[0.5]


def test_what_another_exam_lacks_is_left_out(found: dict[str, Alteration]) -> None:
    left = list(attributes(table(), found["pattern"]).values())
    assert {frozenset(names) for names in left} == {frozenset(NAMES[:2]), frozenset(NAMES[5:]), frozenset()}
    assert set(map(len, attributes(table(), found["no_attributes"]).values())) == {0}


def pictures(item: Alteration, count: int = 3) -> tuple[list[np.ndarray], list[np.ndarray], pa.Table]:
    rows = table(count)
    (changed,) = altered([rows], item)
    assert changed["attributes"].to_pylist() == rows["attributes"].to_pylist()

    def decode(given: pa.Table) -> list[np.ndarray]:
        return [
            np.asarray(Image.open(io.BytesIO(row[0]["bytes"]))).astype(float) for row in given["images"].to_pylist()
        ]

    return decode(rows), decode(changed), changed


def blurred(picture: np.ndarray) -> np.ndarray:
    """Of 40 pixels on the shorter side 3 % are 1.2."""
    return np.stack([gaussian_filter(picture[..., channel], 1.2, mode="nearest") for channel in range(3)], axis=-1)


CHECKS: dict[str, Callable[[np.ndarray, np.ndarray], bool]] = {
    "blur_0.03": lambda before, after: bool(np.abs(after - blurred(before)).mean() < 1 < np.abs(after - before).max()),
    "darken_0.25": lambda before, after: bool(np.abs(after - before / 4).max() <= 0.5),
    "no_photos": lambda before, after: bool((after == (10, 20, 30)).all()),
    "jpeg_5": lambda before, after: 1 < np.abs(after - before).mean() < 40,
}


@pytest.mark.parametrize("name", CHECKS)
def test_photos_are_altered_as_said(name: str) -> None:
    items = {
        item.name: item for item in alterations(RobustnessConfig(), reads_attributes=False, mean_color=(10, 20, 30))
    }
    before, after, _ = pictures(items[name])
    assert all(CHECKS[name](one, other) for one, other in zip(before, after, strict=True))


def test_a_crop_is_a_part_of_the_photo_at_a_place_of_its_own(found: dict[str, Alteration]) -> None:
    before, after, changed = pictures(found["crop_0.25"], 8)
    places = set()
    for one, other, row in zip(before, after, changed["images"].to_pylist(), strict=True):
        assert other.shape == (20, 25, 3)
        assert (row[0]["width"], row[0]["height"]) == (25, 20)
        places |= {
            (top, left)
            for top in range(21)
            for left in range(26)
            if (one[top : top + 20, left : left + 25] == other).all()
        }
    assert len(places) > 4


def test_a_model_of_photos_alone_is_asked_about_photos_alone() -> None:
    names = [item.name for item in alterations(RobustnessConfig(), reads_attributes=False, recorded=[NAMES])]
    assert names[0] == "blur_0.01"
    assert "pattern" not in names
    config = RobustnessConfig(blur=(), darken=(), crop=(), jpeg=(), without_photos=False)
    assert alterations(config, reads_attributes=False) == []


def test_what_it_costs_is_paired() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 90)
    good = rng.dirichlet(np.ones(3), 90) + np.eye(3)[labels]
    good /= good.sum(1, keepdims=True)
    conditions = {"as_they_are": good, "same": good.copy(), "bad": np.roll(good, 1, axis=0)}
    patients = [str(number) for number in range(90)]
    answered = {name: found.max(1) >= 0.6 for name, found in conditions.items()}
    record: dict[str, Any] = robustness_evidence(
        labels, conditions, patients, titles={"bad": "worse photos"}, answered=answered, num_resamples=80
    )
    first, same, bad = record["conditions"]
    assert (first["differences"], first["verdicts"]) == (None, None)
    assert same["differences"]["accuracy"] == {"value": 0, "low": 0, "high": 0}
    assert (bad["title"], bad["verdicts"]["accuracy"], same["verdicts"]["accuracy"]) == (
        "worse photos",
        "worse",
        "not distinguishable",
    )
    assert bad["figures"]["macro_f1"]["value"] == pytest.approx(headline(labels, conditions["bad"])["macro_f1"])
    assert first["confidence"] == bad["confidence"] == pytest.approx(good.max(1).mean())
    sure = good.max(1) >= 0.6
    assert first["answered"] == pytest.approx(sure.mean())
    assert first["accuracy_answered"] == pytest.approx((good.argmax(1) == labels)[sure].mean())
