"""The `model/` folder of a run: everything that turns photos and attributes into the model's inputs and back.

    model/config.json            what the model is, the data set's description, how text and views are made
    model/<component>/           a folder a part, see `models.store`
    model/<NAME>.json            how it answers: calibration, familiarity, reference, known_exam, evidence, each see
    there

Folders of before there were answers, and those of align, have none of the latter; config.json says which are there.

It loads with nothing else at hand: no parent run, no hub, no YAML.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import ValidationError
from torch import nn

from prima_ray.base import PrimaError, StrictConfig, hash_file, hash_json, read_json, write_json
from prima_ray.data.attribute_vectors import SoftTargetEncoder
from prima_ray.data.description import DataSetConfig
from prima_ray.data.metadata import MetadataTextConfig, expand_names, text_attributes
from prima_ray.data.schema import join
from prima_ray.data.views import ViewConfig
from prima_ray.inference.calibration import Calibration
from prima_ray.inference.evidence import Evidence
from prima_ray.inference.familiarity import Familiarity, FamiliarityRecord, load_familiarity, save_arrays
from prima_ray.inference.known_exam import KnownExam
from prima_ray.inference.reference import Reference
from prima_ray.models.experts import ExpertsConfig
from prima_ray.models.store import load_component, save_component

BUNDLE_VERSION = 1
ARRAYS = "familiarity.safetensors"
_CONFIG = "config.json"
_MEND = "Copy the run again, or train it again."
_PARTS = {
    "align": ("image_tower", "text_tower", "heads"),
    "finetune": ("classifier",),
    "fuse": ("image_tower", "text_tower", "fusion"),
}
"""What a model of each kind cannot be without."""
ANSWERS: dict[str, type[StrictConfig]] = {
    "calibration": Calibration,
    "familiarity": FamiliarityRecord,
    "reference": Reference,
    "known_exam": KnownExam,
    "evidence": Evidence,
}
"""Field of a bundle -> what its JSON file holds."""


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
    vector: SoftTargetEncoder | None = None
    """How attributes become the vector that stands beside the text; None for a model that reads the text alone."""
    experts: ExpertsConfig | None = None
    """What is pooled with the fusion model: parts `photos` and `attributes`; None: it answers alone."""
    tuned_after_alignment: bool = False
    """The image tower was fine-tuned after its heads were trained: they explain less of it than they did."""
    answers: tuple[str, ...] = ()
    """Which of the JSON files there are."""

    @property
    def read_attributes(self) -> tuple[str, ...]:
        """The attributes that the model's text speaks of; none for a model of photos alone."""
        if self.text is None or self.kind != "fuse":
            return ()
        masked = expand_names(self.text.masked, self.data_set, what="masked")
        return tuple(item.name for item in text_attributes(self.data_set, self.text) if item.name not in masked)


@dataclass(frozen=True)
class Bundle:
    """A model folder in memory."""

    config: BundleConfig
    components: Mapping[str, nn.Module]
    calibration: Calibration | None = None
    familiarity: Familiarity | None = None
    reference: Reference | None = None
    known_exam: KnownExam | None = None
    evidence: Evidence | None = None

    @classmethod
    def of(
        cls,
        *,
        kind: Literal["align", "finetune", "fuse"],
        data_set: DataSetConfig,
        text: MetadataTextConfig | None,
        views: ViewConfig,
        features: Literal["backbone", "projected"],
        components: Mapping[str, nn.Module],
        vector: SoftTargetEncoder | None = None,
        experts: ExpertsConfig | None = None,
        tuned_after_alignment: bool = False,
        calibration: Calibration | None = None,
        evidence: Evidence | None = None,
    ) -> Self:
        """Of its parts."""
        config = BundleConfig(
            kind=kind,
            data_set=data_set,
            text=text,
            views=views,
            features=features,
            components={name: name for name in components},
            vector=vector,
            experts=experts,
            tuned_after_alignment=tuned_after_alignment,
        )
        return cls(config, components, calibration=calibration, evidence=evidence)

    @property
    def folder_config(self) -> BundleConfig:
        """`config.json` of the folder that this becomes."""
        return self.config.model_copy(
            update={"answers": tuple(name for name in ANSWERS if getattr(self, name) is not None)}
        )


def save_bundle(folder: Path, bundle: Bundle) -> None:
    """Write a model folder; `config.json` comes last."""
    for name, module in bundle.components.items():
        save_component(folder / name, module)
    for name in bundle.folder_config.answers:
        part = getattr(bundle, name)
        if isinstance(part, Familiarity):
            save_arrays(folder / ARRAYS, part)
            part = part.record
        write_json(folder / f"{name}.json", part.model_dump(mode="json"))
    write_json(folder / _CONFIG, bundle.folder_config.model_dump(mode="json"))


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
    unknown = [name for name in config.answers if name not in ANSWERS]
    if unknown:
        raise PrimaError(f"damaged: answers: there is no {unknown[0]!r}", where=folder / _CONFIG, mend=_MEND)
    if absent:
        raise PrimaError(f"damaged: a model of {config.kind} needs the part {absent[0]!r}", where=folder / _CONFIG)
    answers: dict[str, Any] = {name: _read_part(folder / f"{name}.json", ANSWERS[name]) for name in config.answers}
    if "familiarity" in answers:
        answers["familiarity"] = load_familiarity(folder / ARRAYS, answers["familiarity"])
    components = {name: _load(folder / at) for name, at in config.components.items()}
    return Bundle(config=config, components=components, **answers)


def _read_part(path: Path, kind: type[StrictConfig]) -> StrictConfig:
    try:
        return kind.model_validate(read_json(path))
    except ValidationError as error:
        raise PrimaError(f"damaged: {_first_mistake(error)}", where=path, mend=_MEND) from None


def read_calibration(folder: Path) -> Calibration | None:
    """The calibration of a model folder, without its weights; None where it was saved without one.

    Raises:
        PrimaError: a file is missing or damaged.
    """
    if "calibration" not in read_bundle_config(folder).answers:
        return None
    found = _read_part(folder / "calibration.json", Calibration)
    return found if isinstance(found, Calibration) else None


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
