"""Exams a second of align through Ray Train and DeepSpeed, one worker, against a bare torch loop of the same model.

*ray*: `launch` of the small preset with one worker: Ray Train's worker, Ray Data's stream, DeepSpeed (ZeRO 1), the
training loop with its log and TensorBoard. *bare*: what one writes by hand: a process with neither Ray nor DeepSpeed in
it, the same collate function in prefetching threads, forward, the same losses, backward, clipping, AdamW. Both see the
same batches from the same initial weights and must log the same losses, or the benchmark stops.

A launch costs a minute, so runs cannot be interleaved; chunks of steps are. Both processes live side by side, and a
gate in the loss function lets one of them run `--steps` steps while the other is blocked in its own, then the other
way around. Only the time between two gates counts, after `--warmup` steps on each side. Between turns both may fill
what they read ahead (the same number of batches). Ray's idle daemons are there in both turns; what they use during
bare's is measured (`idle_cluster_cores`) and reported.

    python benchmarks/train_step.py [--shards SHARDS] [--pairs 7] [--steps 8] [--quick]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from _harness import CONFIGS, WORK, Figures, find_shards, interleave, parse, parser, report

from prima_ray.config import load_config
from prima_ray.data.batch import ImageTextBatch
from prima_ray.data.plan import ExamIndex, plan_steps, split_roles
from prima_ray.data.stream import local_batches
from prima_ray.stages.align import AlignConfig, make_task
from prima_ray.stages.rundir import open_run
from prima_ray.stages.training import Plan
from prima_ray.training.config import OptimizerConfig
from prima_ray.training.contexts import LocalContext
from prima_ray.training.gather import Gather
from prima_ray.training.launch import launch
from prima_ray.training.loop import TrainingJob
from prima_ray.training.quiet import quiet_worker
from prima_ray.training.schedule import learning_rate
from prima_ray.training.tasks.align import AlignTask

CONFIG = CONFIGS / "pad_ufes_20" / "align.yaml"
TOLERANCE = 2e-3


@dataclass
class Gate:
    """Blocks a loop after its warm-up and then after every so many steps, until the other side has had its turn."""

    folder: Path
    warmup: int
    steps: int
    passed: int = 0
    opened: float = 0.0

    def __call__(self) -> None:
        chunk, inside = divmod(self.passed - self.warmup, self.steps)
        self.passed += 1
        if chunk < 0 or inside:
            return
        arrived = {"seconds": time.perf_counter() - self.opened, "threads": torch.get_num_threads()}
        write_whole(self.folder / f"at-{chunk}", json.dumps(arrived))
        wait_for(self.folder / f"go-{chunk}")
        self.opened = time.perf_counter()


@dataclass(frozen=True)
class GatedTask(AlignTask):
    """Align as it is, with the gate between the forward pass and the loss."""

    gate: Gate | None = None

    def loss(
        self,
        outputs: Mapping[str, Tensor],
        batch: ImageTextBatch,
        *,
        gather: Gather | None,
        total_weight: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if self.gate is not None and torch.is_grad_enabled():
            self.gate()
        return AlignTask.loss(self, outputs, batch, gather=gather, total_weight=total_weight)


def write_whole(path: Path, text: str) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    temporary.replace(path)


def wait_for(path: Path) -> None:
    while not path.exists():
        time.sleep(0.005)


# --------------------------------------------------------------------------------------------- the two sides


def make_job(arguments: argparse.Namespace, side: str) -> TrainingJob:
    """The small preset on all exams, with one worker and one checkpoint, at the end."""
    folder = arguments.work / side
    config = load_config(
        AlignConfig,
        CONFIG,
        [
            f"out={folder / 'run'}",
            f"inputs.shards={arguments.shards}",
            f"feature_cache={arguments.work / 'features'}",
            "fold=none",
            "num_workers=1",
            "features.variants=1",
            "epochs=100000",
            f"max_steps={total_steps(arguments)}",
            "validate_every_epochs=1000000",
        ],
    )
    index = ExamIndex.read(arguments.shards)
    roles = split_roles(index, fold=None, val_fold=None, split=config.split)
    plan = Plan(run=open_run(config, out=config.out, stage="align"), index=index, roles=roles)
    gate = Gate(folder, warmup=arguments.warmup, steps=arguments.steps)
    task = GatedTask(**vars(make_task(config, plan)), gate=gate)
    return TrainingJob(
        config=config,
        task=task,
        run=plan.run.path.resolve(),
        shards=arguments.shards,
        train_rows=roles.train,
        val_rows=roles.val,
    )


def total_steps(arguments: argparse.Namespace) -> int:
    return int(arguments.warmup + arguments.pairs * arguments.steps + 1)


def run_bare(job: TrainingJob) -> None:
    """The loop one writes by hand."""
    config = job.config
    task = job.task.prepare(LocalContext())
    torch.manual_seed(0)
    model = task.build().train()
    optimizer = bare_optimizer(model, config.optimizer)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    total = config.max_steps or 0
    plan = plan_steps(job.train_rows, global_batch=config.global_batch, seed=config.seed, total_steps=total)
    spec = task.stream(train=True)
    nothing = torch.zeros(())
    with (job.run / "steps.jsonl").open("w") as log:
        for step, batch in enumerate(local_batches(job.shards, plan, spec.collate, features=spec.features)):
            outputs = task.condense(model(batch), batch)
            loss, _ = task.loss(outputs, batch, gather=None, total_weight=nothing)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, config.optimizer.clip_norm or float("inf"))
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, total, config.optimizer)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            log.write(json.dumps({"step": step + 1, "loss": loss.item()}) + "\n")
    assert not {"ray", "deepspeed"} & set(sys.modules)  # noqa: S101 - it is bare


def bare_optimizer(model: torch.nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [item for item in trainable if item.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [item for item in trainable if item.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps)


# ------------------------------------------------------------------------------------------------ the umpire


class Side:
    """A child process that waits at its gate."""

    def __init__(self, name: str, arguments: argparse.Namespace) -> None:
        self.folder = arguments.work / name
        self.folder.mkdir(parents=True)
        options = {"work": arguments.work, "shards": arguments.shards}
        numbers = {key: getattr(arguments, key) for key in ("pairs", "steps", "warmup")}
        command = [sys.executable, __file__, "--side", name]
        command += [item for key, value in {**options, **numbers}.items() for item in (f"--{key}", str(value))]
        self.log = (self.folder / "log.txt").open("w")
        self.process = subprocess.Popen(command, stdout=self.log, stderr=subprocess.STDOUT)
        self.threads = 0

    def arrive(self, chunk: int, *, timeout_s: float = 1800.0) -> float:
        """Wait until the side stands at its gate; the seconds that its chunk took."""
        path = self.folder / f"at-{chunk}"
        deadline = time.monotonic() + timeout_s
        while not path.exists():
            if self.process.poll() is not None or time.monotonic() > deadline:
                log = (self.folder / "log.txt").read_text()[-3000:]
                self.stop()
                raise SystemExit(f"{self.folder.name} never came to its gate {chunk}:\n{log}")
            time.sleep(0.01)
        arrived = json.loads(path.read_text())
        self.threads = arrived["threads"]
        return float(arrived["seconds"])

    def run(self, chunk: int) -> float:
        write_whole(self.folder / f"go-{chunk}", "")
        return self.arrive(chunk + 1)

    def finish(self, chunk: int) -> None:
        write_whole(self.folder / f"go-{chunk}", "")
        if self.process.wait(timeout=600):
            raise SystemExit(f"{self.folder.name} failed:\n{(self.folder / 'log.txt').read_text()[-3000:]}")

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait(timeout=60)
        self.log.close()

    def losses(self) -> list[float]:
        lines = (self.folder / "run" / "steps.jsonl").read_text().splitlines()
        return [json.loads(line)["loss"] for line in lines]


def cpu_seconds(root: int) -> float:
    """CPU time so far of a process and all its descendants, from /proc; 0 where there is none."""
    parents: dict[int, list[int]] = {}
    used: dict[int, float] = {}
    ticks = os.sysconf("SC_CLK_TCK")
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            pid, fields = int(stat.parent.name), stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        parents.setdefault(int(fields[1]), []).append(pid)
        used[pid] = (int(fields[11]) + int(fields[12])) / ticks
    waiting, total = [root], 0.0
    while waiting:
        pid = waiting.pop()
        total += used.get(pid, 0.0)
        waiting.extend(parents.get(pid, []))
    return total


def play(arguments: argparse.Namespace, sides: Mapping[str, Side]) -> dict[str, Any]:
    """Let the sides take turns; what the report needs."""
    idle: list[float] = []
    batch = load_config(AlignConfig, CONFIG).global_batch

    def turn(name: str, chunk: int) -> Figures:
        time.sleep(arguments.settle)
        before = cpu_seconds(sides["ray"].process.pid)
        seconds = sides[name].run(chunk)
        if name == "bare":
            idle.append((cpu_seconds(sides["ray"].process.pid) - before) / seconds)
        return {"exams/s": arguments.steps * batch / seconds}

    names = {name: (lambda pair, name=name: turn(name, pair)) for name in sides}
    pairs = interleave(names, pairs=arguments.pairs)
    for side in sides.values():
        side.finish(arguments.pairs)
    ray, bare = sides["ray"].losses(), sides["bare"].losses()
    differences = [abs(one - other) for one, other in zip(ray, bare, strict=True)]
    if max(differences[: arguments.warmup + 1]) > TOLERANCE:
        raise SystemExit(f"the losses differ by {max(differences):.2g}: these are not the same training")
    return {
        "pairs": pairs,
        "ratio": ("exams/s", "ray", "bare"),
        "idle_cluster_cores": round(sum(idle) / len(idle), 3),
        "largest_loss_difference": float(f"{max(differences):.2g}"),
        "threads": {name: side.threads for name, side in sides.items()},
    }


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--steps", type=int, default=8, help="optimizer steps a turn")
    arguments.add_argument("--warmup", type=int, default=6, help="steps before the first turn")
    arguments.add_argument("--settle", type=float, default=3.0, help="seconds between turns")
    arguments.add_argument("--work", type=Path, default=WORK / "train_step", help="a folder that is emptied")
    arguments.add_argument("--side", choices=("ray", "bare"), help=argparse.SUPPRESS)
    arguments = parse(arguments, argv, steps=2, warmup=2)
    if arguments.side:
        run_side(arguments)
        return
    arguments.shards, data = find_shards(arguments.shards)
    arguments.shards = str(Path(arguments.shards).resolve())
    arguments.work = arguments.work.resolve()
    shutil.rmtree(arguments.work, ignore_errors=True)
    sides: dict[str, Side] = {}
    # A benchmark that is ended takes its two processes and their cluster with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))
    try:
        for name in ("ray", "bare"):
            # One after the other: the second finds the first's text features.
            print(f"starting {name}", file=sys.stderr, flush=True)
            sides[name] = Side(name, arguments)
            sides[name].arrive(0)
        section = play(arguments, sides)
    finally:
        for side in sides.values():
            side.stop()
    section["data"] = data
    section["setting"] = {
        "config": "jobs/configs/pad_ufes_20/align.yaml",
        "steps_a_turn": arguments.steps,
        "warmup": arguments.warmup,
        "settle_s": arguments.settle,
    }
    report("train_step", arguments, sections={"": section}, argv=argv)
    shutil.rmtree(arguments.work, ignore_errors=True)


def run_side(arguments: argparse.Namespace) -> None:
    """The child process of one side."""
    job = make_job(arguments, arguments.side)
    if arguments.side == "bare":
        run_bare(job)
        return
    quiet_worker()
    try:
        launch(job)
    finally:
        import ray

        ray.shutdown()


if __name__ == "__main__":
    main()
