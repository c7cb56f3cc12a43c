"""Checks on the explanations of a run, and examples of its answers, for the page of `prima evaluate`."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from prima_ray.base import hash_key
from prima_ray.data.attributes import normalise_attributes
from prima_ray.data.plan import ExamIndex
from prima_ray.data.reader import Rows
from prima_ray.evaluation.faithfulness import (
    Deleted,
    ExplanationsConfig,
    by_attribute,
    faithfulness_evidence,
    order_of,
)
from prima_ray.inference.attention import overlay
from prima_ray.inference.attribution import (
    Subject,
    delete_attributes,
    delete_cells,
    occlusion,
    on_cells,
    shapley,
)
from prima_ray.inference.diagnosis import Diagnoser, Diagnosis
from prima_ray.inference.explanation import Answered, Explanation, explain
from prima_ray.inference.predictor import Exam, Predictor
from prima_ray.stages.answers import drawn_rows
from prima_ray.stages.row_sets import shard_tables

Matrix = NDArray[np.float64]
Kind = Literal["right", "wrong", "abstained"]
ATTENTION, OCCLUSION = "attention", "occlusion"
LEFT_OUT, SHAPLEY = "left out one by one", "Shapley values"


@dataclass(frozen=True)
class Example:
    """An exam of the test fold, answered and explained."""

    kind: Kind
    truth: str
    answer: Diagnosis
    pictures: Mapping[str, bytes]
    """What is seen -> PNG: the view that the model read, and maps over it."""


@dataclass(frozen=True)
class _Checked:
    """What came of one exam."""

    photo: Deleted
    attributes: Deleted | None
    """None where fewer than two attributes are known, or none is read."""
    shapley: Mapping[str, float]


def explanation_evidence(
    predictor: Predictor, index: ExamIndex, rows: Rows, config: ExplanationsConfig, *, num_resamples: int
) -> dict[str, Any]:
    """For metrics.json.

    Args:
        rows: the scored exams, of which some are drawn.

    Returns:
        `photos`, `attributes`: see `faithfulness_evidence` (attributes null where the model reads none);
        `by_attribute`: see there; `config`.

    Raises:
        PrimaError: captum or shap is not installed.
    """
    again: dict[str, Any] = {"share": config.share, "num_resamples": num_resamples, "seed": config.seed}
    drawn = drawn_rows(index, rows, config.num_exams, config.seed, "explanations")
    checked = list(_check(predictor, index, drawn, config))
    spoken = [item.attributes for item in checked if item.attributes is not None]
    return {
        "photos": faithfulness_evidence([item.photo for item in checked], **again),
        "attributes": faithfulness_evidence(spoken, **again) if spoken else None,
        "by_attribute": by_attribute([item.shapley for item in checked if item.shapley]),
        "config": config.model_dump(mode="json"),
    }


def examples_of(
    predictor: Predictor, index: ExamIndex, rows: Rows, probabilities: Matrix, config: ExplanationsConfig
) -> list[Example]:
    """The surest right answers, the surest wrong ones, and the least sure ones that it abstains from.

    Args:
        rows: the scored exams.
        probabilities: (N, C) calibrated, of them.
    """
    diagnoser, found = Diagnoser(predictor, version=""), []
    sure = predictor.calibration.answered(probabilities, predictor.calibration.completeness(index.attribute_rows(rows)))
    for kind, places in _examples(sure, index.labels[rows], probabilities, config.examples).items():
        for place in places:
            exam = _exam(index, int(rows[place]), most=predictor.config.views.max_photos)
            subject = _subject(predictor, exam)
            answer = diagnoser.diagnose_one(exam, explain=True)
            found.append(
                Example(
                    kind=kind,
                    truth=predictor.data_set.class_names[index.labels[rows[place]]],
                    answer=answer,
                    pictures=_pictures(subject, answer, config),
                )
            )
    return found


def _examples(
    sure: NDArray[np.bool_], labels: NDArray[np.int64], probabilities: Matrix, count: int
) -> dict[Kind, NDArray[np.int64]]:
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    order = np.argsort(-confidence, kind="stable")
    return {
        "right": order[(right & sure)[order]][:count],
        "wrong": order[(~right & sure)[order]][:count],
        "abstained": order[(~sure)[order]][::-1][:count],
    }


def _exam(index: ExamIndex, row: int, *, most: int) -> Exam:
    """An exam of the shards, with as many photos as the model reads."""
    (table,) = shard_tables(index, np.array([row]))
    (found,) = table.to_pylist()
    return Exam(
        images=tuple(photo["bytes"] for photo in found["images"][:most]),
        attributes=dict(found["attributes"] or ()),
        exam_id=found["exam_id"],
    )


@dataclass(frozen=True)
class _Whole:
    """A subject with what the product itself says of it."""

    subject: Subject
    exam_id: str

    @cached_property
    def attention(self) -> Matrix | None:
        """Of the first photo, all attributes together; None where the model has no map."""
        maps = [item for item in self.explanation.maps if item.photo == 1 and item.attribute is None]
        return maps[0].grid if maps else None

    @cached_property
    def left_out(self) -> Mapping[str, float]:
        found = self.explanation.contributions
        return {item.attribute: item.log_odds for item in found.items} if found else {}

    @cached_property
    def explanation(self) -> Explanation:
        subject = self.subject
        views = subject.predictor.views_of(subject.batch, 0)
        logits = subject.predictor.logits(subject.encoded)[0]
        asked = Answered(row=0, attributes=subject.attributes, views=views, logits=logits, diagnoses=())
        (found,) = explain(subject.predictor, subject.encoded, [asked])
        return found


def _subject(predictor: Predictor, exam: Exam) -> Subject:
    batch = predictor.collate(predictor.exam_table(exam))
    encoded = predictor.encode(batch)
    known = normalise_attributes(predictor.data_set, exam.attributes)
    return Subject(
        predictor=predictor,
        batch=batch,
        encoded=encoded,
        attributes={name: known[name] for name in predictor.read_attributes if name in known},
        target=int(predictor.logits(encoded)[0].argmax()),
    )


def _check(predictor: Predictor, index: ExamIndex, rows: Rows, config: ExplanationsConfig) -> Iterator[_Checked]:
    for row in rows:
        exam = _exam(index, int(row), most=predictor.config.views.max_photos)
        whole = _Whole(_subject(predictor, exam), exam.exam_id)
        patient = str(index.patient_ids[row])
        given = whole.subject.attributes
        values = _shapley(whole, config) if given else {}
        yield _Checked(
            photo=_photo(whole, patient, config),
            attributes=_attributes(whole, values, patient, config) if len(given) > 1 else None,
            shapley=values,
        )


def _photo(whole: _Whole, patient: str, config: ExplanationsConfig) -> Deleted:
    scores = {OCCLUSION: occlusion(whole.subject, 0, cells=config.cells)}
    if whole.attention is not None:
        scores = {ATTENTION: on_cells(whole.attention, config.cells), **scores}
    orders = [order_of(found) for found in scores.values()]
    chance = _random_orders(whole.exam_id, "photo", config.cells**2, config)
    curves = delete_cells(whole.subject, 0, [*orders, *chance], cells=config.cells)
    return _deleted(patient, scores, curves)


def _attributes(whole: _Whole, values: Mapping[str, float], patient: str, config: ExplanationsConfig) -> Deleted:
    names = list(whole.subject.attributes)
    scores = {
        LEFT_OUT: np.array([whole.left_out[name] for name in names]),
        SHAPLEY: np.array([values[name] for name in names]),
    }
    orders = [order_of(found) for found in scores.values()]
    chance = _random_orders(whole.exam_id, "attributes", len(names), config)
    return _deleted(patient, scores, delete_attributes(whole.subject, [*orders, *chance]))


def _deleted(patient: str, scores: Mapping[str, Matrix], curves: Matrix) -> Deleted:
    mine = dict(zip(scores, curves[: len(scores)], strict=True))
    return Deleted(patient=patient, curves=mine, random=curves[len(scores) :], scores=scores)


def _shapley(whole: _Whole, config: ExplanationsConfig) -> dict[str, float]:
    seed = hash_key(config.seed, "shapley", whole.exam_id) % 2**32
    found = shapley(whole.subject, permutations=config.permutations, seed=seed)
    return dict(zip(whole.subject.attributes, found.tolist(), strict=True))


def _random_orders(exam: str, what: str, count: int, config: ExplanationsConfig) -> list[NDArray[np.int64]]:
    rng = np.random.default_rng(hash_key(config.seed, "orders", what, exam))
    return [rng.permutation(count) for _ in range(config.random_orders)]


def _pictures(subject: Subject, answer: Diagnosis, config: ExplanationsConfig) -> dict[str, bytes]:
    """Of the first photo."""
    from PIL import Image

    view = subject.predictor.views_of(subject.batch, 0)[0]
    stream = io.BytesIO()
    Image.fromarray((np.clip(view, 0, 1) * 255).astype(np.uint8)).save(stream, "PNG")
    found = {"photo": stream.getvalue()}
    if answer.explanation is not None:
        together = [item.png for item in answer.explanation.maps if item.photo == 1 and item.png]
        found |= {ATTENTION: together[0]} if together else {}
    fall = np.clip(occlusion(subject, 0, cells=config.cells), 0, None).reshape(config.cells, config.cells)
    found[OCCLUSION] = overlay(view, fall / fall.sum() if fall.any() else fall)
    return found
