"""What two trained models say, compared: real runs of this process."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from prima_ray.base import PrimaError
from prima_ray.data.plan import ExamIndex
from prima_ray.inference.similarity import image_text_cosines
from prima_ray.stages import align
from prima_ray.stages.elastic_answers import answer_difference
from tests.conftest import train_tiny

TOWER = {"name": "resnet10t", "image_size": 32}
BERT = {"model_type": "bert", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 16}  # fmt: skip


@pytest.fixture(scope="module")
def aligned(labelled_shards: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("aligned")

    def trained(name: str, lr: float) -> Path:
        raw = {
            "out": str(folder / name),
            "inputs": {"shards": labelled_shards},
            "image_tower": TOWER,
            "text_tower": {"config": BERT, "max_tokens": 32},
            "views": {"image_size": 32},
            "projection": {"width": 8},
            "optimizer": {"lr": lr},
            "global_batch": 8,
            "max_steps": 2,
            "context": {"kind": "local", "device": "cpu"},
        }
        return Path(align.run(align.AlignConfig.model_validate(raw)))

    return trained("one", 1e-3), trained("other", 1e-2)


def test_aligned_models_are_compared_by_their_cosines(aligned: tuple[Path, Path], labelled_shards: str):
    one, other = aligned
    assert answer_difference(one, one, stage="align", shards=labelled_shards) == 0.0
    assert answer_difference(one, other, stage="align", shards=labelled_shards) > 1e-4


def test_cosines_are_cosines_and_each_exam_has_its_row(aligned: tuple[Path, Path], labelled_shards: str):
    index = ExamIndex.read(labelled_shards)
    rows = np.arange(len(index))
    whole = image_text_cosines(aligned[0], labelled_shards, index.manifest, rows)
    assert whole.shape == (40, 40)
    assert whole.dtype == torch.float64
    assert whole.abs().max() <= 1 + 1e-9
    few = image_text_cosines(aligned[0], labelled_shards, index.manifest, rows[[30, 3]])
    torch.testing.assert_close(few, whole[[30, 3]][:, [30, 3]], rtol=0, atol=1e-6)


def test_a_run_of_another_stage_has_no_cosines(tiny_fuse: Path, labelled_shards: str):
    index = ExamIndex.read(labelled_shards)
    with pytest.raises(PrimaError, match="no model of align"):
        image_text_cosines(tiny_fuse, labelled_shards, index.manifest, np.arange(2))


def test_models_that_diagnose_are_compared_by_their_probabilities(
    tiny_finetune: Path, labelled_shards: str, tmp_path: Path
):
    def difference(other: Path) -> float:
        return answer_difference(tiny_finetune, other, stage="finetune", shards=labelled_shards)

    assert difference(tiny_finetune) == 0.0
    assert 0 < difference(train_tiny("finetune", labelled_shards, tmp_path / "more", max_steps=9)) <= 1
    assert difference(train_tiny("finetune", labelled_shards, tmp_path / "fold", fold=1)) == float("inf")
