"""A study of tiny runs: two recipes, a rival that sees photos alone, classifiers of attributes, and their sum."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from prima_ray.config import load_config
from prima_ray.studies.config import StudyConfig
from tests.conftest import tiny_config


def write_study(folder: Path, shards: str, **changes: Any) -> Path:
    """A study's YAML beside its recipes' in a folder; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    for stage in ("finetune", "fuse"):
        raw = tiny_config(stage, shards, "runs/unused")
        if stage == "fuse":
            raw = {key: value for key, value in raw.items() if key != "image_tower"}
        (folder / f"{stage}.yaml").write_text(yaml.safe_dump(raw))
    raw = {
        "out": str(folder / "study"),
        "inputs": {"shards": shards},
        "folds": [0, 1],
        "num_resamples": 50,
        "context": {"kind": "local"},
        "recipes": {
            "photos": {"stage": "finetune", "config": "finetune.yaml", "change": {"max_steps": 2}},
            "both": {
                "stage": "fuse",
                "config": "fuse.yaml",
                "parents": {"finetune": "photos"},
                "change": {"max_steps": 3},
            },
        },
        "variants": {
            "prima": {"kind": "trained", "title": "PRIMA", "recipe": "both"},
            "photos": {"kind": "trained", "title": "photos alone", "recipe": "photos"},
            "metadata": {"kind": "metadata", "title": "attributes alone", "candidates": [{"C": 1.0}, {"C": 0.01}]},
            "late": {"kind": "late_fusion", "title": "added up", "of": ["photos", "metadata"]},
        },
        "ours": "prima",
        **changes,
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(raw, sort_keys=False))
    return path


@pytest.fixture
def make_study(tmp_path: Path, labelled_shards: str) -> Callable[..., StudyConfig]:
    """A study of one's own; keywords are keys of it."""

    def make(**changes: Any) -> StudyConfig:
        return load_config(StudyConfig, write_study(tmp_path / "given", labelled_shards, **changes))

    return make
