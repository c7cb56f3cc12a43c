"""Small saved copies of real architectures, and no network: what the tests of models load."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from prima_ray.data.batch import ImageTextBatch
from prima_ray.models.tokenizer import OFFLINE_TEXT_MODEL, resolve_text_model

VOCABULARY = 30522
BERT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
QWEN3 = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "intermediate_size": 48,
}


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    # The libraries read HF_HUB_OFFLINE once, at import.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def add_tokenizer(folder: Path) -> Path:
    source = Path(resolve_text_model(OFFLINE_TEXT_MODEL))
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json"):
        shutil.copy(source / name, folder / name)
    return folder


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folders as a hub holds them, by kind: bert, modernbert, qwen3, qwen3_untied; do not write into them."""
    import transformers

    made: dict[str, Path] = {}

    def build(kind: str) -> nn.Module:
        sizes: dict[str, Any] = {"vocab_size": VOCABULARY, "pad_token_id": 0}
        torch.manual_seed(len(kind))
        if kind == "bert":
            return transformers.BertForMaskedLM(transformers.BertConfig(**BERT, **sizes))
        if kind == "modernbert":
            special = {f"{name}_token_id": None for name in ("bos", "eos", "cls", "sep")}
            return transformers.ModernBertForMaskedLM(transformers.ModernBertConfig(**BERT, **sizes, **special))
        config = transformers.Qwen3Config(**QWEN3, **sizes, tie_word_embeddings=kind == "qwen3")
        return transformers.Qwen3ForCausalLM(config)

    def get(kind: str) -> Path:
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            build(kind).save_pretrained(folder)
            made[kind] = add_tokenizer(folder)
        return made[kind]

    return get


def feature_batch(
    num_exams: int = 3, *, views: int = 2, width: int = 6, grid: int = 4, tokens: int = 7, seed: int = 0
) -> ImageTextBatch:
    """Cached features; the first exam has everything, the others one photo and fewer tokens."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(num_exams, *shape, generator=generator)

    image_mask = torch.ones(num_exams, views, dtype=torch.bool)
    attention = torch.ones(num_exams, tokens, dtype=torch.bool)
    for exam in range(1, num_exams):
        image_mask[exam, 1:] = False
        attention[exam, max(2, tokens - 2 * exam) :] = False
    return ImageTextBatch(
        exam_ids=tuple(f"e{exam}" for exam in range(num_exams)),
        weights=torch.ones(num_exams),
        labels=torch.zeros(num_exams, dtype=torch.int64),
        image_mask=image_mask,
        attention_mask=attention,
        image_cls=draw(views, width),
        image_seq=draw(views, grid * grid, width),
        text_cls=draw(width),
        text_seq=draw(tokens, width),
    )


def counts(module: nn.Module) -> tuple[int, int]:
    """Parameters, and those that train."""
    sizes = [(item.numel(), item.requires_grad) for item in module.parameters()]
    return sum(size for size, _ in sizes), sum(size for size, trains in sizes if trains)
