"""The learning rate as a pure function of the step, so that a resumed run needs no scheduler state."""

from __future__ import annotations

import math

from prima_ray.training.config import OptimizerConfig


def learning_rate(step: int, total_steps: int, config: OptimizerConfig) -> float:
    """The rate of optimizer step ``step`` (0 is the first): linear warm-up, then a cosine to the final share.

    The warm-up ends at the full rate; the cosine would reach its end one step after the last.
    """
    warmup = max(round(config.warmup_fraction * total_steps), 0)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    progress = (step - warmup) / max(total_steps - warmup, 1)
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))
    return config.lr * (config.final_lr_fraction + (1.0 - config.final_lr_fraction) * cosine)
