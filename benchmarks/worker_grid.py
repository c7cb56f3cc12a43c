"""The worker count is not a hyper-parameter: align and fuse by every engine and 1 to 4 workers, against one run.

The reference is plain torch in one worker, the whole batch in one piece. Every other cell trains the same config by
another engine (torch, DeepSpeed ZeRO 0 to 3), another number of workers, micro-batches of three, and is compared with
it: the largest relative difference of the two loss curves, and the largest absolute difference of what the trained
models say of the held-out exams (fuse: probabilities; align: cosines of every image with every text). Everything that
is random or exam-spanning is on: augmentation, attribute dropout, LoRA and its dropout in every tower, drop paths, the
learnable temperature, clipping that bites, a ragged last batch. `members` is fuse again without dropout, where the
prompt is read once a batch: two small models from random weights. Phantoms, small models, fp32, torch.multiprocessing
and gloo; the loop, the tasks and the engines are the product's own. ZeRO stage and world size in the table are what the
engine said of itself (`starts.jsonl`), not what the config asked for.

    python benchmarks/worker_grid.py [--corner] [--worlds 1 2 3 4] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from _harness import circumstances

from prima_ray.base import write_json
from prima_ray.data.plan import ExamIndex, Roles, plan_epoch
from prima_ray.training.contexts import LocalContext, ProgressBar
from prima_ray.training.loop import TrainingJob, train
from prima_ray.training.ranks import start_ranks

ENGINES: dict[str, dict[str, Any]] = {
    "torch": {"kind": "torch"},
    **{f"zero{stage}": {"kind": "deepspeed", "zero_stage": stage} for stage in range(4)},
}
STEPS = {"align": 45, "fuse": 75, "members": 75}
STAGES = tuple(STEPS)
REFERENCE = "torch, whole batch"
NUM_TRAIN, NUM_HELD_OUT = 42, 20
BATCH, MICRO_BATCH = 16, 3
"""42 exams: an epoch is two whole batches and one of ten."""
STEPS_AN_EPOCH = 3
CLIP = 0.5

_VIT = {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 2}
_BERT = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 96}
_QWEN3 = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 24,
}


_MEMBERS = {
    "fusion": {"kind": "qwen3", "config": _QWEN3, "trainable": "full"},
    "members": 2,
    "optimizer": {"lr": 5e-4, "clip_norm": CLIP},
}


@dataclass(frozen=True)
class Cell:
    """One run of the grid."""

    stage: str
    engine: str
    world: int

    @property
    def name(self) -> str:
        return f"{self.stage}-{self.engine.partition(',')[0]}-{self.world}{'-whole' if ',' in self.engine else ''}"


class GroupContext(LocalContext):
    """One of the workers that torch.multiprocessing started, on the CPU."""

    def __init__(self) -> None:
        super().__init__("cpu")
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()

    def gather_objects(self, values: list[str]) -> list[str]:
        lists: list[list[str]] = [[] for _ in range(self.world_size)]
        dist.all_gather_object(lists, values)
        return [value for part in lists for value in part]

    def barrier(self) -> None:
        dist.barrier()

    @contextmanager
    def progress(self, **about: Any) -> Iterator[ProgressBar]:
        del about
        yield _Silent()


class _Silent:
    def update(self, count: int = 1, *, loss: float | None = None) -> None:
        del count, loss


# ------------------------------------------------------------------------------------------- data and configs


def make_shards(folder: Path) -> str:
    """Phantoms of 48 px, ingested."""
    from prima_ray.data.phantoms import PhantomConfig, ingest_config, write_phantoms
    from prima_ray.stages.ingest import IngestConfig, run

    if not (folder / "raw").exists():
        write_phantoms(folder / "raw", PhantomConfig(num_patients=45, image_side=48))
    raw = {**ingest_config(folder / "raw", out=str(folder / "shards")), "context": {"kind": "local"}}
    return str(run(IngestConfig.model_validate(raw)))


def make_models(folder: Path) -> dict[str, str]:
    """Saved copies of small models with random weights: LoRA adapts what comes from a file."""
    import timm
    import transformers
    from safetensors.torch import save_file

    from prima_ray.models.tokenizer import OFFLINE_TEXT_MODEL, resolve_text_model

    made = {kind: str(folder / kind) for kind in ("vit", "bert", "qwen3")}
    if (folder / "models").exists():
        return made
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=0, **_VIT)
    (folder / "vit").mkdir(exist_ok=True)
    save_file(vit.state_dict(), folder / "vit" / "model.safetensors")
    sizes: dict[str, Any] = {"vocab_size": 30522, "pad_token_id": 0}
    transformers.BertModel(transformers.BertConfig(**_BERT, **sizes)).save_pretrained(folder / "bert")
    qwen = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**_QWEN3, **sizes, tie_word_embeddings=True))
    qwen.save_pretrained(folder / "qwen3")
    source = Path(resolve_text_model(OFFLINE_TEXT_MODEL))
    for kind in ("bert", "qwen3"):
        for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json"):
            shutil.copy(source / name, folder / kind / name)
    (folder / "models").touch()
    return made


def raw_config(stage: str, shards: str, models: dict[str, str], folder: Path) -> dict[str, Any]:
    """The stage's config; engine and micro-batch are the cell's."""
    lora = {"rank": 8, "alpha": 32, "dropout": 0.1}
    tower = {
        "name": "vit_tiny_patch16_224",
        "image_size": 32,
        "weights": models["vit"],
        "options": {**_VIT, "drop_path_rate": 0.1},
        # The CLS token of random weights is nearly the same whatever it reads.
        "pooling": "mean",
    }
    text = {"path": models["bert"], "max_tokens": 64, "pooling": "mean"}
    augment = {"crop_area": [0.8, 1.0], "quarter_turns": False, "vertical_flip": 0.0, "color": 0.5}
    shared: dict[str, Any] = {
        "out": str(folder / stage),
        "inputs": {"shards": shards},
        "fold": "none",
        "seed": 3,
        "epochs": 100,
        "max_steps": STEPS[stage],
        "validate_every_epochs": 100,
        "global_batch": BATCH,
        "log_exam_ids": True,
        "text": {"attribute_dropout": 0.1},
        "context": {"kind": "local", "device": "cpu"},
        "feature_cache": str(folder / "features"),
    }
    if stage == "align":
        return {
            **shared,
            "views": {"image_size": 32, "augment": augment},
            "image_tower": {**tower, "trainable": "lora", "lora": lora},
            "text_tower": {**text, "trainable": "lora", "lora": lora},
            "projection": {"width": 32},
            # Every loss at the learnable temperature, which begins too low: so it has something to learn at once.
            "temperature": {"initial": 0.03},
            "losses": {"image_consistency": {"temperature": None}, "local_semantic": {"temperature": None}},
            "soft_targets": {"temperature": 1.0},
            "optimizer": {"lr": 5e-3, "clip_norm": CLIP},
        }
    return {
        **shared,
        "views": {"image_size": 32, "num_views": "all", "augment": augment},
        "image_tower": {**tower, "trainable": "frozen"},
        "text_tower": {**text, "trainable": "frozen"},
        "feature_store": {"variants": 2},
        "fusion": {"kind": "qwen3", "path": models["qwen3"], "trainable": "lora", "lora": {"rank": 4, "dropout": 0.1}},
        # At twice the rate the loss falls less, and rounding grows twenty times as much.
        "optimizer": {"lr": 5e-3, "clip_norm": CLIP},
        **(_MEMBERS if stage == "members" else {}),
    }


def make_job(stage: str, shards: str, models: dict[str, str], folder: Path) -> TrainingJob:
    """What all cells of a stage have in common."""
    from prima_ray.stages import align, fuse
    from prima_ray.stages.rundir import open_run
    from prima_ray.stages.training import Plan

    raw = raw_config(stage, shards, models, folder)
    index = ExamIndex.read(shards)
    rows = plan_epoch(torch.arange(len(index)).numpy(), global_batch=len(index), seed=0, epoch=0, shuffle=False)[0]
    roles = Roles(train=rows[:NUM_TRAIN], val=rows[NUM_TRAIN : NUM_TRAIN + NUM_HELD_OUT], test=rows[:0])
    config: Any = (align.AlignConfig if stage == "align" else fuse.FuseConfig).model_validate(raw)
    kind = "align" if stage == "align" else "fuse"
    plan = Plan(run=open_run(config, out=config.out, stage=kind), index=index, roles=roles)
    task = align.make_task(config, plan) if stage == "align" else fuse.make_task(config, plan)
    return TrainingJob(config=config, task=task, run=folder, shards=shards, train_rows=roles.train, val_rows=roles.val)


def cell_job(job: TrainingJob, cell: Cell, folder: Path) -> TrainingJob:
    whole = cell.engine == REFERENCE
    raw = job.config.model_dump()
    engine = ENGINES[cell.engine.partition(",")[0]]
    config = type(job.config).model_validate({**raw, "engine": engine, "micro_batch": None if whole else MICRO_BATCH})
    return replace(job, config=config, run=folder / "cells" / cell.name)


# ------------------------------------------------------------------------------------------------ the workers


def run_rank(_rank: int, jobs: list[TrainingJob]) -> None:
    """Train all cells of one world size, one after the other, in one process group."""
    for job in jobs:
        job.run.mkdir(parents=True, exist_ok=True)
        train(job, GroupContext())
        dist.barrier()


def is_done(job: TrainingJob) -> bool:
    """Whether a run of an earlier start is complete; one that was broken off begins anew."""
    steps = job.run / "steps.jsonl"
    last = job.config.max_steps
    done = steps.exists() and len(lines_of(steps)) == last and any((job.run / "checkpoints").glob(f"*{last}"))
    if not done:
        shutil.rmtree(job.run, ignore_errors=True)
    return done


def train_cells(cells: Sequence[Cell], folder: Path) -> dict[str, TrainingJob]:
    """Train every cell, one start of processes a world size; the jobs of the cells by name."""
    folder.mkdir(parents=True, exist_ok=True)
    shards, models = make_shards(folder), make_models(folder)
    templates = {stage: make_job(stage, shards, models, folder) for stage in {cell.stage for cell in cells}}
    jobs = {cell.name: cell_job(templates[cell.stage], cell, folder) for cell in cells}
    for world in sorted({cell.world for cell in cells}):
        mine = [jobs[cell.name] for cell in cells if cell.world == world and not is_done(jobs[cell.name])]
        if not mine:
            continue
        print(f"{world} worker(s): {len(mine)} runs ...", file=sys.stderr, flush=True)
        start_ranks(run_rank, world, mine)
    return jobs


# --------------------------------------------------------------------------------------------- the comparison


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def predict(job: TrainingJob) -> Tensor:
    """What the trained model says of the held-out exams, in one process: probabilities, or cosines."""
    from prima_ray.stages.training import load_parameters
    from prima_ray.training.checkpoint import load_last

    context = LocalContext("cpu")
    task = job.task.prepare(context)
    model = task.build()
    loaded = load_last(job.run / "checkpoints")
    if loaded is None:
        raise SystemExit(f"{job.run} holds no checkpoint")
    load_parameters(model, loaded[0])
    model.eval()
    plan = plan_epoch(job.val_rows, global_batch=20, seed=0, epoch=0, shuffle=False)
    found: list[dict[str, Tensor]] = []
    with torch.no_grad():
        for batch in context.batches(job.shards, [(0, plan)], task.stream(train=False)):
            outputs = {key: value for key, value in model(batch).items() if key in ("logits", "image_cls", "text_cls")}
            found.append(outputs)
    if "logits" in found[0]:
        return torch.cat([item["logits"] for item in found]).double().softmax(dim=-1)
    # The first photo of each exam against every text.
    images = torch.cat([item["image_cls"][:, 0] for item in found])
    texts = torch.cat([item["text_cls"] for item in found])
    unit = torch.nn.functional.normalize
    return unit(images.double(), dim=-1) @ unit(texts.double(), dim=-1).T


def compare(cells: Sequence[Cell], jobs: dict[str, TrainingJob]) -> list[dict[str, Any]]:
    """A row a cell; the first cell of a stage is what the others are compared with."""
    rows: list[dict[str, Any]] = []
    references: dict[str, tuple[list[dict[str, Any]], Tensor]] = {}
    for cell in cells:
        job = jobs[cell.name]
        steps, predicted = lines_of(job.run / "steps.jsonl"), predict(job)
        wanted, expected = references.setdefault(cell.stage, (steps, predicted))
        losses = [step["loss"] for step in steps]
        engine = lines_of(job.run / "starts.jsonl")[-1]["engine"]
        rows.append(
            {
                "stage": cell.stage,
                "asked": cell.engine,
                "engine": engine["kind"],
                "zero_stage": engine.get("zero_stage"),
                "world_size": engine["world_size"],
                "steps": len(steps),
                "same_exams": all(
                    sorted(one["exam_ids"]) == sorted(other["exam_ids"])
                    for one, other in zip(steps, wanted, strict=True)
                ),
                "loss_difference": max(
                    abs(one - other["loss"]) / abs(other["loss"]) for one, other in zip(losses, wanted, strict=True)
                ),
                "prediction_difference": float((predicted - expected).abs().max()),
                "first_epoch_loss": sum(losses[:STEPS_AN_EPOCH]) / STEPS_AN_EPOCH,
                "last_epoch_loss": sum(losses[-STEPS_AN_EPOCH:]) / STEPS_AN_EPOCH,
                "share_of_steps_clipped": sum(step["grad_norm"] > CLIP for step in steps) / len(steps),
            }
        )
    return rows


def grid(worlds: Sequence[int], *, stages: Sequence[str] = STAGES) -> list[Cell]:
    """The reference of each stage first, then every engine and world size."""
    cells = []
    for stage in stages:
        cells.append(Cell(stage, REFERENCE, 1))
        cells += [Cell(stage, engine, world) for world in worlds for engine in ENGINES]
    return cells


CORNER = [
    Cell("align", REFERENCE, 1),
    Cell("align", "zero2", 2),
    Cell("align", "torch", 3),
    Cell("align", "zero3", 3),
    Cell("fuse", REFERENCE, 1),
    Cell("fuse", "zero1", 2),
    Cell("members", REFERENCE, 1),
    Cell("members", "zero3", 2),
]
"""What tests/distributed runs."""


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| stage | engine | workers | loss curve, largest relative difference | predictions, largest difference |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        engine = row["asked"] if row["zero_stage"] is None else f"ZeRO {row['zero_stage']}"
        lines.append(
            f"| {row['stage']} | {engine} | {row['world_size']} | {row['loss_difference']:.1e} "
            f"| {row['prediction_difference']:.1e} |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    command = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("--corner", action="store_true", help="what the tests run; no result file")
    command.add_argument("--worlds", type=int, nargs="+", default=[1, 2, 3, 4])
    command.add_argument("--work", type=Path, help="a folder to keep the runs in; what is done there is not run again")
    command.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the result")
    arguments = command.parse_args(argv)
    cells = CORNER if arguments.corner else grid(arguments.worlds)
    with tempfile.TemporaryDirectory(prefix="worker-grid-") as folder:
        rows = compare(cells, train_cells(cells, (arguments.work or Path(folder)).resolve()))
    print(table(rows))
    for stage in STAGES:
        first = next(row for row in rows if row["stage"] == stage)
        fall = 1 - first["last_epoch_loss"] / first["first_epoch_loss"]
        print(f"{stage}: the loss falls by {fall:.0%}, {first['share_of_steps_clipped']:.0%} of steps are clipped")
    worst = {key: max(row[key] for row in rows) for key in ("loss_difference", "prediction_difference")}
    print(", ".join(f"{key} {value:.1e}" for key, value in worst.items()))
    if not arguments.corner:
        result = {"benchmark": "worker_grid", **circumstances("worker_grid", argv), "worst": worst, "cells": rows}
        write_json(arguments.out / "worker_grid.json", result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
