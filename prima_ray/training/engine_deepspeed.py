"""The DeepSpeed engine, ZeRO 0 to 3: the only module that imports deepspeed.

DeepSpeed refuses to load a checkpoint at another world size for ZeRO 1 to 3. So state is gathered here parameter by
parameter into full fp32 tensors, and scattered again into whatever partitions this run has.
"""

from __future__ import annotations

import logging
import os
from typing import Any

import torch
from torch import Tensor, nn

from prima_ray.data.batch import ImageTextBatch
from prima_ray.training.config import DeepSpeedEngineConfig, OptimizerConfig
from prima_ray.training.engine import (
    State,
    build_optimizer,
    distributed_world,
    read_adam_state,
    trainable_parameters,
    write_adam_state,
)
from prima_ray.training.engine_build import prepare_environment, tell_of_a_build

_MOMENTS = ("exp_avg", "exp_avg_sq")


class DeepSpeedEngine:
    """`deepspeed.initialize` around a module; the process group must exist already."""

    def __init__(
        self,
        module: nn.Module,
        config: DeepSpeedEngineConfig,
        optimizer: OptimizerConfig,
        *,
        precision: str,
        device: torch.device,
        num_micro_batches: int = 1,
    ) -> None:
        deepspeed = import_deepspeed()
        self._deepspeed = deepspeed
        self._stage = config.zero_stage
        module = module.to(device)
        names = [name for name, _ in trainable_parameters(module)]
        client = build_optimizer(module, optimizer)
        # ZeRO's set-up may take an optimizer step on zero gradients: what was there before is put back afterwards.
        initial = read_adam_state(client, trainable_parameters(module))
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=module,
            optimizer=client,
            config=_config_dict(config, optimizer, precision=precision, num_micro_batches=num_micro_batches),
            dist_init_required=False,
        )
        self.module = module
        parameters = dict(module.named_parameters())
        self._named = [(name, parameters[name]) for name in names]
        self.import_state(initial)

    def forward(self, batch: ImageTextBatch) -> dict[str, Tensor]:
        outputs: dict[str, Tensor] = self._engine(batch)
        return outputs

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss, scale_wrt_gas=False)

    def step(self, lr: float) -> float:
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        # ZeRO-0 keeps no norm; its gradients are whole and averaged by now.
        norm = self._plain_norm() if self._stage == 0 else None
        self._engine.step()
        return float(self._engine.get_global_grad_norm()) if norm is None else norm

    def _plain_norm(self) -> float:
        gradients = [parameter.grad for _, parameter in self._named if parameter.grad is not None]
        return float(torch.nn.utils.get_total_norm(gradients))

    def export_state(self) -> State:
        if self._stage == 0:
            return read_adam_state(self._adam, self._named)
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        state: State = {"step": torch.tensor([self._adam_step()])}
        for name, parameter in self._named:
            shape = parameter.ds_shape if self._stage == 3 else parameter.shape  # type: ignore[attr-defined]
            state[f"param/{name}"] = safe_get_full_fp32_param(parameter).detach().float().cpu().reshape(shape).clone()
            for key in _MOMENTS:
                value = safe_get_full_optimizer_state(parameter, key)
                state[f"{key}/{name}"] = value.detach().float().cpu().reshape(shape).clone()
        return state

    def import_state(self, state: State) -> None:
        if self._stage == 0:
            write_adam_state(self._adam, self._named, state)
            return
        self._create_moments(step=int(state["step"]))
        if self._stage == 3:
            self._scatter_stage_3(state)
        else:
            self._scatter_stage_1_and_2(state)

    def describe(self) -> dict[str, object]:
        return {
            "kind": "deepspeed",
            "zero_stage": int(self._engine.zero_optimization_stage()),
            "world_size": int(self._engine.dp_world_size),
        }

    @property
    def _adam(self) -> torch.optim.Optimizer:
        """The torch optimizer itself, inside ZeRO's wrapper where there is one."""
        inner: torch.optim.Optimizer = getattr(self._optimizer, "optimizer", self._optimizer)
        return inner

    def _partitions(self) -> list[Tensor]:
        """This rank's flat fp32 partitions, the keys of the inner optimizer's state."""
        wrapper = self._optimizer
        flat: list[Tensor] = (
            wrapper.fp32_partitioned_groups_flat if self._stage == 3 else wrapper.single_partition_of_fp32_groups
        )
        return flat

    def _adam_step(self) -> int:
        return max(int(self._adam.state[flat]["step"]) for flat in self._partitions())

    def _create_moments(self, *, step: int) -> None:
        """Adam's state on every partition, which ZeRO leaves out until the first step."""
        for flat in self._partitions():
            self._adam.state[flat] = {
                "step": torch.tensor(float(step)),
                **{key: torch.zeros_like(flat.data) for key in _MOMENTS},
            }
        if self._stage != 3:
            # ZeRO links parameters to their moments once, after its first step; these are new tensors.
            from deepspeed.utils import lazy_init_hp_params_optimizer_state

            for group, flat in zip(self._optimizer.bit16_groups, self._partitions(), strict=True):
                lazy_init_hp_params_optimizer_state(group, flat, self._adam.state)
            self._optimizer._hp_optimizer_states_linked = True

    def _scatter_stage_1_and_2(self, state: State) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        with torch.no_grad():
            for name, parameter in self._named:
                value = state[f"param/{name}"].to(parameter.device)
                parameter.data.copy_(value)
                safe_set_full_fp32_param(parameter, value)
                for key in _MOMENTS:
                    safe_set_full_optimizer_state(parameter, state[f"{key}/{name}"].to(parameter.device), key)

    def _scatter_stage_3(self, state: State) -> None:
        from deepspeed.utils import safe_get_local_fp32_param, safe_set_local_fp32_param, safe_set_local_optimizer_state

        rank, _ = distributed_world()
        for name, parameter in self._named:
            with self._deepspeed.zero.GatheredParameters([parameter], modifier_rank=0), torch.no_grad():
                if rank == 0:
                    parameter.data.copy_(state[f"param/{name}"].to(parameter.device))
            local = safe_get_local_fp32_param(parameter)
            safe_set_local_fp32_param(parameter, _own_slice(state[f"param/{name}"], local, rank))
            for key in _MOMENTS:
                safe_set_local_optimizer_state(parameter, _own_slice(state[f"{key}/{name}"], local, rank), key)


def _own_slice(full: Tensor, local: Tensor, rank: int) -> Tensor:
    """This rank's piece of a flattened parameter; ZeRO-3 pads the last rank's piece with zeros."""
    piece = torch.zeros_like(local)
    values = full.flatten()[rank * local.numel() : (rank + 1) * local.numel()]
    piece.flatten()[: values.numel()].copy_(values)
    return piece


def _config_dict(
    config: DeepSpeedEngineConfig, optimizer: OptimizerConfig, *, precision: str, num_micro_batches: int
) -> dict[str, Any]:
    # DeepSpeed ignores a misspelt top-level key without a word: nothing of the user's YAML is passed through.
    _, world_size = distributed_world()
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": num_micro_batches,
        "train_batch_size": num_micro_batches * world_size,
        "gradient_clipping": optimizer.clip_norm or 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": config.zero_stage, "reduce_bucket_size": config.reduce_bucket_size},
        "torch_autocast": {"enabled": precision == "bf16", "dtype": "bfloat16"},
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    }


def import_deepspeed() -> Any:
    """Import deepspeed with its chatter turned down to warnings."""
    gpus = torch.cuda.is_available()
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if gpus else "cpu")
    prepare_environment()
    if not gpus:
        tell_of_a_build()
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(dist_backend="nccl" if gpus else "gloo", dist_init_required=False, verbose=False)
    return deepspeed
