"""The sections of a training stage's config: optimizer, engine, context, checkpoints, tracking, and what they share.

To add an engine or a context: a class with its own `kind` here, one line in its union, one branch in
`engine.build_engine` or `launch.launch`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from prima_ray.base import StrictConfig

EXECUTION_KEYS = frozenset(
    {"num_workers", "micro_batch", "context", "engine", "tracking", "log_exam_ids", "checkpoint"}
)
"""Where and how fast a run trains, not what: a run may be taken up with other values."""
_Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(StrictConfig):
    """AdamW with linear warm-up and cosine decay."""

    lr: float = Field(gt=0)
    weight_decay: float = Field(default=1e-3, ge=0)
    """Applied to matrices only: biases, norms and the temperature are not decayed."""
    betas: tuple[_Beta, _Beta] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)
    warmup_fraction: float = Field(default=0.1, ge=0, lt=1)
    """Share of all steps over which the rate rises linearly from 0."""
    final_lr_fraction: float = Field(default=0.0, ge=0, le=1)
    """The rate at the last step as a share of `lr`."""
    clip_norm: float | None = Field(default=1.0, gt=0)
    """Largest norm of the whole gradient; `null` switches clipping off."""


class TorchEngineConfig(StrictConfig):
    """Plain torch: gradients are averaged over the workers after the last micro-batch."""

    kind: Literal["torch"] = "torch"


class DeepSpeedEngineConfig(StrictConfig):
    """DeepSpeed with ZeRO."""

    kind: Literal["deepspeed"] = "deepspeed"
    zero_stage: Literal[0, 1, 2, 3] = 1
    reduce_bucket_size: int = Field(default=50_000_000, gt=0)
    """Elements reduced at a time."""


EngineConfig = Annotated[TorchEngineConfig | DeepSpeedEngineConfig, Field(discriminator="kind")]


class LocalContextConfig(StrictConfig):
    """Train in this process, without Ray."""

    kind: Literal["local"] = "local"
    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    """`auto` takes a GPU where there is one; else `cpu`, `cuda` or `cuda:1`."""


class RayContextConfig(StrictConfig):
    """Train in Ray Train workers that stream from Ray Data."""

    kind: Literal["ray"] = "ray"
    address: str | None = None
    """A cluster's address; `null` joins the one named by RAY_ADDRESS, else starts one on this machine."""
    cpus_per_worker: float = Field(default=0.5, gt=0)
    """Less than the cluster has: Ray Data reads with what the workers leave."""
    gpus_per_worker: float = Field(default=0.0, ge=0)
    autoscales: bool = False
    """The cluster adds nodes when they are asked for: a job that does not fit yet waits instead of being refused."""
    num_cpus: int | None = Field(default=None, gt=0)
    """Logical CPUs of a cluster started here; `null`: enough for the workers and the readers."""
    max_failures: int = Field(default=2, ge=-1)
    """Restarts of the worker group from the last checkpoint before giving up; -1: without end."""
    resize_interval_s: float = Field(default=60.0, gt=0)
    """How often an elastic run looks for nodes to grow onto."""
    leave_timeout_s: float = Field(default=60.0, gt=0)
    """How long workers that make room for another number of workers may take to finish their step and save."""


ContextConfig = Annotated[LocalContextConfig | RayContextConfig, Field(discriminator="kind")]


def _ray_first(value: Any) -> Any:
    return {"kind": "ray", **value} if isinstance(value, dict) else value


RayFirstContextConfig = Annotated[ContextConfig, BeforeValidator(_ray_first)]
"""A context whose `kind` may be left out where it is Ray."""


class CheckpointConfig(StrictConfig):
    """How checkpoints are written, and which stay."""

    keep_last: int = Field(default=2, ge=1)
    """The newest so many, beside the best: with one alone there would be none before it if it turns out damaged."""
    asynchronous: bool = True
    """Training goes on while a checkpoint is written; the next one waits for it. `false` waits at once."""


class SelectionConfig(StrictConfig):
    """Which validation metric decides the best checkpoint and early stopping."""

    metric: str
    mode: Literal["min", "max"]
    patience_epochs: int | None = Field(default=None, gt=0)
    """Stop after so many epochs without a better value; `null`: never."""
    min_epochs: int = Field(default=0, ge=0)
    """Earlier epochs neither stop the run nor count as the best."""


class TrackingConfig(StrictConfig):
    """TensorBoard event files are always written; MLflow is asked for."""

    mlflow_uri: str | None = None
    mlflow_experiment: str = "prima_ray"


class LoopConfig(StrictConfig):
    """What every stage that trains has."""

    out: str
    seed: int = Field(default=0, ge=0)
    epochs: int = Field(default=10, gt=0)
    max_steps: int | None = Field(default=None, gt=0)
    """Stop after so many optimizer steps; the schedule ends there too."""
    global_batch: int = Field(default=64, gt=0)
    """Exams an optimizer step, over all workers."""
    micro_batch: int | None = Field(default=None, gt=0)
    """Exams a forward pass on one worker; `null`: all of the worker's share."""
    num_workers: int | tuple[int, int] = 1
    """A number, or `[min, max]` for an elastic run."""
    engine: EngineConfig = TorchEngineConfig()
    context: ContextConfig = LocalContextConfig()
    precision: Literal["fp32", "bf16"] = "fp32"
    optimizer: OptimizerConfig
    selection: SelectionConfig
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()
    checkpoint_every_steps: int | None = Field(default=None, gt=0)
    """A checkpoint so often, besides the one at each validation; `null`: only those."""
    validate_every_epochs: int = Field(default=1, gt=0)
    log_exam_ids: bool = False
    """Write every step's exams to steps.jsonl."""
    shuffle_window: int | None = Field(default=None, gt=0)
    """Rows shuffled together; `null` shuffles the whole data set at once. Set it for data larger than memory."""

    @model_validator(mode="after")
    def _check_loop(self) -> Self:
        low, high = self.worker_range
        if low < 1 or high < low:
            raise ValueError(f"num_workers: expected a number from 1 or [min, max], got {self.num_workers!r}")
        if self.context.kind == "local" and high > 1:
            raise ValueError(
                f"num_workers is {self.num_workers!r}, but the local context has one worker: "
                "set context.kind to ray, or num_workers to 1"
            )
        if self.global_batch < high:
            raise ValueError(f"global_batch {self.global_batch} is smaller than num_workers {high}")
        if self.selection.min_epochs > self.epochs:
            raise ValueError(
                f"selection.min_epochs is {self.selection.min_epochs}, but there are {self.epochs} epochs: none would "
                "be chosen before the last"
            )
        return self

    @property
    def worker_range(self) -> tuple[int, int]:
        """Least and most workers."""
        return (self.num_workers, self.num_workers) if isinstance(self.num_workers, int) else self.num_workers


class TrainingConfig(LoopConfig):
    """What align, finetune and fuse share: the loop over the folds of a data set."""

    fold: int | Literal["none"] = 0
    """The test fold, touched once; `none` trains on every fold."""
    val_fold: int | None = None
    """Decides everything that is chosen; `null`: the fold after `fold`."""
    split: Literal["patient", "lesion"] = "patient"
    feature_cache: str | None = None
    """Where frozen towers' features are kept; `null`: `features` beside `out`."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.fold != "none" and self.val_fold == self.fold:
            raise ValueError(f"val_fold and fold are both {self.fold}: the test fold must not choose the model")
        if self.fold == "none" and self.val_fold is None and self.selection.patience_epochs is not None:
            raise ValueError(
                "selection.patience_epochs needs a validation fold: with fold: none, name a val_fold or set it to null"
            )
        return self
