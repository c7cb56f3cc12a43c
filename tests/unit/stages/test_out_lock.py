"""One process at a time in a run directory, and no trace of a run that never began."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from prima_ray.base import PrimaError, StrictConfig
from prima_ray.stages import out_lock
from prima_ray.stages.out_lock import LOCK, open_alone

HOLD = """
import subprocess, sys
from prima_ray.base import StrictConfig
from prima_ray.stages.out_lock import open_alone

with open_alone(StrictConfig(), out=sys.argv[1], stage="toy"):
    child = subprocess.Popen(["sleep", "60"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    print(child.pid, flush=True)
    sys.stdin.read()
"""


def names(folder: Path) -> set[str]:
    return {item.name for item in folder.iterdir()}


def test_a_second_process_is_refused_and_a_killed_one_leaves_the_folder_free(tmp_path: Path):
    out = tmp_path / "run"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    child = int(holder.stdout.readline())
    try:
        with pytest.raises(PrimaError) as caught, open_alone(StrictConfig(), out=str(out), stage="toy"):
            pass
        assert str(caught.value) == (
            f"{out}: another process is working in this folder\n  Wait for it to end, or choose another `out`."
        )
        assert names(out) == {"config.yaml", LOCK}
        holder.kill()
        holder.wait()
        # The program that it had started lives on, without the lock.
        os.kill(child, 0)
        with open_alone(StrictConfig(), out=str(out), stage="toy") as run:
            assert run.path == out
        assert names(out) == {"config.yaml"}
    finally:
        holder.kill()
        holder.communicate()
        os.kill(child, 9)


def test_the_folder_is_free_again_after_a_run(tmp_path: Path):
    for _ in range(2):
        with open_alone(StrictConfig(), out=str(tmp_path / "run"), stage="toy") as run:
            (run.path / "run.json").write_text("{}")
        assert names(tmp_path / "run") == {"config.yaml", "run.json"}
    assert run.finished


def fail(out: Path, *, write: str = "", error: Exception | None = None) -> None:
    expected = error or PrimaError("a mistake")

    def work() -> None:
        with open_alone(StrictConfig(), out=str(out), stage="toy", prepared=("plan.json", "ray")) as run:
            if write:
                (run.path / write).parent.mkdir(exist_ok=True)
                (run.path / write).write_text("x")
            raise expected

    with pytest.raises(type(expected)):
        work()


@pytest.mark.parametrize("write", ["", "plan.json", "ray/state"])
def test_a_mistake_before_the_work_leaves_nothing(tmp_path: Path, write: str):
    fail(tmp_path / "run", write=write)
    assert not (tmp_path / "run").exists()


def test_a_folder_that_was_there_stays(tmp_path: Path):
    fail(tmp_path)
    assert names(tmp_path) == set()


def test_work_that_has_begun_is_kept(tmp_path: Path):
    fail(tmp_path / "a", write="steps.jsonl")
    assert names(tmp_path / "a") == {"config.yaml", "steps.jsonl"}
    fail(tmp_path / "b", error=RuntimeError("ours"))
    assert names(tmp_path / "b") == {"config.yaml"}
    # Taken up, not made: a mistake now does not take it away.
    fail(tmp_path / "b")
    assert names(tmp_path / "b") == {"config.yaml"}


def test_without_locks_a_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(out_lock, "_fcntl", None)
    with open_alone(StrictConfig(), out=str(tmp_path / "run"), stage="toy"):
        assert names(tmp_path / "run") == {"config.yaml"}
