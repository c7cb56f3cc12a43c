"""Refine with two DeepSpeed workers, streamed by Ray Data, is refine with torch in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from prima_ray.base import read_json
from prima_ray.stages import refine
from tests.unit.stages.test_refine import NAMES, config_of, corpus_run, tiny_encoder
from tests.unit.training.toys import curve, read_lines

pytest.importorskip("ray")
pytest.importorskip("deepspeed")


def test_two_deepspeed_workers_under_ray_refine_as_torch_does_here(cluster: Any, tmp_path: Path):
    encoder = tiny_encoder(tmp_path / "encoder", head=True)
    corpus = corpus_run(tmp_path / "corpus", accepted=NAMES)
    # Three texts a step on two workers: two and one, and padding.
    keys: dict[str, Any] = {"global_batch": 3, "epochs": 2}
    here = refine.run(config_of(tmp_path / "here", corpus, encoder, **keys))
    there = refine.run(
        config_of(
            tmp_path / "there",
            corpus,
            encoder,
            **keys,
            num_workers=2,
            engine={"kind": "deepspeed", "zero_stage": 1},
            context={"kind": "ray", "cpus_per_worker": 0.5},
        )
    )
    start = read_lines(there / "starts.jsonl")[0]
    assert start["engine"] == {"kind": "deepspeed", "zero_stage": 1, "world_size": 2}
    assert len(curve(here)) >= 4
    assert curve(there) == pytest.approx(curve(here), rel=1e-5)
    left, right = (read_json(run / "metrics.json") for run in (there, here))
    for moment in ("before", "after"):
        assert left["held_out"][moment] == pytest.approx(right["held_out"][moment], rel=1e-4)
