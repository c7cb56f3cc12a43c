from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from prima_ray.base import PrimaError
from prima_ray.config import validate_config
from prima_ray.models.lora import merge_lora
from prima_ray.models.text_tower import TextTower, TextTowerConfig
from tests.unit.models.conftest import BERT

TEXTS = ["woman, 62, on the face, it itches and has grown", "man"]
Saved = Callable[[str], Path]


def tower(**fields: Any) -> TextTower:
    torch.manual_seed(0)
    return TextTowerConfig.model_validate({"max_tokens": 24, **fields}).build().eval()


def encode(model: TextTower, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    ids, attention, _ = model.config.tokenizer()(texts)
    with torch.no_grad():
        return (*model(ids, attention), attention)


def error_of(**fields: Any) -> str:
    with pytest.raises(PrimaError) as caught:
        validate_config(TextTowerConfig, fields, where="FILE").build()
    return str(caught.value)


def test_the_offline_tower_is_a_sentence_encoder() -> None:
    model = tower()
    assert (model.width, model.pooling) == (384, "mean")
    cls, tokens, attention = encode(model, ["a mole on the arm", "a nevus on the forearm", "the train is late"])
    assert tokens.shape == (3, attention.shape[1], 384)
    near = torch.cosine_similarity(cls[0], cls[1], dim=0)
    far = torch.cosine_similarity(cls[0], cls[2], dim=0)
    assert near > far + 0.2
    assert not [item for item in model.parameters() if item.requires_grad]


@pytest.mark.parametrize("kind", ["bert", "modernbert"])
def test_checkpoints_of_masked_language_models_load_by_what_their_config_says(saved: Saved, kind: str) -> None:
    model = tower(path=str(saved(kind)))
    assert type(model.model).__name__.lower() == f"{kind}model"
    assert (model.width, model.pooling) == (32, "cls")
    published = load_file(saved(kind) / "model.safetensors")
    prefix = "bert" if kind == "bert" else "model"
    state = model.model.state_dict()
    assert all(torch.equal(value, published[f"{prefix}.{name}"]) for name, value in state.items() if "weight" in name)
    assert not [name for name in state if "pooler" in name]
    cls, tokens, _ = encode(model, TEXTS)
    assert torch.equal(cls, tokens[:, 0])


@pytest.mark.parametrize("kind", ["bert", "modernbert"])
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_padding_changes_nothing(saved: Saved, kind: str, pooling: str) -> None:
    model = tower(path=str(saved(kind)), pooling=pooling).train()
    together, alone = encode(model, TEXTS), encode(model, TEXTS[1:])
    length = int(alone[2].sum())
    assert torch.allclose(together[0][1:], alone[0], atol=1e-5)
    assert torch.allclose(together[1][1:, :length], alone[1], atol=1e-5)
    if pooling == "mean":
        assert torch.allclose(alone[0][0], alone[1][0].mean(dim=0), atol=1e-6)


def test_pooling_is_what_the_model_was_trained_with(saved: Saved, tmp_path: Path) -> None:
    folder = shutil.copytree(saved("bert"), tmp_path / "bert")
    (folder / "1_Pooling").mkdir()
    for mean in (True, False):
        (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": mean}))
        assert TextTowerConfig(path=str(folder)).resolve_pooling() == ("mean" if mean else "cls")
    assert TextTowerConfig(path=str(folder), pooling="mean").resolve_pooling() == "mean"


@pytest.mark.parametrize("kind", ["bert", "modernbert"])
def test_random_weights_from_an_architecture(kind: str) -> None:
    model = tower(config={"model_type": kind, **BERT}, trainable="full")
    assert model.width == 32
    assert model.model.config.vocab_size == 30522
    embedding = next(value for name, value in model.named_parameters() if "embed" in name)
    assert 0.01 < float(embedding.detach().std()) < 0.03, "initialised by the model's own rule"
    cls, tokens = model(*model.config.tokenizer()(TEXTS)[:2])
    (cls.sum() + tokens.pow(2).sum()).backward()
    assert all(item.grad is not None for item in model.parameters())


@pytest.mark.parametrize("trainable", ["full", "frozen"])
def test_dropout_is_there_where_it_is_asked_for_and_something_trains(trainable: str) -> None:
    asked = tower(config={"model_type": "bert", **BERT, "hidden_dropout_prob": 0.5}, trainable=trainable)
    rates = {layer.p for layer in asked.modules() if isinstance(layer, torch.nn.Dropout)}
    assert rates == ({0.0, 0.5} if trainable == "full" else {0.0})
    # BERT's own rates, 0.1, are not asked for.
    plain = tower(config={"model_type": "bert", **BERT}, trainable=trainable)
    assert {layer.p for layer in plain.modules() if isinstance(layer, torch.nn.Dropout)} == {0.0}


def test_dropout_inside_of_attention_is_a_mistake() -> None:
    config = {"model_type": "bert", **BERT, "attention_probs_dropout_prob": 0.5}
    with pytest.raises(PrimaError) as caught:
        validate_config(TextTowerConfig, {"config": config}, where="FILE")
    assert str(caught.value) == (
        "FILE: config.attention_probs_dropout_prob: its masks are drawn inside of the attention, by the worker; leave "
        "it at 0 (other dropout can be keyed by exam)"
    )


def test_adapters_train_alone(saved: Saved) -> None:
    model = tower(path=str(saved("modernbert")), trainable="lora", lora={"rank": 2})
    names = {name for name, item in model.named_parameters() if item.requires_grad}
    assert len(names) == 2 * 2 * 4
    assert all("lora_" in name for name in names)
    before = encode(model, TEXTS)[1]
    merge_lora(model)
    assert torch.allclose(encode(model, TEXTS)[1], before, atol=1e-5)


def test_models_that_cannot_be_had_are_mistakes(saved: Saved, tmp_path: Path) -> None:
    mend = "\n  Name a local folder in text_tower.path, or bring the model with `prima fetch`."
    assert error_of(path=str(tmp_path / "none")) == f"{tmp_path / 'none'}: no such model folder"
    by_name = error_of(name="nobody/nothing")
    assert by_name.startswith("nobody/nothing: no model to be had (")
    assert by_name.endswith(mend)
    folder = shutil.copytree(saved("bert"), tmp_path / "bert")
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-10])
    assert error_of(path=str(folder)) == (
        f"{folder}: no weights to be had (Error while deserializing header: incomplete metadata, file not fully "
        f"covered){mend}"
    )
    state = load_file(saved("bert") / "model.safetensors")
    save_file({name: value for name, value in state.items() if "layer.1" not in name}, weights, {"format": "pt"})
    assert error_of(path=str(folder)) == (
        f"{folder}: the weights do not fit their config: 16 are missing "
        "(encoder.layer.1.attention.output.LayerNorm.bias, ...)"
    )
    weights.rename(folder / "pytorch_model.bin")
    assert error_of(path=str(folder)).startswith(f"{folder}: no weights to be had (")
    (folder / "config.json").unlink()
    assert error_of(path=str(folder)).startswith(f"{folder}: no model to be had (")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"config": {"hidden_size": 32}}, "FILE: config needs `model_type` (bert, modernbert, ...)"),
        (
            {"config": {"model_type": "bert"}, "trainable": "lora"},
            "FILE: LoRA over random weights adapts noise: set trainable to full, or name a model",
        ),
        ({"max_tokens": 600}, "text_tower.max_tokens is 600, the model reads 512"),
        (
            {"config": {"model_type": "bert", **BERT, "vocab_size": 100}},
            "config.vocab_size is 100, the tokenizer has 30522 tokens\n"
            "  Leave vocab_size out, or name the model's own tokenizer.",
        ),
    ],
)
def test_mistakes_are_named(fields: dict[str, Any], message: str) -> None:
    assert error_of(**fields) == message


def test_sizes_that_do_not_fit_each_other_are_mistakes() -> None:
    assert error_of(config={"model_type": "nonsense"}).startswith("config: ")
    assert error_of(config={"model_type": "bert", **BERT, "num_attention_heads": 5}).startswith("config: ")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_sizee": 32}, "unknown key 'text_tower.config.hidden_sizee', "
         "did you mean 'text_tower.config.hidden_size'?"),
        ({"hidden_size": 0}, "text_tower.config.hidden_size: expected a whole number from 1 (got 0)"),
        ({"hidden_size": "abc"}, "text_tower.config.hidden_size: expected a whole number from 1 (got 'abc')"),
        ({"hidden_act": 3.5}, "text_tower.config: Validation error for field 'hidden_act': "
         "TypeError: Field 'hidden_act' expected str, got float (value: 3.5)"),
    ],
)  # fmt: skip
def test_mistakes_in_an_architecture_are_named_before_anything_is_built(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(PrimaError) as caught:
        TextTowerConfig(config={"model_type": "bert", **fields}).check_architecture()
    assert str(caught.value) == message


def test_an_architecture_may_be_written_in_older_names() -> None:
    fields = {"model_type": "modernbert", "global_rope_theta": 1e5, "num_labels": 3, "dtype": "float32"}
    TextTowerConfig(config=fields).check_architecture()
