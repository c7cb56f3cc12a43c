"""The answer: exams in, diagnoses out. What `prima predict` prints and the endpoint sends is made here, without Ray.

A `Diagnoser` is a loaded run. It answers a batch of exams at once; what is wrong with one of them is that one's answer,
and no answer depends on the others of the batch (up to float rounding).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from prima_ray.base import PrimaError
from prima_ray.data.attributes import normalise_attributes
from prima_ray.data.batch import ImageTextBatch
from prima_ray.data.fetched import local_copy
from prima_ray.inference.appearance import measure
from prima_ray.inference.bundle import model_version
from prima_ray.inference.explanation import Answered, Explanation
from prima_ray.inference.explanation import explain as explain_exams
from prima_ray.inference.predictor import Exam, Predictor
from prima_ray.inference.reference import exam_values

Cause = Literal["uncertain", "out_of_distribution", "image_unusable"]


@dataclass(frozen=True)
class Reason:
    """Why an answer abstains."""

    cause: Cause
    text: str
    """For people."""


@dataclass(frozen=True)
class Diagnosis:
    """The answer for one exam."""

    model: str
    """Data set and stage: `pad_ufes_20-fuse`."""
    version: str
    """Of the model folder, see `bundle.model_version`."""
    prediction: str
    """The most probable class, also where the answer abstains."""
    probabilities: Mapping[str, float]
    """Calibrated, by class, in the data set's order."""
    prediction_set: tuple[str, ...]
    """Holds the true class for the share ``coverage`` of exams like those of the validation fold; most probable
    first."""
    coverage: float
    confidence: float
    """The largest probability."""
    reasons: tuple[Reason, ...]
    """Why it abstains; empty where it does not."""
    attributes_used: Mapping[str, str]
    """Canonical values that the model read."""
    attributes_missing: tuple[str, ...]
    """What it would have read."""
    attributes_ignored: tuple[str, ...]
    """Given, but nothing that it reads."""
    text: str | None
    """What the model read of the attributes; None for a model of photos alone."""
    warnings: tuple[str, ...]
    """What a person should know before believing the answer."""
    novelty: float | None = None
    """How strange the photos are, by the stranger of two measures (`familiarity`): above 1 is out of distribution. None
    where the model cannot say."""
    novelty_by: Mapping[str, float] = field(default_factory=dict)
    """The same, each measure by itself: `features` and `appearance`."""
    drift: Mapping[str, str] = field(default_factory=dict)
    """Variable of the model's `reference` -> this exam's answer: what a service counts to notice drift."""
    explanation: Explanation | None = None
    timings: Mapping[str, float] = field(default_factory=dict)
    """Seconds that the whole batch of the exam took, by step: decode, encode, fuse, explain."""

    @property
    def abstained(self) -> bool:
        """The prediction is not to be used; `reasons` says why."""
        return bool(self.reasons)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: what a person asks for; not `drift` and `timings`, which are for operators."""
        found: dict[str, Any] = {
            "model": {"name": self.model, "version": self.version},
            "prediction": self.prediction,
            "probabilities": dict(self.probabilities),
            "prediction_set": list(self.prediction_set),
            "coverage": self.coverage,
            "confidence": self.confidence,
            "novelty": self.novelty,
            "abstained": self.abstained,
            "reasons": [{"cause": item.cause, "text": item.text} for item in self.reasons],
            "attributes_used": dict(self.attributes_used),
            "attributes_missing": list(self.attributes_missing),
            "attributes_ignored": list(self.attributes_ignored),
            "text": self.text,
            "warnings": list(self.warnings),
        }
        if self.explanation is not None:
            found["explanation"] = self.explanation.as_dict()
        return found


Answer = Diagnosis | PrimaError
"""A diagnosis, or what is wrong with the exam."""


class Diagnoser:
    """A loaded run that answers."""

    def __init__(self, predictor: Predictor, *, version: str) -> None:
        self.predictor = predictor
        self.version = version
        config = predictor.config
        self.name = f"{config.data_set.name}-{config.kind}"
        self._read = predictor.read_attributes

    @classmethod
    def load(cls, run: str | Path, *, device: str = "cpu") -> Self:
        """Load a run of finetune (photos alone) or fuse (photos and attributes).

        Raises:
            PrimaError: no such run, a missing or damaged file, or a run of another stage.
        """
        predictor = Predictor.load(run, device=device)
        return cls(predictor, version=model_version(local_copy(run) / "model"))

    @property
    def classes(self) -> tuple[str, ...]:
        return self.predictor.data_set.class_names

    def check(self, exam: Exam) -> None:
        """Look at an exam without asking the model: photos are decoded, attributes are read.

        Raises:
            PrimaError: no photo or too many, an unusable photo, an unknown or impossible attribute.
        """
        self.predictor.exam_table(exam)

    def diagnose_one(self, exam: Exam, *, explain: bool = False) -> Diagnosis:
        """One exam.

        Raises:
            PrimaError: see `check`.
        """
        (answer,) = self.diagnose([exam], explain=explain)
        if isinstance(answer, PrimaError):
            raise answer
        return answer

    def diagnose(self, exams: Sequence[Exam], *, explain: bool | Sequence[bool] = False) -> list[Answer]:
        """Answer a batch, one forward pass.

        Args:
            explain: for all exams, or one an exam.

        Returns:
            an answer an exam, in order: what is wrong with an exam (see `check`) stands in its place and spoils no
            other.

        Raises:
            PrimaError: the model is damaged.
        """
        wanted = [explain] * len(exams) if isinstance(explain, bool) else list(explain)
        if len(wanted) != len(exams):
            raise ValueError(f"{len(exams)} exams, {len(wanted)} times told whether to explain")
        clock = _Clock()
        answers: dict[int, Answer] = {}
        tables: dict[int, pa.Table] = {}
        with clock.timing("decode"):
            for place, exam in enumerate(exams):
                try:
                    tables[place] = self.predictor.exam_table(exam)
                except PrimaError as error:
                    answers[place] = error
            batch = self._collate(tables, answers)
        if batch is not None:
            places = list(tables)
            found = self._answer(
                batch,
                [normalise_attributes(self.predictor.data_set, exams[place].attributes) for place in places],
                _sizes(pa.concat_tables(tables.values())),
                [wanted[place] for place in places],
                clock,
            )
            answers |= dict(zip(places, found, strict=True))
        return [answers[place] for place in range(len(exams))]

    def diagnose_table(self, table: pa.Table) -> list[Diagnosis]:
        """Answer rows of the shard schema, one forward pass. Of an exam's photos the first are read, as many as the
        model takes; attributes that it does not read are not looked at.

        Raises:
            PrimaError: a photo cannot be decoded, or the model is damaged.
        """
        most = self.predictor.config.views.max_photos
        return self._answer(
            self.predictor.collate(table),
            [self._given(dict(pairs or ())) for pairs in table["attributes"].to_pylist()],
            [sizes[:most] for sizes in _sizes(table)],
            [False] * len(table),
            _Clock(),
        )

    def _collate(self, tables: dict[int, pa.Table], answers: dict[int, Answer]) -> ImageTextBatch | None:
        """The batch of the exams that can be read; what cannot moves from ``tables`` to ``answers``."""
        if not tables:
            return None
        try:
            return self.predictor.collate(pa.concat_tables(tables.values()))
        except PrimaError:
            # A photo that decodes whole and not reduced: whose is it?
            for place, table in list(tables.items()):
                try:
                    self.predictor.collate(table)
                except PrimaError as error:
                    answers[place] = error
                    del tables[place]
        return self.predictor.collate(pa.concat_tables(tables.values())) if tables else None

    def _answer(
        self,
        batch: ImageTextBatch,
        attributes: Sequence[Mapping[str, str]],
        sizes: Sequence[Sequence[tuple[int, int]]],
        explained: Sequence[bool],
        clock: _Clock,
    ) -> list[Diagnosis]:
        predictor = self.predictor
        with clock.timing("encode"):
            encoded = predictor.encode(batch)
        with clock.timing("fuse"):
            logits = predictor.logits(encoded)
        completeness = predictor.calibration.completeness(attributes)
        probabilities = predictor.calibration.probabilities(logits, completeness)
        sets = predictor.calibration.sets(probabilities, completeness)
        with clock.timing("check"):
            photos = [
                self._photos(encoded, row, predictor.views_of(batch, row), size) for row, size in enumerate(sizes)
            ]
        explanations: dict[int, Explanation] = {}
        if any(explained):
            with clock.timing("explain"):
                asked = [
                    Answered(
                        row=row,
                        attributes=self._given(attributes[row]),
                        views=photos[row].views,
                        logits=logits[row],
                        diagnoses=self._ranked(probabilities[row], sets[row]),
                    )
                    for row, wanted in enumerate(explained)
                    if wanted
                ]
                explanations = dict(
                    zip([item.row for item in asked], explain_exams(predictor, encoded, asked), strict=True)
                )
        return [
            self._diagnosis(
                attributes[row],
                probabilities[row],
                sets[row],
                completeness=float(completeness[row]),
                photos=photos[row],
                explanation=explanations.get(row),
                timings=clock.seconds,
            )
            for row in range(len(attributes))
        ]

    def _photos(
        self, encoded: ImageTextBatch, row: int, views: NDArray[np.float32], sizes: Sequence[tuple[int, int]]
    ) -> _Photos:
        looks, known = measure(views), self.predictor.bundle.familiarity
        if known is None or encoded.image_cls is None:
            return _Photos(views, looks, (), {})
        features = encoded.image_cls[row, : len(views)].double().cpu().numpy()
        complaints = [
            (f"photo {number} cannot be used: " if len(views) > 1 else "the photo cannot be used: ") + complaint
            for number, (look, (width, height)) in enumerate(zip(looks, sizes, strict=True), start=1)
            for complaint in (
                known.record.bounds.complaints(look, width=width, height=height) if known.record.bounds else ()
            )
        ]
        return _Photos(views, looks, tuple(complaints), known.novelty(features, looks))

    def _given(self, attributes: Mapping[str, str]) -> dict[str, str]:
        return {name: attributes[name] for name in self._read if name in attributes}

    def _ranked(self, probabilities: NDArray[np.float64], held: NDArray[np.bool_]) -> tuple[str, ...]:
        order = np.argsort(-probabilities, kind="stable")
        return tuple(self.classes[index] for index in order if held[index])

    def _diagnosis(
        self,
        attributes: Mapping[str, str],
        probabilities: NDArray[np.float64],
        held: NDArray[np.bool_],
        *,
        completeness: float,
        photos: _Photos,
        explanation: Explanation | None,
        timings: Mapping[str, float],
    ) -> Diagnosis:
        ranked = self._ranked(probabilities, held)
        confidence = float(probabilities.max())
        return Diagnosis(
            model=self.name,
            version=self.version,
            prediction=ranked[0],
            probabilities=dict(zip(self.classes, probabilities.tolist(), strict=True)),
            prediction_set=ranked,
            coverage=self.predictor.calibration.coverage,
            confidence=confidence,
            reasons=tuple(self._reasons(confidence, completeness, photos)),
            attributes_used=self._given(attributes),
            attributes_missing=tuple(name for name in self._read if name not in attributes),
            attributes_ignored=tuple(name for name in attributes if name not in self._read),
            text=self.predictor.text(attributes),
            warnings=tuple(self._warnings(attributes)),
            novelty=photos.strangeness,
            novelty_by=dict(photos.novelty),
            drift=self._drift(attributes, ranked[0], confidence, photos),
            explanation=explanation,
            timings=timings,
        )

    def _reasons(self, confidence: float, completeness: float, photos: _Photos) -> Iterator[Reason]:
        for complaint in photos.complaints:
            yield Reason("image_unusable", complaint)
        strange = {name: value for name, value in photos.novelty.items() if value > 1}
        if strange and not photos.complaints:
            told = " and ".join(f"{_SPACES[name]} {value:.1f} times" for name, value in strange.items())
            yield Reason(
                "out_of_distribution",
                f"unlike the photos that the model was trained on: {told} as far from them as the limit",
            )
        least = self.predictor.calibration.least_confidence(completeness)
        if confidence < least:
            told = f"the most probable diagnosis has {confidence:.1%}"
            if least == self.predictor.calibration.min_confidence:
                yield Reason("uncertain", f"too uncertain: {told}, less than {least:.1%}")
            elif least > 1:
                yield Reason("uncertain", f"too uncertain: {told}, and with so few attributes none is believed")
            else:
                yield Reason("uncertain", f"too uncertain: {told}, and with so few attributes it takes {least:.1%}")

    def _warnings(self, attributes: Mapping[str, object]) -> Iterator[str]:
        yield from self.predictor.calibration.notes
        if self.predictor.bundle.familiarity is not None:
            yield from self.predictor.bundle.familiarity.record.notes
        yield from self.predictor.warnings(attributes)

    def _drift(
        self, attributes: Mapping[str, str], prediction: str, confidence: float, photos: _Photos
    ) -> dict[str, str]:
        reference = self.predictor.bundle.reference
        if reference is None:
            return {}
        values = exam_values(self.predictor.data_set, attributes, prediction, confidence, photos.looks)
        return reference.answers({**values, "novelty": photos.strangeness})


_SPACES = {"features": "in what it sees in them", "appearance": "in light, colour and detail"}


@dataclass(frozen=True)
class _Photos:
    """What is known of an exam's photos."""

    views: NDArray[np.float32]
    """(V, S, S, 3) in 0-1."""
    looks: NDArray[np.float64]
    """(V, A)"""
    complaints: tuple[str, ...]
    novelty: Mapping[str, float]

    @property
    def strangeness(self) -> float | None:
        return max(self.novelty.values(), default=None)


def _sizes(table: pa.Table) -> list[list[tuple[int, int]]]:
    """Width and height of each photo, exam by exam; the photos themselves are not touched."""
    found = []
    for exams in table["images"].chunks:
        photos = exams.flatten()
        sizes = zip(photos.field("width").to_pylist(), photos.field("height").to_pylist(), strict=True)
        found += [list(islice(sizes, count)) for count in exams.value_lengths().to_pylist()]
    return found


class _Clock:
    """Seconds by step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def timing(self, step: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[step] = self.seconds.get(step, 0.0) + time.perf_counter() - started
