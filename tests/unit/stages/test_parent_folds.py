from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from prima_ray.base import PrimaError
from prima_ray.data.plan import ExamIndex
from tests.conftest import tiny_config, train_tiny, write_toy_shards


def fuse(shards: str, out: Path, parent: Path, **changes: Any) -> Path:
    raw = tiny_config("fuse", shards, "unused")
    inputs = {**raw["inputs"], "finetune": str(parent)}
    return train_tiny("fuse", shards, out, inputs=inputs, image_tower=None, **changes)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"fold": 2}, r"a leak: inputs.finetune learned from (\d+) of the \1 exams that are tested here"),
        # Fold 1 has chosen the parent.
        ({"fold": 1, "val_fold": 0}, r"was chosen on (\d+) of the \1 exams that are tested here"),
        ({"fold": 0, "val_fold": 3}, r"learned from (\d+) of the \1 exams that are validated here"),
        ({"fold": 0, "split": "lesion"}, r"a leak: inputs.finetune learned from"),
    ],
)
def test_what_a_parent_learned_from_is_neither_tested_nor_validated(
    changes: dict[str, Any], told: str, tiny_finetune: Path, labelled_shards: str, tmp_path: Path
) -> None:
    with pytest.raises(PrimaError, match=told):
        fuse(labelled_shards, tmp_path / "out", tiny_finetune, **changes)
    # Nothing is left of a run that never began.
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("fold", [0, "none"])
def test_the_same_fold_and_all_folds_are_right(
    fold: int | str, tiny_finetune: Path, labelled_shards: str, tmp_path: Path
) -> None:
    assert (fuse(labelled_shards, tmp_path / "out", tiny_finetune, fold=fold) / "run.json").exists()


def test_shards_that_were_made_anew_are_compared_by_the_names_of_exams(
    tiny_finetune: Path, labelled_shards: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    anew = write_toy_shards(tmp_path / "anew", num_exams=41, num_folds=4)
    assert ExamIndex.read(anew).manifest.content_hash != ExamIndex.read(labelled_shards).manifest.content_hash
    with pytest.raises(PrimaError, match=r"a leak: inputs.finetune learned from \d+ of the \d+ exams that are tested"):
        fuse(anew, tmp_path / "out", tiny_finetune, fold=2)
    # Where they are gone nothing is known, and that is said.
    parent = Path(shutil.copytree(tiny_finetune, tmp_path / "parent"))
    record = json.loads((parent / "run.json").read_text())
    record["inputs"]["shards"]["path"] = str(tmp_path / "gone")
    (parent / "run.json").write_text(json.dumps(record))
    fuse(anew, tmp_path / "other", parent, fold=2)
    assert "which are gone: whether it knows exams that are tested here cannot be told" in caplog.text


def test_a_parent_of_every_fold_leaves_nothing_to_test_on(labelled_shards: str, tmp_path: Path) -> None:
    parent = train_tiny("finetune", labelled_shards, tmp_path / "parent", fold="none")
    with pytest.raises(PrimaError, match=r"learned from (\d+) of the \1 exams that are tested here"):
        fuse(labelled_shards, tmp_path / "out", parent)
