"""Masked-language modelling on two gloo ranks is that of one, whatever the engine. No Ray; DeepSpeed starts once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from prima_ray.data.masking import ReplacementConfig
from prima_ray.data.text_shards import SideText, write_text_shards
from prima_ray.models.lora import LoraConfig
from prima_ray.models.tokenizer import TextTokenizer
from prima_ray.training.checkpoint import load_last
from prima_ray.training.contexts import LocalContext
from prima_ray.training.loop import TrainingJob, train
from prima_ray.training.ranks import start_ranks
from prima_ray.training.tasks.refine import RefineTask
from tests.unit.models.conftest import BERT, VOCABULARY, add_tokenizer
from tests.unit.training.toys import curve, make_config

pytest.importorskip("deepspeed")

WORLD = 2
TEXTS = [" ".join(["sun and skin raise the risk of moles in old age"] * (1 + number % 3)) for number in range(12)]
RUNS: dict[str, dict[str, Any]] = {
    "torch": {"engine": {"kind": "torch"}},
    # The output layer is tied to the input embeddings, which ZeRO-3 partitions: full training moves them.
    **{f"zero{stage}": {"engine": {"kind": "deepspeed", "zero_stage": stage}} for stage in (1, 3)},
}


class Rank(LocalContext):
    """One of two processes."""

    def __init__(self, rank: int) -> None:
        super().__init__("cpu")
        self.rank, self.world_size = rank, WORLD  # type: ignore[misc]

    def gather_objects(self, values: list[str]) -> list[str]:
        lists: list[list[str]] = [[] for _ in range(WORLD)]
        dist.all_gather_object(lists, values)
        return [value for part in lists for value in part]

    def barrier(self) -> None:
        dist.barrier()


def job_of(folder: Path, name: str, trainable: Any) -> TrainingJob:
    """Nine texts in ragged batches of five: 3 and 2 on two ranks, and padding at the end."""
    run = folder / f"{name}-{trainable}"
    run.mkdir(exist_ok=True)
    return TrainingJob(
        config=make_config(**RUNS.get(name, RUNS["torch"]), micro_batch=2, optimizer={"lr": 0.01}, epochs=2),
        task=RefineTask(
            seed=7,
            part="encoder",
            source=str(folder / "encoder"),
            tokenizer=TextTokenizer(str(folder / "encoder"), max_tokens=40),
            trainable=trainable,
            lora=LoraConfig(rank=2),
            mask_rate=0.3,
            replacement=ReplacementConfig(),
        ),
        run=run,
        shards=str(folder / "texts"),
        train_rows=np.arange(9),
        val_rows=np.arange(9, 12),
    )


def rank_main(rank: int, folder: str) -> None:
    for name in RUNS:
        for trainable in ("lora", "full"):
            train(job_of(Path(folder), name, trainable), Rank(rank))
            dist.barrier()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import transformers

    folder = tmp_path_factory.mktemp("refine")
    write_text_shards(folder / "texts", [SideText(f"t{n}", "o", text, n >= 9) for n, text in enumerate(TEXTS)])
    torch.manual_seed(0)
    model = transformers.BertForMaskedLM(transformers.BertConfig(**BERT, vocab_size=VOCABULARY))
    model.save_pretrained(folder / "encoder")
    add_tokenizer(folder / "encoder")
    for trainable in ("lora", "full"):
        train(job_of(folder, "alone", trainable), LocalContext("cpu"))
    start_ranks(rank_main, WORLD, str(folder))
    return folder


@pytest.mark.parametrize("trainable", ["lora", "full"])
@pytest.mark.parametrize("name", RUNS)
def test_two_workers_train_as_one_does(folder: Path, name: str, trainable: str):
    alone, both = folder / f"alone-{trainable}", folder / f"{name}-{trainable}"
    assert len(curve(alone)) == 4
    assert curve(both) == pytest.approx(curve(alone), rel=1e-5)
    assert curve(both, "grad_norm") == pytest.approx(curve(alone, "grad_norm"), rel=1e-3)
    one, other = load_last(alone / "checkpoints"), load_last(both / "checkpoints")
    assert one is not None
    assert other is not None
    assert other[1].metrics == pytest.approx(one[1].metrics, rel=1e-4)
