from __future__ import annotations

import math

import pytest

from prima_ray.training.config import OptimizerConfig
from prima_ray.training.schedule import learning_rate


def test_linear_warm_up_then_cosine():
    config = OptimizerConfig(lr=1.0, warmup_fraction=0.2, final_lr_fraction=0.1)
    rates = [learning_rate(step, 10, config) for step in range(11)]
    assert rates[:3] == pytest.approx([0.5, 1.0, 1.0])
    assert rates[6] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 4 / 8)))
    assert rates[10] == pytest.approx(0.1)
    assert rates[2:] == sorted(rates[2:], reverse=True)


def test_without_warm_up_the_first_rate_is_the_full_one():
    assert learning_rate(0, 1, OptimizerConfig(lr=0.3, warmup_fraction=0.0)) == pytest.approx(0.3)
