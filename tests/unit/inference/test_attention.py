from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image

from prima_ray.data.description import DataSetConfig
from prima_ray.data.metadata import MetadataTextConfig, describe
from prima_ray.inference.attention import AttentionMap, attention_maps, clause_tokens, overlay, token_attention
from prima_ray.models.tokenizer import OFFLINE_TEXT_MODEL, TextTokenizer
from tests.conftest import TOY

DATA_SET = DataSetConfig.model_validate(TOY)


def test_attention_by_hand() -> None:
    """One token (2, 0), D = 4: scores 2 * log 2 / 2 = log 2 and 0, so two thirds and one third."""
    text = torch.tensor([[2.0, 0.0, 0.0, 0.0]])
    image = torch.tensor([[[math.log(2), 5.0, 0.0, 0.0], [0.0, -7.0, 1.0, 0.0]]])
    assert token_attention(text, image)[0, 0].tolist() == pytest.approx([2 / 3, 1 / 3])


@pytest.mark.parametrize("missing", ["omit", "state"])
def test_tokens_are_those_of_the_attributes_own_words(missing: str) -> None:
    config = MetadataTextConfig.model_validate({"missing": missing})
    known = {"region": "FACE", "age": "61"}
    text = describe(known, DATA_SET, config)
    tokenizer = TextTokenizer(OFFLINE_TEXT_MODEL, max_tokens=64)
    found = clause_tokens(known, DATA_SET, config, text, tokenizer)
    ids = tokenizer([text])[0][0].tolist()
    words = {name: tokenizer.loaded.decode([ids[place] for place in places]) for name, places in found.items()}
    assert words == {"region": "on the face", "age": "age 61 years"}
    # What was cut off is spoken of by nothing that the model read; the last place is the closing special token's.
    short = TextTokenizer(OFFLINE_TEXT_MODEL, max_tokens=10)
    cut = clause_tokens(known, DATA_SET, config, text, short)
    assert list(cut) == ["region"]
    assert max(cut["region"]) < 9


def test_a_map_is_the_mean_over_an_attributes_tokens() -> None:
    attention = torch.tensor([[[0.7, 0.1, 0.1, 0.1], [0.1, 0.7, 0.1, 0.1], [0.25, 0.25, 0.25, 0.25]]])
    views = np.zeros((1, 8, 8, 3))
    found = attention_maps(attention, {"itch": [0, 1], "age": [2]}, (2, 2), views)
    assert [(item.photo, item.attribute, item.png is not None) for item in found] == [
        (1, None, True),
        (1, "itch", False),
        (1, "age", False),
    ]
    assert found[1].grid == pytest.approx(np.array([[0.4, 0.4], [0.1, 0.1]]))
    assert found[0].grid == pytest.approx(np.array([[0.325, 0.325], [0.175, 0.175]]))
    assert found[2].spread == pytest.approx(1.0)
    # exp of the entropy of (1/2, 1/2, 0, 0) is 2: half of four patches.
    assert AttentionMap(1, None, np.array([[0.5, 0.5], [0.0, 0.0]])).spread == pytest.approx(0.5)


def test_the_picture_is_bright_where_words_look_and_dull_where_they_look_everywhere() -> None:
    view = np.full((32, 32, 3), 0.5)

    def pixels(grid: np.ndarray) -> np.ndarray:
        with Image.open(io.BytesIO(overlay(view, grid))) as picture:
            assert picture.format == "PNG"
            return np.asarray(picture.convert("RGB"), dtype=float)

    peak = np.zeros((4, 4))
    peak[0, 3] = 1.0
    shown = pixels(peak)
    assert shown.shape == (256, 256, 3)
    assert shown[:50, 206:].mean() > 2 * shown[206:, :50].mean()
    flat = pixels(np.full((4, 4), 1 / 16))
    assert flat.std(axis=(0, 1)).max() < 1
    assert flat.max() < shown.max()
