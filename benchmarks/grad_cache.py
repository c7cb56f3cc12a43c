"""What the gradient cache costs, and that memory is the micro-batch's: align on the CPU, the loop's own step.

*memory*: a process a setting takes two steps of the global batches B and 8 B at one micro-batch, B in one piece, 8 B
through the cache. Peak resident memory is counted above idle: the process with its model, engine and Adam state, before
there is a batch. *live*: malloc maps each block by itself, so what is resident is what is in use; *resident*: as a
training runs, which keeps freed memory with holes in it. The share of the peak that is activations is what autograd
saved for backward in one micro-batch (distinct storages, without parameters and pixels) over that peak. The batch's own
pixels lie on the host and count; what a stream reads ahead (four batches a rank) does not. *time*: seconds a step of
one batch, in micro-batches through the cache against in one piece, in turns; one process, the same model and batch.

The model is a ViT of small size (depth 12, width 384) with LoRA, text features as stored ones come, all four losses,
fp32. `--whole` also runs 8 B in one piece, to see what the cache saves.

    python benchmarks/grad_cache.py [--exams 8] [--pairs 7] [--whole] [--quick]
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from _harness import Figures, interleave, parse, parser, report

from prima_ray.data.batch import ImageTextBatch
from prima_ray.losses import AlignLossConfig, align_losses, condense_outputs
from prima_ray.models.dual_encoder import DualEncoder, ProjectionConfig, ProjectionHeads, TemperatureConfig
from prima_ray.models.image_tower import ImageTowerConfig
from prima_ray.models.keyed_dropout import key_random_masks
from prima_ray.models.lora import LoraConfig
from prima_ray.training.allocator import keep_freed_memory
from prima_ray.training.config import OptimizerConfig, TorchEngineConfig
from prima_ray.training.engine import build_engine, trainable_parameters
from prima_ray.training.gradient_cache import backward_cached

TEXT_WIDTH, TEXT_TOKENS, ATTRIBUTES = 384, 96, 64
TINY = {"embed_dim": 48, "depth": 2, "num_heads": 2}


def make_batch(count: int, side: int) -> ImageTextBatch:
    """Made-up exams: two views, stored text features, attributes."""
    mask = torch.ones(count, TEXT_TOKENS, dtype=torch.bool)
    return ImageTextBatch(
        exam_ids=tuple(map(str, range(count))),
        weights=torch.ones(count),
        labels=torch.zeros(count, dtype=torch.int64),
        mask_keys=torch.arange(count),
        images=torch.randn(count, 2, 3, side, side),
        image_mask=torch.ones(count, 2, dtype=torch.bool),
        attention_mask=mask,
        token_mask=mask,
        attributes=(torch.rand(count, ATTRIBUTES) < 0.2).float(),
        text_cls=torch.randn(count, TEXT_WIDTH),
        text_seq=torch.randn(count, TEXT_TOKENS, TEXT_WIDTH),
    )


class Step:
    """Optimizer steps as the training loop takes them, on one worker."""

    def __init__(self, side: int, options: dict[str, Any]) -> None:
        torch.manual_seed(0)
        image = ImageTowerConfig(
            name="vit_small_patch16_224", image_size=side, trainable="frozen", options=options
        ).build()
        # The configs refuse LoRA over random weights, rightly; memory and time do not mind.
        image.set_trainable("lora", LoraConfig(rank=16))
        heads = ProjectionHeads(ProjectionConfig(width=256), image_width=image.width, text_width=TEXT_WIDTH)
        model = DualEncoder(image, None, heads, TemperatureConfig()).train()
        key_random_masks(model)
        self.losses = AlignLossConfig()
        self.engine = build_engine(
            model, TorchEngineConfig(), OptimizerConfig(lr=1e-4), precision="fp32", device=torch.device("cpu")
        )

    def forward(self, piece: ImageTextBatch) -> dict[str, Tensor]:
        return condense_outputs(self.losses, self.engine.forward(piece), token_mask=piece.token_mask)

    def __call__(self, batch: ImageTextBatch, micro_batch: int) -> None:
        light = batch.light()

        def loss(outputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
            return align_losses(
                self.losses, outputs, attributes=light.attributes, label_temperature=10.0, weights=light.weights
            )

        pieces = batch.split(micro_batch)
        backward_cached(self.forward, pieces, loss, self.engine.backward, batch_level=("temperature",))
        self.engine.step(1e-4)

    def activations(self, batch: ImageTextBatch) -> int:
        """Bytes that autograd keeps of one forward pass, without parameters and the batch itself."""
        known = {item.untyped_storage().data_ptr() for item in self.engine.module.parameters()}
        known |= {
            item.untyped_storage().data_ptr()
            for name in batch.__slots__
            if isinstance(item := getattr(batch, name), Tensor)
        }
        seen: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                seen[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            outputs = self.forward(batch)
        del outputs
        return sum(seen.values())


# ------------------------------------------------------------------------------------------------- memory


def resident(key: str) -> int:
    """Bytes of /proc/self/status: VmRSS, or its peak VmHWM."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise SystemExit("grad_cache needs Linux: /proc/self/status has no " + key)


def measure(side: int, options: dict[str, Any], batch: int, micro_batch: int, *, exact: bool) -> dict[str, float]:
    """Two steps in this process; MiB. Not ``exact``: with the memory that a training keeps."""
    if not exact:
        keep_freed_memory()
    step = Step(side, options)
    # Adam's state comes with the first step; gradients go with it.
    step(make_batch(2, side), 1)
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    idle = resident("VmRSS")
    exams = make_batch(batch, side)
    for _ in range(2):
        step(exams, micro_batch)
    peak = resident("VmHWM") - idle
    activations = step.activations(exams.split(micro_batch)[0])
    pixels = 0 if exams.images is None else exams.images.nbytes
    trained = sum(item.nbytes for _, item in trainable_parameters(step.engine.module))
    return {
        "global_batch": batch,
        "micro_batch": micro_batch,
        "peak_above_idle_mib": round(peak / 2**20, 1),
        "activations_mib": round(activations / 2**20, 1),
        "share_of_activations": round(activations / peak, 3),
        "pixels_of_the_batch_mib": round(pixels / 2**20, 1),
        "gradients_mib": round(trained / 2**20, 1),
    }


def measure_apart(side: int, options: dict[str, Any], batch: int, micro_batch: int, *, exact: bool) -> dict[str, float]:
    sizes = {"side": side, "options": options, "batch": batch, "micro_batch": micro_batch, "exact": exact}
    command = [sys.executable, __file__, "--child", json.dumps(sizes)]
    # Each block is mapped by itself and goes when it is freed.
    environment = {**os.environ, **({"MALLOC_MMAP_THRESHOLD_": "65536"} if exact else {})}
    shown = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
    found: dict[str, float] = json.loads(shown.splitlines()[-1])
    print(found, file=sys.stderr, flush=True)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    command = parser(__doc__, shards=False)
    command.add_argument("--exams", type=int, default=8, help="B, and the micro-batch (default %(default)s)")
    command.add_argument("--side", type=int, default=224, help="pixels, of the memory part (default %(default)s)")
    command.add_argument("--whole", action="store_true", help="8 B in one piece as well: eight times the memory")
    command.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parse(command, argv, exams=4, side=64)
    if arguments.child:
        print(json.dumps(measure(**json.loads(arguments.child))))
        return 0
    options = TINY if arguments.quick else {}
    small, large = arguments.exams, 8 * arguments.exams
    settings = {
        "B": (small, small),
        "8 B": (large, small),
        **({"8 B, whole": (large, large)} if arguments.whole else {}),
    }
    memory = {
        kind: {
            name: measure_apart(arguments.side, options, *sizes, exact=kind == "live")
            for name, sizes in settings.items()
        }
        for kind in ("live", "resident")
    }
    growth = {
        kind: round(found["8 B"]["peak_above_idle_mib"] / found["B"]["peak_above_idle_mib"], 3)
        for kind, found in memory.items()
    }

    side, count = (64, 8) if arguments.quick else (128, 32)
    step, batch = Step(side, options), make_batch(count, side)

    def turn(micro_batch: int) -> Figures:
        start = time.perf_counter()
        step(batch, micro_batch)
        return {"s a step": time.perf_counter() - start}

    turn(count // 4), turn(count)
    contenders = {"cached": lambda _: turn(count // 4), "one piece": lambda _: turn(count)}
    section = {
        "pairs": interleave(contenders, pairs=arguments.pairs),
        "ratio": ("s a step", "cached", "one piece"),
        "timed": {"exams": count, "micro_batch": count // 4, "image_size": side},
        "memory": memory,
        "peak_of_8_b_over_b": growth,
        "threads": torch.get_num_threads(),
    }
    report("grad_cache", arguments, sections={"": section}, argv=argv)
    return 0


if __name__ == "__main__":
    sys.exit(main())
