"""Exams/s of the small preset's language model, forward and backward: its prompt read once a batch, or for every exam.

The model of jobs/configs/pad_ufes_20/fuse.yaml with the features of a batch of 32 exams, random ones, no optimizer.

    python benchmarks/shared_prompt.py [--pairs 7] [--steps 5] [--quick]
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from _harness import CONFIGS, Figures, interleave, parse, parser, report

from prima_ray.config import load_config
from prima_ray.data.batch import ImageTextBatch
from prima_ray.models.fusion import FusionInputs, Qwen3FusionConfig
from prima_ray.stages.fuse import FuseConfig

_BATCH, _TOKENS, _ATTRIBUTES = 32, 90, 80
_CLASSES = (
    "actinic keratosis",
    "basal cell carcinoma",
    "melanoma",
    "nevus",
    "squamous cell carcinoma",
    "seborrheic keratosis",
)


def main(argv: Sequence[str] | None = None) -> int:
    command = parser(__doc__, shards=False)
    command.add_argument("--steps", type=int, default=5, help="batches a turn (default %(default)s)")
    arguments = parse(command, argv, steps=1)
    fusion = load_config(FuseConfig, CONFIGS / "pad_ufes_20" / "fuse.yaml").fusion
    if not isinstance(fusion, Qwen3FusionConfig):
        raise TypeError("the small preset has no language model any more: nothing here has a prompt")
    inputs = FusionInputs(
        image_width=256,
        text_width=384,
        attribute_width=_ATTRIBUTES,
        grid=(3, 3),
        class_phrases=_CLASSES,
        subject="a patient with a skin lesion",
    )
    torch.manual_seed(0)
    model = fusion.build(inputs).train()
    batch = ImageTextBatch(
        exam_ids=tuple(str(number) for number in range(_BATCH)),
        weights=torch.ones(_BATCH),
        labels=torch.zeros(_BATCH, dtype=torch.int64),
        image_cls=torch.randn(_BATCH, 1, 256),
        image_seq=torch.randn(_BATCH, 1, 9, 256),
        image_mask=torch.ones(_BATCH, 1, dtype=torch.bool),
        text_cls=torch.randn(_BATCH, 384),
        text_seq=torch.randn(_BATCH, _TOKENS, 384),
        attributes=torch.rand(_BATCH, _ATTRIBUTES).round(),
        attention_mask=torch.ones(_BATCH, _TOKENS, dtype=torch.bool),
    )

    def contender(*, once: bool) -> Callable[[int], Figures]:
        # The model asks its config which way to go; its backbone keeps its activations either way.
        config = fusion.model_copy(update={"gradient_checkpointing": not once})

        def run(pair: int) -> Figures:
            del pair
            model.config = config
            start = time.perf_counter()
            for _ in range(arguments.steps):
                model(batch)["logits"].square().mean().backward()
            return {"exams/s": _BATCH * arguments.steps / (time.perf_counter() - start)}

        return run

    contenders = {"once": contender(once=True), "each": contender(once=False)}
    for warm in contenders.values():
        warm(0)
    pairs = interleave(contenders, pairs=arguments.pairs)
    length = {"prompt_tokens": len(model.prompt_ids), "text_tokens": _TOKENS}
    report(
        "shared_prompt",
        arguments,
        sections={"": {"pairs": pairs, "ratio": ("exams/s", "once", "each"), **length}},
        argv=argv,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
