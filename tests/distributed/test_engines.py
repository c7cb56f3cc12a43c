"""Engines agree with each other and hand their state over, on two gloo ranks. No Ray; DeepSpeed starts once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from prima_ray.training.config import DeepSpeedEngineConfig, EngineConfig, OptimizerConfig, TorchEngineConfig
from prima_ray.training.engine import Engine, State, build_engine
from prima_ray.training.ranks import start_ranks

WORLD = 2
STEPS = 6
ENGINES: dict[str, EngineConfig] = {
    "torch": TorchEngineConfig(),
    **{f"zero{stage}": DeepSpeedEngineConfig(zero_stage=stage) for stage in (0, 1, 2, 3)},
}
OPTIMIZER = OptimizerConfig(lr=1e-2, weight_decay=1e-2, clip_norm=0.05)


class Net(nn.Module):
    """Odd sizes (ZeRO pads them), a frozen part, and a temperature that must not be decayed."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 7), nn.Linear(7, 3)
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.temperature = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"y": self.frozen(self.last(torch.tanh(self.first(x)))) * self.temperature}


def make(kind: str) -> Engine:
    torch.manual_seed(0)
    return build_engine(
        Net(), ENGINES[kind], OPTIMIZER, precision="fp32", device=torch.device("cpu"), num_micro_batches=2
    )


def steps(engine: Engine, data: Tensor, first: int, rank: int, world: int) -> list[float]:
    losses = []
    for index in range(first, first + STEPS):
        mine = data[index].chunk(world)[rank]
        loss = torch.zeros(())
        for number, piece in enumerate(mine.chunk(2)):
            part = engine.forward(piece)["y"].pow(2).mean() / 2 * (1 + index)  # type: ignore[arg-type]
            engine.backward(part, last=number == 1)
            loss += part.detach()
        engine.step(1e-2 * (index + 1) / STEPS)
        if world > 1:
            dist.all_reduce(loss)
        losses.append(float(loss) / world)
    return losses


def rank_main(rank: int, folder: str) -> None:
    data = torch.randn(2 * STEPS, 8, 5, generator=torch.Generator().manual_seed(1))
    states: dict[str, State] = {}
    result: dict[str, Any] = {}
    for kind in ENGINES:
        engine = make(kind)
        losses = steps(engine, data, 0, rank, WORLD)
        states[kind] = engine.export_state()
        losses += steps(engine, data, STEPS, rank, WORLD)
        resumed = make(kind)
        # Every engine goes on from the state that the torch engine left.
        resumed.import_state(states["torch"])
        again = steps(resumed, data, STEPS, rank, WORLD)
        difference = {key: float((states[kind][key] - value).abs().max()) for key, value in states["torch"].items()}
        result[kind] = {"losses": losses, "resumed": again, "state": difference, "is": engine.describe()}
    if rank == 0:
        Path(folder, "result.json").write_text(json.dumps(result))
        torch.save(states["zero3"], Path(folder, "state.pt"))


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], State]:
    folder = tmp_path_factory.mktemp("engines")
    start_ranks(rank_main, WORLD, str(folder))
    return json.loads((folder / "result.json").read_text()), torch.load(folder / "state.pt")


@pytest.mark.parametrize("kind", ENGINES)
def test_every_engine_trains_the_same_curve(result: tuple[dict[str, Any], State], kind: str):
    found = result[0]
    assert found[kind]["losses"] == pytest.approx(found["torch"]["losses"], rel=1e-5)
    assert max(found[kind]["state"].values()) < 1e-6
    assert found[kind]["is"] == (
        {"kind": "torch", "world_size": WORLD}
        if kind == "torch"
        else {"kind": "deepspeed", "zero_stage": int(kind[-1]), "world_size": WORLD}
    )


@pytest.mark.parametrize("kind", ENGINES)
def test_every_engine_goes_on_from_another_engines_state(result: tuple[dict[str, Any], State], kind: str):
    found = result[0]
    assert found[kind]["resumed"] == pytest.approx(found["torch"]["losses"][STEPS:], rel=1e-5)


def test_one_worker_goes_on_from_the_state_of_two_zero_3_workers(result: tuple[dict[str, Any], State]):
    found, state = result
    data = torch.randn(2 * STEPS, 8, 5, generator=torch.Generator().manual_seed(1))
    engine = make("torch")
    engine.import_state(state)
    assert steps(engine, data, STEPS, 0, 1) == pytest.approx(found["torch"]["losses"][STEPS:], rel=1e-5)


def test_the_torch_engine_is_adamw_with_clipping_written_out():
    """One parameter, two steps, against the update rule of Loshchilov & Hutter (2019), in float64."""
    config = OptimizerConfig(lr=0.1, weight_decay=0.01, clip_norm=0.5)

    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.tensor([[2.0]], dtype=torch.float64))

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"y": self.w * x}

    engine = build_engine(One(), TorchEngineConfig(), config, precision="fp32", device=torch.device("cpu"))
    w, m, v = 2.0, 0.0, 0.0
    for step, (x, lr) in enumerate([(3.0, 0.1), (0.1, 0.05)], start=1):
        engine.backward(engine.forward(torch.tensor([[x]], dtype=torch.float64))["y"].sum(), last=True)  # type: ignore[arg-type]
        norm = engine.step(lr)
        assert norm == pytest.approx(x)
        g = x * min(1.0, 0.5 / (x + 1e-6))
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        w = w * (1 - lr * 0.01) - lr * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)) ** 0.5 + 1e-8)
        assert float(engine.module.w) == pytest.approx(w, abs=1e-12)  # type: ignore[arg-type]


def test_a_wholly_frozen_module_is_refused():
    with pytest.raises(ValueError, match="every parameter is frozen"):
        build_engine(
            Net().requires_grad_(False), TorchEngineConfig(), OPTIMIZER, precision="fp32", device=torch.device("cpu")
        )
