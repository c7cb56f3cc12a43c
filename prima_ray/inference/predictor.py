"""The predictor: a run directory and exams in, probabilities out. Plain Python, no Ray.

It makes its inputs with the collator that training's own evaluation uses, so the two cannot drift apart. Probabilities
are the calibrated ones, everywhere; a model folder of before there was a calibration gives its own, and says so.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import nn

from prima_ray.base import PrimaError
from prima_ray.data.attributes import normalise_attributes
from prima_ray.data.batch import ImageTextBatch
from prima_ray.data.collate import Collator
from prima_ray.data.description import DataSetConfig
from prima_ray.data.fetched import local_copy
from prima_ray.data.images import ImageRejected, decode_image
from prima_ray.data.metadata import describe, expand_names
from prima_ray.data.schema import SHARD_SCHEMA
from prima_ray.inference.appearance import pixels_of
from prima_ray.inference.bundle import Bundle, BundleConfig, load_bundle, read_bundle_config
from prima_ray.inference.calibration import Calibration
from prima_ray.models.classifier import ImageClassifier
from prima_ray.models.dual_encoder import FeatureEncoder, ProjectionHeads, image_features
from prima_ray.models.ensemble import Ensemble
from prima_ray.models.experts import AttributeExpert, Pool
from prima_ray.models.fusion import MlpFusion, Qwen3Fusion
from prima_ray.models.image_tower import ImageTower
from prima_ray.models.text_tower import TextTower

_log = logging.getLogger(__name__)
_MEND = "Copy the run again, or train it again."
UNCALIBRATED = (
    "this model was saved without a calibration: its probabilities are as it gives them, and prediction sets hold "
    "every class (train its stage again)"
)


@dataclass(frozen=True)
class Exam:
    """What is asked about: one photo or more, and the attributes that are known."""

    images: tuple[bytes, ...]
    """JPEG or PNG files."""
    attributes: Mapping[str, object]
    """By attribute name; raw or canonical values."""
    exam_id: str = "exam"


class Predictor:
    """A loaded model. Its answer for an exam does not depend on the other exams of the call."""

    def __init__(
        self,
        bundle: Bundle,
        model: nn.Module,
        encoder: FeatureEncoder | None,
        device: str,
        *,
        run: str | Path,
        heads: ProjectionHeads | None = None,
    ) -> None:
        self.run = run
        """Where the model is from, for messages."""
        self.bundle = bundle
        self.config = config = bundle.config
        self.calibration = bundle.calibration or Calibration.none(notes=[UNCALIBRATED])
        self.device = torch.device(device)
        self.heads = heads.eval().to(self.device) if heads else None
        self._model = model.eval().to(self.device)
        self._encoder = encoder.eval().to(self.device) if encoder else None
        text, tokenizer = None, None
        if encoder is not None:
            text, tokenizer = config.text, encoder.text_tower.config.tokenizer()
        self.tokenizer = tokenizer
        """None for a model of photos alone."""
        self._collate = Collator(
            data_set=config.data_set,
            seed=0,
            train=False,
            views=config.views,
            text=text,
            tokenizer=tokenizer,
            vector=config.vector if text else None,
        )

    @classmethod
    def load(cls, run: str | Path, *, device: str = "cpu") -> Self:
        """Load a run of finetune (photos alone) or fuse (photos and attributes).

        Raises:
            PrimaError: no such run, a missing or damaged file, or a run of another stage.
        """
        check_diagnoses(run)
        folder = local_copy(run) / "model"
        bundle = load_bundle(folder)
        if bundle.calibration is None:
            _log.warning("%s: %s", run, UNCALIBRATED)
        return cls.of(bundle, device=device, run=run, folder=folder)

    @classmethod
    def of(cls, bundle: Bundle, *, device: str, run: str | Path, folder: Path) -> Self:
        """Of a model folder in memory.

        Args:
            run: where it is from, for messages.
            folder: the model folder itself.

        Raises:
            PrimaError: its parts are not what its description says.
        """
        parts = bundle.components
        if bundle.config.kind == "finetune":
            _check_classes(bundle.config, parts["classifier"], where=folder)
            return cls(bundle, parts["classifier"], None, device, run=run)
        image, text, heads = parts["image_tower"], parts["text_tower"], parts.get("heads")
        if not isinstance(image, ImageTower) or not isinstance(text, TextTower):
            raise PrimaError("the towers are not what config.json says", where=folder)
        projected = bundle.config.features == "projected"
        if (projected and heads is None) or (heads is not None and not isinstance(heads, ProjectionHeads)):
            raise PrimaError("the heads are not what config.json says", where=folder)
        _check_classes(bundle.config, parts["fusion"], where=folder)
        photos, model = _experts(bundle, where=folder)
        # Of a model that reads the backbones' features the heads are there to explain it.
        encoder = FeatureEncoder(image, text, heads if projected else None, photos)
        return cls(bundle, model, encoder, device, run=run, heads=heads)

    @property
    def data_set(self) -> DataSetConfig:
        """The description of the data set that the model was trained on."""
        return self.config.data_set

    @property
    def uses_attributes(self) -> bool:
        """False for a model of photos alone."""
        return self._encoder is not None

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the image tokens."""
        return self._image_tower.grid

    @property
    def _image_tower(self) -> ImageTower:
        if self._encoder is not None:
            return self._encoder.image_tower
        if not isinstance(self._model, ImageClassifier):
            raise TypeError(f"a {type(self._model).__name__} reads features that nothing makes")
        return self._model.image_tower

    @property
    def read_attributes(self) -> tuple[str, ...]:
        """The attributes that the model's text speaks of; none for a model of photos alone."""
        return self.config.read_attributes

    def warnings(self, attributes: Mapping[str, object]) -> list[str]:
        """What a person should know before believing the answer; nothing where as much is given as it learned from.

        A model of photos and attributes answers as surely without them as with them, whatever it learned to expect.
        """
        read, known = self.read_attributes, normalise_attributes(self.data_set, attributes)
        given = sum(name in known for name in read)
        told = f"only {given} of the {len(read)} attributes that the model reads {'is' if given == 1 else 'are'} given"
        scarcity = self.calibration.scarcity
        if scarcity is not None:
            if scarcity.level(scarcity.completeness(known)) is not None:
                return [f"{told}; of the exams that it learned from more was known"]
        elif read and 2 * given < len(read):
            return [f"{told}: if it learned from fuller exams, its probabilities may be far off"]
        return []

    def text(self, attributes: Mapping[str, object]) -> str | None:
        """The text that the model reads for these attributes; None for a model of photos alone."""
        if self.config.text is None:
            return None
        return describe(normalise_attributes(self.data_set, attributes), self.data_set, self.config.text)

    def predict(
        self, exams: Sequence[Exam], *, masked: Collection[str] = (), batch_size: int = 16
    ) -> NDArray[np.float64]:
        """Probabilities of the diagnoses, (N, C) in the order of the data set's classes.

        Args:
            masked: attributes that are treated as missing for every exam.
            batch_size: exams a forward pass.

        Raises:
            PrimaError: an exam without photos or with too many, an unusable photo, an unknown or impossible attribute.
        """
        tables = (self.exam_table(exam) for exam in exams)
        return self.predict_tables(_batched(tables, batch_size), masked=masked)

    def exam_table(self, exam: Exam) -> pa.Table:
        """An exam as a row of the shard schema, its photos and attributes checked.

        Raises:
            PrimaError: see `predict`.
        """
        limit = self.config.views.max_photos
        if not exam.images:
            raise PrimaError("an exam needs at least one photo", where=exam.exam_id)
        if len(exam.images) > limit:
            raise PrimaError(
                f"{len(exam.images)} photos, the model reads at most {limit} of an exam", where=exam.exam_id
            )
        row = {
            "exam_id": exam.exam_id,
            "patient_id": None,
            "images": [
                _photo(data, f"photo {number}", exam.exam_id) for number, data in enumerate(exam.images, start=1)
            ],
            "attributes": sorted(normalise_attributes(self.data_set, exam.attributes).items()),
            "label": None,
        }
        return pa.Table.from_pylist([row], schema=SHARD_SCHEMA)

    def predict_tables(self, tables: Iterable[pa.Table], *, masked: Collection[str] = ()) -> NDArray[np.float64]:
        """The same for tables with the columns of the shard schema, a batch a table."""
        hidden = set(expand_names(masked, self.data_set, what="masked"))
        found = []
        for table in tables:
            logits = self.logits(self.encode(self.collate(table, masked)))
            known = [{name for name, _ in pairs or ()} - hidden for pairs in table["attributes"].to_pylist()]
            found.append(self.calibration.probabilities(logits, self.calibration.completeness(known)))
        if not found:
            return np.zeros((0, len(self.data_set.classes)))
        return np.concatenate(found)

    def collate(
        self, table: pa.Table, masked: Collection[str] = (), *, part: Literal["photos", "text"] | None = None
    ) -> ImageTextBatch:
        """Rows of the shard schema -> the batch that the model reads, on the CPU: photos decoded, texts tokenized.

        Args:
            part: the photos alone, or the text alone.

        Raises:
            PrimaError: a photo cannot be decoded.
        """
        collate = self._collate
        if part == "photos":
            collate = replace(collate, text=None, tokenizer=None, vector=None)
        elif part == "text":
            collate = replace(collate, views=None)
        if masked and collate.text is not None:
            text = collate.text.model_copy(update={"masked": (*collate.text.masked, *sorted(masked))})
            collate = replace(collate, text=text)
        return collate(table)

    @torch.inference_mode()
    def encode(self, batch: ImageTextBatch) -> ImageTextBatch:
        """The batch on the model's device, with the features of the frozen towers in it."""
        batch = self.encode_images(batch)
        return batch if self._encoder is None else self.encode_texts(batch)

    @torch.inference_mode()
    def encode_texts(self, batch: ImageTextBatch) -> ImageTextBatch:
        """The same of the texts alone, for a model that reads them."""
        if self._encoder is None:
            raise TypeError("a model of photos alone reads no texts")
        batch = batch.to(self.device)
        found = self._encoder.encode_texts(batch)
        return replace(batch, text_cls=found["text_cls"], text_seq=found["text_seq"])

    @torch.inference_mode()
    def encode_images(self, batch: ImageTextBatch) -> ImageTextBatch:
        """The same of the photos alone."""
        batch = batch.to(self.device)
        if self._encoder is not None:
            found = self._encoder.encode_images(batch)
            features: dict[str, Any] = dict(found)
            return replace(batch, **features)
        image_cls, image_seq = image_features(self._image_tower, batch)
        return replace(batch, image_cls=image_cls, image_seq=image_seq)

    def views_of(self, batch: ImageTextBatch, row: int) -> NDArray[np.float32]:
        """(V, S, S, 3) RGB in 0-1: what the model reads of an exam's photos, of a collated batch on the CPU."""
        if batch.images is None or batch.image_mask is None:
            raise ValueError("the batch has no photos")
        return pixels_of(batch.images[row][batch.image_mask[row]], self.config.views)

    @torch.inference_mode()
    def logits(self, batch: ImageTextBatch) -> NDArray[np.float64]:
        """Logits (N, C) of an encoded batch, as the model gives them.

        Raises:
            PrimaError: they are not numbers.
        """
        found: NDArray[np.float64] = self._model(batch)["logits"].double().cpu().numpy()
        if not np.isfinite(found).all():
            raise PrimaError(
                "the model gives probabilities that are not numbers (NaN): its weights are damaged, or its training "
                "diverged",
                where=self.run,
                mend=_MEND,
            )
        return found


def _experts(bundle: Bundle, *, where: Path) -> tuple[ImageClassifier | None, nn.Module]:
    """The classifier of photos that speaks too, and the model that answers.

    Raises:
        PrimaError: an expert is missing, or is not what it should be.
    """
    config, parts = bundle.config.experts, bundle.components
    if config is None:
        return None, parts["fusion"]
    wanted = {"photos": (config.photos, ImageClassifier), "attributes": (config.attributes, AttributeExpert)}
    for name, (weight, kind) in wanted.items():
        if weight and not isinstance(parts.get(name), kind):
            raise PrimaError(f"damaged: its experts need the part {name!r}", where=where / "config.json", mend=_MEND)
    photos, attributes = parts.get("photos"), parts.get("attributes")
    if isinstance(photos, ImageClassifier):
        _check_classes(bundle.config, photos, where=where)
    pool = Pool(config, parts["fusion"], attributes if isinstance(attributes, AttributeExpert) else None)
    return photos if isinstance(photos, ImageClassifier) else None, pool


def _check_classes(config: BundleConfig, model: nn.Module, *, where: Path) -> None:
    """The description and the weights must speak of as many classes."""
    if isinstance(model, ImageClassifier):
        found = model.head.out_features
    elif isinstance(model, MlpFusion | Qwen3Fusion | Ensemble):
        found = len(model.inputs.class_phrases)
    else:
        raise PrimaError(f"a {type(model).__name__} does not diagnose", where=where)
    if found != len(config.data_set.classes):
        raise PrimaError(
            f"damaged: it names {len(config.data_set.classes)} classes, the model tells {found} apart",
            where=where / "config.json",
            mend=_MEND,
        )


def check_diagnoses(run: str | Path) -> BundleConfig:
    """The description of a run's model, which must be one that diagnoses; reads no weights.

    Raises:
        PrimaError: no such run, no model in it, or a run of another stage.
    """
    folder = local_copy(run) / "model"
    if not folder.is_dir():
        what = "no model here" if folder.parent.is_dir() else "no such run directory"
        raise PrimaError(what, where=run, mend="Name the run directory of `prima fuse` or `prima finetune`.")
    config = read_bundle_config(folder)
    if config.kind == "align":
        raise PrimaError(
            "a run of align does not diagnose",
            where=run,
            mend="Name the run directory of `prima fuse` or `prima finetune`.",
        )
    return config


def check_photo(data: bytes, *, where: str, name: str = "this photo") -> tuple[int, int]:
    """Width and height of a photo that can be used.

    Args:
        name: what the error calls it.

    Raises:
        PrimaError: it cannot.
    """
    try:
        return decode_image(data).size
    except ImageRejected as error:
        raise PrimaError(f"{name} cannot be used: {error.detail} ({error.reason})", where=where) from None


def _photo(data: bytes, name: str, exam_id: str) -> dict[str, object]:
    width, height = check_photo(data, where=exam_id, name=name)
    return {"image_id": name, "bytes": data, "width": width, "height": height}


def _batched(tables: Iterator[pa.Table], size: int) -> Iterator[pa.Table]:
    waiting: list[pa.Table] = []
    for table in tables:
        waiting.append(table)
        if len(waiting) == size:
            yield pa.concat_tables(waiting)
            waiting = []
    if waiting:
        yield pa.concat_tables(waiting)
