"""Photos/s of a convolutional tower, forward and backward, with its pixels channels last against channels first.

The tower of the small preset (jobs/configs/pad_ufes_20/align.yaml), batches of 64 random pictures, no optimizer. The
towers of `prima_ray.models.image_tower` take channels last wherever their features are a map.

    python benchmarks/channels_last.py [--pairs 7] [--steps 3] [--quick]
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import timm
import torch

sys.path.insert(0, str(Path(__file__).parent))
from _harness import CONFIGS, Figures, interleave, parse, parser, report

from prima_ray.config import load_config
from prima_ray.stages.align import AlignConfig

_BATCH = 64


def main(argv: Sequence[str] | None = None) -> int:
    command = parser(__doc__, shards=False)
    command.add_argument("--steps", type=int, default=3, help="batches a turn (default %(default)s)")
    arguments = parse(command, argv, steps=1)
    tower = load_config(AlignConfig, CONFIGS / "pad_ufes_20" / "align.yaml").image_tower
    torch.manual_seed(0)
    model = timm.create_model(tower.name, num_classes=0, **tower.options).train()
    pixels = torch.randn(_BATCH, 3, tower.image_size, tower.image_size)

    def contender(memory_format: torch.memory_format) -> Callable[[int], Figures]:
        def run(pair: int) -> Figures:
            del pair
            start = time.perf_counter()
            for _ in range(arguments.steps):
                model.forward_features(pixels.contiguous(memory_format=memory_format)).square().mean().backward()
            return {"photos/s": _BATCH * arguments.steps / (time.perf_counter() - start)}

        return run

    contenders = {"last": contender(torch.channels_last), "first": contender(torch.contiguous_format)}
    for warm in contenders.values():
        warm(0)
    pairs = interleave(contenders, pairs=arguments.pairs)
    section = {"pairs": pairs, "ratio": ("photos/s", "last", "first"), "tower": tower.model_dump(mode="json")}
    report("channels_last", arguments, sections={"": section}, argv=argv)
    return 0


if __name__ == "__main__":
    sys.exit(main())
