"""PAD-UFES-20 through the command, with parts written by Ray Data; a run that is killed, and a mistake."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from prima_ray.base import PrimaError
from prima_ray.cli import main
from prima_ray.config import load_config, validate_config
from prima_ray.data.plan import ExamIndex
from prima_ray.data.schema import read_manifest
from prima_ray.stages.ingest import IngestConfig, run
from tests.unit.raw_data_set import NUM_PHOTOS, RawDataSet, encoded, picture

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "jobs" / "configs" / "pad_ufes_20" / "ingest.yaml"
DATA = Path(os.environ.get("PRIMA_SHARED", ROOT.parent / "shared")) / "data" / "pad_ufes_20"
pytestmark = pytest.mark.usefixtures("cluster")
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="PAD-UFES-20 is not in $PRIMA_SHARED/data")


def content(out: Path) -> dict[str, bytes]:
    names = ("manifest.json", "folds.parquet", "quarantine.parquet", "leaks.json", "near_duplicates.json")
    return {path.name: path.read_bytes() for path in (*(out / name for name in names), *out.glob("part-*"))}


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same data set ingested in this process."""
    out = str(tmp_path_factory.mktemp("local") / "shards")
    return Path(run(load_config(IngestConfig, CONFIG, [f"out={out}", "context.kind=local"])))


@needs_data
def test_pad_ufes_20_is_ingested(local: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "shards"
    assert main(["ingest", str(CONFIG), "--set", f"out={out}"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"run: {out}"
    manifest = read_manifest(str(out))
    assert (manifest.num_images, manifest.num_exams, manifest.num_quarantined) == (1028, 908, 923)
    assert manifest.class_counts == {"ACK": 254, "BCC": 289, "MEL": 28, "NEV": 160, "SCC": 57, "SEK": 120}
    reasons = pq.read_table(out / "quarantine.parquet")["reason"].to_pylist()
    assert Counter(reasons) == {"no_photo": 923}
    index = ExamIndex.read(str(out), sha256=True)
    assert (index.num_images > 1).sum() == 110
    for patient in np.unique(index.patient_ids.astype(str)):
        assert len(set(index.patient_fold[index.patient_ids == patient])) == 1
    for fold in (index.patient_fold, index.lesion_fold):
        assert set(fold.tolist()) == set(range(5))
        for label in range(6):
            assert set(fold[index.labels == label].tolist()) == set(range(5)), "every class is in every fold"
    assert content(out) == content(local), "a cluster writes what one process writes"


def small(raw: RawDataSet, out: Path, **sections: Any) -> IngestConfig:
    config = raw.config(out, **{"context": {"kind": "ray"}, **sections})
    return validate_config(IngestConfig, config, where="test")


def test_parts_that_are_there_are_kept_and_the_rest_is_written(tmp_path: Path) -> None:
    raw = RawDataSet(tmp_path / "raw")
    raw.write()
    whole = content(Path(run(small(raw, tmp_path / "whole"))))
    # As a killed run leaves it: one part done, another half written under its temporary name, no manifest.
    out = tmp_path / "out"
    raw.photo("e15_0.jpg", b"")
    with pytest.raises(PrimaError, match="1 empty_file"):
        run(small(raw, out, quarantine={"max_share": 0}))
    (out / "part-00001.parquet").unlink()
    (out / "_part-00001.parquet.0000.tmp").write_bytes(b"PAR1")
    kept = (out / "part-00000.parquet").stat().st_ino
    raw.photo("e15_0.jpg", encoded(picture(1500)))
    run(small(raw, out, quarantine={"max_share": 0}))
    assert read_manifest(str(out)).num_images == NUM_PHOTOS
    assert content(out) == whole
    assert (out / "part-00000.parquet").stat().st_ino == kept
    assert not list(out.glob("_part*"))
