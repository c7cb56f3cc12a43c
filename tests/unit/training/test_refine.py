"""Masked-language modelling through the loop: the loss, micro-batches, resuming, and early stop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from prima_ray.base import PrimaError
from prima_ray.data.masking import ReplacementConfig
from prima_ray.data.plan import ExamIndex, plan_steps
from prima_ray.data.stream import local_batches
from prima_ray.data.text_shards import SideText, write_text_shards
from prima_ray.models.lora import LoraConfig
from prima_ray.models.tokenizer import OFFLINE_TEXT_MODEL, TextTokenizer
from prima_ray.training.checkpoint import load_last
from prima_ray.training.contexts import LocalContext
from prima_ray.training.loop import TrainingJob, train
from prima_ray.training.tasks.refine import RefineTask
from prima_ray.training.tracking import Tracker
from tests.unit.models.conftest import BERT, VOCABULARY, add_tokenizer
from tests.unit.training.toys import curve, make_config

CPU = LocalContext("cpu")
WORDS = [
    *("sun", "age", "moles", "risk", "melanoma", "skin", "raises", "lowers"),
    *("of", "the", "nevus", "family", "history", "itches", "grows"),
]


class Killed(BaseException):
    """Stands for a SIGKILL: nothing catches it."""


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import transformers

    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    transformers.BertForMaskedLM(transformers.BertConfig(**BERT, vocab_size=VOCABULARY)).save_pretrained(folder)
    return add_tokenizer(folder)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("texts") / "texts"
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, size=3 + number)) + "." for number in range(18)]
    write_text_shards(folder, [SideText(f"t{n:02}", "o", text, n >= 13) for n, text in enumerate(texts)])
    return str(folder)


@pytest.fixture
def task(encoder: Path) -> RefineTask:
    return RefineTask(
        seed=7,
        part="encoder",
        source=str(encoder),
        tokenizer=TextTokenizer(str(encoder), max_tokens=16),
        trainable="lora",
        lora=LoraConfig(rank=2),
        mask_rate=0.3,
        replacement=ReplacementConfig(),
    )


def job_of(run: Path, shards: str, task: RefineTask, **keys: Any) -> TrainingJob:
    """13 texts train in ragged batches of five."""
    run.mkdir()
    labels = ExamIndex.read(shards).labels
    return TrainingJob(
        config=make_config(**{"optimizer": {"lr": 0.01}, **keys}),
        task=task,
        run=run,
        shards=shards,
        train_rows=np.flatnonzero(labels == 0),
        val_rows=np.flatnonzero(labels == 1),
    )


def trained(job: TrainingJob) -> list[float]:
    train(job, CPU)
    return curve(job.run)


def test_the_loss_of_a_step_is_the_mean_over_the_masked_tokens_of_the_global_batch(
    tmp_path: Path, shards: str, task: RefineTask
):
    import transformers

    job = job_of(tmp_path / "run", shards, task, optimizer={"lr": 1e-9}, epochs=1)
    found = trained(job)
    # The rate is so small that all three steps see the encoder as it was saved.
    reference = transformers.AutoModelForMaskedLM.from_pretrained(task.source, dtype=torch.float64).eval()
    steps = plan_steps(job.train_rows, global_batch=5, seed=0, total_steps=3)
    for loss, batch in zip(found, local_batches(shards, steps, task.stream(train=True).collate), strict=True):
        assert batch.token_labels is not None
        assert batch.attention_mask is not None
        with torch.no_grad():
            logits = reference(input_ids=batch.input_ids, attention_mask=batch.attention_mask.long()).logits
        each = torch.nn.functional.cross_entropy(logits.mT, batch.token_labels, ignore_index=-1, reduction="none")
        assert loss == pytest.approx(float(each.sum() / (batch.token_labels >= 0).sum()), rel=1e-5)
    last = load_last(job.run / "checkpoints")
    assert last is not None
    assert last[1].metrics.keys() == {"loss", "accuracy"}


@pytest.mark.parametrize("micro_batch", [1, 3])
def test_the_size_of_the_micro_batch_changes_nothing(tmp_path: Path, shards: str, task: RefineTask, micro_batch: int):
    whole = job_of(tmp_path / "whole", shards, task)
    parts = job_of(tmp_path / "parts", shards, task, micro_batch=micro_batch)
    assert trained(parts) == pytest.approx(trained(whole), rel=1e-5)
    assert curve(parts.run, "grad_norm") == pytest.approx(curve(whole.run, "grad_norm"), rel=1e-4)
    one, other = load_last(whole.run / "checkpoints"), load_last(parts.run / "checkpoints")
    assert one is not None
    assert other is not None
    assert one[1].metrics == pytest.approx(other[1].metrics, rel=1e-5)


@pytest.mark.parametrize("part", ["encoder", "head"])
def test_training_lowers_the_loss_of_the_texts_it_sees_and_moves_nothing_else(
    tmp_path: Path, shards: str, task: RefineTask, part: Any
):
    job = job_of(tmp_path / "run", shards, replace(task, part=part, trainable="full"), epochs=12)
    losses = trained(job)
    assert np.mean(losses[-6:]) < np.mean(losses[:6]) - 0.3
    last = load_last(job.run / "checkpoints")
    assert last is not None
    names = [key.removeprefix("param/") for key in last[0] if key.startswith("param/")]
    assert names
    assert all(name.startswith(f"{part}.") for name in names)


def test_a_killed_run_goes_on_as_if_nothing_had_happened(
    tmp_path: Path, shards: str, task: RefineTask, monkeypatch: pytest.MonkeyPatch
):
    whole, broken = job_of(tmp_path / "whole", shards, task), job_of(tmp_path / "broken", shards, task)
    expected = trained(whole)
    original = Tracker.step

    def fatal(self: Tracker, record: Mapping[str, Any]) -> None:
        if record["step"] == 5:
            raise Killed
        original(self, record)

    with monkeypatch.context() as patch:
        patch.setattr(Tracker, "step", fatal)
        with pytest.raises(Killed):
            train(broken, CPU)
    assert len(curve(broken.run)) == 4
    assert trained(broken) == expected


def test_it_stops_when_the_held_out_loss_rises(tmp_path: Path, shards: str, task: RefineTask):
    job = job_of(
        tmp_path / "run",
        shards,
        task,
        epochs=40,
        optimizer={"lr": 0.05, "warmup_fraction": 0},
        selection={"metric": "loss", "mode": "min", "patience_epochs": 2},
    )
    steps = len(trained(job))
    last = load_last(job.run / "checkpoints")
    assert last is not None
    assert last[1].done
    assert last[1].best_step is not None
    assert steps < 40 * 3
    assert steps == last[1].best_step + 2 * 3


def test_a_tokenizer_without_a_mask_is_refused(task: RefineTask):
    tokenizer = TextTokenizer(OFFLINE_TEXT_MODEL, max_tokens=8)
    tokenizer.loaded.mask_token = None
    with pytest.raises(PrimaError) as caught:
        replace(task, tokenizer=tokenizer).stream(train=True)
    assert str(caught.value) == (
        f"{task.source}: this tokenizer has no mask token\n  Name an encoder such as BERT or ModernBERT."
    )
