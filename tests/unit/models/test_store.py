from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from prima_ray.base import PrimaError
from prima_ray.models.classifier import ImageClassifier
from prima_ray.models.dual_encoder import ProjectionConfig, ProjectionHeads
from prima_ray.models.ensemble import Ensemble
from prima_ray.models.fusion import FusionInputs, MlpFusionConfig, Qwen3FusionConfig
from prima_ray.models.image_tower import ImageTower, ImageTowerConfig
from prima_ray.models.lora import LoraConfig
from prima_ray.models.store import load_component, module_hash, save_component
from prima_ray.models.text_tower import TextTower, TextTowerConfig
from tests.unit.models.conftest import BERT, QWEN3, feature_batch

Saved = Callable[[str], Path]
INPUTS = FusionInputs(
    image_width=6, text_width=6, grid=(4, 4), class_phrases=("one", "two", "three"), subject="a skin lesion"
)
MANY = INPUTS.model_copy(update={"class_phrases": tuple(f"number {number}" for number in range(28))})


def image_tower(**fields: Any) -> ImageTower:
    config = {
        "name": "vit_small_patch16_dinov3",
        "image_size": 32,
        "options": {"depth": 1, "embed_dim": 24, "num_heads": 2, "init_values": 1.0},
        **fields,
    }
    return ImageTowerConfig.model_validate(config).build()


def adapted_tower() -> ImageTower:
    tower = image_tower()
    tower.set_trainable("lora", LoraConfig(rank=2))
    for name, parameter in tower.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    return tower


def text_tower(**fields: Any) -> TextTower:
    return TextTowerConfig.model_validate({"max_tokens": 16, **fields}).build()


def heads() -> ProjectionHeads:
    return ProjectionHeads(ProjectionConfig(width=8, kind="mlp"), image_width=24, text_width=32)


def qwen(inputs: FusionInputs = INPUTS, **fields: Any) -> nn.Module:
    return Qwen3FusionConfig.model_validate(fields).build(inputs)


def make(kind: str, saved: Saved) -> nn.Module:
    torch.manual_seed(0)
    makers: Mapping[str, Callable[[], nn.Module]] = {
        "image tower": image_tower,
        "adapted image tower": adapted_tower,
        "image tower, mean": lambda: image_tower(pooling="mean"),
        "convolutional tower": lambda: image_tower(name="resnet10t", options={}),
        "bert": lambda: text_tower(path=str(saved("bert")), pooling="mean"),
        "modernbert": lambda: text_tower(path=str(saved("modernbert")), trainable="lora", lora={"rank": 2}),
        "random text tower": lambda: text_tower(config={"model_type": "modernbert", **BERT}),
        "heads": heads,
        "classifier": lambda: ImageClassifier(image_tower(), 3),
        "adapted classifier": lambda: ImageClassifier(adapted_tower(), 3),
        "random qwen3": lambda: qwen(config=QWEN3, trainable="full"),
        "qwen3": lambda: qwen(path=str(saved("qwen3")), lora={"rank": 2}),
        "qwen3, 28 classes": lambda: qwen(MANY, path=str(saved("qwen3")), trainable="frozen"),
        "untied qwen3": lambda: qwen(path=str(saved("qwen3_untied")), trainable="full"),
        "untied qwen3, 28 classes": lambda: qwen(MANY, path=str(saved("qwen3_untied")), trainable="full"),
        "mlp fusion": lambda: MlpFusionConfig(hidden=4).build(INPUTS),
        "ensemble": lambda: Ensemble(qwen(path=str(saved("qwen3")), lora={"rank": 2}) for _ in range(2)),
    }
    return makers[kind]().eval()


KINDS = (
    "image tower", "adapted image tower", "image tower, mean", "convolutional tower", "bert", "modernbert",
    "random text tower", "heads", "classifier", "adapted classifier", "random qwen3", "qwen3", "qwen3, 28 classes",
    "untied qwen3", "untied qwen3, 28 classes", "mlp fusion", "ensemble",
)  # fmt: skip


def outputs(module: nn.Module) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        if isinstance(module, ImageTower):
            return list(module(torch.randn(2, 3, 32, 32, generator=generator)))
        if isinstance(module, TextTower):
            return list(module(*module.config.tokenizer()(["an itchy lesion", "old"])[:2]))
        if isinstance(module, ProjectionHeads):
            return [module.image(torch.ones(2, 24)), module.text(torch.ones(2, 32))]
        if isinstance(module, ImageClassifier):
            return [module.head(module.image_tower(torch.randn(2, 3, 32, 32, generator=generator))[0])]
        return [module(feature_batch())["logits"]]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_loads_bit_for_bit_with_nothing_else_at_hand(
    kind: str, saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = make(kind, saved)
    before = outputs(module)
    save_component(tmp_path / "saved", module)
    merged = outputs(module)
    assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(before, merged, strict=True))
    # Neither what it was made from, nor the folder it was written to, nor a hub.
    shutil.move(tmp_path / "saved", tmp_path / "moved")
    monkeypatch.setattr("prima_ray.models.text_tower.load_pretrained", _refuse)
    monkeypatch.setattr("prima_ray.models.fusion.load_pretrained", _refuse)
    monkeypatch.chdir(tmp_path)
    loaded = load_component(Path("moved"))
    monkeypatch.chdir("/")
    assert type(loaded) is type(module)
    assert not loaded.training
    assert not any(item.requires_grad for item in loaded.parameters())
    state, again = module.state_dict(), loaded.state_dict()
    assert list(state) == list(again)
    assert all(torch.equal(state[name], again[name]) for name in state)
    assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(merged, outputs(loaded), strict=True))
    assert module_hash(loaded) == module_hash(module)
    names = {str(file.relative_to(tmp_path / "moved")) for file in (tmp_path / "moved").rglob("*") if file.is_file()}
    assert {Path(name).suffix for name in names} <= {".json", ".safetensors", ".txt", ".jinja"}
    # Saved again, it is the same again.
    save_component(tmp_path / "twice", loaded)
    assert (
        load_file(tmp_path / "twice" / "model.safetensors").keys()
        == load_file(tmp_path / "moved" / "model.safetensors").keys()
    )
    config = (tmp_path / "moved" / "config.json").read_text()
    assert str(tmp_path) not in config
    assert (tmp_path / "twice" / "config.json").read_text() == config


def _refuse(*arguments: object, **options: object) -> None:
    raise AssertionError("weights were asked for by name or path")


def test_a_loaded_tower_trains_again(saved: Saved, tmp_path: Path) -> None:
    save_component(tmp_path, make("adapted image tower", saved))
    tower = load_component(tmp_path)
    assert isinstance(tower, ImageTower)
    tower.set_trainable("lora", LoraConfig(rank=2))
    tower(torch.randn(1, 3, 32, 32))[1].pow(2).sum().backward()
    assert all((item.grad is not None) == item.requires_grad for item in tower.parameters())
    assert any(item.requires_grad for item in tower.parameters())


def test_members_of_an_ensemble_are_fusion_models(saved: Saved, tmp_path: Path) -> None:
    save_component(tmp_path, make("ensemble", saved))
    shutil.rmtree(tmp_path / "member_1")
    save_component(tmp_path / "member_1", heads())
    assert "holds a ProjectionHeads, expected a fusion model" in error_of(tmp_path)
    shutil.rmtree(tmp_path / "member_1")
    save_component(tmp_path / "member_1", make("qwen3, 28 classes", saved))
    assert "its members read different things, or tell different classes apart" in error_of(tmp_path)


def test_only_what_it_knows_is_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no part for Linear; known: image_tower, text_tower, heads"):
        save_component(tmp_path, nn.Linear(2, 2))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    save_component(tmp_path / "heads", heads())
    return tmp_path / "heads"


def error_of(folder: Path) -> str:
    with pytest.raises(PrimaError) as caught:
        load_component(folder)
    return str(caught.value)


def test_a_value_that_makes_no_model_is_named(tmp_path: Path) -> None:
    save_component(tmp_path, text_tower(config={"model_type": "modernbert", **BERT}))
    file = tmp_path / "config.json"
    raw = json.loads(file.read_text())
    raw["spec"]["config"]["config"]["hidden_size"] = "x"
    file.write_text(json.dumps(raw))
    assert error_of(tmp_path).startswith(f"{file}: damaged (")


def test_damage_is_named(folder: Path) -> None:
    config, weights = folder / "config.json", folder / "model.safetensors"
    description, whole = json.loads(config.read_text()), weights.read_bytes()
    # Copies: what is loaded is mapped, and the file is about to be cut.
    state = {name: value.clone() for name, value in load_file(weights).items()}

    def describe(**changes: Any) -> None:
        config.write_text(json.dumps({**description, **changes}))

    weights.write_bytes(whole[:-10])
    assert error_of(folder) == (
        f"{weights}: not a whole safetensors file (Error while deserializing header: incomplete metadata, file not "
        "fully covered)"
    )
    weights.write_bytes(b"")
    assert error_of(folder).startswith(f"{weights}: not a whole safetensors file (")
    save_file({name: value for name, value in state.items() if name != "image.0.bias"}, weights)
    assert error_of(folder) == f"{weights}: the weights do not fit the config: image.0.bias"
    save_file({**state, "image.0.bias": torch.zeros(3)}, weights)
    assert error_of(folder) == f"{weights}: the weights do not fit the config: image.0.bias"
    weights.unlink()
    assert error_of(folder) == f"{weights}: no such file"
    describe(format=99)
    assert error_of(folder) == f"{config}: written in format 99, this program reads format 1"
    describe(kind="unheard of")
    assert error_of(folder) == f"{config}: does not describe a model of prima_ray"
    describe(spec={})
    assert error_of(folder) == f"{config}: damaged ('config')"
    describe(spec={**description["spec"], "config": {"width": -1}})
    assert error_of(folder).startswith(f"{config}: damaged (1 validation error for ProjectionConfig")
    config.write_text("{")
    assert error_of(folder).startswith(f"{config}: not valid JSON (")
    config.unlink()
    assert error_of(folder) == f"{config}: no such file"


def test_a_missing_part_of_a_part_is_named(saved: Saved, tmp_path: Path) -> None:
    save_component(tmp_path / "text", make("bert", saved))
    shutil.rmtree(tmp_path / "text" / "tokenizer")
    assert error_of(tmp_path / "text") == f"{tmp_path / 'text' / 'tokenizer'}: no such model folder"
    save_component(tmp_path / "classifier", make("classifier", saved))
    inner = tmp_path / "classifier" / "image_tower"
    (inner / "model.safetensors").unlink()
    assert error_of(tmp_path / "classifier") == f"{inner / 'model.safetensors'}: no such file"
    shutil.rmtree(inner)
    save_component(inner, heads())
    assert error_of(tmp_path / "classifier") == f"{inner}: holds no image tower"


def test_a_model_named_by_its_folder_forgets_where_it_lay(saved: Saved, tmp_path: Path) -> None:
    tower = TextTowerConfig(name=str(saved("bert")), max_tokens=8).build()
    save_component(tmp_path / "text", tower)
    assert str(saved("bert").parent) not in (tmp_path / "text" / "config.json").read_text()
    assert module_hash(load_component(tmp_path / "text")) == module_hash(tower)


def test_the_hash_tells_what_is_computed_not_where_it_lies(saved: Saved, tmp_path: Path) -> None:
    def of(**fields: Any) -> str:
        torch.manual_seed(0)
        return module_hash(image_tower(**fields))

    options = {"depth": 1, "embed_dim": 24, "num_heads": 2, "init_values": 1.0}
    assert of() == of(trainable="frozen")
    assert len({of(), of(pooling="mean"), of(options={**options, "num_heads": 3})}) == 3
    tower = image_tower()
    before = module_hash(tower)
    with torch.no_grad():
        tower.model.norm.bias[0] += 1e-6
    assert module_hash(tower) != before
    copied = shutil.copytree(saved("bert"), tmp_path / "copy")
    texts = {module_hash(text_tower(path=str(path))) for path in (saved("bert"), copied)}
    assert len(texts) == 1
    assert module_hash(text_tower(path=str(copied), pooling="mean")) not in texts


def test_weights_are_readable_by_other_users(folder: Path) -> None:
    umask = os.umask(0)
    os.umask(umask)
    assert (folder / "config.json").stat().st_mode & 0o777 == 0o666 & ~umask
