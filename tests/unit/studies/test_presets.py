"""The studies that ship: every recipe's config is right, and what both tables need is trained once."""

from __future__ import annotations

from pathlib import Path

import pytest

from prima_ray.config import load_config
from prima_ray.data.plan import ExamIndex
from prima_ray.studies.cells import Cell, plan_study
from prima_ray.studies.config import LateFusionVariant, StudyConfig

CONFIGS = Path(__file__).parents[3] / "jobs" / "configs"


def planned(name: str, shards: str) -> tuple[StudyConfig, dict[str, Cell]]:
    study = load_config(StudyConfig, CONFIGS / f"{name}.yaml", [f"inputs.shards={shards}", "folds=[0]"])
    return study, plan_study(study, ExamIndex.read(shards))[0]


@pytest.mark.parametrize(
    ("name", "runs"),
    [("pad_ufes_20/table1", 5), ("pad_ufes_20/table3", 28), ("pad_ufes_20/search", 18), ("phantoms/study", 5)],
)
def test_it_can_be_planned(name: str, runs: int, labelled_shards: str) -> None:
    study, cells = planned(name, labelled_shards)
    assert len(cells) == runs
    # Whoever has something to choose has as much as the others.
    assert len({len(item.candidates) for item in study.variants.values() if len(item.candidates) > 1}) <= 1
    assert all(len(item.candidates) for item in study.variants.values() if isinstance(item, LateFusionVariant))


def test_both_tables_share_primas_runs(labelled_shards: str) -> None:
    (_, first), (_, third) = (planned(name, labelled_shards) for name in ("pad_ufes_20/table1", "pad_ufes_20/table3"))
    assert {cell.recipe for key, cell in first.items() if key in third} == {"align", "finetune", "fuse"}
    # The same folder too: whoever is first trains it.
    assert all(cell.folder == third[key].folder for key, cell in first.items() if key in third)
