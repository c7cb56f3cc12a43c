"""Checkpoints that are written beside training, and what goes wrong with them: full disks, kills, other configs."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from prima_ray.base import PrimaError
from prima_ray.training import checkpoint_writer as writer_module
from prima_ray.training.checkpoint import Origin, Progress, check_origin, load_last, save_checkpoint
from prima_ray.training.checkpoint_writer import CheckpointWriter
from prima_ray.training.config import CheckpointConfig
from prima_ray.training.contexts import LocalContext
from prima_ray.training.engine import State
from prima_ray.training.loop import train
from prima_ray.training.task import AgreedError
from tests.unit.training.toys import curve, make_job

BESIDE = CheckpointConfig(asynchronous=True)
CPU = {"context": {"kind": "local", "device": "cpu"}}


def state(value: float) -> State:
    return {"param/w": torch.full((2, 3), value), "step": torch.tensor([int(value)])}


def last_step(folder: Path) -> int:
    found = load_last(folder)
    return found[1].step if found else 0


def test_a_checkpoint_counts_when_it_is_committed_and_the_next_one_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    may_write = threading.Event()
    real = save_checkpoint

    def slow(*arguments: Any, **keys: Any) -> str:
        assert may_write.wait(10)
        return real(*arguments, **keys)

    monkeypatch.setattr(writer_module, "save_checkpoint", slow)
    writer = CheckpointWriter(str(tmp_path), BESIDE, Origin())
    writer.save(state(1), Progress(step=1))
    assert (writer.saved_step, writer.failed, last_step(tmp_path)) == (0, False, 0)
    timer = threading.Timer(0.1, may_write.set)
    timer.start()
    writer.save(state(2), Progress(step=2))
    assert may_write.is_set()
    assert writer.saved_step >= 1
    writer.wait()
    assert (writer.saved_step, last_step(tmp_path)) == (2, 2)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_write_that_fails_is_told_once_and_the_earlier_one_stays(tmp_path: Path, asynchronous: bool):
    home = tmp_path / "checkpoints"
    writer = CheckpointWriter(str(home), CheckpointConfig(asynchronous=asynchronous), Origin())
    writer.save(state(1), Progress(step=1))
    writer.wait()
    # A file stands where the folder should be.
    (home / "step-00000002").write_text("in the way")

    def save_and_look() -> None:
        writer.save(state(2), Progress(step=2))
        while not writer.failed:
            time.sleep(0.01)
        writer.wait()

    with pytest.raises(PrimaError) as caught:
        save_and_look()
    assert caught.value.what.startswith("the checkpoint of step 2 cannot be written (")
    assert caught.value.mend == (
        "The checkpoint of step 1 is kept. Make room, or see that `out` can be written to, and run the same command "
        "again."
    )
    writer.wait()
    assert (writer.saved_step, last_step(home)) == (1, 1)


def test_training_stops_at_the_step_after_a_lost_checkpoint(
    tmp_path: Path, toy_shards: str, monkeypatch: pytest.MonkeyPatch
):
    job = make_job(tmp_path / "run", toy_shards, checkpoint_every_steps=1, **CPU)
    real = save_checkpoint
    tried: list[int] = []

    def fragile(folder: str, state: State, progress: Progress, **keys: Any) -> str:
        tried.append(progress.step)
        if progress.step == 4:
            raise PrimaError("no room", where="there", mend="Make some.")
        return real(folder, state, progress, **keys)

    monkeypatch.setattr(writer_module, "save_checkpoint", fragile)
    with pytest.raises(AgreedError) as caught:
        train(job, LocalContext("cpu"))
    assert str(caught.value) == "there: no room\n  Make some."
    assert tried == [1, 2, 3, 4]
    assert len(curve(job.run)) in (4, 5)
    assert last_step(job.run / "checkpoints") == 3
    monkeypatch.setattr(writer_module, "save_checkpoint", real)
    train(job, LocalContext("cpu"))
    other = make_job(tmp_path / "whole", toy_shards, checkpoint_every_steps=1, **CPU)
    train(other, LocalContext("cpu"))
    assert curve(job.run) == curve(other.run)


def test_beside_training_or_not_the_run_is_the_same(tmp_path: Path, toy_shards: str):
    runs = []
    for asynchronous in (True, False):
        keys = {"checkpoint": {"asynchronous": asynchronous}, "checkpoint_every_steps": 2, **CPU}
        job = make_job(tmp_path / str(asynchronous), toy_shards, **keys)
        train(job, LocalContext("cpu"))
        runs.append(job.run)
    assert curve(runs[0]) == curve(runs[1])
    one, other = (load_last(run / "checkpoints") for run in runs)
    assert one is not None
    assert other is not None
    assert one[1] == other[1]
    assert all(torch.equal(value, other[0][name]) for name, value in one[0].items())


def test_a_checkpoint_of_another_config_or_other_exams_is_refused(tmp_path: Path, toy_shards: str):
    keys = {"checkpoint_every_steps": 2, "max_steps": 4, **CPU}
    job = make_job(tmp_path / "one", toy_shards, **keys)
    train(job, LocalContext("cpu"))
    name = tmp_path / "two" / "checkpoints" / "step-00000004"

    def taken_up(**changes: Any) -> Any:
        shutil.rmtree(tmp_path / "two", ignore_errors=True)
        other = make_job(tmp_path / "two", toy_shards, **{**keys, **changes})
        shutil.copytree(job.run / "checkpoints", other.run / "checkpoints")
        return other

    # Where and how fast is no matter.
    train(taken_up(micro_batch=2, checkpoint={"asynchronous": False, "keep_last": 5}), LocalContext("cpu"))
    with pytest.raises(AgreedError) as caught:
        train(taken_up(seed=9, optimizer={"lr": 0.01}), LocalContext("cpu"))
    assert str(caught.value) == (
        f"{name}: this checkpoint was written by another config; it differs in seed, optimizer.lr, "
        "optimizer.weight_decay, optimizer.clip_norm\n"
        "  Resume with the config that wrote it, or choose another `out`."
    )
    fewer = taken_up()
    with pytest.raises(AgreedError) as caught:
        train(replace(fewer, train_rows=fewer.train_rows[1:]), LocalContext("cpu"))
    assert str(caught.value) == (
        f"{name}: this checkpoint was written on other exams: the shards, or the rows of its folds, are not the same\n"
        "  Resume on the shards that it was written on, or choose another `out`."
    )


def test_a_checkpoint_that_does_not_say_is_believed(tmp_path: Path):
    save_checkpoint(tmp_path, state(1), Progress(step=1), keep_last=1)
    check_origin(tmp_path, 1, Origin(config={"seed": 1}, exams="abc"))


TRAIN = """
import resource, sys
from pathlib import Path
from prima_ray.base import PrimaError
from prima_ray.training.contexts import LocalContext
from prima_ray.training.loop import train
from tests.unit.training.toys import make_job

run, shards, limit = sys.argv[1:]
job = make_job(Path(run), shards, checkpoint_every_steps=1, **{"context": {"kind": "local", "device": "cpu"}})
if int(limit):
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), resource.RLIM_INFINITY))
try:
    train(job, LocalContext("cpu"))
except PrimaError as error:
    print(error)
"""


def run_child(run: Path, shards: str, *, limit: int = 0) -> str:
    answer = subprocess.run(
        [sys.executable, "-c", TRAIN, str(run), shards, str(limit)], capture_output=True, text=True, check=False
    )
    assert answer.returncode == 0, answer.stderr
    return answer.stdout


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    """A disk of 1 MiB: a checkpoint here is 16 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if made.returncode:
        pytest.skip("file systems cannot be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_stops_training_and_the_run_goes_on_when_there_is_room(
    small_disk: Path, tmp_path: Path, toy_shards: str
):
    run = small_disk / "run"
    job = make_job(run, toy_shards, checkpoint_every_steps=1, max_steps=4, **CPU)
    writes: list[int] = []
    real = save_checkpoint
    filler = small_disk / "filler"

    def filling(folder: str, state: State, progress: Progress, **keys: Any) -> str:
        writes.append(progress.step)
        if progress.step == 3 and len(writes) == 3:
            room = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
            filler.write_bytes(b"x" * (room - 8192))
        return real(folder, state, progress, **keys)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer_module, "save_checkpoint", filling)
        with pytest.raises(AgreedError) as caught:
            train(job, LocalContext("cpu"))
    assert caught.value.what.startswith("the checkpoint of step 3 cannot be written (")
    assert "No space left on device" in caught.value.what
    assert caught.value.where == f"{run}/checkpoints/step-00000003"
    assert str(caught.value.mend).startswith("The checkpoint of step 2 is kept. Make room, ")
    assert not (run / "checkpoints" / "step-00000003").exists(), "what was written of it takes no room"
    assert last_step(run / "checkpoints") == 2
    filler.unlink()
    train(job, LocalContext("cpu"))
    whole = make_job(tmp_path / "whole", toy_shards, checkpoint_every_steps=1, max_steps=4, **CPU)
    train(whole, LocalContext("cpu"))
    assert curve(run) == curve(whole.run)


def test_a_limit_on_files_is_a_full_disk_too(tmp_path: Path, toy_shards: str):
    run = tmp_path / "run"
    said = run_child(run, toy_shards, limit=4096)
    assert said.startswith(f"{run}/checkpoints/step-00000001: the checkpoint of step 1 cannot be written (")
    assert "File too large" in said
    assert said.splitlines()[-1] == (
        "  Make room, or see that `out` can be written to, and run the same command again."
    )
    assert list((run / "checkpoints").iterdir()) == []
    assert run_child(run, toy_shards) == ""
    assert last_step(run / "checkpoints") == 9


KILLED = """
import os, signal, sys
from pathlib import Path
from prima_ray.data import storage
from prima_ray.training import checkpoint
from prima_ray.training.contexts import LocalContext
from prima_ray.training.loop import train
from tests.unit.training.toys import make_job

run, shards, when = sys.argv[1:]
job = make_job(Path(run), shards, checkpoint_every_steps=1, **{"context": {"kind": "local", "device": "cpu"}})
put, write = checkpoint._put_state, storage.Folder.write

def die_before(self, name, data):
    if name == "checkpoint.json" and "step-00000003" in self.address:
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, name, data)

def die_within(target, state):
    if "step-00000003" in target.address:
        target.path.mkdir(parents=True)
        (target.path / "state.safetensors").write_bytes(b"half of a state")
        os.kill(os.getpid(), signal.SIGKILL)
    return put(target, state)

if when == "before the manifest":
    storage.Folder.write = die_before
else:
    checkpoint._put_state = die_within
train(job, LocalContext("cpu"))
"""


@pytest.mark.parametrize("when", ["before the manifest", "within the state"])
def test_a_kill_while_a_checkpoint_is_written_costs_only_the_steps_since_the_last(
    tmp_path: Path, toy_shards: str, when: str
):
    run = tmp_path / "run"
    answer = subprocess.run(
        [sys.executable, "-c", KILLED, str(run), toy_shards, when], capture_output=True, check=False
    )
    assert answer.returncode == -signal.SIGKILL
    assert (run / "checkpoints" / "step-00000003" / "state.safetensors").exists()
    assert last_step(run / "checkpoints") == 2
    job = make_job(run, toy_shards, checkpoint_every_steps=1, **CPU)
    train(job, LocalContext("cpu"))
    whole = make_job(tmp_path / "whole", toy_shards, checkpoint_every_steps=1, **CPU)
    train(whole, LocalContext("cpu"))
    assert curve(run) == curve(whole.run)
    assert last_step(run / "checkpoints") == 9
