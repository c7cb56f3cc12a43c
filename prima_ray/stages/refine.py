"""Refine: the risk corpus -> a text encoder that has read it, by masked-language modelling (method, stage 1b)."""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Self

import numpy as np
from pydantic import Field, model_validator

from prima_ray.base import InputPath, PrimaError, StrictConfig, is_uri, write_json
from prima_ray.data.masking import ReplacementConfig
from prima_ray.data.plan import ExamIndex
from prima_ray.data.reader import Rows
from prima_ray.data.run_record import read_record
from prima_ray.data.schema import join
from prima_ray.data.text_shards import HELD_OUT
from prima_ray.knowledge.corpus_texts import TextsConfig
from prima_ray.knowledge.mentions import Terms
from prima_ray.models.lora import LoraConfig
from prima_ray.models.masked_lm import MaskedLM, load_masked_lm
from prima_ray.models.text_tower import TextTowerConfig
from prima_ray.stages.out_lock import open_alone
from prima_ray.stages.refine_report import ProbeConfig, ReportInputs, check_probe, log_table, read_terms, report
from prima_ray.stages.refine_texts import SPLIT, TEXTS, TextsRequest, prepare_texts
from prima_ray.stages.rundir import RunDir, check_finished, check_parent, finish_run
from prima_ray.stages.training import driver_context, train_task
from prima_ray.training.checkpoint import Progress
from prima_ray.training.config import EXECUTION_KEYS, LoopConfig, OptimizerConfig, SelectionConfig
from prima_ray.training.tasks.refine import RefineTask

_log = logging.getLogger(__name__)
HEADED = "masked_lm"
"""The encoder as it was, with the head that was trained for it: what "before" means."""
_PREPARED = frozenset({TEXTS, SPLIT, "mistake.json", "ray"})
"""What a run holds before its first step, besides its config."""


class RefineInputs(StrictConfig):
    """Parents."""

    corpus: InputPath
    shards: InputPath | None = None
    """Exams for the linear probe; without them there is none."""


class HeadConfig(StrictConfig):
    """How a masked-LM head is trained where the encoder has none; the encoder is frozen meanwhile."""

    epochs: int = Field(default=100, gt=0)
    lr: float = Field(default=1e-3, gt=0)
    patience_epochs: int | None = Field(default=10, gt=0)
    """Stop after so many epochs without a lower held-out loss; `null`: never."""


class RefineConfig(LoopConfig):
    """See the module. An "exam" of the keys that training stages share is a text here."""

    inputs: RefineInputs
    text_tower: TextTowerConfig = TextTowerConfig()
    """The encoder; what of it trains is said below."""
    trainable: Literal["lora", "full"] = "lora"
    lora: LoraConfig = LoraConfig(rank=8)
    texts: TextsConfig = TextsConfig()
    held_out: float = Field(default=0.2, gt=0, lt=1)
    """Share of the entries, whole, whose texts decide when to stop and are reported on."""
    unvetted: bool = False
    """Also read entries that nobody has decided about; marks this run and every descendant."""
    mask_rate: float = Field(default=0.30, gt=0, lt=1)
    """Share of a text's tokens that are to be guessed, at least one."""
    replacement: ReplacementConfig = ReplacementConfig()
    head: HeadConfig = HeadConfig()
    factors: InputPath | None = None
    """The YAML of the factors' terms: these words count as risk terms too, beside the phrases of the corpus."""
    probe: ProbeConfig = ProbeConfig()
    epochs: int = Field(default=100, gt=0)
    global_batch: int = Field(default=32, gt=0)
    optimizer: OptimizerConfig = Field(default=OptimizerConfig(lr=5e-5))
    selection: SelectionConfig = SelectionConfig(metric="loss", mode="min", patience_epochs=10)

    @model_validator(mode="after")
    def _check_refine(self) -> Self:
        if self.text_tower.config is not None:
            raise ValueError("text_tower.config: random weights have nothing to refine, name a model")
        if self.text_tower.trainable != "frozen":
            raise ValueError("text_tower.trainable: what refine trains is said by `trainable` and `lora`")
        if self.selection.metric not in RefineTask.metric_names:
            raise ValueError(f"selection.metric: refine reports {', '.join(RefineTask.metric_names)}")
        return self


def run(config: RefineConfig) -> Path | str:
    """Refine the encoder; returns the run directory.

    Raises:
        PrimaError: a mistake in the config or its inputs.
    """
    read_record(config.inputs.corpus, stage="corpus")
    # What would fail at the end is read at the beginning.
    terms = read_terms(config.inputs.corpus, config.factors)
    if config.inputs.shards:
        check_probe(config.inputs.shards, config.probe)
    with open_alone(
        config, out=config.out, stage="refine", execution_keys=EXECUTION_KEYS, prepared=_PREPARED
    ) as opened:
        if opened.finished:
            check_finished(opened)
            _log.info("%s: already finished, nothing to do", opened.address)
        else:
            _refine(config, opened, terms)
    return opened.address


def _refine(config: RefineConfig, opened: RunDir, terms: Terms) -> None:
    parents = {"corpus": config.inputs.corpus, "shards": config.inputs.shards, "text_encoder": config.text_tower.folder}
    inputs = {role: path for role, path in parents.items() if path}
    for path in inputs.values():
        check_parent(path)
    split = prepare_texts(opened.path, _request(config))
    opened.push()
    index = ExamIndex.read(_workers_path(opened, TEXTS))
    rows = np.flatnonzero(index.labels == index.manifest.data_set.class_names.index(HELD_OUT))
    sides = _Sides(index, np.setdiff1d(np.arange(len(index)), rows), rows)
    task = _headed(config, opened, sides)
    model, progress = _train(config, task, opened, sides)
    share = trained_share(model)
    pooling = config.text_tower.resolve_pooling()
    model.save(opened.path / "model", source=task.source, tokenizer=task.tokenizer, pooling=pooling)
    figures = report(task.untrained(), model, _questions(config, task, sides, terms))
    log_table(figures)
    head = "trained" if (opened.path / HEADED).exists() else "published"
    known = {"best_step": progress.step, "val": progress.metrics, "trained_share": share, "head": head}
    write_json(opened.path / "metrics.json", {"stage": "refine", **known, **figures})
    finish_run(opened, seed=config.seed, inputs=inputs, parents=split.state)


@dataclass(frozen=True)
class _Sides:
    """The texts, and the row numbers of both sides."""

    index: ExamIndex
    train: Rows
    held_out: Rows


def _request(config: RefineConfig) -> TextsRequest:
    return TextsRequest(
        corpus=config.inputs.corpus,
        texts=config.texts,
        held_out=config.held_out,
        seed=config.seed,
        unvetted=config.unvetted,
        tokenizer=config.text_tower.tokenizer(),
    )


def _questions(config: RefineConfig, task: RefineTask, sides: _Sides, terms: Terms) -> ReportInputs:
    return ReportInputs(
        task=task,
        tower=config.text_tower,
        index=sides.index,
        rows=sides.held_out,
        terms=terms,
        shards=config.inputs.shards,
        probe=config.probe,
        context=driver_context(config),
        batch_size=config.micro_batch or config.global_batch,
    )


def _headed(config: RefineConfig, run: RunDir, sides: _Sides) -> RefineTask:
    """The task on an encoder with a masked-LM head: its own, or one that is trained now, or was before."""
    tower = config.text_tower
    task = RefineTask(
        seed=config.seed,
        part="encoder",
        source=_absolute(tower.folder) if tower.folder else tower.source,
        tokenizer=tower.tokenizer(),
        trainable=config.trainable,
        lora=config.lora,
        mask_rate=config.mask_rate,
        replacement=config.replacement,
    )
    # What a worker would say is said here.
    task.stream(train=True)
    headed = replace(task, source=_workers_path(run, HEADED))
    if (run.path / HEADED).exists():
        return headed
    plain, has_head = load_masked_lm(task.source, key="text_tower.path")
    plain.check_tokens(task.tokenizer)
    if has_head:
        return task
    _log.info("refine: %s has no masked-LM head; one is trained, the encoder is frozen meanwhile", tower.source)
    head = run.path / "head"
    head.mkdir(exist_ok=True)
    changes = {
        "epochs": config.head.epochs,
        "max_steps": None,
        "optimizer": config.optimizer.model_copy(update={"lr": config.head.lr}),
        "selection": SelectionConfig(metric="loss", mode="min", patience_epochs=config.head.patience_epochs),
    }
    try:
        model, _ = _train(config.model_copy(update=changes), replace(task, part="head"), run.folder("head"), sides)
    except PrimaError:
        if {item.name for item in head.iterdir()} <= _PREPARED:
            # Nothing has trained: the folder that is given up must not be kept by it.
            shutil.rmtree(head)
        raise
    model.save(run.path / HEADED, source=task.source, tokenizer=task.tokenizer, pooling=tower.resolve_pooling())
    run.push()
    return headed


def _workers_path(run: RunDir, name: str) -> str:
    """A folder of the run as every worker finds it: their working directory is another one."""
    return join(_absolute(str(run.address)), name)


def _absolute(path: str) -> str:
    return path if is_uri(path) else str(Path(path).resolve())


def _train(config: RefineConfig, task: RefineTask, run: RunDir, sides: _Sides) -> tuple[MaskedLM, Progress]:
    _, model, progress = train_task(
        config,
        task,
        run=run,
        shards=sides.index.shards,
        train_rows=sides.train,
        val_rows=sides.held_out,
        files=sides.index.file if config.shuffle_window else None,
    )
    if not isinstance(model, MaskedLM):
        raise TypeError(f"refine trains a MaskedLM, not a {type(model).__name__}")
    return model, progress


def trained_share(model: MaskedLM) -> float:
    """Trained parameters over those of the encoder."""
    sizes = [(item.numel(), item.requires_grad) for item in model.encoder.parameters()]
    trained = sum(size for size, trains in sizes if trains)
    return trained / sum(size for size, _ in sizes)
