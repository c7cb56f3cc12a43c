"""The `model/` folder of a run: everything that turns photos and attributes into the model's inputs and back.

    model/config.json            what the model is, the data set's description, how text and views are made
    model/<component>/           a folder a part, see `models.store`
    model/calibration.json       how far its probabilities go, see `calibration`

It loads with nothing else at hand: no parent run, no hub, no YAML.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import ValidationError
from torch import nn

from prima_ray.base import PrimaError, StrictConfig, hash_file, hash_json, read_json, write_json
from prima_ray.data.description import DataSetConfig
from prima_ray.data.metadata import MetadataTextConfig
from prima_ray.data.schema import join
from prima_ray.data.views import ViewConfig
from prima_ray.inference.calibration import Calibration
from prima_ray.models.store import load_component, save_component

BUNDLE_VERSION = 1
CALIBRATION = "calibration.json"
_CONFIG = "config.json"
_MEND = "Copy the run again, or train it again."
_PARTS = {
    "align": ("image_tower", "text_tower", "heads"),
    "finetune": ("classifier",),
    "fuse": ("image_tower", "text_tower", "fusion"),
}
"""What a model of each kind cannot be without."""
PartT = TypeVar("PartT", bound=StrictConfig)


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
    calibrated: bool = False
    """There is a `calibration.json`; folders of before there were any have none."""


@dataclass(frozen=True)
class Bundle:
    """A loaded model folder."""

    config: BundleConfig
    components: Mapping[str, nn.Module]
    calibration: Calibration | None = None
    """None in a folder of before there were any, and in one of align."""


def save_bundle(
    folder: Path,
    *,
    kind: Literal["align", "finetune", "fuse"],
    data_set: DataSetConfig,
    text: MetadataTextConfig | None,
    views: ViewConfig,
    features: Literal["backbone", "projected"],
    components: Mapping[str, nn.Module],
    calibration: Calibration | None = None,
) -> None:
    """Write a model folder; `config.json` comes last."""
    for name, module in components.items():
        save_component(folder / name, module)
    if calibration is not None:
        write_json(folder / CALIBRATION, calibration.model_dump(mode="json"))
    config = BundleConfig(
        kind=kind,
        data_set=data_set,
        text=text,
        views=views,
        features=features,
        components={name: name for name in components},
        calibrated=calibration is not None,
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
        raise PrimaError(f"damaged: {_first_mistake(error)}", where=folder / _CONFIG, mend=_MEND) from None


def _first_mistake(error: ValidationError) -> str:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    return f"{f'{key}: ' if key else ''}{first['msg']}"


def load_bundle(folder: Path) -> Bundle:
    """Load a model folder: every part frozen, in eval mode, on the CPU.

    Raises:
        PrimaError: a file is missing, damaged, or of another version.
    """
    config = read_bundle_config(folder)
    absent = [name for name in _PARTS[config.kind] if name not in config.components]
    if absent:
        raise PrimaError(f"damaged: a model of {config.kind} needs the part {absent[0]!r}", where=folder / _CONFIG)
    return Bundle(
        config=config,
        components={name: _load(folder / at) for name, at in config.components.items()},
        calibration=read_part(folder / CALIBRATION, Calibration) if config.calibrated else None,
    )


def read_part(path: Path, kind: type[PartT]) -> PartT:
    """A JSON file of a model folder.

    Raises:
        PrimaError: it is missing or damaged.
    """
    try:
        return kind.model_validate(read_json(path))
    except ValidationError as error:
        raise PrimaError(f"damaged: {_first_mistake(error)}", where=path, mend=_MEND) from None


def model_version(folder: Path) -> str:
    """What identifies a model: 16 hex digits of the SHA-256 over the names and contents of all files of its folder."""
    files = sorted(item for item in folder.rglob("*") if item.is_file() and not item.name.startswith("."))
    return hash_json({item.relative_to(folder).as_posix(): hash_file(item) for item in files})[:16]


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
