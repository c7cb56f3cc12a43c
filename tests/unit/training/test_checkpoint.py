from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from prima_ray.base import PrimaError
from prima_ray.training.checkpoint import Progress, load_best, load_checkpoint, load_last, save_checkpoint
from prima_ray.training.engine import State


def state(value: float) -> State:
    return {"param/w": torch.full((2, 3), value), "step": torch.tensor([int(value)])}


def save(folder: Path, step: int, *, best: int | None = None, keep_last: int = 1) -> Path:
    return Path(save_checkpoint(folder, state(float(step)), Progress(step=step, best_step=best), keep_last=keep_last))


def names(folder: Path) -> list[str]:
    return sorted(item.name for item in folder.glob("step-*"))


def test_the_last_and_the_best_stay(tmp_path: Path):
    save(tmp_path, 10, best=10)
    save(tmp_path, 20, best=10)
    save(tmp_path, 30, best=10)
    assert names(tmp_path) == ["step-00000010", "step-00000030"]
    loaded = load_last(tmp_path)
    assert loaded is not None
    assert loaded[1].step == 30
    assert torch.equal(loaded[0]["param/w"], state(30)["param/w"])
    assert load_best(tmp_path)[1].step == 10


def test_progress_comes_back_whole(tmp_path: Path):
    progress = Progress(step=7, best_value=0.5, best_step=3, epochs_since_best=2, metrics={"a": 1.0}, done=True)
    save_checkpoint(tmp_path, state(7.0), progress, keep_last=1)
    loaded = load_last(tmp_path)
    assert loaded is not None
    assert loaded[1] == progress


@pytest.mark.parametrize("harm", ["truncate", "no manifest", "half a manifest", "no state"])
def test_a_torn_checkpoint_is_passed_over(tmp_path: Path, harm: str):
    save(tmp_path, 10, keep_last=2)
    torn = save(tmp_path, 20, keep_last=2)
    if harm == "truncate":
        data = (torn / "state.safetensors").read_bytes()
        (torn / "state.safetensors").write_bytes(data[:-4])
    elif harm == "no manifest":
        (torn / "checkpoint.json").unlink()
    elif harm == "half a manifest":
        (torn / "checkpoint.json").write_text('{"progress": {"st')
    else:
        (torn / "state.safetensors").unlink()
    loaded = load_last(tmp_path)
    assert loaded is not None
    assert loaded[1].step == 10
    with pytest.raises(PrimaError):
        load_checkpoint(torn)


def test_a_torn_attempt_is_overwritten(tmp_path: Path):
    torn = tmp_path / "step-00000010"
    torn.mkdir()
    (torn / "state.safetensors").write_text("half")
    save(tmp_path, 10)
    assert json.loads((torn / "checkpoint.json").read_text())["progress"]["step"] == 10


def test_a_new_best_lets_the_old_one_go(tmp_path: Path):
    save(tmp_path, 10, best=10)
    save(tmp_path, 20, best=20)
    assert names(tmp_path) == ["step-00000020"]
    assert load_best(tmp_path)[1].step == 20


def test_what_a_torn_attempt_left_beyond_the_new_step_goes(tmp_path: Path):
    save(tmp_path, 10, best=10)
    torn = save(tmp_path, 30, best=10)
    (torn / "checkpoint.json").unlink()
    save(tmp_path, 20, best=10)
    assert names(tmp_path) == ["step-00000010", "step-00000020"]


def test_nothing_to_load_is_none(tmp_path: Path):
    assert load_last(tmp_path) is None
    with pytest.raises(PrimaError) as caught:
        load_best(tmp_path)
    assert str(caught.value) == f"{tmp_path}: no checkpoint here has been chosen yet\n  Run the stage again."


@pytest.mark.parametrize(
    "text", ["[]", "{}", '{"progress": 1}', '{"progress": {"step": "x"}}', '{"progress": {"a": 1}}']
)
def test_a_manifest_that_says_something_else_is_told(tmp_path: Path, text: str):
    save(tmp_path, 10, keep_last=2)
    damaged = save(tmp_path, 20, keep_last=2) / "checkpoint.json"
    damaged.write_text(text)
    with pytest.raises(PrimaError) as caught:
        load_checkpoint(damaged.parent)
    assert str(caught.value) == f"{damaged}: damaged: it does not say where training stood"
    loaded = load_last(tmp_path)
    assert loaded is not None
    assert loaded[1].step == 10


def test_what_is_no_checkpoint_is_let_alone(tmp_path: Path):
    save(tmp_path, 10)
    (tmp_path / "step-zzz").write_text("a note")
    (tmp_path / "step-99999999").write_text("a note")
    loaded = load_last(tmp_path)
    assert loaded is not None
    assert loaded[1].step == 10
    save(tmp_path, 20)
    assert names(tmp_path) == ["step-00000020", "step-99999999", "step-zzz"]
