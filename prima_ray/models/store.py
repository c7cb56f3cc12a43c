"""Saving and loading the parts of a model: a folder a part, `config.json` and `model.safetensors`, nothing pickled.

What is written is resolved: the architecture in full, the tokenizer's files, LoRA folded in. So loading asks no hub and
no parent run. To add a part: a `_Part` in `_PARTS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prima_ray.base import PrimaError, hash_json, read_json, write_json
from prima_ray.data.features import hash_tensors
from prima_ray.data.fetched import local_copy
from prima_ray.models.classifier import ImageClassifier
from prima_ray.models.dual_encoder import ProjectionConfig, ProjectionHeads
from prima_ray.models.ensemble import Ensemble
from prima_ray.models.experts import AttributeExpert
from prima_ray.models.fusion import FusionInputs, MlpFusion, MlpFusionConfig, Qwen3Fusion, Qwen3FusionConfig
from prima_ray.models.image_tower import ImageTower, ImageTowerConfig
from prima_ray.models.lora import merge_lora
from prima_ray.models.pretrained import architecture_of
from prima_ray.models.text_tower import TextTower, TextTowerConfig
from prima_ray.models.tokenizer import first_line

_CONFIG = "config.json"
_WEIGHTS = "model.safetensors"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class _Part:
    """How one kind of module is described and made again."""

    module: type[nn.Module]
    describe: Callable[[Any, Path], dict[str, Any]]
    """Module and folder -> JSON; writes further files (a tokenizer) into the folder."""
    build: Callable[[Mapping[str, Any], Path], nn.Module]
    """JSON and folder -> a module that the weights fit."""


def save_component(folder: Path, module: nn.Module) -> None:
    """Write a module into a folder. Folds its LoRA adapters in, in place.

    Raises:
        ValueError: no way to save this kind of module is known.
    """
    from safetensors.torch import save_file

    kind = next((name for name, part in _PARTS.items() if type(module) is part.module), None)
    if kind is None:
        raise ValueError(f"no part for {type(module).__name__}; known: {', '.join(_PARTS)}")
    folder.mkdir(parents=True, exist_ok=True)
    merge_lora(module)
    spec = _PARTS[kind].describe(module, folder)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in _own_state(module).items()}
    save_file(state, folder / _WEIGHTS)
    write_json(folder / _CONFIG, {"format": FORMAT_VERSION, "kind": kind, "spec": spec})


def load_component(folder: str | Path) -> nn.Module:
    """Read a module from a folder of `save_component`, local or on an object store: frozen, in eval mode, on the CPU.

    Raises:
        PrimaError: a file is missing or damaged, or of another format.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = local_copy(folder)
    description = read_json(folder / _CONFIG)
    if not isinstance(description, dict) or str(description.get("kind")) not in _PARTS:
        raise PrimaError("does not describe a model of prima_ray", where=folder / _CONFIG)
    if description.get("format") != FORMAT_VERSION:
        raise PrimaError(
            f"written in format {description.get('format')}, this program reads format {FORMAT_VERSION}",
            where=folder / _CONFIG,
        )
    try:
        # Absolute, so that the tokenizer is found in whatever process and folder it is loaded later.
        module = _PARTS[description["kind"]].build(description["spec"], folder.resolve())
    except (PrimaError, ImportError, MemoryError):
        raise
    except Exception as error:  # of a value that makes no model, every library says what it likes
        raise PrimaError(f"damaged ({first_line(error)})", where=folder / _CONFIG) from None
    try:
        state = load_file(folder / _WEIGHTS)
    except FileNotFoundError:
        raise PrimaError("no such file", where=folder / _WEIGHTS) from None
    except (SafetensorError, OSError) as error:
        raise PrimaError(f"not a whole safetensors file ({error})", where=folder / _WEIGHTS) from None
    expected = _own_state(module)
    odd = sorted(set(expected) ^ set(state))
    odd += [name for name, value in expected.items() if name in state and state[name].shape != value.shape]
    if odd:
        raise PrimaError(f"the weights do not fit the config: {odd[0]}", where=folder / _WEIGHTS)
    module.load_state_dict(state, strict=False)
    return module.eval().requires_grad_(False)


def module_hash(module: nn.Module) -> str:
    """SHA-256 (hex) of what a module computes: its weights, and the architecture and pooling that they do not show."""
    shapes = [
        [name, _describe_architecture(part)]
        for name, part in module.named_modules()
        if isinstance(part, ImageTower | TextTower | ProjectionHeads)
    ]
    return hash_json([shapes, hash_tensors(module.state_dict())])


def _describe_architecture(part: ImageTower | TextTower | ProjectionHeads) -> dict[str, Any]:
    if isinstance(part, ImageTower):
        wanted = part.config.model_dump(mode="json", include={"name", "image_size", "options"})
        turned = {"orientations": part.config.orientations} if part.config.orientations > 1 else {}
        return {**wanted, **turned, "cls": part.uses_cls}
    if isinstance(part, TextTower):
        return {**architecture_of(part.model), "pooling": part.pooling}
    return part.config.model_dump(mode="json")


def _own_state(module: nn.Module) -> dict[str, Tensor]:
    """A module's state without the parts that are saved in folders of their own."""
    state = module.state_dict()
    if isinstance(module, ImageClassifier):
        return {name: tensor for name, tensor in state.items() if not name.startswith("image_tower.")}
    return {} if isinstance(module, Ensemble) else state


def _describe_image_tower(tower: ImageTower, folder: Path) -> dict[str, Any]:
    del folder
    pooling = "cls" if tower.uses_cls else "mean"
    changes = {"pretrained": False, "weights": None, "trainable": "frozen", "pooling": pooling}
    return {"config": tower.config.model_copy(update=changes).model_dump(mode="json")}


def _build_image_tower(spec: Mapping[str, Any], folder: Path) -> ImageTower:
    del folder
    return ImageTowerConfig.model_validate(spec["config"]).build()


def _describe_text_tower(tower: TextTower, folder: Path) -> dict[str, Any]:
    tower.config.tokenizer().save(folder / "tokenizer")
    named = Path(tower.config.name)
    changes = {
        # A model folder travels: no path of the machine that trained it.
        "name": named.name if named.is_absolute() else tower.config.name,
        "config": architecture_of(tower.model),
        "path": None,
        "trainable": "frozen",
        "pooling": tower.pooling,
    }
    return {"config": tower.config.model_copy(update=changes).model_dump(mode="json")}


def _build_text_tower(spec: Mapping[str, Any], folder: Path) -> TextTower:
    return TextTowerConfig.model_validate({**spec["config"], "path": str(folder / "tokenizer")}).build()


def _describe_heads(heads: ProjectionHeads, folder: Path) -> dict[str, Any]:
    del folder
    return {
        "config": heads.config.model_dump(mode="json"),
        "image_width": heads.image_width,
        "text_width": heads.text_width,
    }


def _build_heads(spec: Mapping[str, Any], folder: Path) -> ProjectionHeads:
    del folder
    return ProjectionHeads(
        ProjectionConfig.model_validate(spec["config"]),
        image_width=spec["image_width"],
        text_width=spec["text_width"],
    )


def _describe_classifier(classifier: ImageClassifier, folder: Path) -> dict[str, Any]:
    save_component(folder / "image_tower", classifier.image_tower)
    return {"num_classes": classifier.head.out_features}


def _build_classifier(spec: Mapping[str, Any], folder: Path) -> ImageClassifier:
    tower = load_component(folder / "image_tower")
    if not isinstance(tower, ImageTower):
        raise PrimaError("holds no image tower", where=folder / "image_tower")
    return ImageClassifier(tower, spec["num_classes"])


def _describe_qwen3(model: Qwen3Fusion, folder: Path) -> dict[str, Any]:
    from prima_ray.models.fusion import fusion_tokenizer

    fusion_tokenizer(model.config).save(folder / "tokenizer")
    changes = {
        "name": None,
        "path": None,
        "tokenizer": None,
        "config": architecture_of(model.backbone),
        "trainable": "frozen",
    }
    return {
        "config": model.config.model_copy(update=changes).model_dump(mode="json"),
        "inputs": model.inputs.model_dump(mode="json"),
        "own_rows": model.output_rows is not None,
    }


def _build_qwen3(spec: Mapping[str, Any], folder: Path) -> Qwen3Fusion:
    config = Qwen3FusionConfig.model_validate({**spec["config"], "tokenizer": str(folder / "tokenizer")})
    model = config.build(FusionInputs.model_validate(spec["inputs"]))
    if spec["own_rows"]:
        model.output_rows = nn.Parameter(torch.zeros(len(model.class_ids), int(model.backbone.config.hidden_size)))
    return model


def _describe_mlp(model: MlpFusion, folder: Path) -> dict[str, Any]:
    del folder
    return {"config": model.config.model_dump(mode="json"), "inputs": model.inputs.model_dump(mode="json")}


def _build_mlp(spec: Mapping[str, Any], folder: Path) -> MlpFusion:
    del folder
    return MlpFusionConfig.model_validate(spec["config"]).build(FusionInputs.model_validate(spec["inputs"]))


def _describe_ensemble(ensemble: Ensemble, folder: Path) -> dict[str, Any]:
    for number, member in enumerate(ensemble.members):
        save_component(folder / f"member_{number}", member)
    return {"members": len(ensemble.members)}


def _build_ensemble(spec: Mapping[str, Any], folder: Path) -> Ensemble:
    members = [load_component(folder / f"member_{number}") for number in range(spec["members"])]
    for member in members:
        if not isinstance(member, MlpFusion | Qwen3Fusion):
            raise PrimaError(f"holds a {type(member).__name__}, expected a fusion model", where=folder)
    ensemble = Ensemble(members)
    if any(member.inputs != ensemble.inputs for member in ensemble.members):
        raise PrimaError("damaged: its members read different things, or tell different classes apart", where=folder)
    return ensemble


def _describe_attribute_expert(expert: AttributeExpert, folder: Path) -> dict[str, Any]:
    del folder
    return {"width": expert.layer.in_features, "num_classes": expert.layer.out_features}


def _build_attribute_expert(spec: Mapping[str, Any], folder: Path) -> AttributeExpert:
    del folder
    return AttributeExpert(spec["width"], spec["num_classes"])


_PARTS: dict[str, _Part] = {
    "image_tower": _Part(ImageTower, _describe_image_tower, _build_image_tower),
    "text_tower": _Part(TextTower, _describe_text_tower, _build_text_tower),
    "heads": _Part(ProjectionHeads, _describe_heads, _build_heads),
    "classifier": _Part(ImageClassifier, _describe_classifier, _build_classifier),
    "qwen3_fusion": _Part(Qwen3Fusion, _describe_qwen3, _build_qwen3),
    "mlp_fusion": _Part(MlpFusion, _describe_mlp, _build_mlp),
    "ensemble": _Part(Ensemble, _describe_ensemble, _build_ensemble),
    "attribute_expert": _Part(AttributeExpert, _describe_attribute_expert, _build_attribute_expert),
}
