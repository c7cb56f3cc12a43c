from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from prima_ray.base import PrimaError
from prima_ray.training import launch as launch_module
from prima_ray.training import shared_folder
from prima_ray.training.leaving import Doorbell, GroupLeaves
from prima_ray.training.loop import TrainingJob
from prima_ray.training.shared_folder import leave_mark
from prima_ray.training.task import AgreedError
from tests.unit.training.toys import curve, make_job


@pytest.fixture
def own_group() -> Iterator[None]:
    """A group that the test starts ends with it; one that DeepSpeed left in this process stays."""
    before = torch.distributed.is_initialized()
    yield
    if not before:
        torch.distributed.destroy_process_group()


def test_the_local_context_trains_in_this_process(tmp_path: Path, toy_shards: str, capfd: pytest.CaptureFixture[str]):
    job = make_job(tmp_path / "run", toy_shards, max_steps=2, context={"kind": "local", "device": "cpu"})
    (job.run / "mistake.json").write_text('{"what": "an old one", "where": null, "mend": null}')
    launch_module.launch(job)
    assert len(curve(job.run)) == 2
    assert not (job.run / "mistake.json").exists()
    out, err = capfd.readouterr()
    assert out == ""
    assert "classify" in err
    assert "2/2" in err


def test_a_group_of_one_leaves_the_environment_as_it_was(monkeypatch: pytest.MonkeyPatch, own_group: None):
    monkeypatch.setenv("WORLD_SIZE", "7")
    monkeypatch.delenv("RANK", raising=False)
    for _ in range(2):
        with launch_module._group_of_one(torch.device("cpu")):
            assert (os.environ["RANK"], os.environ["WORLD_SIZE"]) == ("0", "1")
            assert torch.distributed.get_world_size() == 1
        assert "RANK" not in os.environ
        assert os.environ["WORLD_SIZE"] == "7"


def test_ctrl_c_under_ray_train_is_an_interrupt_and_the_handler_goes_again():
    before = signal.getsignal(signal.SIGINT)

    def fit() -> None:
        # What Ray Train does: a handler of its own, which exits with 0 once the workers are gone.
        signal.signal(signal.SIGINT, lambda *_: exit_with_0())
        signal.raise_signal(signal.SIGINT)

    def exit_with_0() -> None:
        raise SystemExit(0)

    with pytest.raises(KeyboardInterrupt), launch_module._interruptible():
        fit()
    assert signal.getsignal(signal.SIGINT) is before


class _Context:
    world_size = 2
    rank = 1
    name = "node-a:17"
    others: ClassVar[list[str]] = []
    """What the other rank tells."""

    def __init__(self, *, heeds_notices: bool) -> None:
        assert heeds_notices

    def gather_objects(self, values: list[str]) -> list[str]:
        return [*self.others, *values]


def _for_worker(job: TrainingJob) -> dict[str, Any]:
    return {"job": job, "mark": leave_mark(job.address), "heeds_notices": True}


@pytest.mark.parametrize(("kind", "raises"), [(PrimaError, True), (AgreedError, False)])
def test_a_worker_leaves_word_of_a_mistake_and_raises_only_where_others_wait(
    tmp_path: Path, toy_shards: str, monkeypatch: pytest.MonkeyPatch, kind: type[PrimaError], raises: bool
):
    job = make_job(tmp_path / "run", toy_shards)

    def fail(*_: Any) -> None:
        raise kind("too far", where="there", mend="Come back.")

    monkeypatch.setattr(launch_module, "RayContext", _Context)
    monkeypatch.setattr(launch_module, "train", fail)
    if raises:
        with pytest.raises(PrimaError, match="too far"):
            launch_module._ray_worker(_for_worker(job))
    else:
        launch_module._ray_worker(_for_worker(job))
    found = launch_module._mistake(job)
    assert str(found) == "there: too far\n  Come back."
    # The group that Ray starts again does not run into the same mistake.
    launch_module._ray_worker(_for_worker(job))


@pytest.mark.parametrize("case", ["finished", "rung", "left"])
def test_a_group_that_left_by_itself_tells_the_controller(
    tmp_path: Path, toy_shards: str, monkeypatch: pytest.MonkeyPatch, case: str
):
    bell = Doorbell()
    if case == "rung":
        bell.ring()
    monkeypatch.setattr(launch_module, "DOORBELL", bell)
    monkeypatch.setattr(launch_module, "RayContext", _Context)
    monkeypatch.setattr(launch_module, "train", lambda *_: case == "finished")
    worker = _for_worker(make_job(tmp_path / "run", toy_shards))
    if case == "left":
        with pytest.raises(GroupLeaves):
            launch_module._ray_worker(worker)
    else:
        launch_module._ray_worker(worker)
    assert bell.answered, "whoever rang is waiting"


@pytest.mark.parametrize(("sees", "others"), [(True, ["node-b"]), (False, []), (False, ["node-b"])])
def test_a_node_that_joined_and_does_not_see_the_folder_ends_the_run(
    tmp_path: Path, toy_shards: str, monkeypatch: pytest.MonkeyPatch, sees: bool, others: list[str]
):
    job = make_job(tmp_path / "run", toy_shards)
    monkeypatch.setattr(shared_folder, "_APPEARS_S", 0.1)
    monkeypatch.setattr(launch_module, "RayContext", _Context)
    monkeypatch.setattr(launch_module, "train", lambda *_: pytest.fail("it must not train"))
    monkeypatch.setattr(_Context, "others", others)
    worker = _for_worker(job)
    if not sees:
        # An older copy of the folder, on a disk of its own.
        (job.run / shared_folder.MARK).write_text("another driver's")
    if not sees and others:
        with pytest.raises(PrimaError, match=r"node node-b \(and 1 more\) cannot use this folder"):
            launch_module._ray_worker(worker)
    else:
        launch_module._ray_worker(worker)
    told = launch_module._mistake(job)
    assert (told is not None) == sees, "who does not see the folder leaves no word in what it takes for it"
    if told:
        assert str(told) == (
            f"{job.address}: the cluster's node node-b cannot use this folder: what another machine wrote there is not "
            "seen; it is on a disk of one machine\n"
            "  Name in `out` a folder that every node mounts at this path (NFS), or an object store (s3://...)."
        )
