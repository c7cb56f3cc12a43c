from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

from prima_ray.base import PrimaError
from prima_ray.models.lora import LoraConfig, lora_targets, merge_lora, set_trainable


def _transformer(folder: Path) -> nn.Module:
    from transformers import AutoModel

    model: nn.Module = AutoModel.from_pretrained(folder)
    return model


def _structure(module: nn.Module) -> list[tuple[str, type]]:
    return [(name, type(part)) for name, part in module.named_modules()]


def _randomise_adapters(module: nn.Module) -> None:
    for name, parameter in module.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)


def test_timm_vits_are_adapted_in_attention_and_mlp() -> None:
    model = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=32, num_classes=5)
    assert lora_targets(model) == [
        f"blocks.{block}.{layer}" for block in range(2) for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    ]


@pytest.mark.parametrize(
    ("kind", "layers"),
    [
        ("bert", {"query", "key", "value", "dense"}),
        ("modernbert", {"Wqkv", "Wo", "Wi"}),
        ("qwen3", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
    ],
)
def test_transformers_are_adapted_whatever_their_layers_are_called(
    saved: Callable[[str], Path], kind: str, layers: set[str]
) -> None:
    targets = lora_targets(_transformer(saved(kind)))
    assert {name.rpartition(".")[2] for name in targets} == layers
    assert not [name for name in targets if "pooler" in name or "embed" in name]


def test_layers_that_are_not_called_are_left_alone() -> None:
    model = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32)
    assert lora_targets(model, called={"blocks.0.attn.proj"}) == ["blocks.0.attn.proj"]


def test_a_convolutional_network_has_nothing_to_adapt() -> None:
    with pytest.raises(PrimaError) as caught:
        set_trainable(timm.create_model("resnet18", num_classes=0), "lora", LoraConfig())
    assert str(caught.value) == (
        "ResNet has no linear layers in repeated blocks for LoRA to adapt\n"
        "  Set `trainable: full` or `trainable: frozen`."
    )


def test_full_and_frozen() -> None:
    model = nn.Linear(3, 2)
    set_trainable(model, "frozen", LoraConfig())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    set_trainable(model, "full", LoraConfig())
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("kind", ["vit", "bert", "modernbert", "qwen3"])
def test_adapters_train_alone_and_merge_into_the_same_function(saved: Callable[[str], Path], kind: str) -> None:
    if kind == "vit":
        model: Any = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=32, num_classes=0)
        arguments: dict[str, Any] = {"x": torch.randn(2, 3, 32, 32)}
    else:
        model = _transformer(saved(kind))
        arguments = {"input_ids": torch.randint(5, 99, (2, 6))}
    model.eval()

    def run() -> torch.Tensor:
        outputs = model(**arguments)
        result: torch.Tensor = outputs if kind == "vit" else outputs.last_hidden_state
        return result

    before, structure, names = run().detach(), _structure(model), list(model.state_dict())
    attributes = set(vars(model))
    set_trainable(model, "lora", LoraConfig(rank=4, alpha=8.0))
    assert torch.allclose(run(), before, atol=1e-5), "fresh adapters change nothing"
    assert all(("lora_" in name) == parameter.requires_grad for name, parameter in model.named_parameters())
    _randomise_adapters(model)
    adapted = run()
    adapted.pow(2).sum().backward()
    assert all(item.grad is not None and item.grad.any() for item in model.parameters() if item.requires_grad)
    assert not torch.allclose(adapted, before, atol=1e-3)
    merge_lora(model)
    assert torch.allclose(run(), adapted, atol=1e-5)
    assert (_structure(model), list(model.state_dict()), set(vars(model))) == (structure, names, attributes)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        set_trainable(model, "lora", LoraConfig(rank=2))


def test_alpha_scales_the_update() -> None:
    deltas = []
    for alpha in (None, 8.0):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4, bias=False))
        weight = model[0].weight.detach().clone()
        set_trainable(model, "lora", LoraConfig(rank=4, alpha=alpha))
        nn.init.ones_(model[0].lora_B["default"].weight)
        merge_lora(model)
        deltas.append(model[0].weight.detach() - weight)
    assert torch.allclose(deltas[1], 2 * deltas[0], atol=1e-6)
