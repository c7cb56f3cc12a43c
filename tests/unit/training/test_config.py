from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from prima_ray.training.config import TrainingConfig
from tests.unit.training.toys import make_config


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"num_workers": 0}, "num_workers: expected a number from 1 or [min, max], got 0"),
        ({"num_workers": [3, 2]}, "num_workers: expected a number from 1 or [min, max], got (3, 2)"),
        (
            {"num_workers": 2},
            "num_workers is 2, but the local context has one worker: set context.kind to ray, or num_workers to 1",
        ),
        (
            {"num_workers": [1, 8], "context": {"kind": "ray"}},
            "global_batch 5 is smaller than num_workers 8",
        ),
        ({"fold": 2, "val_fold": 2}, "val_fold and fold are both 2: the test fold must not choose the model"),
        (
            {"selection": {"metric": "loss", "mode": "min", "min_epochs": 4}},
            "selection.min_epochs is 4, but there are 3 epochs: none would be chosen before the last",
        ),
        (
            {"fold": "none", "selection": {"metric": "loss", "mode": "min", "patience_epochs": 2}},
            "selection.patience_epochs needs a validation fold: with fold: none, name a val_fold or set it to null",
        ),
    ],
)
def test_rules_that_span_keys(keys: dict[str, Any], message: str):
    with pytest.raises(ValidationError) as caught:
        make_config(**keys)
    assert [error["msg"] for error in caught.value.errors()] == [f"Value error, {message}"]


@pytest.mark.parametrize(
    ("keys", "where"),
    [
        ({"optimizer": {"lr": 0}}, ("optimizer", "lr")),
        ({"optimizer": {"lr": 1, "betas": [0.9, 1.0]}}, ("optimizer", "betas", 1)),
        ({"optimizer": {"lr": 1, "warmup_fraction": 1}}, ("optimizer", "warmup_fraction")),
        ({"optimizer": {"lr": 1, "clip_norm": 0}}, ("optimizer", "clip_norm")),
        ({"engine": {"kind": "deepspeed", "zero_stage": 4}}, ("engine", "deepspeed", "zero_stage")),
        ({"context": {"kind": "local", "device": "gpu"}}, ("context", "local", "device")),
        ({"precision": "fp16"}, ("precision",)),
        ({"micro_batch": 0}, ("micro_batch",)),
    ],
)
def test_values_out_of_range(keys: dict[str, Any], where: tuple[str | int, ...]):
    with pytest.raises(ValidationError) as caught:
        make_config(**keys)
    assert caught.value.errors()[0]["loc"] == where


def test_clipping_may_be_switched_off_and_workers_may_be_a_range():
    config = make_config(
        optimizer={"lr": 1, "clip_norm": None}, num_workers=[1, 4], context={"kind": "ray"}, fold="none"
    )
    assert config.optimizer.clip_norm is None
    assert config.worker_range == (1, 4)
    assert TrainingConfig.model_validate(config.model_dump(mode="json")) == config
