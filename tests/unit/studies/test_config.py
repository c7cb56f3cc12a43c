"""Mistakes in a study are told before anything runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from prima_ray.base import PrimaError
from prima_ray.studies.config import StudyConfig

METADATA = {"kind": "metadata", "title": "attributes alone"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"ours": "nobody"}, "ours: nobody is no variant; known: prima, photos, metadata, late"),
        ({"inputs": {}}, "inputs: give shards, or ingest, and not both"),
        ({"claims": [["prima", "nobody", "what"]]}, "claims: nobody is no variant"),
        ({"variants": {"prima": {"kind": "trained", "title": "P", "recipe": "none"}}}, "none is no recipe"),
        (
            {"variants": {"prima": METADATA, "late": {"kind": "late_fusion", "title": "L", "of": ["prima", "late"]}}},
            "variants.late.of: late is no variant that it could add up",
        ),
        (
            {
                "variants": {
                    "prima": METADATA,
                    "a": METADATA,
                    "late": {"kind": "late_fusion", "title": "L", "of": ["prima", "a"], "candidates": [[1, 1, 1]]},
                }
            },
            "are not 2 weights",
        ),
        (
            {"budget": 3, "variants": {"prima": {**METADATA, "candidates": [{"C": 1}, {"C": 2}]}}},
            "variants.prima has 2 candidates, the budget of each is 3",
        ),
        (
            {
                "recipes": {
                    "photos": {"stage": "finetune", "config": "finetune.yaml", "parents": {"align": "both"}},
                    "both": {"stage": "fuse", "config": "fuse.yaml", "parents": {"finetune": "photos"}},
                }
            },
            "recipes: photos -> both -> photos goes in a circle",
        ),
        ({"folds": [0], "fold": 1}, "unknown key 'fold', did you mean 'folds'"),
    ],
)
def test_it_is_told(make_study: Callable[..., StudyConfig], change: dict[str, Any], said: str) -> None:
    with pytest.raises(PrimaError) as error:
        make_study(**change)
    assert said in str(error.value)
