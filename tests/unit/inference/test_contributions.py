from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from prima_ray.inference.contributions import leave_one_out, log_odds
from prima_ray.inference.predictor import Exam, Predictor
from tests.conftest import jpeg


def test_log_odds_by_hand() -> None:
    probabilities = np.array([[0.7, 0.2, 0.1]])
    assert log_odds(np.log(probabilities)) == pytest.approx(np.log(probabilities / (1 - probabilities)))
    # Where p rounds to 1, too.
    assert log_odds(np.array([[100.0, 0.0]]))[0, 0] == pytest.approx(100.0)


def test_each_change_is_what_asking_without_the_attribute_gives(tiny_fuse: Path) -> None:
    predictor = Predictor.load(tiny_fuse)
    photos = [(jpeg(np.random.default_rng(seed), 50, 40),) * (1 + seed) for seed in range(2)]
    given = [{"region": "FACE", "itch": "true", "age": "61"}, {"age": "30"}]
    exams = [Exam(images, values) for images, values in zip(photos, given, strict=True)]
    table = [predictor.exam_table(exam) for exam in exams]
    encoded = predictor.encode(predictor.collate(pa.concat_tables(table)))
    logits = predictor.logits(encoded)
    found = leave_one_out(predictor, encoded, given, logits)
    whole = predictor.calibration.probabilities(logits)
    for place, (exam, values) in enumerate(zip(exams, given, strict=True)):
        top = int(whole[place].argmax())
        bare = predictor.predict([Exam(exam.images, {})])[0]
        assert list(found[place].without_attributes.values()) == pytest.approx(bare.tolist(), abs=1e-6)
        by_name = {item.attribute: item for item in found[place].items}
        assert by_name.keys() == values.keys()
        for name, item in by_name.items():
            without = predictor.predict([exam], masked=[name])[0]
            assert item.probability == pytest.approx(whole[place, top] - without[top], abs=1e-6)
            odds = np.log(whole[place, top] / (1 - whole[place, top])) - np.log(without[top] / (1 - without[top]))
            assert item.log_odds == pytest.approx(odds, abs=1e-5)
        sizes = [abs(item.log_odds) for item in found[place].items]
        assert sizes == sorted(sizes, reverse=True)
        assert sizes[0] > 0
