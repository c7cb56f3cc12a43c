"""The stages by name. To add one: a line here."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

from prima_ray.base import StrictConfig
from prima_ray.config import load_config
from prima_ray.training.config import EXECUTION_KEYS

STAGES: dict[str, tuple[str, str, str]] = {
    "ingest": ("prima_ray.stages.ingest", "IngestConfig", "photos and a table -> shards, folds, manifest, quarantine"),
    "corpus": ("prima_ray.stages.corpus", "CorpusConfig", "literature -> what it says of risk factors, with quotes"),
    "refine": ("prima_ray.stages.refine", "RefineConfig", "risk corpus -> a text encoder that has read it"),
    "align": ("prima_ray.stages.align", "AlignConfig", "shards -> image and text towers aligned by four losses"),
    "finetune": ("prima_ray.stages.finetune", "FinetuneConfig", "align's image tower -> a classifier of photos"),
    "fuse": ("prima_ray.stages.fuse", "FuseConfig", "towers -> the diagnosis from photos and attributes"),
    "elastic": (
        "prima_ray.stages.elastic",
        "ElasticConfig",
        "a training whose workers come and go, beside a fixed one",
    ),
}
"""Name -> (module, config class, what it does). A stage module has `run(config) -> Path`."""


def config_class(stage: str) -> type[StrictConfig]:
    """What the config of a stage is validated as."""
    module, name, _ = STAGES[stage]
    found: type[StrictConfig] = getattr(importlib.import_module(module), name)
    return found


def run_of(stage: str) -> Callable[[Any], Any]:
    """The function that runs a stage: config -> run directory."""
    found: Callable[[Any], Any] = importlib.import_module(STAGES[stage][0]).run
    return found


def execution_keys(stage: str) -> frozenset[str]:
    """Keys (`context`, `writer.calls`) of a stage's config that say where and how fast, not what.

    They may differ when a run is taken up again.
    """
    found: frozenset[str] = getattr(importlib.import_module(STAGES[stage][0]), "EXECUTION_KEYS", EXECUTION_KEYS)
    return found


def load_stage(stage: str, path: str, overrides: Sequence[str] = ()) -> tuple[StrictConfig, Callable[[Any], Any]]:
    """The validated config of a stage, and the function that runs it.

    Raises:
        PrimaError: the config is missing or wrong.
    """
    return load_config(config_class(stage), path, overrides), run_of(stage)
