"""What a run that diagnoses carries beside its weights, so that its answers can be believed: made when training is
over.

The photos of some training exams and of the held-out ones pass the image tower once more, without augmentation: what is
usual of photos is learned from the former, limits from the validation fold, and the test fold tells what came of them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prima_ray.base import PrimaError, hash_key
from prima_ray.data.fetched import local_copy
from prima_ray.data.plan import ExamIndex
from prima_ray.data.reader import RowReader, Rows
from prima_ray.data.run_record import read_record
from prima_ray.inference.appearance import measure
from prima_ray.inference.bundle import Bundle
from prima_ray.inference.evidence import Evidence, gather_evidence
from prima_ray.inference.familiarity import Familiarity, FamiliarityConfig, fit_familiarity
from prima_ray.inference.predictor import Predictor
from prima_ray.inference.readiness import make_known_exam
from prima_ray.inference.reference import (
    Reference,
    attribute_variables,
    of_numbers,
    of_texts,
    photo_variables,
)
from prima_ray.knowledge.corpus import read_corpus
from prima_ray.knowledge.vetting import read_log, resolve
from prima_ray.stages.rundir import is_unvetted
from prima_ray.stages.training import HeldOut, Trained

_log = logging.getLogger(__name__)
_COLUMNS = ("exam_id", "images", "label")
_BATCH = 32


@dataclass(frozen=True)
class Seen:
    """The photos of one exam, as the model reads them."""

    features: NDArray[np.float64]
    """(V, C)"""
    looks: NDArray[np.float64]
    """(V, A)"""
    sizes: tuple[tuple[int, int], ...]
    """Width and height in pixels."""


def complete(
    bundle: Bundle, trained: Trained, held_out: HeldOut, config: FamiliarityConfig, *, device: str
) -> tuple[Bundle, dict[str, Any]]:
    """Add to a run's model what is usual, and its known exam.

    Args:
        held_out: what was predicted of the validation and test folds.
        device: where the towers run.

    Returns:
        the bundle, and figures for metrics.json: of the validation and test folds the share of exams with strange
        photos, and with unusable ones.
    """
    plan, run = trained.plan, trained.plan.run.path
    predictor = Predictor.of(bundle, device=device, run=run, folder=run / "model")
    roles = {
        name: drawn_rows(plan.index, rows, config.max_exams, "familiarity")
        for name, rows in (("train", plan.roles.train), ("val", plan.roles.val), ("test", plan.roles.test))
    }
    seen = {name: list(look_at(predictor, plan.index, rows)) for name, rows in roles.items()}
    train, val = seen["train"], seen["val"]
    width = train[0].features.shape[1] if train else 0
    familiarity = fit_familiarity(
        (
            np.concatenate([item.features for item in train]),
            np.concatenate([item.looks for item in train]),
            np.array([min(size) for item in train for size in item.sizes], dtype=np.int64),
        ),
        (
            np.concatenate([np.zeros((0, width)), *(item.features for item in val)]),
            np.concatenate([np.zeros((0, train[0].looks.shape[1])), *(item.looks for item in val)]),
            np.repeat(np.arange(len(val)), [len(item.looks) for item in val]),
        ),
        config,
        view_side=predictor.config.views.image_size,
    )
    for note in familiarity.record.notes:
        _log.warning("warning: %s", note)
    bundle = replace(
        bundle,
        familiarity=familiarity,
        reference=_reference(trained, held_out, familiarity, val),
        known_exam=make_known_exam(predictor),
    )
    figures = {name: _figures(familiarity, seen[name]) for name in ("val", "test") if seen[name]}
    return bundle, {"limits": familiarity.record.limits, **figures}


def drawn_rows(index: ExamIndex, rows: Rows, most: int, *key: object) -> Rows:
    """At most so many of the rows, drawn by ``key`` and their exam ids, in order."""
    if len(rows) <= most:
        return rows
    keys = np.array([hash_key(*key, exam) for exam in index.exam_ids[rows]], dtype=np.uint64)
    return np.sort(rows[np.argsort(keys, kind="stable")[:most]])


def look_at(predictor: Predictor, index: ExamIndex, rows: Rows) -> Iterator[Seen]:
    """The photos of some exams, an exam at a time."""
    reader = RowReader(index.shards, index.manifest, columns=_COLUMNS)
    for start in range(0, len(rows), _BATCH):
        table = reader.read(rows[start : start + _BATCH], 0)
        batch = predictor.collate(table, part="photos")
        encoded = predictor.encode_images(batch)
        if encoded.image_cls is None:
            raise TypeError("the model makes no features of photos")
        for row, photos in enumerate(table["images"].to_pylist()):
            views = predictor.views_of(batch, row)
            yield Seen(
                features=encoded.image_cls[row, : len(views)].double().cpu().numpy(),
                looks=measure(views),
                sizes=tuple((photo["width"], photo["height"]) for photo in photos[: len(views)]),
            )


def _reference(trained: Trained, held_out: HeldOut, familiarity: Familiarity, val: list[Seen]) -> Reference:
    index, roles = trained.plan.index, trained.plan.roles
    return make_reference(
        index,
        roles.val,
        held_out.probabilities[np.isin(held_out.rows, roles.val)],
        novelty=[max(familiarity.novelty(item.features, item.looks).values(), default=None) for item in val],
        seen=val,
        learned=roles.train,
    )


def make_reference(
    index: ExamIndex,
    rows: Rows,
    probabilities: NDArray[np.float64],
    *,
    novelty: Sequence[float | None],
    seen: Sequence[Seen],
    learned: Rows,
) -> Reference:
    """What is usual of answers and photos, from exams that the model did not learn from, and of attributes.

    Args:
        rows: those exams.
        probabilities: (N, C) of them.
        novelty: of those whose photos were looked at.
        learned: the exams that the model learned from.
    """
    data_set = index.manifest.data_set
    names = data_set.class_names
    variables = attribute_variables(index.attribute_rows(learned), data_set)
    if len(probabilities):
        variables["prediction"] = of_texts(names[place] for place in probabilities.argmax(axis=1))
        variables["confidence"] = of_numbers(probabilities.max(axis=1).tolist())
        variables["novelty"] = of_numbers(novelty)
        variables |= photo_variables([item.looks for item in seen])
    return Reference(num_train=len(learned), num_val=len(rows), variables=variables)


def _figures(familiarity: Familiarity, seen: list[Seen]) -> dict[str, float]:
    bounds = familiarity.record.bounds
    strange = [max(familiarity.novelty(item.features, item.looks).values(), default=0.0) > 1 for item in seen]
    unusable = [
        bounds is not None
        and any(
            True
            for look, (width, height) in zip(item.looks, item.sizes, strict=True)
            for _ in bounds.complaints(look, width=width, height=height)
        )
        for item in seen
    ]
    return {"strange": float(np.mean(strange)), "unusable": float(np.mean(unusable))}


def read_evidence(corpus: str | None, bundle: Bundle, *, parents: list[str]) -> Evidence | None:
    """What the model may show of a corpus; None without one.

    Entries that nobody has vetted are let in where a parent run is marked as unvetted, and say so.

    Raises:
        PrimaError: the corpus or its log is damaged.
    """
    if corpus is None:
        return None
    local = local_copy(corpus)
    read = read_corpus(local)
    unvetted = any(map(is_unvetted, parents))
    found = gather_evidence(read, resolve(read, read_log(local)), bundle.config.data_set, unvetted=unvetted)
    if not found.items:
        _log.warning("warning: no usable entry of %s speaks of an attribute: is it vetted?", corpus)
    return found


def corpus_of(align: str | None, named: str | None) -> str | None:
    """The corpus whose entries a model shows: the one that is named, else the one that its run of align read, if it is
    still there.

    Raises:
        PrimaError: the one that is named is damaged, or not there.
    """
    if named is not None:
        read_corpus(local_copy(named))
        return named
    parent = read_record(align)["inputs"].get("corpus") if align is not None else None
    if parent is None:
        return None
    try:
        read_corpus(local_copy(parent["path"]))
    except PrimaError as error:
        _log.warning("warning: answers will show no evidence: the corpus that %s read: %s", align, error)
        return None
    return str(parent["path"])
