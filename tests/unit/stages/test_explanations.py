"""What `prima evaluate --explanations` puts into the figures and onto the page."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from prima_ray.base import PrimaError
from prima_ray.data.plan import ExamIndex
from prima_ray.evaluation.faithfulness import ExplanationsConfig
from prima_ray.inference.predictor import Predictor
from prima_ray.stages.align import AlignConfig
from prima_ray.stages.align import run as run_align
from prima_ray.stages.evaluate import EvaluateConfig, run_evaluate
from prima_ray.stages.explanations import examples_of, explanation_evidence
from prima_ray.stages.fuse import FuseConfig
from prima_ray.stages.fuse import run as run_fuse
from tests.conftest import tiny_config

SMALL = ExplanationsConfig(enabled=True, num_exams=5, cells=3, random_orders=2, permutations=2, examples=1)


def evaluated(run: Path, out: Path, explanations: ExplanationsConfig = SMALL) -> tuple[dict[str, Any], str]:
    config = EvaluateConfig(num_resamples=20, explanations=explanations)
    found = Path(run_evaluate(str(run), out=str(out), config=config))
    return json.loads((found / "metrics.json").read_text()), (found / "report.html").read_text()


@pytest.fixture(scope="module")
def aligned(labelled_shards: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of fuse from a run of align, which leaves the heads that attention needs: do not write into it."""
    root = tmp_path_factory.mktemp("aligned")
    tiny = tiny_config("fuse", labelled_shards, str(root / "align"))
    kept = ("out", "inputs", "image_tower", "text_tower", "views", "optimizer", "global_batch", "max_steps", "context")
    align = AlignConfig.model_validate({**{key: tiny[key] for key in kept}, "views": {"image_size": 32}})
    parent = run_align(align)
    fuse = tiny_config("fuse", labelled_shards, str(root / "fuse"))
    for key in ("image_tower", "text_tower"):
        del fuse[key]
    return Path(run_fuse(FuseConfig.model_validate({**fuse, "inputs": {**fuse["inputs"], "align": str(parent)}})))


def test_of_photos_and_attributes(aligned: Path, labelled_shards: str, tmp_path: Path) -> None:
    metrics, page = evaluated(aligned, tmp_path / "out")
    found = metrics["explanations"]
    assert list(found["photos"]["methods"]) == ["attention", "occlusion"]
    assert list(found["attributes"]["methods"]) == ["left out one by one", "Shapley values"]
    assert found["photos"]["num_exams"] == 5
    assert {row["attribute"] for row in found["by_attribute"]} <= {"age", "itch", "region", "grew", "diameter"}
    for words in ("Do the explanations name what the answer rests on?", "Example, ", "Model card", "not for"):
        assert words in page
    assert "http" not in page.replace("http://www.w3.org", "")
    again, _ = evaluated(aligned, tmp_path / "out")
    assert again["explanations"] == found
    index = ExamIndex.read(labelled_shards)
    assert not any(f"{exam}" in page.split("Example, ")[1] for exam in index.exam_ids)


def test_exams_without_attributes_and_with_more_photos_than_are_read(
    aligned: Path, labelled_shards: str, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(aligned, tmp_path / "run"))
    described = json.loads((run / "model" / "config.json").read_text())
    described["views"]["max_photos"] = 1
    (run / "model" / "config.json").write_text(json.dumps(described))
    index = ExamIndex.read(labelled_shards)
    rows = np.flatnonzero((index.patient_fold == 0) & (index.labels >= 0))
    assert index.num_images[rows].max() > 1
    attributes = [dict(row) for row in index.attributes.to_pylist()]
    attributes[rows[0]] = {}
    bare = replace(
        index, attributes=pa.chunked_array([pa.array([list(row.items()) for row in attributes], index.attributes.type)])
    )
    predictor = Predictor.load(run)
    found = explanation_evidence(predictor, bare, rows, SMALL.model_copy(update={"num_exams": 99}), num_resamples=10)
    assert found["photos"]["num_exams"] == len(rows)
    assert list(found["photos"]["methods"]) == ["attention", "occlusion"]
    assert examples_of(predictor, bare, rows, np.full((len(rows), 3), 1 / 3), SMALL)


def test_of_photos_alone(tiny_finetune: Path, tmp_path: Path) -> None:
    metrics, page = evaluated(tiny_finetune, tmp_path / "out")
    assert list(metrics["explanations"]["photos"]["methods"]) == ["occlusion"]
    assert metrics["explanations"]["attributes"] is None
    assert metrics["explanations"]["by_attribute"] == []
    assert "<dt>reads</dt><dd>photos alone</dd>" in page
    assert "go missing together" not in page.split("Model card")[1]


def test_no_patients_photo_is_shown_unless_asked_for(tiny_fuse: Path, tmp_path: Path) -> None:
    _, page = evaluated(tiny_fuse, tmp_path / "out", SMALL.model_copy(update={"examples": 0, "num_exams": 2}))
    assert "Example, " not in page
    config = EvaluateConfig(num_resamples=20)
    plain = Path(run_evaluate(str(tiny_fuse), out=str(tmp_path / "plain"), config=config))
    assert json.loads((plain / "metrics.json").read_text())["explanations"] is None
    assert "Example, " not in (plain / "report.html").read_text()


def test_another_data_set_is_not_explained(tiny_fuse: Path, labelled_shards: str) -> None:
    with pytest.raises(PrimaError, match="on a run's own test fold"):
        run_evaluate(
            str(tiny_fuse), shards=labelled_shards, mapping="m.yaml", config=EvaluateConfig(explanations=SMALL)
        )
