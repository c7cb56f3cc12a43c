from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from prima_ray.base import PrimaError
from prima_ray.training import launch as launch_module
from prima_ray.training.leaving import Doorbell, GroupLeaves
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

    def __init__(self, *, heeds_notices: bool) -> None:
        assert heeds_notices


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
            launch_module._ray_worker({"job": job, "heeds_notices": True})
    else:
        launch_module._ray_worker({"job": job, "heeds_notices": True})
    found = launch_module._mistake(job)
    assert str(found) == "there: too far\n  Come back."
    # The group that Ray starts again does not run into the same mistake.
    launch_module._ray_worker({"job": job, "heeds_notices": True})


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
    worker = {"job": make_job(tmp_path / "run", toy_shards), "heeds_notices": True}
    if case == "left":
        with pytest.raises(GroupLeaves):
            launch_module._ray_worker(worker)
    else:
        launch_module._ray_worker(worker)
    assert bell.answered, "whoever rang is waiting"
