"""The tables that ship follow from the answers that ship with them, on the data that they are about."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from prima_ray.config import load_config
from prima_ray.stages.ingest import IngestConfig
from prima_ray.stages.ingest import run as ingest
from prima_ray.studies.config import StudyConfig
from prima_ray.studies.run import study_so_far

ROOT = Path(__file__).parents[3]
CONFIGS = ROOT / "jobs" / "configs" / "pad_ufes_20"
RESULTS = ROOT / "benchmarks" / "results"
DATA = Path(os.environ.get("PRIMA_SHARED", ROOT.parent / "shared")) / "data" / "pad_ufes_20"
STUDIES = sorted(path.stem.removesuffix("_answers") for path in RESULTS.glob("*_answers.parquet"))
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="PAD-UFES-20 is not in $PRIMA_SHARED/data")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("pad") / "shards"
    return str(ingest(load_config(IngestConfig, CONFIGS / "ingest.yaml", [f"out={out}", "context.kind=local"])))


def leaves(found: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """Every value below, with the way to it."""
    if isinstance(found, dict | list):
        for key, item in found.items() if isinstance(found, dict) else enumerate(found):
            yield from leaves(item, f"{where}/{key}")
    else:
        yield where, found


@pytest.mark.parametrize("name", STUDIES)
def test_a_table_is_what_its_answers_say(name: str, shards: str, tmp_path: Path) -> None:
    shipped = json.loads((RESULTS / f"{name}.json").read_text())
    only = [variant for variant in shipped["variants"] if variant != shipped["ours"]]
    study = load_config(
        StudyConfig,
        CONFIGS / f"{name.removeprefix('pad_ufes_20_')}.yaml",
        [
            f"inputs.shards={shards}",
            f"out={tmp_path / 'study'}",
            f"answers=[{RESULTS / f'{name}_answers.parquet'}]",
            f"only={json.dumps(only)}",
            f"split={shipped['split']}",
            "context.kind=local",
        ],
    )
    study_so_far(study)
    metrics = json.loads((tmp_path / "study" / "metrics.json").read_text())
    assert metrics["shards_hash"] == shipped["shards_hash"]
    for part in ("sets", "claims", "choices", "best", "variants"):
        found, expected = dict(leaves(metrics[part])), dict(leaves(shipped[part]))
        assert found.keys() == expected.keys()
        for where, value in expected.items():
            close = pytest.approx(value, rel=1e-6, abs=1e-9, nan_ok=True) if isinstance(value, float) else value
            assert found[where] == close, f"{part}{where}"
