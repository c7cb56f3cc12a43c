from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from prima_ray.base import PrimaError
from prima_ray.config import validate_config
from prima_ray.models.image_tower import ImageTower, ImageTowerConfig
from prima_ray.models.lora import LoraConfig, merge_lora
from prima_ray.models.store import module_hash

DINO = {
    "name": "vit_small_patch16_dinov3",
    "image_size": 32,
    "options": {"depth": 2, "embed_dim": 24, "num_heads": 2, "init_values": 1.0},
}
VIT = {"name": "vit_tiny_patch16_224", "image_size": 32, "options": {"depth": 1, "embed_dim": 24, "num_heads": 2}}
SWIN = {
    "name": "swin_tiny_patch4_window7_224",
    "image_size": 64,
    "options": {"depths": [1, 1, 1, 1], "embed_dim": 24, "num_heads": [1, 1, 2, 2]},
}


def tower(**fields: Any) -> ImageTower:
    torch.manual_seed(0)
    return ImageTowerConfig.model_validate(fields).build().eval()


def images(size: int, count: int = 2) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def error_of(**fields: Any) -> str:
    with pytest.raises(PrimaError) as caught:
        validate_config(ImageTowerConfig, fields, where="FILE").build()
    return str(caught.value)


def test_dinov3_has_a_class_token_and_four_registers_before_its_patches() -> None:
    model = tower(**DINO)
    assert (model.num_prefix_tokens, model.uses_cls, model.grid, model.width) == (5, True, (2, 2), 24)
    x = images(32)
    cls, tokens = model(x)
    features = model.model.forward_features(x)
    assert features.shape == (2, 9, 24)
    assert torch.allclose(cls, features[:, 0], atol=1e-5)
    assert torch.allclose(tokens, features[:, 5:], atol=1e-5)


def test_tokens_are_in_rows() -> None:
    # A change in the top right corner of the picture changes the second token's patch alone.
    model = tower(**{**DINO, "options": {**DINO["options"], "depth": 1}})
    x = images(32, count=1)
    changed = x.clone()
    changed[:, :, :16, 16:] += 1
    difference = (model.model.patch_embed(x) - model.model.patch_embed(changed)).abs().amax(dim=-1).flatten()
    assert difference.gt(1e-6).tolist() == [False, True, False, False]


@pytest.mark.parametrize(
    ("fields", "grid", "uses_cls", "idle"),
    [
        (VIT, (2, 2), True, set()),
        # Registers without a class token: what stands first is no global feature.
        (
            {"name": "vit_wee_patch16_reg1_gap_256", "image_size": 32, "options": {"depth": 1}},
            (2, 2),
            False,
            {"fc_norm.weight", "fc_norm.bias"},
        ),
        (SWIN, (2, 2), False, set()),
        (
            {"name": "convnext_atto", "image_size": 64, "options": {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 24]}},
            (2, 2),
            False,
            {"head.norm.weight", "head.norm.bias"},
        ),
        ({"name": "resnet10t", "image_size": 64}, (2, 2), False, set()),
        ({"name": "mobilenetv3_small_050", "image_size": 64}, (2, 2), False, {"conv_head.weight", "conv_head.bias"}),
    ],
    ids=lambda value: value["name"] if isinstance(value, dict) and "name" in value else "",
)
def test_every_kind_of_backbone_gives_tokens_on_a_grid(
    fields: dict[str, Any], grid: tuple[int, int], uses_cls: bool, idle: set[str]
) -> None:
    model = tower(**fields)
    cls, tokens = model(images(fields["image_size"]))
    assert model.grid == grid
    assert cls.shape == (2, model.width)
    assert tokens.shape == (2, grid[0] * grid[1], model.width)
    assert model.uses_cls is uses_cls
    if not uses_cls:
        assert torch.allclose(cls, tokens.mean(dim=1))
    (cls.sum() + tokens.sum()).backward()
    trains = {name for name, parameter in model.model.named_parameters() if parameter.requires_grad}
    assert {name for name, parameter in model.model.named_parameters() if parameter.grad is not None} == trains
    assert {name for name, _ in model.model.named_parameters()} - trains == idle


def test_maps_of_either_layout_become_rows_of_tokens() -> None:
    for fields in (SWIN, {"name": "resnet10t", "image_size": 64}):
        model = tower(**fields)
        x = images(64)
        features = model.model.forward_features(x)
        channels_last = features if fields is SWIN else features.permute(0, 2, 3, 1)
        assert torch.allclose(model(x)[1].unflatten(1, (2, 2)), channels_last, atol=1e-5)


def test_no_exam_depends_on_its_batch() -> None:
    for fields in (DINO, {"name": "resnet10t", "image_size": 32}):
        model = tower(**fields).train()
        x = images(32, count=3)
        together = model(x)
        alone = model(x[1:2])
        assert all(torch.allclose(a[1:2], b, atol=1e-5) for a, b in zip(together, alone, strict=True))


def test_batch_norm_becomes_group_norm_with_its_activation() -> None:
    model = tower(name="mobilenetv3_small_050", image_size=32)
    kinds = {type(layer).__name__ for layer in model.modules()}
    assert "GroupNorm" in kinds
    assert not [kind for kind in kinds if "BatchNorm" in kind]
    ours = sum(isinstance(layer, nn.Hardswish | nn.ReLU) for layer in model.modules())
    theirs = sum(
        isinstance(layer, nn.Hardswish | nn.ReLU) for layer in timm.create_model("mobilenetv3_small_050").modules()
    )
    assert ours >= theirs - 1  # the head's own


def test_no_random_masks_but_those_asked_for() -> None:
    # Swin drops paths unless told otherwise.
    assert timm.create_model("swin_tiny_patch4_window7_224").layers[3].blocks[1].drop_path1.drop_prob > 0
    model = tower(**SWIN).train()
    x = images(64)
    assert torch.allclose(model(x)[1], model(x)[1], atol=1e-5)
    asked = tower(**{**SWIN, "options": {**SWIN.get("options", {}), "drop_path_rate": 0.5}}).train()
    assert not torch.allclose(asked(x)[1], asked(x)[1], atol=1e-3)
    asked.set_trainable("frozen", LoraConfig())
    assert torch.allclose(asked(x)[1], asked(x)[1], atol=1e-5), "what is frozen drops nothing"


def test_pooling_is_a_key() -> None:
    model = tower(**VIT, pooling="mean")
    cls, tokens = model(images(32))
    assert torch.allclose(cls, tokens.mean(dim=1))
    assert error_of(**SWIN, pooling="cls") == (
        "image_tower.pooling is cls, but swin_tiny_patch4_window7_224 has no CLS token\n  Set it to mean."
    )


@pytest.mark.parametrize(
    "name", ["vit_small_patch16_dinov3", "vit_small_patch16_dinov3_qkvb", "eva02_tiny_patch14_224"]
)
def test_adapters_reach_every_projection_and_fold_back(name: str) -> None:
    # With a bias, timm reads these projections' weights instead of calling them.
    size = 28 if "14" in name else 32
    config = ImageTowerConfig(name=name, image_size=size, options={"depth": 1, "init_values": 1.0})
    model = config.build().eval()
    x = images(size)
    before = model(x)[1].detach()
    structure = [(path, type(part)) for path, part in model.named_modules()]
    model.set_trainable("lora", LoraConfig(rank=2))
    assert "model.blocks.0.attn.qkv.lora_A.default.weight" in dict(model.named_parameters())
    for path, parameter in model.named_parameters():
        if "lora_B" in path:
            nn.init.normal_(parameter, std=0.05)
    adapted = model(x)[1]
    adapted.pow(2).sum().backward()
    assert all((item.grad is not None) == item.requires_grad for item in model.parameters())
    # To train anew, old adapters are folded in.
    model.set_trainable("full", LoraConfig())
    assert torch.allclose(model(x)[1], adapted, atol=1e-4)
    assert not torch.allclose(before, adapted, atol=1e-3)
    merge_lora(model)
    assert [(path, type(part)) for path, part in model.named_modules()] == structure


def test_gradient_checkpointing_gives_the_same_gradients_even_to_adapters() -> None:
    found = []
    for checkpointing in (False, True):
        model = tower(**DINO, gradient_checkpointing=checkpointing)
        torch.manual_seed(1)
        model.set_trainable("lora", LoraConfig(rank=2))
        model.train()(images(32))[1].pow(2).sum().backward()
        found.append({name: item.grad for name, item in model.named_parameters() if item.requires_grad})
    plain, checkpointed = found
    assert all(checkpointed[name] is not None and torch.allclose(plain[name], checkpointed[name]) for name in plain)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier as timm publishes it, trained at 64 px."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(3)
    model = timm.create_model(VIT["name"], img_size=64, num_classes=1000, **VIT["options"])
    save_file(model.state_dict(), folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("as_folder", [True, False])
def test_local_weights_are_loaded_without_their_classifier(weights: Path, as_folder: bool) -> None:
    path = weights if as_folder else weights / "model.safetensors"
    model = tower(**{**VIT, "image_size": 64}, weights=str(path))
    saved = load_file(weights / "model.safetensors")
    state = model.model.state_dict()
    assert set(saved) - set(state) == {"head.weight", "head.bias"}
    assert all(torch.equal(value, saved[name]) for name, value in state.items())
    assert model.model.pretrained_cfg["state_dict"] is None


def test_local_weights_of_another_size_have_their_positions_resampled(weights: Path) -> None:
    model = tower(**VIT, weights=str(weights))
    saved = load_file(weights / "model.safetensors")
    assert model.model.pos_embed.shape == (1, 5, 24)
    assert torch.equal(model.model.blocks[0].attn.qkv.weight, saved["blocks.0.attn.qkv.weight"])


def test_local_weights_may_be_adapted(weights: Path) -> None:
    model = tower(**VIT, weights=str(weights), trainable="lora", lora={"rank": 2})
    assert {name for name, item in model.named_parameters() if item.requires_grad} == {
        f"model.blocks.0.{layer}.lora_{side}.default.weight"
        for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
        for side in "AB"
    }


def test_weights_that_cannot_be_used_are_mistakes(weights: Path, tmp_path: Path) -> None:
    assert error_of(**VIT, weights=str(tmp_path / "none")) == f"{tmp_path / 'none'}: no such weights"
    assert error_of(**VIT, weights=str(tmp_path)) == f"{tmp_path}: expected one .safetensors file here, found 0"
    whole = (weights / "model.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-10])
    assert error_of(**VIT, weights=str(tmp_path)).startswith(
        f"{tmp_path / 'cut.safetensors'}: not a whole safetensors file ("
    )
    deeper = {**VIT, "options": {**VIT["options"], "depth": 2}}
    assert error_of(**deeper, weights=str(weights)).startswith(
        f'{weights}: these weights do not fit the model (Missing key(s) in state_dict: "blocks.1.norm1.weight", '
    )
    wider = {**VIT, "options": {**VIT["options"], "embed_dim": 48}}
    assert "these weights do not fit the model (" in error_of(**wider, weights=str(weights))


def test_weights_by_name_that_are_not_to_be_had() -> None:
    text = error_of(name="vit_tiny_patch16_224", pretrained=True)
    assert text.startswith("the weights of vit_tiny_patch16_224 could not be had by name (")
    assert text.endswith("\n  Bring them with `prima fetch` and name the folder in image_tower.weights.")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"name": "vit_tiny_patch16_225"},
            "timm has no model 'vit_tiny_patch16_225'\n"
            "  Perhaps vit_tiny_patch16_224, deit_tiny_patch16_224, vit_tiny_patch16_384?",
        ),
        ({"name": "zzz"}, "timm has no model 'zzz'"),
        (
            {"name": "vit_tiny_patch16_224.zzz"},
            "timm has no weights 'vit_tiny_patch16_224.zzz'\n  Leave the part after the dot out.",
        ),
        (
            {"name": "vit_tiny_patch16_224", "options": {"zzz": 1}},
            "options: vit_tiny_patch16_224 does not take them (VisionTransformer.__init__() got an unexpected keyword "
            "argument 'zzz')",
        ),
        (
            {"name": "vit_tiny_patch16_224", "options": {"attn_drop_rate": 0.1}},
            "FILE: options.attn_drop_rate: its masks are drawn inside of the attention, by the worker; leave it at 0 "
            "(drop_path_rate can be keyed by exam)",
        ),
        (
            {"name": "vit_tiny_patch16_224", "options": {"drop_rate": 0.1}},
            "FILE: options.drop_rate: it belongs to the classifier, which features do not pass; leave it at 0 "
            "(drop_path_rate can be keyed by exam)",
        ),
        (
            {"name": "vit_tiny_patch16_224", "trainable": "lora"},
            "FILE: LoRA over random weights adapts noise: set trainable to full, or give pretrained or weights",
        ),
        (
            {"name": "vit_tiny_patch16_224", "pretrained": True, "weights": "x"},
            "FILE: pretrained and weights: give one of them",
        ),
        ({"name": "volo_d1_224", "image_size": 32},
         "the 5 tokens of volo_d1_224 form no square grid\n  Choose another model."),
        ({"name": "vit_tiny_patch16_224", "image_size": 4},
         "FILE: image_size: input should be greater than or equal to 8 (got 4)"),
    ],
)  # fmt: skip
def test_mistakes_are_named(fields: dict[str, Any], message: str) -> None:
    assert error_of(**fields) == message


def test_pretrained_batch_norm_is_refused(tmp_path: Path) -> None:
    save_file(timm.create_model("resnet10t").state_dict(), tmp_path / "model.safetensors")
    assert error_of(name="resnet10t", weights=str(tmp_path)) == (
        "resnet10t uses batch norm, which mixes exams: its weights cannot be used here\n"
        "  Choose a model with layer or group norm: a ViT, a ConvNeXt, resnetv2_50x1_bit."
    )


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(PrimaError) as caught:
        tower(name="resnet10t", image_size=32)(images(64))
    assert str(caught.value) == "the image tower reads 32 px, the images have 64 x 64\n  Set views.image_size to 32."


def test_a_list_of_features_is_refused() -> None:
    text = error_of(name="crossvit_9_240", image_size=240)
    assert text.startswith("crossvit_9_240 gives no features of images of 240 px (")


def test_over_all_orientations_a_turned_image_has_the_same_features_and_turned_tokens() -> None:
    model = tower(**{**DINO, "orientations": 8})
    x = images(32)
    cls, tokens = model(x)
    turned_cls, turned_tokens = model(x.flip(-1).rot90(1, (-2, -1)))
    assert torch.allclose(turned_cls, cls, atol=1e-5)
    maps = tokens.unflatten(1, model.grid)
    assert torch.allclose(turned_tokens.unflatten(1, model.grid), maps.flip(2).rot90(1, (1, 2)), atol=1e-5)
    alone = tower(**DINO)
    parts = [alone(y.rot90(turn, (-2, -1)))[0] for y in (x, x.flip(-1)) for turn in range(4)]
    assert torch.allclose(cls, torch.stack(parts).mean(dim=0), atol=1e-5)


def test_in_training_an_image_is_seen_as_it_is() -> None:
    model, alone = tower(**{**DINO, "orientations": 8}).train(), tower(**DINO).train()
    assert torch.equal(model(images(32))[0], alone(images(32))[0])


def test_features_over_orientations_are_other_features() -> None:
    assert module_hash(tower(**{**DINO, "orientations": 4})) != module_hash(tower(**DINO))
