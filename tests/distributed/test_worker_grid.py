"""A corner of `benchmarks/worker_grid.py`: align and fuse by torch and ZeRO in two and three workers, against one."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("deepspeed")
FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def grid() -> ModuleType:
    # Not by monkeypatch: the workers that it starts import the module by its name as well.
    sys.path.insert(0, str(FOLDER))
    return importlib.import_module("worker_grid")


@pytest.fixture(scope="module")
def rows(grid: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    cells = grid.CORNER
    found: list[dict[str, Any]] = grid.compare(cells, grid.train_cells(cells, tmp_path_factory.mktemp("grid")))
    return found


def test_engines_are_what_they_were_asked_to_be(grid: ModuleType, rows: list[dict[str, Any]]):
    asked = [(cell.stage, None if cell.engine.startswith("torch") else int(cell.engine[-1]), cell.world)
             for cell in grid.CORNER]  # fmt: skip
    assert [(row["stage"], row["zero_stage"], row["world_size"]) for row in rows] == asked


def test_the_worker_count_is_no_hyper_parameter(rows: list[dict[str, Any]]):
    for row in rows:
        assert row["steps"] >= 40
        assert row["same_exams"], row
        assert row["loss_difference"] <= 1e-4, row
        assert row["prediction_difference"] <= 1e-3, row


def test_there_is_something_to_differ_in(rows: list[dict[str, Any]]):
    """Losses fall and clipping bites: equal curves of a model that stands still would say nothing."""
    for row in rows:
        assert row["last_epoch_loss"] <= 0.7 * row["first_epoch_loss"], row
        assert row["share_of_steps_clipped"] > 0, row
