"""`jobs/<name>.py` takes the arguments of `prima <name>`, for every stage and for what is done with its results."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

from prima_ray.cli import main
from prima_ray.stages.registry import STAGES

JOBS = Path(__file__).parents[2] / "jobs"


def test_every_stage_has_its_job() -> None:
    assert {*STAGES, "evaluate", "predict", "doctor"} <= {path.stem for path in JOBS.glob("*.py")}


@pytest.mark.parametrize("path", sorted(JOBS.glob("*.py")), ids=lambda path: path.stem)
def test_a_job_takes_the_commands_arguments(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([path.stem, "--help"])
    wanted = capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(path), run_name="__main__")
    assert stopped.value.code == 0
    assert capsys.readouterr().out == wanted
    assert wanted.startswith(f"usage: prima {path.stem}")


def test_a_job_says_its_mistake_last_and_exits_with_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["jobs/align.py", "nowhere.yaml"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(JOBS / "align.py"), run_name="__main__")
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "prima: nowhere.yaml: no such config file\n"
