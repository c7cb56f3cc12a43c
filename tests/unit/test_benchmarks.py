"""The benchmarks import and read their command lines; what they measure is not repeated here."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
NAMES = sorted(path.stem for path in FOLDER.glob("[a-z]*.py"))


@pytest.fixture(autouse=True)
def search_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))


@pytest.fixture
def harness() -> ModuleType:
    return importlib.import_module("_harness")


def test_the_benchmarks_are_there() -> None:
    assert NAMES == [
        "channels_last",
        "checkpoint",
        "elastic_pause",
        "feature_cache",
        "gpu_train",
        "grad_cache",
        "index_whole",
        "indexing",
        "ingest_stream",
        "retrieval",
        "risk_pairs",
        "serve",
        "serve_faults",
        "shared_prompt",
        "small_preset",
        "strange_photos",
        "train_step",
        "verify_quotes",
        "worker_grid",
    ]


@pytest.mark.parametrize("name", NAMES)
def test_a_benchmark_reads_its_command_line(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(name).main(["--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    # Two check a corpus, one compares runs, one asks a run, one breaks a server: nothing takes turns.
    untimed = ("risk_pairs", "serve_faults", "strange_photos", "verify_quotes", "worker_grid")
    assert ("--quick" in shown) == ("--pairs" in shown) == (name not in untimed)


def test_no_gpu_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    gpu_train = importlib.import_module("gpu_train")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert gpu_train.main([]) == 2
    assert capsys.readouterr().err == ("gpu_train: no GPU here (torch sees none); --tiny runs the same path on a CPU\n")


def test_contenders_take_turns_and_ratios_are_within_pairs(
    harness: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    order: list[str] = []

    def contender(name: str, values: list[float]):
        def run(pair: int) -> dict[str, float]:
            order.append(name)
            return {"images/s": values[pair]}

        return run

    pairs = harness.interleave({"a": contender("a", [2, 9, 4]), "b": contender("b", [1, 3, 4])}, pairs=3)
    capsys.readouterr()
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert pairs.ratios("images/s", "a", "b") == [2.0, 3.0, 1.0]
    assert harness.spread([3.0, 1.0, 2.0]) == {
        "median": 2.0,
        "min": 1.0,
        "max": 3.0,
        "iqr": [1.5, 2.5],
        "values": [3.0, 1.0, 2.0],
    }


def test_quick_sets_defaults_that_the_command_line_overrides(harness: ModuleType) -> None:
    def parser():
        found = harness.parser("x")
        found.add_argument("--steps", type=int, default=40)
        return found

    assert harness.parse(parser(), [], steps=8).steps == 40
    quick = harness.parse(parser(), ["--quick"], steps=8)
    assert (quick.steps, quick.pairs) == (8, 2)
    assert harness.parse(parser(), ["--quick", "--steps", "3"], steps=8).steps == 3


def test_a_result_file_names_no_place_of_this_machine(harness: ModuleType) -> None:
    inside = harness.REPOSITORY / "runs" / "shards"
    assert harness._portable(["--shards", str(inside), "/somewhere/else/s", "7"]) == [
        "--shards",
        "runs/shards",
        "s",
        "7",
    ]


def test_a_gate_stops_after_the_warm_up_and_after_every_chunk(tmp_path: Path) -> None:
    gate = importlib.import_module("train_step").Gate(tmp_path, warmup=2, steps=3)
    for chunk in range(2):
        (tmp_path / f"go-{chunk}").touch()
    stops = []
    for _ in range(6):
        before = set(tmp_path.glob("at-*"))
        gate()
        stops.append(len(set(tmp_path.glob("at-*")) - before))
    assert stops == [0, 0, 1, 0, 0, 1]


def test_importing_benchmarks_brings_in_neither_ray_nor_deepspeed() -> None:
    import subprocess

    code = f"import sys; sys.path.insert(0, {str(FOLDER)!r})\n"
    code += f"import {', '.join(NAMES)}\nassert not {{'ray', 'deepspeed'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
