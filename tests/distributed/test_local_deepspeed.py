"""The loop with DeepSpeed in this process: every ZeRO stage beside plain torch on a toy task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from prima_ray.base import PrimaError
from prima_ray.data.plan import ExamIndex
from prima_ray.training.checkpoint import load_last
from prima_ray.training.launch import launch
from tests.unit.training.toys import Classify, Contrast, curve, make_job

pytest.importorskip("deepspeed")
STAGES = (0, 1, 2, 3)


def run(out: Path, shards: str, *, stage: int | None = None, task: Any = None, **keys: Any) -> Path:
    engine = {"kind": "torch"} if stage is None else {"kind": "deepspeed", "zero_stage": stage}
    job = make_job(out, shards, task, engine=engine, context={"kind": "local", "device": "cpu"}, **keys)
    launch(job)
    return job.run


@pytest.mark.parametrize("kind", [Classify, Contrast])
@pytest.mark.parametrize("clip_norm", [0.1, None])
def test_every_stage_trains_torchs_curve(
    tmp_path: Path, toy_shards: str, kind: type[Classify | Contrast], clip_norm: float | None
):
    task = kind(ExamIndex.read(toy_shards).manifest.data_set)
    keys = {"micro_batch": 2, "optimizer": {"lr": 0.05, "weight_decay": 0.1, "clip_norm": clip_norm}}
    wanted = run(tmp_path / "torch", toy_shards, task=task, **keys)
    expected = load_last(wanted / "checkpoints")
    assert expected is not None
    for stage in STAGES:
        found = run(tmp_path / f"zero{stage}", toy_shards, stage=stage, task=task, **keys)
        assert curve(found) == pytest.approx(curve(wanted), abs=1e-5), stage
        assert curve(found, "grad_norm") == pytest.approx(curve(wanted, "grad_norm"), rel=1e-3), stage
        loaded = load_last(found / "checkpoints")
        assert loaded is not None
        assert loaded[1].metrics == pytest.approx(expected[1].metrics, abs=1e-5), stage


@pytest.mark.parametrize("stage", STAGES)
def test_bf16_is_near_fp32(tmp_path: Path, toy_shards: str, stage: int):
    exact = curve(run(tmp_path / "fp32", toy_shards))
    coarse = curve(run(tmp_path / "bf16", toy_shards, stage=stage, precision="bf16"))
    assert coarse != exact
    assert coarse == pytest.approx(exact, rel=3e-2)


@pytest.mark.parametrize("stage", STAGES)
def test_a_gradient_that_is_not_finite_stops_the_run(tmp_path: Path, toy_shards: str, stage: int):
    """ZeRO would leave the step out without a word."""
    index = ExamIndex.read(toy_shards)
    task = Classify(index.manifest.data_set, poison_gradient=str(index.exam_ids[0]))
    with pytest.raises(PrimaError, match="the gradient's norm is (nan|inf) at step"):
        run(tmp_path / "run", toy_shards, stage=stage, task=task)
