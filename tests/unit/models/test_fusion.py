from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor

from prima_ray.base import PrimaError
from prima_ray.config import validate_config
from prima_ray.data.batch import ImageTextBatch
from prima_ray.models.fusion import (
    FusionConfig,
    FusionInputs,
    ImageProjector,
    MlpFusion,
    Qwen3Fusion,
    Qwen3FusionConfig,
    TextProjector,
    fusion_tokenizer,
    prompt_tokens,
)
from prima_ray.models.keyed_dropout import key_random_masks
from prima_ray.models.lora import merge_lora
from tests.unit.models.conftest import QWEN3, feature_batch

Saved = Callable[[str], Path]
RANDOM = {"kind": "qwen3", "config": QWEN3, "trainable": "full"}


def inputs(num_classes: int = 3, *, width: int = 6, grid: int = 4) -> FusionInputs:
    return FusionInputs(
        image_width=width,
        text_width=width,
        grid=(grid, grid),
        class_phrases=tuple(f"diagnosis {number}" for number in range(num_classes)),
        subject="a skin lesion",
    )


def qwen(num_classes: int = 3, **fields: Any) -> Qwen3Fusion:
    torch.manual_seed(0)
    source = {} if {"path", "config"} & set(fields) else RANDOM
    return Qwen3FusionConfig.model_validate({**source, **fields}).build(inputs(num_classes)).eval()


def rows(batch: ImageTextBatch, wanted: slice, *, views: int | None = None, tokens: int | None = None) -> Any:
    """A part of a batch, without the padding that its other exams brought."""
    part = batch.split(1)[wanted.start] if wanted.stop - wanted.start == 1 else batch
    cut: dict[str, Tensor | None] = {
        "image_mask": None if part.image_mask is None else part.image_mask[:, :views],
        "image_cls": None if part.image_cls is None else part.image_cls[:, :views],
        "image_seq": None if part.image_seq is None else part.image_seq[:, :views],
        "attention_mask": None if part.attention_mask is None else part.attention_mask[:, :tokens],
        "text_seq": None if part.text_seq is None else part.text_seq[:, :tokens],
    }
    return replace(part, **cut)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "fields", [{}, {"text_stride": 3, "image_stride": 1}, {"local_tokens": False}, {"attention": "eager"}]
)
def test_an_exams_logits_do_not_depend_on_its_neighbours(fields: dict[str, Any]) -> None:
    model = qwen(**fields).train()
    batch = feature_batch()
    together = model(batch)["logits"]
    for exam in (1, 2):
        alone = model(rows(batch, slice(exam, exam + 1), views=1, tokens=7 - 2 * exam))["logits"]
        assert torch.allclose(together[exam], alone[0], atol=2e-5), exam


@pytest.mark.parametrize("kind", ["qwen3", "mlp"])
def test_what_stands_in_padding_is_never_seen(kind: str) -> None:
    torch.manual_seed(0)
    fields = RANDOM if kind == "qwen3" else {"kind": "mlp"}
    model = TypeAdapter(FusionConfig).validate_python(fields).build(inputs()).eval()
    batch = feature_batch()
    assert batch.image_cls is not None
    assert batch.image_seq is not None
    assert batch.text_seq is not None
    assert batch.image_mask is not None
    assert batch.attention_mask is not None
    noisy = replace(
        batch,
        image_cls=batch.image_cls.masked_fill(~batch.image_mask[..., None], 9.0),
        image_seq=batch.image_seq.masked_fill(~batch.image_mask[..., None, None], 9.0),
        text_seq=batch.text_seq.masked_fill(~batch.attention_mask[..., None], 9.0),
    )
    assert torch.allclose(model(batch)["logits"], model(noisy)["logits"], atol=1e-5)


def test_every_photo_and_every_token_counts() -> None:
    model = qwen()
    batch = feature_batch()
    before = model(batch)["logits"]
    for name in ("image_cls", "image_seq", "text_cls", "text_seq"):
        value = getattr(batch, name).clone()
        value[0, -1] += torch.randn_like(value[0, -1])
        after = model(replace(batch, **{name: value}))["logits"]
        assert not torch.allclose(before[0], after[0], atol=1e-6), name
        assert torch.allclose(before[1:], after[1:], atol=1e-6), name


def test_eight_photos_of_an_exam() -> None:
    assert qwen()(feature_batch(2, views=8))["logits"].shape == (2, 3)


@pytest.mark.parametrize("kind", ["qwen3", "qwen3_untied"])
def test_class_logits_are_rows_of_the_whole_vocabularys(saved: Saved, kind: str) -> None:
    from transformers import AutoModelForCausalLM

    model = qwen(path=str(saved(kind)), trainable="frozen")
    seen: list[dict[str, Tensor]] = []
    model.backbone.register_forward_hook(
        lambda module, args, kwargs, result: seen.append(
            {key: value for key, value in kwargs.items() if isinstance(value, Tensor)}
        ),
        with_kwargs=True,
    )
    logits = model(feature_batch())["logits"]
    prompt, exams = seen
    embeddings = torch.cat([prompt["inputs_embeds"].expand(3, -1, -1), exams["inputs_embeds"]], dim=1)
    mask = exams["attention_mask"]
    whole = AutoModelForCausalLM.from_pretrained(saved(kind), dtype=torch.float32).eval()
    with torch.no_grad():
        said = whole(inputs_embeds=embeddings, attention_mask=mask, use_cache=False).logits
        full = said[torch.arange(3), mask.sum(dim=1) - 1]
    assert full.shape[1] == 30522
    assert torch.allclose(logits, full[:, model.class_ids], atol=1e-5)


@pytest.mark.parametrize("kind", ["qwen3", "qwen3_untied"])
def test_pretrained_weights_are_the_saved_ones_and_adapters_train_alone(saved: Saved, kind: str) -> None:
    from transformers import AutoModelForCausalLM

    model = qwen(path=str(saved(kind)), lora={"rank": 2})
    whole = AutoModelForCausalLM.from_pretrained(saved(kind), dtype=torch.float32)
    assert torch.equal(model.backbone.get_input_embeddings().weight, whole.get_input_embeddings().weight)
    assert (model.output_rows is None) is (kind == "qwen3")
    if model.output_rows is not None:
        assert torch.equal(model.output_rows, whole.get_output_embeddings().weight[model.class_ids])
        assert not model.output_rows.requires_grad
    trained = {name.split(".")[0] for name, item in model.named_parameters() if item.requires_grad}
    assert trained == {"backbone", "image_global", "text_global", "image_local", "text_local", "specials"}
    inside = [name for name, item in model.backbone.named_parameters() if item.requires_grad]
    assert len(inside) == 2 * 7 * 2
    assert all("lora_" in name for name in inside)
    model(feature_batch())["logits"].pow(2).sum().backward()
    assert all((item.grad is not None) == item.requires_grad for item in model.parameters())
    before = model(feature_batch())["logits"]
    merge_lora(model)
    assert torch.allclose(model(feature_batch())["logits"], before, atol=1e-5)


def test_special_tokens_start_as_the_mean_of_what_describes_them() -> None:
    model = qwen()
    tokenizer = fusion_tokenizer(model.config).loaded
    rows = model.backbone.get_input_embeddings().weight
    for number, phrase in enumerate(("start of the image", "start of the patient data")):
        ids = tokenizer(phrase, add_special_tokens=False)["input_ids"]
        assert len(ids) >= 4
        assert torch.allclose(model.specials[number], rows[ids].mean(dim=0))
    assert model.specials.requires_grad


def test_the_prompt_names_every_class_and_a_letter_for_it() -> None:
    tokenizer = fusion_tokenizer(Qwen3FusionConfig.model_validate(RANDOM))
    prompt, cue, letters = prompt_tokens(inputs(3), tokenizer)
    assert tokenizer.loaded.decode(prompt) == (
        "images and data of a patient with a skin lesion. which diagnosis is it? "
        "a : diagnosis 0 ; b : diagnosis 1 ; c : diagnosis 2."
    )
    assert tokenizer.loaded.decode(cue) == "the diagnosis is"
    assert tokenizer.loaded.convert_ids_to_tokens(letters) == ["a", "b", "c"]


def test_a_letter_is_the_token_that_follows_a_word(tmp_path: Path) -> None:
    # In byte-level vocabularies such as Qwen's, " A" after a word and "A" at the start of a text are two tokens.
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = sorted({*(chr(code) for code in range(33, 127)), *(f"Ġ{letter}" for letter in "ABC"), "Ġ"})
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("Ġ", letter) for letter in "ABC"]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path)
    config = Qwen3FusionConfig.model_validate({**RANDOM, "tokenizer": str(tmp_path)})
    _, _, letters = prompt_tokens(inputs(3), fusion_tokenizer(config))
    assert letters == [vocabulary["ĠA"], vocabulary["ĠB"], vocabulary["ĠC"]]


def test_letters_that_are_no_tokens_of_their_own_are_a_mistake(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "diagnosis": 1}, unk_token="[UNK]"))  # noqa: S106
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(tmp_path)  # noqa: S106
    with pytest.raises(PrimaError) as caught:
        qwen(config=QWEN3, trainable="full", tokenizer=str(tmp_path))
    assert str(caught.value) == f"{tmp_path}: the letters A, B, C ... are not single tokens of this tokenizer"


def test_classes_past_the_alphabet_have_rows_of_their_own() -> None:
    model = qwen(30)
    assert model.extra_classes is not None
    assert model.extra_classes.shape == (4, 32)
    logits = model(feature_batch())["logits"]
    assert logits.shape == (3, 30)
    assert len(set(logits[0].tolist())) == 30
    logits.logsumexp(dim=1).sum().backward()
    assert model.extra_classes.grad is not None
    assert model.extra_classes.grad.abs().sum(dim=1).gt(0).all()
    assert qwen(26).extra_classes is None


def test_every_parameter_of_a_small_random_model_trains_and_starts_by_the_models_own_rule() -> None:
    model = qwen().train()
    assert model.backbone.get_input_embeddings().weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert torch.equal(model.backbone.norm.weight, torch.ones(32))
    model(feature_batch())["logits"].pow(2).sum().backward()
    assert [name for name, item in model.named_parameters() if item.grad is None] == []


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_prompt_that_is_read_once_says_what_it_says_before_each_exam(saved: Saved, attention: str) -> None:
    model = qwen(path=str(saved("qwen3")), config=None, trainable="frozen", attention=attention).train()
    batch = feature_batch(3)
    passes: list[int] = []
    model.backbone.layers[0].register_forward_hook(lambda _, __, out: passes.append(len(out)))
    with torch.no_grad():
        once = model(batch)["logits"]
        # Activations that are not kept, as in this one, are the other way to read it.
        model.config = model.config.model_copy(update={"gradient_checkpointing": True})
        each = model(batch)["logits"]
    assert passes == [1, 3, 3]
    torch.testing.assert_close(once, each, atol=1e-5, rtol=1e-5)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    found = []
    for checkpointing in (False, True):
        model = qwen(gradient_checkpointing=checkpointing).train()
        model(feature_batch())["logits"].pow(2).sum().backward()
        found.append([item.grad for item in model.parameters()])
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("fields", [{}, {"local_tokens": False}, {"gradient_checkpointing": True}])
def test_an_exams_random_masks_do_not_depend_on_its_neighbours(saved: Saved, fields: dict[str, Any]) -> None:
    """The adapters' dropout on sequences whose slots move with the longest text and the most photos of a batch."""
    model = qwen(path=str(saved("qwen3")), trainable="lora", lora={"rank": 2, "dropout": 0.5}, **fields).train()
    for name, item in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(item, std=0.5)
    key_random_masks(model)
    batch = replace(feature_batch(), mask_keys=torch.tensor([5, -6, 7]))

    def run(part: ImageTextBatch) -> tuple[Tensor, Tensor]:
        model.zero_grad()
        logits: Tensor = model(part)["logits"]
        logits.pow(2).sum().backward()
        return logits.detach(), torch.cat([item.grad.flatten() for item in model.parameters() if item.grad is not None])

    together, gradient = run(batch)
    parts = [run(rows(batch, slice(0, 1)))]
    parts += [run(rows(batch, slice(exam, exam + 1), views=1, tokens=7 - 2 * exam)) for exam in (1, 2)]
    assert torch.allclose(together, torch.cat([logits for logits, _ in parts]), atol=2e-5)
    assert torch.allclose(gradient, sum(part for _, part in parts), rtol=1e-3, atol=1e-4)  # type: ignore[arg-type]
    other = run(replace(batch, mask_keys=torch.tensor([5, 6, 7])))[0]
    assert torch.equal(other[0], together[0])
    assert not torch.allclose(other[1], together[1], atol=1e-3)


def test_logits_are_float32_under_autocast() -> None:
    model = qwen()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(feature_batch())["logits"]
    assert logits.dtype == torch.float32
    assert torch.allclose(logits, model(feature_batch())["logits"], atol=0.05)


def test_image_tokens_are_down_sampled_where_they_lie() -> None:
    torch.manual_seed(0)
    projector = ImageProjector(5, 7, stride=2, grid=(4, 6))
    tokens = torch.randn(2, 3, 24, 5)
    found = projector(tokens)
    assert found.shape == (2, 3, 6, 7)
    changed = tokens.clone()
    changed[1, 2, 6 * 3 + 5] += torch.randn(5)  # the last row's last token: the last output of that photo alone
    difference = (projector(changed) - found).abs().amax(dim=-1).gt(1e-7).nonzero().tolist()
    assert difference == [[1, 2, 5]]


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("length", [1, 4, 5, 7])
def test_text_tokens_are_down_sampled_with_their_mask(stride: int, length: int) -> None:
    torch.manual_seed(0)
    projector = TextProjector(5, 7, stride=stride)
    tokens = torch.randn(1, 9, 5)
    mask = torch.arange(9)[None] < length
    found, kept = projector(tokens, mask)
    assert found.shape[1] == kept.shape[1] == -(-9 // stride)
    alone, whole = projector(tokens[:, :length], mask[:, :length])
    assert int(kept.sum()) == int(whole.sum()) == -(-length // stride)
    assert torch.allclose(found[kept], alone[whole], atol=1e-6)


def test_the_simple_rival() -> None:
    model = TypeAdapter(FusionConfig).validate_python({"kind": "mlp", "hidden": 4}).build(inputs())
    assert isinstance(model, MlpFusion)
    assert model(feature_batch())["logits"].shape == (3, 3)


def test_pixels_are_not_features() -> None:
    with pytest.raises(ValueError, match="a fusion model reads features"):
        qwen()(replace(feature_batch(), text_seq=None))


def error_of(**fields: Any) -> str:
    with pytest.raises(PrimaError) as caught:
        validate_config(Qwen3FusionConfig, fields, where="FILE").build(inputs())
    return str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "FILE: give one of name, path and config"),
        ({"name": "a/b", "config": QWEN3}, "FILE: give one of name, path and config"),
        (
            {"config": QWEN3},
            "FILE: LoRA over random weights adapts noise: set trainable to full, or name a model",
        ),
        (
            {"config": {**QWEN3, "model_type": "llama"}, "trainable": "full"},
            "FILE: config.model_type is llama, expected qwen3",
        ),
        (
            {"config": {**QWEN3, "attention_dropout": 0.5}, "trainable": "full"},
            "FILE: config.attention_dropout: its masks are drawn inside of the attention, by the worker; leave it at 0 "
            "(other dropout can be keyed by exam)",
        ),
        (
            {"config": {**QWEN3, "vocab_size": 99}, "trainable": "full"},
            "config.vocab_size is 99, the tokenizer has 30522 tokens\n"
            "  Leave vocab_size out, or name the model's own tokenizer.",
        ),
    ],
)
def test_mistakes_are_named(fields: dict[str, Any], message: str) -> None:
    assert error_of(**fields) == message


def test_models_that_cannot_be_had_are_mistakes(saved: Saved, tmp_path: Path) -> None:
    mend = "\n  Name a local folder in fusion.path, or bring the model with `prima fetch`."
    assert error_of(path=str(saved("bert"))) == f"{saved('bert')}: is a bert model, expected qwen3"
    assert error_of(path=str(tmp_path / "none")) == f"{tmp_path / 'none'}: no such model folder"
    by_name = error_of(name="nobody/nothing")
    assert by_name.startswith("nobody/nothing: no model to be had (")
    folder = shutil.copytree(saved("qwen3"), tmp_path / "qwen3")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-10])
    assert error_of(path=str(folder)) == (
        f"{folder}: no weights to be had (Error while deserializing header: incomplete metadata, file not fully "
        f"covered){mend}"
    )


def test_fields_that_no_qwen3_has_are_mistakes() -> None:
    config = Qwen3FusionConfig(config={"hidden_sizee": 32, "rope_theta": 1e6}, trainable="full")
    with pytest.raises(PrimaError) as caught:
        config.check_architecture()
    assert str(caught.value) == ("unknown key 'fusion.config.hidden_sizee', did you mean 'fusion.config.hidden_size'?")
