"""A GPU's exams a second, peak memory and MFU in align and fuse at the paper's sizes, bf16, random weights.

*align*: `vit_base_patch16_dinov3` at 224 px with LoRA (rank 32), two views an exam, the four losses, a frozen text
tower's features (128 tokens of width 768) as the stage streams them. *fuse*: a Qwen-3 as large as Qwen3-1.7B, frozen,
LoRA (rank 16) and trained projectors, over one photo's features (196 tokens) and a text's (128 tokens). The engine
is the stage's torch engine; batches are made up and lie on the host, as streamed ones do (what the stream itself gives
is `ingest_stream`'s question). No Ray, no DeepSpeed.

Two contenders, interleaved: *fp32*, frozen weights as loaded, which autocast casts again in every use; *bf16*, frozen
weights stored in bf16 (trained ones stay fp32 in both). `--profile` prints where the time of a step goes.

FLOPs are counted by torch (`torch.utils.flop_counter`: matrix products, convolutions and attention of one step, forward
and backward, as executed); MFU is their rate over the card's dense bf16 peak, a table below or `--peak-tflops`.

    python benchmarks/gpu_train.py [--only align|fuse] [--pairs 7] [--steps 20] [--profile]
    python benchmarks/gpu_train.py --tiny --quick     # the same path on a CPU, small
"""

from __future__ import annotations

import argparse
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
from _harness import Figures, interleave, parse, parser, report

from prima_ray.data.batch import ImageTextBatch
from prima_ray.losses import AlignLossConfig, align_losses, condense_outputs
from prima_ray.models.dual_encoder import DualEncoder, ProjectionConfig, ProjectionHeads, TemperatureConfig
from prima_ray.models.fusion import FusionInputs, Qwen3FusionConfig
from prima_ray.models.image_tower import ImageTowerConfig
from prima_ray.models.lora import LoraConfig, set_trainable
from prima_ray.training.classification import classification_loss
from prima_ray.training.config import OptimizerConfig, TorchEngineConfig
from prima_ray.training.engine import Engine, build_engine
from prima_ray.training.gradient_cache import backward_cached

PEAK_TFLOPS = {
    # Dense bf16 with fp32 accumulation, from the makers' data sheets; the first name found in the card's counts.
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
    "A10G": 70.0,
    "RTX 4090": 165.0,
    "RTX 3090": 71.0,
}
TEXT_WIDTH = 768
CLASSES = ("actinic keratosis", "basal cell carcinoma", "melanoma", "nevus", "squamous cell carcinoma", "keratosis")


@dataclass(frozen=True)
class Sizes:
    """What is built."""

    image_model: str = "vit_base_patch16_dinov3"
    image_options: dict[str, Any] = field(default_factory=dict)
    image_size: int = 224
    text_tokens: int = 128
    num_attributes: int = 96
    projection: int = 512
    language_model: dict[str, Any] = field(
        default_factory=lambda: {
            "vocab_size": 151_936,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "tie_word_embeddings": True,
        }
    )


TINY = Sizes(
    image_options={"embed_dim": 48, "depth": 2, "num_heads": 2},
    image_size=64,
    text_tokens=12,
    num_attributes=10,
    projection=32,
    language_model={
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
    },
)


class Workload(ABC):
    """One model on the device, its engine, and a made-up batch on the host."""

    micro_batch: int

    def __init__(self, model: nn.Module, batch: ImageTextBatch, *, frozen: torch.dtype, device: torch.device) -> None:
        for parameter in model.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(frozen)
        self.batch, self.device = batch, device
        self.engine: Engine = build_engine(
            model.train(), TorchEngineConfig(), OptimizerConfig(lr=3e-5), precision="bf16", device=device
        )
        named = list(model.parameters())
        self.num_parameters = sum(item.numel() for item in named)
        self.num_trained = sum(item.numel() for item in named if item.requires_grad)

    def step(self) -> None:
        """One optimizer step, as the training loop takes it."""
        # Pixels and features come to the device a micro-batch at a time.
        self.accumulate(self.batch.split(self.micro_batch), self.batch.light().to(self.device))
        self.engine.step(3e-5)

    @abstractmethod
    def accumulate(self, micro: list[ImageTextBatch], light: ImageTextBatch) -> None:
        """Forward and backward of every micro-batch; ``light`` is what losses read of the whole batch."""


class AlignWorkload(Workload):
    """The dual encoder; its losses span the batch, so micro-batches go through the gradient cache."""

    def accumulate(self, micro: list[ImageTextBatch], light: ImageTextBatch) -> None:
        config = AlignLossConfig()

        def forward(piece: ImageTextBatch) -> dict[str, Tensor]:
            moved = piece.to(self.device)
            return condense_outputs(config, self.engine.forward(moved), token_mask=moved.token_mask)

        def loss(outputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
            return align_losses(
                config,
                outputs,
                attributes=light.attributes,
                label_temperature=10.0,
                weights=light.weights,
            )

        backward_cached(forward, micro, loss, self.engine.backward, batch_level=("temperature",))


class FuseWorkload(Workload):
    """The fusion model; losses of micro-batches add up."""

    def accumulate(self, micro: list[ImageTextBatch], light: ImageTextBatch) -> None:
        total = light.weights.sum()
        weights = [1.0] * len(CLASSES)
        for number, host in enumerate(micro):
            piece = host.to(self.device)
            logits = self.engine.forward(piece)["logits"]
            loss = classification_loss(logits, piece, weights=weights, label_smoothing=0.0, total_weight=total)
            self.engine.backward(loss, last=number == len(micro) - 1)


def build_align(sizes: Sizes, arguments: argparse.Namespace, frozen: torch.dtype, device: torch.device) -> Workload:
    torch.manual_seed(0)
    # The configs refuse LoRA over random weights, rightly; speed does not mind, so it is put in afterwards.
    image = ImageTowerConfig(
        name=sizes.image_model, image_size=sizes.image_size, trainable="frozen", options=sizes.image_options
    ).build()
    image.set_trainable("lora", LoraConfig(rank=32))
    heads = ProjectionHeads(ProjectionConfig(width=sizes.projection), image_width=image.width, text_width=TEXT_WIDTH)
    count, side, length = arguments.align_batch, sizes.image_size, sizes.text_tokens
    mask = torch.ones(count, length, dtype=torch.bool)
    batch = ImageTextBatch(
        exam_ids=tuple(str(number) for number in range(count)),
        weights=torch.ones(count),
        labels=torch.arange(count) % len(CLASSES),
        images=torch.randn(count, 2, 3, side, side),
        image_mask=torch.ones(count, 2, dtype=torch.bool),
        attention_mask=mask,
        token_mask=mask,
        attributes=(torch.rand(count, sizes.num_attributes) < 0.2).float(),
        text_cls=torch.randn(count, TEXT_WIDTH),
        text_seq=torch.randn(count, length, TEXT_WIDTH),
    )
    workload = AlignWorkload(DualEncoder(image, None, heads, TemperatureConfig()), batch, frozen=frozen, device=device)
    workload.micro_batch = arguments.micro_batch or count
    return workload


def build_fuse(sizes: Sizes, arguments: argparse.Namespace, frozen: torch.dtype, device: torch.device) -> Workload:
    torch.manual_seed(0)
    grid = sizes.image_size // 16
    width = sizes.image_options.get("embed_dim", 768)
    inputs = FusionInputs(
        image_width=width, text_width=TEXT_WIDTH, grid=(grid, grid), class_phrases=CLASSES, subject="a skin lesion"
    )
    config = Qwen3FusionConfig(config=sizes.language_model, trainable="frozen")
    model = config.build(inputs)
    set_trainable(model.backbone, "lora", LoraConfig(rank=16))
    count, length = arguments.fuse_batch, sizes.text_tokens
    batch = ImageTextBatch(
        exam_ids=tuple(str(number) for number in range(count)),
        weights=torch.ones(count),
        labels=torch.arange(count) % len(CLASSES),
        image_mask=torch.ones(count, 1, dtype=torch.bool),
        attention_mask=torch.ones(count, length, dtype=torch.bool),
        image_cls=torch.randn(count, 1, width),
        image_seq=torch.randn(count, 1, grid * grid, width),
        text_cls=torch.randn(count, TEXT_WIDTH),
        text_seq=torch.randn(count, length, TEXT_WIDTH),
    )
    workload = FuseWorkload(model, batch, frozen=frozen, device=device)
    workload.micro_batch = arguments.micro_batch or count
    return workload


# -------------------------------------------------------------------------------------------------- measuring


def count_flops(workload: Workload) -> float:
    """Floating-point operations of one step."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        workload.step()
    return float(counter.get_total_flops())


def timed(workload: Workload, steps: int) -> float:
    """Seconds of so many steps, the device's work included."""
    _wait(workload.device)
    start = time.perf_counter()
    for _ in range(steps):
        workload.step()
    _wait(workload.device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_mib(workload: Workload, warmup: int, *, before: int) -> float | None:
    """Most memory that the model and its warm-up steps took beyond ``before`` bytes, MiB; None on a CPU."""
    if workload.device.type != "cuda":
        timed(workload, warmup)
        return None
    torch.cuda.reset_peak_memory_stats(workload.device)
    timed(workload, warmup)
    return round((torch.cuda.max_memory_allocated(workload.device) - before) / 2**20, 1)


def profile(workload: Workload, title: str) -> None:
    """Print the operators that a step spends its time in."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    on_gpu = workload.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with torch_profile(activities=activities) as seen:
        timed(workload, 3)
    by = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    print(f"\n{title}\n{seen.key_averages().table(sort_by=by, row_limit=15, max_name_column_width=60)}")


def run_stage(
    title: str, build: Callable[..., Workload], sizes: Sizes, arguments: argparse.Namespace, device: torch.device
) -> dict[str, Any]:
    """Both contenders of one stage: memory one by one, then time in turns."""
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    workloads: dict[str, Workload] = {}
    memory: dict[str, float | None] = {}
    flops = 0.0
    for name, dtype in dtypes.items():
        # The other contender's optimizer state stays on the device.
        before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        workload = build(sizes, arguments, dtype, device)
        memory[name] = peak_mib(workload, arguments.warmup, before=before)
        if arguments.profile:
            profile(workload, f"{title}, frozen weights in {name}")
        flops = count_flops(workload)
        # Off the device while the other one is measured.
        workload.engine.module.to("cpu")
        workloads[name] = workload
    if device.type == "cuda":
        torch.cuda.empty_cache()
    peak = arguments.peak_tflops or device_peak(device)

    def turn(name: str) -> Figures:
        workload = workloads[name]
        workload.engine.module.to(device)
        timed(workload, 2)
        seconds = timed(workload, arguments.steps) / arguments.steps
        workload.engine.module.to("cpu")
        rates = {"exams/s": len(workload.batch) / seconds, "TFLOP/s": flops / seconds / 1e12}
        return {**rates, "MFU, %": 100 * rates["TFLOP/s"] / peak} if peak else rates

    pairs = interleave({name: lambda _, name=name: turn(name) for name in dtypes}, pairs=arguments.pairs)
    one = workloads["bf16"]
    return {
        "pairs": pairs,
        "ratio": ("exams/s", "bf16", "fp32"),
        "peak_memory_mib": memory,
        "tflop_a_step": round(flops / 1e12, 4),
        "parameters_m": round(one.num_parameters / 1e6, 1),
        "trained_parameters_m": round(one.num_trained / 1e6, 2),
        "setting": {
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "peak_tflops": peak,
            "batch": len(one.batch),
            "micro_batch": one.micro_batch,
            "steps_a_turn": arguments.steps,
            "tiny": arguments.tiny,
        },
    }


def device_peak(device: torch.device) -> float | None:
    """Dense bf16 TFLOP/s of the card, None where the table does not know it."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK_TFLOPS.items() if all(word in name for word in key.split())), None)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser(__doc__, shards=False)
    arguments.add_argument("--only", choices=("align", "fuse"), help="one stage; default: both")
    arguments.add_argument("--tiny", action="store_true", help="small sizes, on a CPU where there is no GPU")
    arguments.add_argument("--align-batch", type=int, default=64, help="exams a step of align, two views each")
    arguments.add_argument("--fuse-batch", type=int, default=32, help="exams a step of fuse")
    arguments.add_argument("--micro-batch", type=int, help="exams a forward pass; default: the batch")
    arguments.add_argument("--steps", type=int, default=20, help="steps a turn")
    arguments.add_argument("--warmup", type=int, default=5)
    arguments.add_argument("--profile", action="store_true", help="print a profile of every contender")
    arguments.add_argument("--peak-tflops", type=float, help="dense bf16 peak of the card")
    arguments = parse(arguments, argv, steps=2, warmup=2)
    if not torch.cuda.is_available() and not arguments.tiny:
        print("gpu_train: no GPU here (torch sees none); --tiny runs the same path on a CPU", file=sys.stderr)
        return 2
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if arguments.tiny:
        arguments.align_batch, arguments.fuse_batch = min(arguments.align_batch, 8), min(arguments.fuse_batch, 8)
    sizes = TINY if arguments.tiny else Sizes()
    stages = {"align": build_align, "fuse": build_fuse}
    sections = {
        title: run_stage(title, build, sizes, arguments, device)
        for title, build in stages.items()
        if arguments.only in (None, title)
    }
    report("gpu_train", arguments, sections=sections, argv=argv)
    return 0


if __name__ == "__main__":
    sys.exit(main())
