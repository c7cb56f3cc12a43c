"""The `model/` folder of a run: everything that turns photos and attributes into the model's inputs and back.

    model/config.json            what the model is, the data set's description, how text and views are made
    model/<component>/           a folder a part, see `models.store`

It loads with nothing else at hand: no parent run, no hub, no YAML.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import ValidationError
from torch import nn

from prima_ray.base import PrimaError, StrictConfig, read_json, write_json
from prima_ray.data.description import DataSetConfig
from prima_ray.data.metadata import MetadataTextConfig
from prima_ray.data.schema import join
from prima_ray.data.views import ViewConfig
from prima_ray.models.store import load_component, save_component

BUNDLE_VERSION = 1
_CONFIG = "config.json"
_MEND = "Copy the run again, or train it again."
_PARTS = {
    "align": ("image_tower", "text_tower", "heads"),
    "finetune": ("classifier",),
    "fuse": ("image_tower", "text_tower", "fusion"),
}
"""What a model of each kind cannot be without."""


class BundleConfig(StrictConfig):
    """`model/config.json`."""

    version: int = BUNDLE_VERSION
    kind: Literal["align", "finetune", "fuse"]
    data_set: DataSetConfig
    text: MetadataTextConfig | None
    views: ViewConfig
    features: Literal["backbone", "projected"]
    components: dict[str, str]
    """Name -> folder."""


@dataclass(frozen=True)
class Bundle:
    """A loaded model folder."""

    config: BundleConfig
    components: Mapping[str, nn.Module]


def save_bundle(
    folder: Path,
    *,
    kind: Literal["align", "finetune", "fuse"],
    data_set: DataSetConfig,
    text: MetadataTextConfig | None,
    views: ViewConfig,
    features: Literal["backbone", "projected"],
    components: Mapping[str, nn.Module],
) -> None:
    """Write a model folder; `config.json` comes last."""
    for name, module in components.items():
        save_component(folder / name, module)
    config = BundleConfig(
        kind=kind,
        data_set=data_set,
        text=text,
        views=views,
        features=features,
        components={name: name for name in components},
    )
    write_json(folder / _CONFIG, config.model_dump(mode="json"))


def read_bundle_config(folder: Path) -> BundleConfig:
    """The description of a model folder, without its weights.

    Raises:
        PrimaError: it is missing, damaged, or of another version.
    """
    raw = read_json(folder / _CONFIG)
    if not isinstance(raw, dict):
        raise PrimaError(f"damaged: holds a {type(raw).__name__}, not an object", where=folder / _CONFIG)
    if raw.get("version") != BUNDLE_VERSION:
        raise PrimaError(
            f"a model of version {raw.get('version')}, this program reads version {BUNDLE_VERSION}",
            where=folder / _CONFIG,
        )
    try:
        return BundleConfig.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise PrimaError(
            f"damaged: {f'{key}: ' if key else ''}{first['msg']}",
            where=folder / _CONFIG,
            mend=_MEND,
        ) from None


def load_bundle(folder: Path) -> Bundle:
    """Load a model folder: every part frozen, in eval mode, on the CPU.

    Raises:
        PrimaError: a file is missing, damaged, or of another version.
    """
    config = read_bundle_config(folder)
    absent = [name for name in _PARTS[config.kind] if name not in config.components]
    if absent:
        raise PrimaError(f"damaged: a model of {config.kind} needs the part {absent[0]!r}", where=folder / _CONFIG)
    return Bundle(config=config, components={name: _load(folder / at) for name, at in config.components.items()})


def _load(folder: Path) -> nn.Module:
    try:
        return load_component(folder)
    except (ValueError, KeyError, TypeError, RuntimeError, OSError) as error:
        # The file reads as JSON and says something that no model can be built from.
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise PrimaError(
            f"this part of the model is damaged ({reason[0]})",
            where=folder,
            mend=_MEND,
        ) from error


def component_folder(run: str, name: str) -> str:
    """The folder of one part of a run's model."""
    return join(run, "model", name)
