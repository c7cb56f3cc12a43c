"""The training loop: batches in, checkpoints out. Knows tasks, engines and contexts by their protocols only.

Read it as: `train` walks the plan from the cursor; `_step` is one optimizer step; `_validate` one look at the
validation fold; `_save` one checkpoint. Everything that decides the order is a function of (seed, epoch).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prima_ray.base import hash_key
from prima_ray.data.batch import ImageTextBatch
from prima_ray.data.plan import num_steps, plan_epoch, plan_steps, rank_rows
from prima_ray.training.allocator import keep_freed_memory
from prima_ray.training.checkpoint import Progress, load_last, save_checkpoint
from prima_ray.training.config import LoopConfig
from prima_ray.training.contexts import WorkerContext
from prima_ray.training.engine import Engine, State, build_engine, trainable_parameters
from prima_ray.training.gather import Gather
from prima_ray.training.gradient_cache import backward_cached, concatenate
from prima_ray.training.leaving import Notice
from prima_ray.training.schedule import learning_rate
from prima_ray.training.task import AgreedError, Task, refuse_unkeyed
from prima_ray.training.tracking import Tracker

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class TrainingJob:
    """Everything a worker needs, the same on every rank; picklable."""

    config: LoopConfig
    task: Task
    run: Path
    shards: str
    train_rows: Rows
    """Row numbers in the shards, in their order."""
    val_rows: Rows
    """Empty where there is no validation fold: then the last checkpoint is the best."""
    files: Rows | None = None
    """The file of every row of the shards (`ExamIndex.file`); needed for `shuffle_window`."""


def train(job: TrainingJob, context: WorkerContext) -> bool:
    """Train to the end, from the newest whole checkpoint if there is one. Collective: every rank calls it.

    Returns:
        False where the workers were told to leave before the end: they saved, and another group will go on.

    Raises:
        AgreedError: the loss or its gradient is not finite, or the checkpoint or config does not fit the task.
        PrimaError: this rank's stream met something broken.

    The last checkpoint stays in either case.
    """
    if context.device.type == "cpu":
        keep_freed_memory()
    return _Loop(job, context).run()


class _Loop:
    def __init__(self, job: TrainingJob, context: WorkerContext) -> None:
        self.job, self.config, self.context = job, job.config, context
        self.timeline = {"train": time.time()}
        self.task = job.task.prepare(context)
        self.timeline["prepared"] = time.time()
        self.checkpoints = job.run / "checkpoints"
        self.steps_per_epoch = num_steps(len(job.train_rows), self.config.global_batch)
        total = self.steps_per_epoch * self.config.epochs
        self.total_steps = min(total, self.config.max_steps or total)
        local_batch = math.ceil(self.config.global_batch / context.world_size)
        self.micro_batch = min(self.config.micro_batch or local_batch, local_batch)
        torch.manual_seed(hash_key(self.config.seed, "torch") % 2**63)
        model = self.task.build()
        refuse_unkeyed(model)
        self.engine: Engine = build_engine(
            model,
            self.config.engine,
            self.config.optimizer,
            precision=self.config.precision,
            device=context.device,
            num_micro_batches=math.ceil(local_batch / self.micro_batch),
        )
        self.timeline["engine"] = time.time()
        self.gather = Gather() if context.world_size > 1 else None
        self.progress = Progress()
        self.saved_step = -1
        self.saving = self.leaving = False

    def run(self) -> bool:
        loaded = load_last(self.checkpoints)
        if loaded is not None:
            state, self.progress = loaded
            self._check_state(state)
            self.engine.import_state(state)
            self.saved_step = self.progress.step
        if self.progress.done:
            return True
        workers = self.context.gather_objects([self.context.name])
        if self.context.rank > 0:
            self._run_steps(None)
            return self.progress.done
        with Tracker(
            self.job.run, self.config.tracking, params=self._params(), resume_step=self.progress.step
        ) as tracker:
            self._note_start(tracker, workers)
            self._run_steps(tracker)
        return self.progress.done

    def _run_steps(self, tracker: Tracker | None) -> None:
        self.engine.module.train()
        first = self.progress.step
        steps = plan_steps(
            self.job.train_rows,
            global_batch=self.config.global_batch,
            seed=self.config.seed,
            total_steps=self.total_steps,
            start_step=first,
            rank=self.context.rank,
            world_size=self.context.world_size,
            window_rows=self.config.shuffle_window,
            files=self.job.files,
        )
        with (
            closing(self.context.batches(self.job.shards, steps, self.task.stream(train=True))) as batches,
            self.context.progress(total=self.total_steps, initial=first, description=self.task.kind) as bar,
        ):
            started = time.perf_counter()
            for step, batch in zip(range(first, self.total_steps), batches, strict=True):
                lr = learning_rate(step, self.total_steps, self.config.optimizer)
                figures = self._step(batch.to(self.context.device), lr, step)
                self.progress = replace(self.progress, step=step + 1)
                if self.config.log_exam_ids:
                    figures["exam_ids"] = self.context.gather_objects(_real_ids(batch))
                if tracker:
                    now = time.perf_counter()
                    tracker.step(self._record(figures, lr, seconds=now - started))
                    started = now
                bar.update(loss=figures["loss"])
                self._after_step(tracker)
                if self.progress.done or self.leaving:
                    break

    def _step(self, batch: ImageTextBatch, lr: float, step: int) -> dict[str, Any]:
        micro = batch.split(self.micro_batch)
        if self.task.interacts:
            nothing = torch.zeros((), device=self.context.device)
            total, parts = backward_cached(
                self.engine.forward,
                micro,
                lambda outputs: self.task.loss(outputs, batch, gather=self.gather, total_weight=nothing),
                self.engine.backward,
                batch_level=self.task.batch_level,
            )
        else:
            total, parts = self._accumulate(batch, micro)
        heard = _as_figures(self.context.notice(), total)
        values = {"loss": total.detach(), **{key: value.detach() for key, value in parts.items()}, **heard}
        figures = self._reduce(values)
        # Of any rank, so that all save or leave after the same step.
        self.saving, self.leaving = (figures.pop(key) > 0 for key in heard)
        self._check_finite("loss", figures["loss"], batch, step)
        figures["grad_norm"] = self.engine.step(lr)
        # After the update, which it may have spoilt: nothing is saved between here and there.
        self._check_finite("gradient's norm", figures["grad_norm"], batch, step)
        return figures

    def _check_finite(self, name: str, value: float, batch: ImageTextBatch, step: int) -> None:
        """Every rank sees the same value, so all of them raise or none."""
        if math.isfinite(value):
            return
        ids = self.context.gather_objects(_real_ids(batch))
        kept = f"The state after step {self.saved_step} is kept. " if self.saved_step > 0 else ""
        raise AgreedError(
            f"the {name} is {value} at step {step + 1} (exams {', '.join(ids[:4])}{', ...' if len(ids) > 4 else ''})",
            where=self.job.run,
            mend=f"{kept}A lower optimizer.lr, or precision: fp32, usually helps.",
        )

    def _accumulate(self, batch: ImageTextBatch, micro: list[ImageTextBatch]) -> tuple[Tensor, dict[str, Tensor]]:
        weight = self.task.batch_weight(batch).detach().clone()
        total_weight = self._mean_over_ranks(weight)
        total, parts = torch.zeros((), device=self.context.device), dict[str, Tensor]()
        for index, piece in enumerate(micro):
            loss, piece_parts = self.task.loss(
                self.engine.forward(piece), piece, gather=None, total_weight=total_weight
            )
            self.engine.backward(loss, last=index == len(micro) - 1)
            total = total + loss.detach()
            for key, value in piece_parts.items():
                parts[key] = parts.get(key, torch.zeros((), device=self.context.device)) + value.detach()
        return total, parts

    def _mean_over_ranks(self, value: Tensor) -> Tensor:
        if self.context.world_size > 1:
            torch.distributed.all_reduce(value)
            value = value / self.context.world_size
        return value

    def _reduce(self, values: dict[str, Tensor]) -> dict[str, Any]:
        stacked = torch.stack([value.float().reshape(()) for value in values.values()])
        return dict(zip(values, self._mean_over_ranks(stacked).tolist(), strict=True))

    def _after_step(self, tracker: Tracker | None) -> None:
        step = self.progress.step
        last = step == self.total_steps
        epoch_end = step % self.steps_per_epoch == 0
        epoch = step // self.steps_per_epoch
        if last or (epoch_end and epoch % self.config.validate_every_epochs == 0):
            self._validate(tracker, last=last)
            self._save(tracker)
        elif self.saving or self.leaving or step % (self.config.checkpoint_every_steps or step + 1) == 0:
            self._save(tracker)
        if self.saving:
            self.context.heeded()

    def _validate(self, tracker: Tracker | None, *, last: bool) -> None:
        """Look at the validation fold, and move `progress` on: is this the best state so far, is training over."""
        selection, progress = self.config.selection, self.progress
        if not len(self.job.val_rows):
            self.progress = replace(progress, best_step=progress.step, done=last)
            return
        metrics = self._observe_validation()
        if tracker:
            tracker.validation(metrics, progress.step)
        self.context.report({"step": progress.step, **metrics})
        if selection.metric not in metrics:
            raise AgreedError(
                f"selection.metric is {selection.metric!r}, which {self.task.kind} does not report",
                mend=f"It reports {', '.join(sorted(metrics))}.",
            )
        value, epoch = metrics[selection.metric], progress.step // self.steps_per_epoch
        sign = 1.0 if selection.mode == "max" else -1.0
        too_early = epoch < selection.min_epochs and not last
        better = progress.best_value is None or sign * value > sign * progress.best_value
        # A figure that is not a number is no better than another, but some state has to be chosen in the end.
        improved = better and not too_early and math.isfinite(value)
        waited = 0 if improved or too_early else progress.epochs_since_best + self.config.validate_every_epochs
        done = last or (selection.patience_epochs is not None and waited >= selection.patience_epochs)
        chosen = improved or (done and progress.best_step is None)
        self.progress = replace(
            progress,
            metrics=metrics,
            best_value=value if improved else progress.best_value,
            best_step=progress.step if chosen else progress.best_step,
            epochs_since_best=waited,
            done=done,
        )

    def _observe_validation(self) -> dict[str, float]:
        # Shuffled once and for all: neighbours in the shards may share a label, and contrastive losses would see it.
        plan = plan_epoch(self.job.val_rows, global_batch=self.config.global_batch, seed=self.config.seed, epoch=0)
        rows = rank_rows(plan, rank=self.context.rank, world_size=self.context.world_size)
        spec = self.task.stream(train=False)
        seen: dict[str, list[Tensor]] = {}
        with (
            closing(self.context.batches(self.job.shards, [(0, rows)], spec)) as batches,
            _evaluating(self.engine.module),
            torch.no_grad(),
        ):
            for host_batch in batches:
                batch = host_batch.to(self.context.device)
                outputs = concatenate(
                    [self.engine.forward(piece) for piece in batch.split(self.micro_batch)],
                    batch_level=self.task.batch_level,
                )
                observed = self.task.observe(outputs, batch, gather=self.gather)
                for key, value in {**observed, "weights": batch.weights}.items():
                    seen.setdefault(key, []).append(self.gather(value) if self.gather else value)
        whole = {key: torch.cat(values).cpu() for key, values in seen.items()}
        real = whole.pop("weights") > 0
        return self.task.metrics({key: value[real] for key, value in whole.items()})

    def _save(self, tracker: Tracker | None) -> None:
        state = self.engine.export_state()
        if tracker:
            tracker.flush()
        if self.context.rank == 0:
            save_checkpoint(self.checkpoints, state, self.progress, keep_last=self.config.checkpoint.keep_last)
        self.saved_step = self.progress.step
        self.context.barrier()

    def _check_state(self, state: State) -> None:
        wanted = {name for name, _ in trainable_parameters(self.engine.module)}
        found = {key.removeprefix("param/") for key in state if key.startswith("param/")}
        if wanted != found:
            odd = sorted(wanted ^ found)[0]
            raise AgreedError(
                f"the checkpoint does not fit the model: {odd} is only in {'it' if odd in found else 'the model'}",
                where=self.checkpoints,
                mend="Resume with the config and version that wrote it, or choose another `out`.",
            )

    def _record(self, figures: dict[str, Any], lr: float, *, seconds: float) -> dict[str, Any]:
        step = self.progress.step
        return {
            "step": step,
            "epoch": (step - 1) // self.steps_per_epoch,
            "lr": lr,
            "world_size": self.context.world_size,
            "seconds": round(seconds, 4),
            "time": round(time.time(), 3),
            **figures,
        }

    def _params(self) -> dict[str, Any]:
        return {"task": self.task.kind, "steps": self.total_steps, **self.config.model_dump(mode="json")}

    def _note_start(self, tracker: Tracker, workers: list[str]) -> None:
        """One line a start: who trains, from where, and what is done twice."""
        record = {
            "from_step": self.progress.step,
            "replayed_steps": tracker.num_replayed,
            "engine": self.engine.describe(),
            "micro_batch": self.micro_batch,
            "workers": workers,
            "timeline": {name: round(at, 2) for name, at in {**self.context.timeline, **self.timeline}.items()},
            "time": time.time(),
        }
        with (self.job.run / "starts.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def _as_figures(notice: Notice, like: Tensor) -> dict[str, Tensor]:
    """What this rank has heard, to be reduced with the loss."""
    return {item.value: like.new_full((), float(notice is item)) for item in (Notice.SAVE, Notice.LEAVE)}


@contextmanager
def _evaluating(module: torch.nn.Module) -> Iterator[None]:
    module.eval()
    try:
        yield
    finally:
        module.train()


def _real_ids(batch: ImageTextBatch) -> list[str]:
    return [exam for exam, weight in zip(batch.exam_ids, batch.weights.tolist(), strict=True) if weight > 0]
