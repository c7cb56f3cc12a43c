"""Batch prediction through Ray Data is the prediction of one exam, many times."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prima_ray.base import PrimaError, hash_file
from prima_ray.cli import main
from prima_ray.data.schema import SHARD_SCHEMA
from prima_ray.stages.predict import predict_folder

pytestmark = pytest.mark.usefixtures("cluster")
PROBABILITIES = ["prob_BCC", "prob_NEV", "prob_SEK"]


def by_exam(path: Path) -> dict[str, dict[str, Any]]:
    return {row["exam_id"]: row for row in pq.read_table(path).to_pylist()}


def test_every_exam_of_the_shards_gets_what_the_run_wrote_of_it(
    tiny_fuse: Path, labelled_shards: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "p.parquet"
    assert main(["predict", str(tiny_fuse), "--shards", labelled_shards, "--out", str(out)]) == 0
    assert capfd.readouterr().out.splitlines()[-1] == f"run: {out}"
    found, recorded = by_exam(out), by_exam(tiny_fuse / "predictions.parquet")
    answers = ["confidence", "prediction_set", "abstained", "reasons", "novelty", "warnings"]
    assert pq.read_schema(out).names == [*pq.read_schema(tiny_fuse / "predictions.parquet").names, *answers]
    # In the order of the shards, and all of them: exams without a diagnosis as well.
    assert list(found) == [f"e{number:03}" for number in range(40)]
    assert len(recorded) > 12
    for name, row in recorded.items():
        assert [found[name][key] for key in PROBABILITIES] == pytest.approx(
            [row[key] for key in PROBABILITIES], abs=1e-5
        )
        assert all(found[name][key] == row[key] for key in ("label", "fold", "prediction"))
    for row in found.values():
        assert row["confidence"] == max(row[key] for key in PROBABILITIES)
        assert row["prediction_set"][0] == row["prediction"]
        assert row["abstained"] == bool(row["reasons"])
        assert {item["cause"] for item in row["reasons"]} <= {"uncertain", "out_of_distribution", "image_unusable"}
    assert sum(row["label"] is None for row in found.values()) == 5
    assert [item.name for item in out.parent.iterdir()] == ["p.parquet"]


def test_a_photo_that_cannot_be_decoded_is_named_and_nothing_is_written(
    tiny_fuse: Path, labelled_shards: str, tmp_path: Path
) -> None:
    shards = Path(shutil.copytree(labelled_shards, tmp_path / "shards"))
    part = shards / "part-00001.parquet"
    rows = pq.read_table(part).to_pylist()
    size, digest = part.stat().st_size, hash_file(part)
    photo = rows[2]["images"][0]
    photo["bytes"] = b"x" * len(photo["bytes"])
    pq.write_table(pa.Table.from_pylist(rows, schema=SHARD_SCHEMA), part, row_group_size=3)
    manifest = shards / "manifest.json"
    text = manifest.read_text().replace(f'"bytes": {size}', f'"bytes": {part.stat().st_size}')
    manifest.write_text(text.replace(digest, hash_file(part)))
    with pytest.raises(PrimaError) as caught:
        predict_folder(str(tiny_fuse), str(shards), tmp_path / "p.parquet")
    assert caught.value.what.startswith("exam e010: the photo i010_0 cannot be decoded (not_an_image")
    assert not (tmp_path / "p.parquet").exists()
