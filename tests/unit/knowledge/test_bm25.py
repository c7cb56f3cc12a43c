from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from prima_ray.base import PrimaError
from prima_ray.knowledge.bm25 import Bm25, Bm25Config, Terms

TEXTS = [
    "moles and moles of the sun",
    "sun sun sun, age",
    "the",
    "arsenic in water; arsenic in wells near the sun and the moles",
]
PLAIN = Bm25Config(stem=False)


def reference(query: str, texts: list[str], config: Bm25Config) -> list[float]:
    """Robertson's formula with Lucene's idf, in float64."""
    counted = [Counter(Terms(config)(text)) for text in texts]
    mean = sum(sum(words.values()) for words in counted) / len(texts)
    scores = []
    for words in counted:
        score = 0.0
        for word in Terms(config)(query):
            having = sum(word in other for other in counted)
            idf = math.log(1 + (len(texts) - having + 0.5) / (having + 0.5))
            length = config.k1 * (1 - config.b + config.b * sum(words.values()) / mean)
            score += idf * words[word] / (words[word] + length)
        scores.append(score)
    return scores


@pytest.mark.parametrize("config", [PLAIN, Bm25Config(k1=0.7, b=0.2), Bm25Config(stop_words=False, b=1.0)])
@pytest.mark.parametrize("query", ["sun moles", "mole", "arsenic of the sun sun", "nothing known", "the", ""])
def test_scores_are_those_of_the_formula(query: str, config: Bm25Config):
    found = Bm25.build(TEXTS, config).scores(query)
    np.testing.assert_allclose(found, reference(query, TEXTS, config), atol=1e-6)


def test_words_count_by_their_stem_without_stop_words():
    assert Terms(Bm25Config())("The Moles are changing: 5-FU, Größe") == ["mole", "chang", "fu", "grösse"]
    assert Terms(PLAIN)("The Moles") == ["moles"]
    assert Terms(Bm25Config(stop_words=False, stem=False))("The Moles") == ["the", "moles"]


def test_what_is_saved_scores_alike(tmp_path: Path):
    built = Bm25.build(TEXTS, Bm25Config(k1=0.9))
    built.save(tmp_path / "bm25")
    loaded = Bm25.load(tmp_path / "bm25")
    assert loaded.config == Bm25Config(k1=0.9)
    assert loaded.scores("moles in the sun").tolist() == built.scores("moles in the sun").tolist()


def test_texts_without_words_are_found_by_nothing(tmp_path: Path):
    for texts in (["the"], ["", "of"]):
        Bm25.build(texts, Bm25Config()).save(tmp_path / "bm25")
        assert Bm25.load(tmp_path / "bm25").scores("the sun").tolist() == [0.0] * len(texts)


def test_a_file_that_is_gone_is_said(tmp_path: Path):
    Bm25.build(TEXTS, Bm25Config()).save(tmp_path / "bm25")
    (tmp_path / "bm25" / "data.csc.index.npy").unlink()
    with pytest.raises(PrimaError, match="damaged"):
        Bm25.load(tmp_path / "bm25")
    (tmp_path / "bm25" / "terms.json").unlink()
    with pytest.raises(PrimaError, match=r"terms\.json: no such file"):
        Bm25.load(tmp_path / "bm25")
