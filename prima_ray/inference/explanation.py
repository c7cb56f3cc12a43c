"""What an answer rests on, where it is asked for: where the words look, what each attribute did, what literature says.

Each part stands alone and says in `notes` why it is not there: a model of photos alone reads no words, one that was not
aligned has no heads, and a folder without a corpus has no evidence.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from prima_ray.data.batch import ImageTextBatch
from prima_ray.inference.attention import AttentionMap, attention_maps, clause_tokens, token_attention
from prima_ray.inference.contributions import Contributions, leave_one_out
from prima_ray.inference.evidence import EvidenceItem
from prima_ray.inference.predictor import Predictor

NO_WORDS = "the model reads photos alone: no attribute contributes, and no words look anywhere"
NO_ATTRIBUTES = "no attribute that the model reads is given: there is nothing to attribute"
NO_HEADS = (
    "no attention map: the model has no heads of an alignment (it was trained without one, or saved before they were "
    "kept)"
)
TUNED = (
    "attention maps: the image tower was fine-tuned after it was aligned with the text, so they show less than they "
    "did then"
)
PLACES = (
    "attention maps: a word tends to look at its own place whatever the photo shows (docs/answers.md); a map is no "
    "evidence that the lesion was looked at"
)
NO_CORPUS = "no evidence: the model was made without a corpus"
UNVETTED = "evidence: nobody has vetted the entries that are marked so"


@dataclass(frozen=True)
class Explanation:
    """Of one exam."""

    maps: tuple[AttentionMap, ...]
    contributions: Contributions | None
    evidence: tuple[EvidenceItem, ...]
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """For JSON; pictures are PNGs in base64."""
        found: dict[str, Any] = {
            "attention": [
                {
                    "photo": item.photo,
                    "attribute": item.attribute,
                    "grid": np.round(item.grid, 6).tolist(),
                    "spread": item.spread,
                    "png": None if item.png is None else base64.b64encode(item.png).decode(),
                }
                for item in self.maps
            ],
            "contributions": None,
            "evidence": [item.model_dump(mode="json") for item in self.evidence],
            "notes": list(self.notes),
        }
        if self.contributions is not None:
            found["contributions"] = {
                "attributes": [
                    {
                        "attribute": item.attribute,
                        "value": item.value,
                        "log_odds": item.log_odds,
                        "probability": item.probability,
                    }
                    for item in self.contributions.items
                ],
                "without_attributes": dict(self.contributions.without_attributes),
            }
        return found


@dataclass(frozen=True)
class Answered:
    """What is known of an exam when it is to be explained."""

    row: int
    """In the encoded batch."""
    attributes: Mapping[str, str]
    """Canonical values that the model reads."""
    views: NDArray[np.floating]
    """(V, S, S, 3) in 0-1: what the model read of the photos."""
    logits: NDArray[np.float64]
    """(C,)"""
    diagnoses: Sequence[str]
    """On which evidence is wanted, the most important first."""


def explain(predictor: Predictor, encoded: ImageTextBatch, exams: Sequence[Answered]) -> list[Explanation]:
    """Of some exams of a batch.

    Args:
        encoded: of `Predictor.encode`.
    """
    asked = [exam for exam in exams if exam.attributes] if predictor.uses_attributes else []
    found: dict[int, Contributions] = {}
    if asked:
        rows = torch.tensor([exam.row for exam in asked], device=predictor.device)
        attributes = [exam.attributes for exam in asked]
        logits = np.stack([exam.logits for exam in asked])
        made = leave_one_out(predictor, _photos(encoded, rows), attributes, logits)
        found = {exam.row: item for exam, item in zip(asked, made, strict=True)}
    return [_one(predictor, encoded, exam, found.get(exam.row)) for exam in exams]


def _photos(encoded: ImageTextBatch, rows: torch.Tensor) -> ImageTextBatch:
    """The encoded photos of some rows."""

    def pick(value: torch.Tensor | None) -> torch.Tensor | None:
        return None if value is None else value[rows]

    places = rows.tolist()
    return replace(
        encoded.light(),
        exam_ids=tuple(encoded.exam_ids[place] for place in places),
        weights=encoded.weights[rows],
        labels=encoded.labels[rows],
        image_cls=pick(encoded.image_cls),
        image_seq=pick(encoded.image_seq),
        photo_logits=pick(encoded.photo_logits),
        image_mask=pick(encoded.image_mask),
        attention_mask=None,
        token_mask=None,
    )


def _one(
    predictor: Predictor, encoded: ImageTextBatch, exam: Answered, contributions: Contributions | None
) -> Explanation:
    notes: list[str] = []
    if not predictor.uses_attributes:
        notes.append(NO_WORDS)
    elif not exam.attributes:
        notes.append(NO_ATTRIBUTES)
    maps = tuple(_maps(predictor, encoded, exam, notes)) if contributions is not None else ()
    evidence: tuple[EvidenceItem, ...] = ()
    if predictor.bundle.evidence is None:
        notes.append(NO_CORPUS)
    else:
        evidence = predictor.bundle.evidence.about(exam.attributes, exam.diagnoses)
        if not all(item.vetted for item in evidence):
            notes.append(UNVETTED)
    return Explanation(maps=maps, contributions=contributions, evidence=evidence, notes=tuple(notes))


def _maps(predictor: Predictor, encoded: ImageTextBatch, exam: Answered, notes: list[str]) -> Iterator[AttentionMap]:
    config, heads, grid = predictor.config, predictor.heads, predictor.grid
    if heads is None or config.text is None or predictor.tokenizer is None:
        notes.append(NO_HEADS)
        return
    notes.append(PLACES)
    if config.tuned_after_alignment:
        notes.append(TUNED)
    if encoded.image_seq is None or encoded.text_seq is None:
        raise ValueError("the batch is not encoded")
    text = predictor.text(exam.attributes) or ""
    tokens = clause_tokens(exam.attributes, config.data_set, config.text, text, predictor.tokenizer)
    with torch.inference_mode():
        words = encoded.text_seq[exam.row]
        patches = encoded.image_seq[exam.row, : len(exam.views)]
        if config.features == "backbone":
            words, patches = heads.text(words), heads.image(patches)
        attention = token_attention(words, patches)
    yield from attention_maps(attention, tokens, grid, exam.views)
