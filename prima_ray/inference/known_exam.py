"""An exam of nobody whose answer is known: whether a model still answers as it did when it was trained.

The picture is smooth random colour and the attributes are made from the data set's description, so the model folder
carries it without carrying a patient. It says that weights, tokenizer, pixels and libraries still give what they gave;
it says nothing of how good the model is.
"""

from __future__ import annotations

import base64
import io
import math
from typing import Self

import numpy as np
from PIL import Image
from pydantic import Field

from prima_ray.base import StrictConfig, hash_key
from prima_ray.data.description import (
    BooleanAttribute,
    CategoricalAttribute,
    DataSetConfig,
    NumericAttribute,
    OrdinalAttribute,
)


class KnownExam(StrictConfig):
    """`model/known_exam.json`."""

    picture: str
    """A PNG, in base64."""
    attributes: dict[str, str]
    features: dict[str, tuple[float, ...]] = Field(default_factory=dict)
    """Global features of its `image` and its `text`: a fusion model may hardly heed a tower, whose weights matter all
    the same."""
    log_probabilities: dict[str, float] = Field(default_factory=dict)
    """By class, as the model gave them before any calibration."""

    @classmethod
    def of(cls, data_set: DataSetConfig, *, side: int) -> Self:
        """The exam of a data set, not yet asked."""
        picture = base64.b64encode(_picture(data_set, side)).decode()
        return cls(picture=picture, attributes=_attributes(data_set))

    @property
    def photo(self) -> bytes:
        """The PNG."""
        return base64.b64decode(self.picture)


def _picture(data_set: DataSetConfig, side: int) -> bytes:
    rng = np.random.default_rng(hash_key("known exam", data_set.name))
    coarse = Image.fromarray(rng.integers(40, 216, (6, 6, 3), dtype=np.uint8))
    stream = io.BytesIO()
    coarse.resize((side, side), Image.Resampling.BICUBIC).save(stream, "PNG")
    return stream.getvalue()


def _attributes(data_set: DataSetConfig) -> dict[str, str]:
    """A value for every attribute whose values the description knows."""
    found = {}
    for attribute in data_set.attributes:
        draw = hash_key("known exam", data_set.name, attribute.name)
        match attribute:
            case BooleanAttribute():
                found[attribute.name] = ("true", "false")[draw % 2]
            case CategoricalAttribute() | OrdinalAttribute() if attribute.values:
                found[attribute.name] = list(attribute.values)[draw % len(attribute.values)]
            case NumericAttribute() if math.isfinite(attribute.minimum) and math.isfinite(attribute.maximum):
                found[attribute.name] = f"{0.5 * (attribute.minimum + attribute.maximum):.{attribute.decimals or 0}f}"
            case _:
                pass
    return found
