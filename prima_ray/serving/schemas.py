"""What goes over the wire: the request, the answer, the attributes as JSON Schema. Names are fixed; fields are added.

An attribute of another kind needs a branch in `_attribute_schema`, and a field on the page.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from prima_ray.base import StrictConfig
from prima_ray.data.description import (
    AttributeConfig,
    BooleanAttribute,
    CategoricalAttribute,
    DataSetConfig,
    NumericAttribute,
    OrdinalAttribute,
    TextAttribute,
)

MAX_IMAGES = 8
Scalar = str | bool | int | float | None


class DiagnosisRequest(StrictConfig):
    """The JSON body of `POST /v1/diagnoses`."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", json_schema_extra={"examples": [{"images": ["<base64>"], "attributes": {}}]}
    )

    images: tuple[str, ...] = Field(min_length=1, max_length=MAX_IMAGES)
    """JPEG or PNG files in base64."""
    attributes: dict[str, Scalar] = Field(default_factory=dict)
    """By name, see `GET /v1/schema`; null, or left out: not known."""
    explain: bool = False
    """Also an overlay, the attributes' contributions and evidence: slower."""


class ModelCard(BaseModel):
    """Which model answers."""

    model_config = ConfigDict(frozen=True, protected_namespaces=())

    name: str
    """The data set's name and the stage that trained it: `phantoms-fuse`."""
    version: str
    """16 hex digits of the hash of its files."""
    data_version: str | None
    """The same of the manifest of the shards that it was trained on; null where the run does not tell."""
    unvetted: bool = False
    """It was trained with corpus entries that nobody has vetted."""


class Reason(BaseModel):
    """Why there is no answer to rely on."""

    cause: str
    """`uncertain`, `out_of_distribution` or `image_unusable`."""
    text: str
    """For people."""


class Attention(BaseModel):
    """Where the words of an attribute look on a photo."""

    photo: int
    """From 1, in the order sent."""
    attribute: str | None
    """None: the words of all attributes together."""
    grid: list[list[float]]
    """Shares of the attention by patch, rows from the top; they add up to one."""
    spread: float
    png: str | None
    """The photo with them laid over it, in base64; null where there is none for one attribute alone."""


class Contribution(BaseModel):
    """What an attribute did."""

    attribute: str
    value: str
    log_odds: float
    """Of the prediction, with the attribute less without it."""
    probability: float
    """The same of its probability."""


class Contributions(BaseModel):
    """What the attributes did, each left out in turn."""

    attributes: list[Contribution]
    without_attributes: dict[str, float]
    """Probabilities with none of them."""


class Source(BaseModel):
    """A quote and where it stands."""

    quote: str
    title: str
    url: str | None
    source: str
    licence: str | None


class Evidence(BaseModel):
    """What the risk corpus says of an attribute and a diagnosis."""

    attribute: str
    values: list[str]
    factor: str
    diagnosis: str
    direction: str
    strength: str | None
    summary: str
    vetted: bool
    """A person has accepted or edited it."""
    sources: list[Source]


class Explanation(BaseModel):
    """Asked for by `explain`."""

    attention: list[Attention]
    contributions: Contributions | None
    evidence: list[Evidence]
    notes: list[str]
    """What cannot be explained of this model, and why."""


class Diagnosis(BaseModel):
    """The answer. A prediction that was abstained from is still told, so that a person may judge it."""

    model_config = ConfigDict(protected_namespaces=())

    request_id: str
    model: ModelCard
    prediction: str
    """The most probable class."""
    probabilities: dict[str, float]
    """By class, calibrated where the run holds a calibration; they add up to one."""
    prediction_set: list[str]
    """The classes among which the right one is with probability `coverage`; all, where the run holds no calibration."""
    coverage: float
    confidence: float
    """The largest probability."""
    novelty: float | None
    """How strange the photos are: above 1 is out of distribution; null where the model cannot say."""
    abstained: bool
    reasons: list[Reason]
    """Why it abstains; empty where it does not."""
    attributes_used: dict[str, str]
    """Canonical values that the model read."""
    attributes_ignored: list[str]
    """Given, but nothing that the model reads."""
    attributes_missing: list[str]
    """Not given, though the model reads them."""
    text: str | None
    """What the model read of the attributes; null for a model of photos alone."""
    warnings: list[str]
    explanation: Explanation | None = None


class Problem(BaseModel):
    """An error, as RFC 9457 has it (`application/problem+json`)."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    request_id: str | None = None


def attributes_schema(data_set: DataSetConfig, read: Collection[str]) -> dict[str, Any]:
    """The attributes as a JSON Schema, in the order of the description; of all of them, read by the model or not.

    `x-read` says whether this model reads the attribute; `x-classes` names the diagnoses.
    """
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": data_set.title or data_set.name,
        "description": f"What may be known about {data_set.subject}. All of it may be left out.",
        "type": "object",
        "additionalProperties": False,
        "properties": {item.name: _attribute_schema(item, item.name in read) for item in data_set.attributes},
        "x-classes": {item.name: item.phrase for item in data_set.classes},
        "x-max-images": MAX_IMAGES,
    }


def _attribute_schema(item: AttributeConfig, is_read: bool) -> dict[str, Any]:
    found: dict[str, Any] = {"title": item.question or item.name.replace("_", " ").capitalize()}
    match item:
        case BooleanAttribute():
            found["type"] = ["boolean", "null"]
        case NumericAttribute():
            found["type"] = ["number", "null"]
            limits = {"minimum": item.minimum, "maximum": item.maximum}
            # JSON has no infinity.
            found.update({key: value for key, value in limits.items() if math.isfinite(value)})
            if item.unit:
                found["x-unit"] = item.unit
        case CategoricalAttribute() | OrdinalAttribute():
            found["type"] = ["string", "null"]
            if item.values:
                found["enum"] = [*item.values, None]
                found["x-words"] = dict(item.values)
        case TextAttribute():
            found.update({"type": ["string", "null"], "maxLength": item.max_chars})
    found["x-kind"] = item.kind
    found["x-read"] = is_read
    return found
