from __future__ import annotations

import json
from pathlib import Path

import pytest

from prima_ray.base import PrimaError, StrictConfig
from prima_ray.stages.rundir import finish_run, open_run, read_record


class Inner(StrictConfig):
    lr: float = 1.0


class Config(StrictConfig):
    out: str = "x"
    optimizer: Inner = Inner()
    num_workers: int = 1


def test_a_new_run_writes_its_config_and_is_not_finished(tmp_path: Path):
    run = open_run(Config(), out=str(tmp_path / "a" / "b"), stage="align")
    assert not run.finished
    assert (run.path / "config.yaml").read_text() == "out: x\noptimizer:\n  lr: 1.0\nnum_workers: 1\n"


def test_the_same_config_takes_the_run_up_and_another_is_refused(tmp_path: Path):
    out = str(tmp_path / "run")
    run = open_run(Config(), out=out, stage="align")
    assert not open_run(Config(), out=out, stage="align").finished
    finish_run(run, seed=0, inputs={})
    assert open_run(Config(), out=out, stage="align").finished
    assert open_run(Config(num_workers=2), out=out, stage="align", execution_keys=frozenset({"num_workers"})).finished
    with pytest.raises(PrimaError) as caught:
        open_run(Config(optimizer=Inner(lr=2.0)), out=out, stage="align")
    assert str(caught.value) == (
        f"{out}: `out` holds a run of another config; it differs in optimizer.lr\n"
        "  Choose another `out`, or delete the folder if the run is not needed."
    )


def test_a_folder_of_something_else_is_not_touched(tmp_path: Path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(PrimaError, match="is no run directory"):
        open_run(Config(), out=str(tmp_path), stage="align")
    assert [item.name for item in tmp_path.iterdir()] == ["thesis.tex"]


def test_the_record_names_parents_by_hash_and_outputs(tmp_path: Path):
    parent = tmp_path / "encoder"
    parent.mkdir()
    (parent / "config.json").write_text("{}")
    run = open_run(Config(), out=str(tmp_path / "run"), stage="align")
    (run.path / "model").mkdir()
    (run.path / "model" / "w.bin").write_bytes(b"1")
    finish_run(run, seed=3, inputs={"text_encoder": str(parent)}, extra={"note": 1})
    record = json.loads((run.path / "run.json").read_text())
    assert record["seed"] == 3
    assert record["inputs"]["text_encoder"]["path"] == str(parent)
    assert len(record["inputs"]["text_encoder"]["hash"]) == 64
    assert list(record["outputs"]) == ["model/w.bin"]
    assert record["versions"]["torch"]
    assert read_record(run.path, stage="align")["note"] == 1
    with pytest.raises(PrimaError, match="this is a run of align, expected one of fuse"):
        read_record(run.path, stage="fuse")


def test_an_unfinished_run_is_told_from_no_run(tmp_path: Path):
    open_run(Config(), out=str(tmp_path / "run"), stage="align")
    with pytest.raises(PrimaError, match="is not finished"):
        read_record(tmp_path / "run")
    with pytest.raises(PrimaError, match="no such run directory"):
        read_record(tmp_path / "none")
    with pytest.raises(PrimaError, match="is no run directory"):
        read_record(tmp_path)
