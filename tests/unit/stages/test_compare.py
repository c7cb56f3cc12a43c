from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from sklearn import metrics as sk

from prima_ray.base import PrimaError, read_json
from prima_ray.cli import main
from prima_ray.data.schema import read_manifest
from prima_ray.stages.compare import CompareConfig, run_compare
from prima_ray.stages.tested_run import open_tested
from tests.conftest import train_tiny, write_toy_shards


def message(*runs: Path, **options: Any) -> str:
    with pytest.raises(PrimaError) as caught:
        run_compare([str(run) for run in runs], **options)
    return str(caught.value)


def test_runs_beside_each_other(
    tiny_fuse: Path, tiny_finetune: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "comparison"
    runs = [str(tiny_fuse), str(tiny_finetune)]
    assert main(["compare", *runs, "--out", str(out), "--set", "num_resamples=30"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"run: {out}"
    found, html = read_json(out / "metrics.json"), (out / "report.html").read_text()
    accuracies = []
    for address in runs:
        rows = pq.read_table(Path(address) / "predictions.parquet").to_pylist()
        rows = [row for row in rows if row["fold"] == 0 and row["label"]]
        accuracies.append(sk.accuracy_score([row["label"] for row in rows], [row["prediction"] for row in rows]))
    whole = found["sets"]["all"]
    assert (found["runs"], found["num_exams"]) == (runs, len(rows))
    models = whole["headline"]["models"]
    assert [models[address]["accuracy"]["value"] for address in runs] == pytest.approx(accuracies)
    gap = whole["headline"]["differences"][runs[1]]["accuracy"]
    assert gap["value"] == pytest.approx(accuracies[0] - accuracies[1])
    classes = found["classes"]
    recalls = sk.recall_score(
        [row["label"] for row in rows], [row["prediction"] for row in rows], labels=classes, average=None
    )
    told = whole["classes"]["models"][runs[1]]
    assert [told[f"{name}.recall"]["value"] for name in classes] == pytest.approx(list(recalls))
    assert sum(found["class_counts"].values()) == len(rows)
    assert list(found["sets"]) == ["all", "complete"]
    assert found["positive"] == ["BCC"]
    assert "our macro F1 is" in html
    assert "http" not in html
    # An earlier comparison is overwritten; another report is not.
    assert main(["compare", *runs, "--out", str(out), "--set", "num_resamples=2"]) == 0
    assert main(["compare", *runs, "--out", str(tiny_fuse)]) == 2


def test_runs_of_other_shards_are_refused(tiny_finetune: Path, tmp_path: Path) -> None:
    shards = write_toy_shards(tmp_path / "shards", num_exams=40, num_folds=4, seed=3)
    run = train_tiny("finetune", shards, tmp_path / "run", max_steps=1)
    mine = open_tested(str(tiny_finetune)).index.shards
    hashes = [read_manifest(item).content_hash[:12] for item in (shards, mine)]
    assert message(tiny_finetune, run, out=str(tmp_path / "out")) == (
        f"{run}: trained on other shards than {tiny_finetune}: {shards} (content hash {hashes[0]}), not {mine} "
        f"({hashes[1]})\n  Only runs on the same shards can be compared. Train one of them again on the other's."
    )
    assert not (tmp_path / "out").exists()


def test_a_run_that_saw_the_others_patients_is_refused(
    tiny_finetune: Path, labelled_shards: str, tmp_path: Path
) -> None:
    """Split by lesion it was tested on some of the same exams, and trained on others of their patients."""
    run = train_tiny("finetune", labelled_shards, tmp_path / "lesion", max_steps=1, split="lesion")
    shared = open_tested(str(run)).shared_patients
    assert shared > 0
    said = message(tiny_finetune, run, out=str(tmp_path / "out"))
    assert said.startswith(f"{run}: a leak: ")
    assert " among those that it is scored on and among those that it was trained on" in said
    other = Path(shutil.copytree(run, tmp_path / "copy"))
    target = run_compare([str(run), str(other)], out=str(tmp_path / "out"), config=CompareConfig(num_resamples=5))
    assert "Grouped by lesion" in (target / "report.html").read_text()
    gaps = read_json(target / "metrics.json")["sets"]["all"]["headline"]["differences"][str(other)]
    assert np.array([list(item.values()) for item in gaps.values()]).tolist() == [[0, 0, 0]] * 4


def test_what_cannot_be_compared(tiny_finetune: Path, tiny_fuse: Path) -> None:
    assert message(tiny_fuse) == "one run cannot be compared\n  Name two or more; the first is ours."
    assert message(tiny_fuse, tiny_finetune, tiny_fuse) == (
        f"{tiny_fuse}: this run is named twice\n  Name each run once."
    )
