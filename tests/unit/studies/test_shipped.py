"""The answers that ship are those of the tables that ship."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from prima_ray.config import load_config
from prima_ray.evaluation.metrics import headline
from prima_ray.stages.ingest import IngestConfig
from prima_ray.stages.ingest import run as ingest
from prima_ray.studies.config import StudyConfig
from prima_ray.studies.sitting import Sitting

ROOT = Path(__file__).parents[3]
CONFIGS = ROOT / "jobs" / "configs" / "pad_ufes_20"
RESULTS = ROOT / "benchmarks" / "results"
DATA = Path(os.environ.get("PRIMA_SHARED", ROOT.parent / "shared")) / "data" / "pad_ufes_20"


@pytest.mark.skipif(not DATA.is_dir(), reason="PAD-UFES-20 is not in $PRIMA_SHARED/data")
@pytest.mark.parametrize(("name", "ours"), [("table1", "prima")])
def test_a_table_is_what_the_answers_say(name: str, ours: str, tmp_path: Path) -> None:
    """Fold by fold, of every trained variant that the answers know; what they know of ours is all of it, or a part."""
    out = tmp_path / "shards"
    shards = str(ingest(load_config(IngestConfig, CONFIGS / "ingest.yaml", [f"out={out}", "context.kind=local"])))
    answers = RESULTS / "pad_ufes_20_answers.parquet"
    table = json.loads((RESULTS / f"pad_ufes_20_{name}.json").read_text())
    changes = [f"inputs.shards={shards}", f"cells={tmp_path / 'cells'}", f"answers=[{answers}]"]
    sitting = Sitting(load_config(StudyConfig, CONFIGS / f"{name}.yaml", changes), shards)
    assert table["shards_hash"] == sitting.index.manifest.content_hash
    compared = set()
    for (variant, _, fold, _), key in sitting.asked.items():
        said = sitting.book.read(sitting.cells[key], "test")
        if said is None:
            continue
        found = headline(sitting.index.labels[sitting.data[fold].roles.test], said)
        expected = table["sets"]["all"]["headline"]["over_folds"][variant]
        place = table["folds"].index(fold)
        assert found == pytest.approx({figure: item["values"][place] for figure, item in expected.items()}, abs=1e-6)
        compared.add(variant)
    assert ours in compared
