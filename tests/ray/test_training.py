"""One smoke config through {torch, DeepSpeed} x {local, Ray}, a worker that dies on the way, and a user's mistake.

A launch under Ray costs most of a minute, so each carries several questions.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from prima_ray.stages import align, finetune
from prima_ray.stages.align import AlignConfig
from prima_ray.stages.finetune import FinetuneConfig
from prima_ray.training.checkpoint import load_last
from tests.conftest import write_toy_shards

pytest.importorskip("ray")
pytest.importorskip("deepspeed")

TORCH: dict[str, Any] = {"engine": {"kind": "torch"}, "context": {"kind": "local", "device": "cpu"}}
DEEPSPEED: dict[str, Any] = {**TORCH, "engine": {"kind": "deepspeed", "zero_stage": 1}}
# 7 exams a step on two workers: 4 and 3, and another exam of padding at the ragged end.
RAY: dict[str, Any] = {"context": {"kind": "ray", "cpus_per_worker": 0.5}, "num_workers": 2}

COMMON: dict[str, Any] = {
    "seed": 3,
    "global_batch": 7,
    "max_steps": 6,
    "split": "lesion",
    "views": {"image_size": 32},
    "optimizer": {"lr": 1e-2, "clip_norm": 0.5},
    "checkpoint_every_steps": 2,
    "log_exam_ids": True,
}
TOWER: dict[str, Any] = {"name": "resnet10t", "image_size": 32}
ALIGN: dict[str, Any] = {
    **COMMON,
    "image_tower": TOWER,
    "text_tower": {
        "config": {"model_type": "bert", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
                   "intermediate_size": 16, "vocab_size": 30522},
        "max_tokens": 32,
    },
    "projection": {"width": 16},
}  # fmt: skip
FINETUNE: dict[str, Any] = {**COMMON, "image_tower": TOWER, "views": {"image_size": 32, "num_views": 1}}


@dataclass(frozen=True)
class Outcome:
    run: Path

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.run / "steps.jsonl").read_text().splitlines()]

    def values(self, key: str) -> list[Any]:
        return [line[key] for line in self.lines]

    @property
    def starts(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.run / "starts.jsonl").read_text().splitlines()]

    @property
    def metrics(self) -> dict[str, float]:
        loaded = load_last(self.run / "checkpoints")
        assert loaded is not None
        return loaded[1].metrics


def run_align(out: Path, shards: str, **keys: Any) -> Outcome:
    config = AlignConfig.model_validate({"out": str(out), "inputs": {"shards": shards}, **ALIGN, **keys})
    return Outcome(align.run(config))


def run_finetune(out: Path, shards: str, **keys: Any) -> Outcome:
    config = FinetuneConfig.model_validate({"out": str(out), "inputs": {"shards": shards}, **FINETUNE, **keys})
    return Outcome(finetune.run(config))


def assert_alike(found: Outcome, wanted: Outcome) -> None:
    assert found.values("step") == list(range(1, 7))
    assert found.values("loss") == pytest.approx(wanted.values("loss"), rel=1e-5)
    assert found.values("grad_norm") == pytest.approx(wanted.values("grad_norm"), rel=1e-3)
    assert found.values("lr") == wanted.values("lr")
    assert [sorted(ids) for ids in found.values("exam_ids")] == [sorted(ids) for ids in wanted.values("exam_ids")]
    assert found.metrics == pytest.approx(wanted.metrics, rel=1e-4)
    assert max(wanted.values("grad_norm")) > 0.5, "clipping was never active"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("training")


@pytest.fixture(scope="module")
def shards(folder: Path) -> str:
    return write_toy_shards(folder / "shards", num_folds=5)


@pytest.fixture(scope="module")
def aligned(folder: Path, shards: str) -> Outcome:
    return run_align(folder / "align-local-torch", shards, **TORCH)


@pytest.fixture(scope="module")
def finetuned(folder: Path, shards: str) -> Outcome:
    return run_finetune(folder / "finetune-local-torch", shards, **TORCH)


def test_deepspeed_in_this_process_trains_as_torch_does(folder: Path, shards: str, aligned: Outcome):
    before = dict(os.environ)
    found = run_align(folder / "align-local-deepspeed", shards, **DEEPSPEED, micro_batch=3)
    assert found.starts[0]["engine"] == {"kind": "deepspeed", "zero_stage": 1, "world_size": 1}
    assert_alike(found, aligned)
    # What a launcher would set is gone: a cluster that is started next would hand it to its workers.
    assert [name for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE") if os.environ.get(name) != before.get(name)] == []


def test_two_deepspeed_workers_under_ray_train_as_torch_does_here(
    cluster: Any, folder: Path, shards: str, aligned: Outcome
):
    found = run_align(folder / "align-ray-deepspeed", shards, **{**DEEPSPEED, **RAY}, micro_batch=3)
    assert found.starts[0]["engine"] == {"kind": "deepspeed", "zero_stage": 1, "world_size": 2}
    assert found.values("world_size") == [2] * 6
    assert_alike(found, aligned)


def test_two_torch_workers_one_of_which_dies_train_as_one_here(
    cluster: Any, folder: Path, shards: str, finetuned: Outcome, monkeypatch: pytest.MonkeyPatch
):
    marker = folder / "died"
    original = finetune.make_task

    def mortal(*arguments: Any) -> Any:
        task = original(*arguments)
        return _mortal(task, marker)

    monkeypatch.setattr(finetune, "make_task", mortal)
    keys = {**TORCH, **RAY, "micro_batch": 2}
    found = run_finetune(folder / "finetune-ray-torch", shards, **keys)
    assert marker.exists()
    assert [(start["from_step"], start["replayed_steps"]) for start in found.starts] == [(0, 0), (2, 1)]
    assert_alike(found, finetuned)


def _mortal(task: Any, marker: Path) -> Any:
    """A task whose worker dies, without a word, in the loss of its fourth step; once."""
    import ray.cloudpickle

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

    class Mortal(type(task)):  # type: ignore[misc]
        def loss(self, outputs: Any, batch: Any, **keys: Any) -> Any:
            calls = Mortal.__dict__.get("calls", 0) + 1
            Mortal.calls = calls  # type: ignore[attr-defined]
            # Two micro-batches a step.
            if calls == 7 and torch.distributed.get_rank() == 1 and not marker.exists():
                marker.touch()
                os._exit(1)
            return super().loss(outputs, batch, **keys)

    return Mortal(**vars(task))


def test_ctrl_c_stops_the_workers_and_the_run_goes_on_here(cluster: Any, folder: Path, shards: str):
    length = {"epochs": 100, "max_steps": 200, "validate_every_epochs": 100, "log_exam_ids": False}
    keys = {**TORCH, **RAY, "num_workers": 1, **length}
    out = folder / "interrupted"
    path = folder / "interrupted.yaml"
    path.write_text(yaml.safe_dump({"out": str(out), "inputs": {"shards": shards}, **FINETUNE, **keys}))
    said, steps = folder / "interrupted.log", out / "steps.jsonl"
    with said.open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "prima_ray.cli", "finetune", str(path)],
            env={**os.environ, "RAY_ADDRESS": cluster.get_runtime_context().gcs_address},
            stdout=subprocess.DEVNULL,
            stderr=stderr,
        )
        try:
            deadline = time.monotonic() + 240
            while not steps.exists() or steps.read_text().count("\n") < 5:
                assert process.poll() is None, said.read_text()
                assert time.monotonic() < deadline, said.read_text()
                time.sleep(0.1)
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=120) == 130
        finally:
            process.kill()
    assert said.read_text().endswith("prima: interrupted; the same command continues where it can\n")
    assert not (out / "run.json").exists()
    assert len(Outcome(out).lines) < 200
    # Where a run trains is not what it trains: this process takes it up.
    finished = run_finetune(out, shards, **{**keys, **TORCH})
    assert finished.values("step") == list(range(1, 201))
    assert [start["from_step"] > 0 for start in finished.starts] == [False, True]


def test_a_mistake_found_by_the_workers_is_two_lines_and_exit_2(cluster: Any, folder: Path, shards: str):
    keys = {**TORCH, **RAY, "optimizer": {"lr": 1e30, "warmup_fraction": 0}}
    out = folder / "mistake"
    config = {"out": str(out), "inputs": {"shards": shards}, **FINETUNE, **keys}
    path = folder / "mistake.yaml"
    path.write_text(yaml.safe_dump(config))
    answer = subprocess.run(
        [sys.executable, "-m", "prima_ray.cli", "finetune", str(path)],
        env={**os.environ, "RAY_ADDRESS": cluster.get_runtime_context().gcs_address},
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 2, answer.stderr
    assert answer.stdout == ""
    what, mend = answer.stderr.splitlines()[-2:]
    assert re.fullmatch(rf"prima: {out}: the (loss|gradient's norm) is (nan|inf) at step \d \(exams e\d.*\)", what), (
        what
    )
    assert mend == "  A lower optimizer.lr, or precision: fp32, usually helps."
    # No frame of ours; Ray may have its own troubles on a busy machine.
    assert "prima_ray/" not in answer.stderr
    # Nor what Ray tells of every group of workers.
    for chatter in ("Requesting resources", "worker group", "world_rank=", "process group for", "PreemptionWatcher"):
        assert chatter not in answer.stderr
