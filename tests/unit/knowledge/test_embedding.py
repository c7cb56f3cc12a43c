from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from prima_ray.base import PrimaError
from prima_ray.knowledge.embedding import Embedder, EncoderConfig

TEXTS = ["moles", "the sun raises the risk of melanoma in people with light skin", "age", "", "scars and burns"]


def load(folder: Path, **keys: object) -> Embedder:
    config = EncoderConfig.model_validate({"path": str(folder), "pooling": "mean", "max_tokens": 16, **keys})
    return Embedder.load(config, device="cpu", batch_size=2)


def test_vectors_are_those_of_one_text_at_a_time(encoder_folder: Callable[[int], Path]):
    embedder = load(encoder_folder(0))
    found = embedder.embed(TEXTS)
    assert (found.dtype, found.shape) == (np.float32, (5, 32))
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    for text, vector in zip(TEXTS, found, strict=True):
        np.testing.assert_allclose(embedder.embed([text])[0], vector, atol=1e-6)
    assert embedder.embed([]).shape == (0, 32)


def test_vectors_are_the_mean_over_tokens_as_transformers_gives_it(encoder_folder: Callable[[int], Path]):
    from transformers import AutoModel, AutoTokenizer

    folder = encoder_folder(0)
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer([TEXTS[1]], return_tensors="pt", truncation=True, max_length=16)["input_ids"]
    with torch.no_grad():
        tokens = model(input_ids=ids).last_hidden_state[0]
    for pooling, pooled in (("mean", tokens.mean(dim=0)), ("cls", tokens[0])):
        wanted = (pooled / pooled.norm()).numpy()
        found = load(folder, pooling=pooling).embed([TEXTS[1]])[0]
        np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_an_identity_is_of_weights_pooling_tokens_and_tokenizer(encoder_folder: Callable[[int], Path], tmp_path: Path):
    first = load(encoder_folder(0)).identity
    moved = load(Path(shutil.copytree(encoder_folder(0), tmp_path / "moved"))).identity
    assert moved.name != first.name
    assert moved.same(first)
    other_tokenizer = Path(shutil.copytree(encoder_folder(0), tmp_path / "other"))
    text = (other_tokenizer / "tokenizer.json").read_text()
    assert '"lowercase":true' in text.replace(" ", "")
    (other_tokenizer / "tokenizer.json").write_text(
        text.replace('"lowercase": true', '"lowercase": false').replace('"lowercase":true', '"lowercase":false')
    )
    config = other_tokenizer / "tokenizer_config.json"
    config.write_text(config.read_text().replace('"do_lower_case": true', '"do_lower_case": false'))
    for other in (
        load(encoder_folder(1)),
        load(encoder_folder(0), pooling="cls"),
        load(encoder_folder(0), max_tokens=17),
        load(other_tokenizer),
    ):
        assert not other.identity.same(first)


def test_an_encoder_that_is_not_there_or_too_short_is_said(encoder_folder: Callable[[int], Path]):
    with pytest.raises(PrimaError) as caught:
        load(Path("/nowhere/encoder"))
    assert str(caught.value) == "/nowhere/encoder: no such model folder"
    with pytest.raises(PrimaError) as caught:
        load(encoder_folder(0), max_tokens=1000)
    assert str(caught.value) == "encoder.max_tokens is 1000, the model reads 512"
