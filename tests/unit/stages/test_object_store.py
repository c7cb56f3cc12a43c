"""Runs whose `out` and parents are addresses on an object store: a real server, spoken to over HTTP."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from prima_ray.base import PrimaError, StrictConfig
from prima_ray.data.fetched import local_copy
from prima_ray.data.run_record import read_record
from prima_ray.data.schema import open_filesystem
from prima_ray.data.storage import Folder
from prima_ray.stages import out_store
from prima_ray.stages.evaluate import EvaluateConfig, run_evaluate
from prima_ray.stages.out_lock import open_alone
from prima_ray.stages.predict import predict_exam, run_predict
from prima_ray.stages.rundir import check_parent
from prima_ray.training import loop as loop_module
from prima_ray.training.checkpoint import load_last
from tests.conftest import train_tiny


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(out_store, "BEAT_S", 0.2)


def lines(address: str, name: str = "steps.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in Folder.at(address).read(name).decode().splitlines()]


@pytest.fixture(scope="module")
def finetuned(bucket: str, labelled_shards: str) -> str:
    shards = f"{bucket}/shards"
    there = Folder.at(shards)
    for path in Path(labelled_shards).iterdir():
        there.upload(path, path.name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(out_store, "BEAT_S", 0.2)
        run = train_tiny("finetune", shards, f"{bucket}/runs/finetune", checkpoint_every_steps=2)  # type: ignore[arg-type]
    return str(run)


def test_a_run_on_a_store_is_the_run_on_a_disk(finetuned: str, labelled_shards: str, tmp_path: Path):
    assert finetuned == "s3://prima/runs/finetune"
    here = train_tiny("finetune", labelled_shards, tmp_path / "here", checkpoint_every_steps=2)
    on_store, on_disk = Folder.at(finetuned), Folder.at(here)
    without = ("tensorboard",)
    assert set(on_store.files(without=without)) == set(on_disk.files(without=without))
    assert [name for name in on_store.files() if name.startswith("tensorboard/")]
    for name in ("predictions.parquet", "model/classifier/model.safetensors"):
        assert on_store.read(name) == on_disk.read(name)
    assert [line["loss"] for line in lines(finetuned)] == [line["loss"] for line in lines(str(here))]
    assert on_store.folders() == ["checkpoints", "model", "tensorboard"]


def test_a_finished_run_is_returned_and_another_config_refused(finetuned: str, capsys: pytest.CaptureFixture[str]):
    shards = "s3://prima/shards"
    before = Folder.at(finetuned).stamps()
    again = train_tiny("finetune", shards, finetuned, checkpoint_every_steps=2)  # type: ignore[arg-type]
    assert (str(again), Folder.at(finetuned).stamps()) == (finetuned, before)
    with pytest.raises(PrimaError) as caught:
        train_tiny("finetune", shards, finetuned, seed=8, checkpoint_every_steps=2)  # type: ignore[arg-type]
    assert str(caught.value) == (
        f"{finetuned}: `out` holds a run of another config; it differs in seed\n"
        "  Choose another `out`, or delete the folder if the run is not needed."
    )


def test_a_finished_run_that_lost_a_file_is_told(finetuned: str, bucket: str):
    copy = Folder.at(f"{bucket}/lost")
    for name in Folder.at(finetuned).files(without=("checkpoints", "tensorboard")):
        if name != "predictions.parquet":
            copy.write(name, Folder.at(finetuned).read(name))
    with pytest.raises(PrimaError) as caught:
        train_tiny("finetune", f"{bucket}/shards", copy.address, checkpoint_every_steps=2)  # type: ignore[arg-type]
    assert str(caught.value) == (
        f"{copy.address}/predictions.parquet: this file of the run is missing\n"
        "  Copy the run again, or delete the folder and run its stage again."
    )


def test_a_run_that_was_stopped_goes_on_elsewhere(
    finetuned: str, store: str, bucket: str, monkeypatch: pytest.MonkeyPatch
):
    original = loop_module._Loop._step
    taken: list[int] = []

    def mortal(self: Any, batch: Any, lr: float, step: int) -> Any:
        taken.append(step)
        if step == 5 and taken.count(5) == 1:
            raise KeyboardInterrupt
        return original(self, batch, lr, step)

    monkeypatch.setattr(loop_module._Loop, "_step", mortal)
    with pytest.raises(KeyboardInterrupt):
        train_tiny("finetune", f"{bucket}/shards", store, checkpoint_every_steps=2)  # type: ignore[arg-type]
    there = Folder.at(store)
    assert not there.exists("run.json")
    assert not there.exists(out_store.LEASE)
    assert len(lines(store)) == 5
    # Nothing of the first process is at hand: the second begins with an empty copy.
    train_tiny("finetune", f"{bucket}/shards", store, checkpoint_every_steps=2)  # type: ignore[arg-type]
    assert taken == [0, 1, 2, 3, 4, 5, 4, 5]
    assert [line["loss"] for line in lines(store)] == [line["loss"] for line in lines(finetuned)]
    assert [(item["from_step"], item["replayed_steps"]) for item in lines(store, "starts.jsonl")] == [(0, 0), (4, 1)]


def test_children_read_their_parent_where_it_is(finetuned: str, bucket: str, tmp_path: Path):
    check_parent(finetuned)
    check_parent(f"{finetuned}/model/classifier")
    check_parent(f"{bucket}/shards")  # has no model, and is not fetched
    run = train_tiny(
        "fuse",
        f"{bucket}/shards",
        f"{bucket}/runs/fuse",  # type: ignore[arg-type]
        inputs={"shards": f"{bucket}/shards", "finetune": finetuned},
        image_tower=None,
    )
    assert run == f"{bucket}/runs/fuse"
    record = read_record(str(run))
    assert {role: item["path"] for role, item in record["inputs"].items()} == {
        "shards": f"{bucket}/shards",
        "finetune": finetuned,
    }
    assert all(len(item["hash"]) == 64 for item in record["inputs"].values())
    # The features of the frozen towers are beside the run, as on a disk.
    assert "features" in Folder.at(f"{bucket}/runs").folders()

    assert pq.read_table(local_copy(str(run)) / "predictions.parquet").num_rows == 18
    photo = tmp_path / "photo.jpg"
    filesystem, root = open_filesystem(f"{bucket}/shards/part-00000.parquet")
    photo.write_bytes(pq.read_table(root, filesystem=filesystem)["images"][0].as_py()[0]["bytes"])
    assert sum(predict_exam(str(run), [str(photo)], None)["probabilities"].values()) == pytest.approx(1)

    report = run_evaluate(str(run), config=EvaluateConfig(num_resamples=20))
    assert report == f"{bucket}/runs/fuse/evaluation"
    assert set(Folder.at(str(report)).files()) == {"report.html", "metrics.json"}
    assert json.loads(Folder.at(str(report)).read("metrics.json"))["run"] == run
    # The report is no part of what was fetched: nothing is fetched anew for it.
    run_evaluate(str(run), config=EvaluateConfig(num_resamples=20))
    with pytest.raises(PrimaError) as caught:
        run_evaluate(str(run), out=f"{bucket}/runs", config=EvaluateConfig(num_resamples=20))
    assert caught.value.what.startswith("--out holds something that is no report of `prima evaluate`: ")


def test_predictions_may_go_to_the_store_and_overwrite_nothing(bucket: str, finetuned: str):
    there = Folder.at(bucket)
    there.write("taken.parquet", b"")
    with pytest.raises(PrimaError) as caught:
        run_predict(finetuned, shards=f"{bucket}/shards", out=f"{bucket}/taken.parquet")
    assert str(caught.value) == (f"{bucket}/taken.parquet: --out exists\n  Name a new file; nothing is overwritten.")


def test_a_parent_that_is_not_there_is_told(bucket: str, store: str):
    with pytest.raises(PrimaError) as caught:
        read_record(f"{bucket}/nothing")
    assert str(caught.value) == f"{bucket}/nothing: there is nothing at this address"
    Folder.at(store).write("config.yaml", b"{}")
    with pytest.raises(PrimaError) as caught:
        read_record(store)
    assert str(caught.value) == (
        f"{store}: this is not finished (run.json is missing)\n  Run its stage again to complete it."
    )


def test_a_parent_whose_file_was_replaced_is_told(finetuned: str, store: str):
    copy, names = Folder.at(store), Folder.at(finetuned).files(without=("checkpoints", "tensorboard"))
    for name in names:
        copy.write(name, Folder.at(finetuned).read(name))
    read_record(store, stage="finetune")
    copy.write("predictions.parquet", b"something else")
    with pytest.raises(PrimaError) as caught:
        read_record(store)
    assert str(caught.value) == (
        f"{store}/predictions.parquet: is not the file that the run wrote (checksum)\n"
        "  Copy the run again, or train it again."
    )


def test_another_folder_is_not_taken(store: str):
    Folder.at(store).write("notes.txt", b"mine")
    with pytest.raises(PrimaError) as caught, open_alone(StrictConfig(), out=store, stage="toy"):
        pass
    assert str(caught.value) == (
        f"{store}: `out` exists and is no run directory (it has no config.yaml)\n  Choose another `out`."
    )
    assert set(Folder.at(store).files()) == {"notes.txt"}


def test_a_mistake_before_the_work_begins_leaves_nothing(store: str):
    def begin() -> None:
        with open_alone(StrictConfig(), out=store, stage="toy", prepared={"priors.json"}) as run:
            (run.path / "priors.json").write_text("{}")
            run.push()
            assert set(Folder.at(store).files()) == {"config.yaml", "priors.json", out_store.LEASE}
            raise PrimaError("too bad")

    with pytest.raises(PrimaError, match="too bad"):
        begin()
    assert Folder.at(store).files() == {}


HOLD = """
import sys
from prima_ray.base import StrictConfig
from prima_ray.stages import out_store
from prima_ray.stages.out_lock import open_alone

out_store.BEAT_S = 0.2
with open_alone(StrictConfig(), out=sys.argv[1], stage="toy"):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_process_is_refused_and_a_killed_ones_lease_runs_out(store: str):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, store],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ},
    )
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(PrimaError) as caught, open_alone(StrictConfig(), out=store, stage="toy"):
            pass
        assert caught.value.what.startswith(f"another process is working in this folder (process {holder.pid} on ")
        holder.kill()
        holder.wait()
        assert Folder.at(store).exists(out_store.LEASE)
        with open_alone(StrictConfig(), out=store, stage="toy") as run:
            assert run.address == store
        assert set(Folder.at(store).files()) == {"config.yaml"}
    finally:
        holder.kill()
        holder.communicate()


def test_who_lost_the_lease_does_not_finish(store: str, monkeypatch: pytest.MonkeyPatch):
    # A renewal that was under way would take the lease back.
    monkeypatch.setattr(out_store, "BEAT_S", 3600.0)
    with open_alone(StrictConfig(), out=store, stage="toy") as run:
        Folder.at(store).write(out_store.LEASE, b'{"owner": "somebody else", "pid": 1, "host": "there"}')
        with pytest.raises(PrimaError) as caught:
            run.check()
    assert str(caught.value) == (
        f"{store}: another process is working in this folder (process 1 on there)\n"
        "  Wait for it to end, or choose another `out`."
    )
    assert Folder.at(store).exists(out_store.LEASE)


def test_a_torn_checkpoint_on_a_store_is_passed_over(finetuned: str, store: str):
    source, copy = Folder.at(f"{finetuned}/checkpoints"), Folder.at(store)
    for name in source.files():
        copy.write(name, source.read(name))
    found = load_last(store)
    assert found is not None
    assert found[1].step == 6
    state = copy.read("step-00000006/state.safetensors")
    copy.write("step-00000006/state.safetensors", state[:-4])
    found = load_last(store)
    assert found is not None
    assert found[1].step == 4


def test_a_store_that_does_not_answer_is_no_fresh_start(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    with pytest.raises(PrimaError) as caught:
        load_last("s3://prima/run/checkpoints?region=us-east-1")
    assert caught.value.what.startswith("the checkpoints cannot be read (")
