"""Engines: forward, backward and step behind one face. The loop and the tasks see only `Engine`.

State leaves an engine as full fp32 tensors by parameter name, the same for every engine, ZeRO stage and world size:
that is what makes a checkpoint independent of all three. To add an engine: a class with these methods, a config with
its own `kind`, one branch in `build_engine`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor, nn

from prima_ray.data.batch import ImageTextBatch
from prima_ray.training.config import DeepSpeedEngineConfig, EngineConfig, OptimizerConfig

State = dict[str, Tensor]
"""`param/NAME`, `exp_avg/NAME`, `exp_avg_sq/NAME` (fp32, full shape, on the CPU) and `step` (int64, shape (1,))."""


class Engine(Protocol):
    """What the loop needs of an engine."""

    module: nn.Module

    def forward(self, batch: ImageTextBatch) -> dict[str, Tensor]:
        """The model's outputs; autocast covers this call and nothing else."""
        ...

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate gradients; ``last`` says that `step` follows."""
        ...

    def step(self, lr: float) -> float:
        """Average gradients over the workers, clip, update with rate ``lr``, clear; the norm before clipping."""
        ...

    def export_state(self) -> State:
        """The full training state, on every rank. Collective."""
        ...

    def import_state(self, state: State) -> None:
        """Take over a state from `export_state` of any engine and world size. Collective."""
        ...

    def describe(self) -> dict[str, object]:
        """What the engine itself says it is: kind, ZeRO stage, world size."""
        ...


def trainable_parameters(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Names and parameters that train, in a fixed order."""
    return [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]


def parameter_groups(module: nn.Module, config: OptimizerConfig) -> list[dict[str, object]]:
    """Two AdamW groups: matrices with weight decay; biases, norms and temperatures without."""
    named = trainable_parameters(module)
    matrices = [parameter for _, parameter in named if parameter.ndim >= 2]
    others = [parameter for _, parameter in named if parameter.ndim < 2]
    groups: list[dict[str, object]] = []
    if matrices:
        groups.append({"params": matrices, "weight_decay": config.weight_decay})
    if others:
        groups.append({"params": others, "weight_decay": 0.0})
    return groups


def build_optimizer(module: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over `parameter_groups`; its rate is set before every step."""
    return torch.optim.AdamW(parameter_groups(module, config), lr=config.lr, betas=config.betas, eps=config.eps)


def read_adam_state(optimizer: torch.optim.Optimizer, named: Iterable[tuple[str, nn.Parameter]]) -> State:
    """Moments and step count of unpartitioned parameters; zeros before the first step."""
    state: State = {}
    step = 0
    for name, parameter in named:
        found = optimizer.state.get(parameter, {})
        state[f"param/{name}"] = parameter.detach().float().cpu().clone()
        for key in ("exp_avg", "exp_avg_sq"):
            value = found.get(key)
            state[f"{key}/{name}"] = (
                torch.zeros_like(parameter, device="cpu", dtype=torch.float32)
                if value is None
                else value.detach().float().cpu().clone()
            )
        step = max(step, int(found["step"])) if "step" in found else step
    state["step"] = torch.tensor([step])
    return state


def write_adam_state(optimizer: torch.optim.Optimizer, named: Iterable[tuple[str, nn.Parameter]], state: State) -> None:
    """Inverse of `read_adam_state`."""
    with torch.no_grad():
        for name, parameter in named:
            parameter.copy_(state[f"param/{name}"])
            optimizer.state[parameter] = {
                "step": torch.tensor(float(state["step"])),
                # Copies: Adam updates its moments in place, and the state may be kept by the caller.
                "exp_avg": torch.empty_like(parameter).copy_(state[f"exp_avg/{name}"]),
                "exp_avg_sq": torch.empty_like(parameter).copy_(state[f"exp_avg_sq/{name}"]),
            }


def distributed_world() -> tuple[int, int]:
    """(rank, world size) of the process group, (0, 1) without one."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


class TorchEngine:
    """Plain torch. Gradients are averaged in one all-reduce of a flat buffer a dtype, in parameter order."""

    def __init__(self, module: nn.Module, optimizer: OptimizerConfig, *, precision: str, device: torch.device) -> None:
        self.module = module.to(device)
        self._named = trainable_parameters(module)
        self._optimizer = build_optimizer(module, optimizer)
        self._clip_norm = optimizer.clip_norm
        self._autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")

    def forward(self, batch: ImageTextBatch) -> dict[str, Tensor]:
        with self._autocast:
            outputs: dict[str, Tensor] = self.module(batch)
        return outputs

    def backward(self, loss: Tensor, *, last: bool) -> None:
        # `last` matters to engines that reduce while they accumulate; this one reduces in `step`.
        del last
        torch.autograd.backward(loss)

    def step(self, lr: float) -> float:
        self._average_gradients()
        parameters = [parameter for _, parameter in self._named]
        limit = float("inf") if self._clip_norm is None else self._clip_norm
        norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return float(norm)

    def _average_gradients(self) -> None:
        _, world_size = distributed_world()
        for _, parameter in self._named:
            # A parameter that no exam of this rank touched still takes part in the average.
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if world_size == 1:
            return
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for _, parameter in self._named:
            if parameter.grad is not None:
                by_dtype.setdefault(parameter.dtype, []).append(parameter.grad)
        for gradients in by_dtype.values():
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            torch.distributed.all_reduce(flat)
            flat /= world_size
            start = 0
            for gradient in gradients:
                gradient.copy_(flat[start : start + gradient.numel()].view_as(gradient))
                start += gradient.numel()

    def export_state(self) -> State:
        return read_adam_state(self._optimizer, self._named)

    def import_state(self, state: State) -> None:
        write_adam_state(self._optimizer, self._named, state)

    def describe(self) -> dict[str, object]:
        return {"kind": "torch", "world_size": distributed_world()[1]}


def build_engine(
    module: nn.Module,
    config: EngineConfig,
    optimizer: OptimizerConfig,
    *,
    precision: str,
    device: torch.device,
    num_micro_batches: int = 1,
) -> Engine:
    """The engine of ``config.kind`` around ``module``, for ``num_micro_batches`` backward passes a step.

    Raises:
        ValueError: nothing in the module trains.
    """
    if not trainable_parameters(module):
        raise ValueError("every parameter is frozen: nothing would train; set a `trainable` key to full or lora")
    if isinstance(config, DeepSpeedEngineConfig):
        from prima_ray.training.engine_deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(
            module, config, optimizer, precision=precision, device=device, num_micro_batches=num_micro_batches
        )
    return TorchEngine(module, optimizer, precision=precision, device=device)
