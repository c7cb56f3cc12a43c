"""The training loop: batches in, checkpoints out. Knows tasks, engines and contexts by their protocols only.

Read it as: `train` walks the plan from the cursor; `_step` is one optimizer step; `_validate` one look at the
validation fold; `_save` one checkpoint. Everything that decides the order is a function of (seed, epoch).
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prima_ray.base import PrimaError, hash_json, hash_key
from prima_ray.data.batch import ImageTextBatch
from prima_ray.data.fetched import CHECKPOINTS
from prima_ray.data.plan import num_steps, plan_epoch, plan_steps, rank_rows
from prima_ray.data.schema import join, read_manifest
from prima_ray.data.storage import Folder, WorkingCopy
from prima_ray.models.keyed_dropout import key_random_masks
from prima_ray.training.allocator import keep_freed_memory
from prima_ray.training.checkpoint import Origin, Progress, check_origin, load_last, load_step
from prima_ray.training.checkpoint_writer import CheckpointWriter
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
KEPT_APART = (CHECKPOINTS, "ray", "run.json", ".lock")
"""Of a run on an object store: what is no file of the working copy, but written in place, or last, or not at all."""
_LOST = "checkpoint_lost"
"""Rides with a step's figures: rank 0's checkpoint could not be written."""


@dataclass(frozen=True)
class TrainingJob:
    """Everything a worker needs, the same on every rank; picklable."""

    config: LoopConfig
    task: Task
    run: Path
    """The run directory; where `store` is given, this process's copy of its small files."""
    shards: str
    train_rows: Rows
    """Row numbers in the shards, in their order."""
    val_rows: Rows
    """Empty where there is no validation fold: then the last checkpoint is the best."""
    files: Rows | None = None
    """The file of every row of the shards (`ExamIndex.file`); needed for `shuffle_window`."""
    store: str | None = None
    """The run directory's address on an object store; None for a folder on a disk."""

    @property
    def address(self) -> str:
        """Where the run is, as a user names it."""
        return self.store or str(self.run)

    @property
    def checkpoints(self) -> str:
        """Where its checkpoints are."""
        return join(self.address, CHECKPOINTS)

    def origin(self) -> Origin:
        """What this job's checkpoints belong to. Reads the shards' manifest."""
        rows = [
            hashlib.sha256(np.ascontiguousarray(item).tobytes()).hexdigest()
            for item in (self.train_rows, self.val_rows)
        ]
        return Origin(
            config=self.config.model_dump(mode="json"),
            exams=hash_json([read_manifest(self.shards).content_hash, *rows]),
        )


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
        self.checkpoints = job.checkpoints
        self.files = WorkingCopy(job.run, Folder.at(job.store), without=KEPT_APART) if job.store else None
        self.steps_per_epoch = num_steps(len(job.train_rows), self.config.global_batch)
        total = self.steps_per_epoch * self.config.epochs
        self.total_steps = min(total, self.config.max_steps or total)
        local_batch = math.ceil(self.config.global_batch / context.world_size)
        self.micro_batch = min(self.config.micro_batch or local_batch, local_batch)
        torch.manual_seed(hash_key(self.config.seed, "torch") % 2**63)
        model = self.task.build()
        key_random_masks(model)
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
        self.writer: CheckpointWriter | None = None
        """On rank 0, once it is known where training begins."""
        self.saving = self.leaving = False

    def run(self) -> bool:
        loaded = self._load()
        if loaded is not None:
            state, self.progress = loaded
            self._check_state(state)
            self.engine.import_state(state)
        if self.progress.done:
            return True
        workers = self.context.gather_objects([self.context.name])
        if self.context.rank > 0:
            self._run_steps(None)
            return self.progress.done
        self.writer = CheckpointWriter(
            self.checkpoints,
            self.config.checkpoint,
            self.job.origin(),
            before=self.files.push if self.files else None,
            saved_step=self.progress.step,
        )
        if self.files:
            # What is appended to; TensorBoard begins a file a start.
            self.files.pull(folders=False)
        try:
            with Tracker(
                self.job.run, self.config.tracking, params=self._params(), resume_step=self.progress.step
            ) as tracker:
                self._note_start(tracker, workers)
                self._run_steps(tracker)
        finally:
            self.writer.close()
            if self.files:
                self.files.push()
        return self.progress.done

    def _load(self) -> tuple[State, Progress] | None:
        """Rank 0 looks for the newest whole checkpoint and the others take that one: none may go on from another."""
        found, failed = None, None
        if self.context.rank == 0:
            try:
                found = load_last(self.checkpoints)
                if found:
                    check_origin(self.checkpoints, found[1].step, self.job.origin())
            except PrimaError as error:
                failed = error
        self._agree(failed)
        steps = self.context.gather_objects([str(found[1].step)] if found else [])
        return found or (load_step(self.checkpoints, int(steps[0])) if steps else None)

    def _agree(self, failed: PrimaError | None) -> None:
        """Raise on every rank what one of them met. Collective.

        Raises:
            AgreedError: see above.
        """
        told = [json.dumps([failed.what, failed.where, failed.mend])] if failed else []
        for text in self.context.gather_objects(told):
            what, where, mend = json.loads(text)
            raise AgreedError(what, where=where, mend=mend) from failed

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
                figures = self._step(batch, lr, step)
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
            self._settle()

    def _step(self, batch: ImageTextBatch, lr: float, step: int) -> dict[str, Any]:
        # Pixels come to the device a micro-batch at a time; what the loss reads of the whole batch is little.
        micro, light = batch.split(self.micro_batch), batch.light().to(self.context.device)
        if self.task.interacts:
            nothing = torch.zeros((), device=self.context.device)
            total, parts = backward_cached(
                self._outputs,
                micro,
                lambda outputs: self.task.loss(outputs, light, gather=self.gather, total_weight=nothing),
                self.engine.backward,
                batch_level=self.task.batch_level,
            )
        else:
            total, parts = self._accumulate(light, micro)
        # What one rank knows and all must act on after the same step rides along with the loss.
        signals = self._signals(like=total)
        figures = self._reduce(
            {"loss": total.detach(), **{key: value.detach() for key, value in parts.items()}, **signals}
        )
        lost, self.saving, self.leaving = (figures.pop(key) > 0 for key in signals)
        if lost:
            self._settle()
        self._check_finite("loss", figures["loss"], batch, step)
        figures["grad_norm"] = self.engine.step(lr)
        # After the update, which it may have spoilt: nothing is saved between here and there.
        self._check_finite("gradient's norm", figures["grad_norm"], batch, step)
        return figures

    def _signals(self, *, like: Tensor) -> dict[str, Tensor]:
        """What this rank alone knows: rank 0's checkpoint could not be written; it was told to save, or to leave."""
        notice = self.context.notice()
        known = {
            _LOST: self.writer is not None and self.writer.failed,
            **{item.value: notice is item for item in (Notice.SAVE, Notice.LEAVE)},
        }
        return {name: like.new_full((), float(value)) for name, value in known.items()}

    def _check_finite(self, name: str, value: float, batch: ImageTextBatch, step: int) -> None:
        """Every rank sees the same value, so all of them raise or none."""
        if math.isfinite(value):
            return
        ids = self.context.gather_objects(_real_ids(batch))
        if self.writer:
            self.writer.close()
        saved = self.context.gather_objects([str(self.writer.saved_step)] if self.writer else [])
        kept = f"The state after step {saved[0]} is kept. " if saved != ["0"] else ""
        raise AgreedError(
            f"the {name} is {value} at step {step + 1} (exams {', '.join(ids[:4])}{', ...' if len(ids) > 4 else ''})",
            where=self.job.address,
            mend=f"{kept}A lower optimizer.lr, or precision: fp32, usually helps.",
        )

    def _outputs(self, piece: ImageTextBatch) -> dict[str, Tensor]:
        """A micro-batch, wherever it lies, -> what the loss needs of its exams."""
        moved = piece.to(self.context.device)
        return self.task.condense(self.engine.forward(moved), moved)

    def _accumulate(self, light: ImageTextBatch, micro: list[ImageTextBatch]) -> tuple[Tensor, dict[str, Tensor]]:
        weight = self.task.batch_weight(light).detach().clone()
        total_weight = self._mean_over_ranks(weight)
        total, parts = torch.zeros((), device=self.context.device), dict[str, Tensor]()
        for index, (piece, target) in enumerate(zip(micro, light.split(self.micro_batch), strict=True)):
            loss, piece_parts = self.task.loss(self._outputs(piece), target, gather=None, total_weight=total_weight)
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
                batch = host_batch.light().to(self.context.device)
                outputs = concatenate(
                    [self._outputs(piece) for piece in host_batch.split(self.micro_batch)],
                    batch_level=self.task.batch_level,
                )
                observed = self.task.observe(outputs, batch, gather=self.gather)
                for key, value in {**observed, "weights": batch.weights}.items():
                    seen.setdefault(key, []).append(self.gather(value) if self.gather else value)
        whole = {key: torch.cat(values).cpu() for key, values in seen.items()}
        real = whole.pop("weights") > 0
        return self.task.metrics({key: value[real] for key, value in whole.items()})

    def _save(self, tracker: Tracker | None) -> None:
        """One checkpoint; where they are asynchronous it has only begun when this returns, see `_settle`."""
        # Before the export: two states at once would be twice the memory.
        self._settle()
        state = self.engine.export_state()
        if tracker:
            tracker.flush()
        self._settle(lambda writer: writer.save(state, self.progress))

    def _settle(self, act: Callable[[CheckpointWriter], None] = CheckpointWriter.wait) -> None:
        """Wait for the checkpoint that is being written, or do something else with the writer. Collective.

        Raises:
            AgreedError: rank 0 could not write it.
        """
        failed = None
        if self.writer:
            try:
                act(self.writer)
            except PrimaError as error:
                failed = error
        self._agree(failed)

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


@contextmanager
def _evaluating(module: torch.nn.Module) -> Iterator[None]:
    module.eval()
    try:
        yield
    finally:
        module.train()


def _real_ids(batch: ImageTextBatch) -> list[str]:
    return [exam for exam, weight in zip(batch.exam_ids, batch.weights.tolist(), strict=True) if weight > 0]
