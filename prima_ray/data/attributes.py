"""Cells of a table and answers of a form -> canonical attribute values. One home for ingest, predict and serving.

Canonical: `true`/`false`; numbers with the attribute's decimals; categories as the description spells them.
To add a kind of attribute, give it a branch in `normalise_value`.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Mapping

from prima_ray.base import PrimaError
from prima_ray.data.description import (
    AttributeConfig,
    BooleanAttribute,
    CategoricalAttribute,
    DataSetConfig,
    NumericAttribute,
    OrdinalAttribute,
)


class AttributeRejected(Exception):  # noqa: N818 - an outcome with a reason, not a fault
    """A value that its attribute cannot have: a short fixed reason and what was seen."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


def is_missing(raw: object, missing: Collection[str]) -> bool:
    """True for None, NaN, and the spellings in ``missing`` (case and outer spaces are ignored)."""
    if raw is None or (isinstance(raw, float) and math.isnan(raw)):
        return True
    return str(raw).strip().lower() in {item.lower() for item in missing}


def normalise_value(attribute: AttributeConfig, raw: object, *, missing: Collection[str]) -> str | None:
    """The canonical value, or None where it is missing.

    Args:
        missing: the data set's spellings of "not recorded"; the attribute's own are added.

    Raises:
        AttributeRejected: `attribute_type`, `attribute_range` or `attribute_value`.
    """
    if is_missing(raw, (*missing, *attribute.missing)):
        return None
    text = str(raw).strip()
    text = _synonym(text, attribute.synonyms)
    match attribute:
        case BooleanAttribute():
            return _boolean(attribute, text)
        case NumericAttribute():
            return _number(attribute, text)
        case CategoricalAttribute() | OrdinalAttribute():
            return _category(attribute, text)
        case _:
            return text[: attribute.max_chars]


def _synonym(text: str, synonyms: Mapping[str, str]) -> str:
    folded = {key.lower(): value for key, value in synonyms.items()}
    return folded.get(text.lower(), text)


def _boolean(attribute: BooleanAttribute, text: str) -> str:
    if text.lower() in {item.lower() for item in attribute.true_values}:
        return "true"
    if text.lower() in {item.lower() for item in attribute.false_values}:
        return "false"
    raise AttributeRejected("attribute_type", f"{attribute.name}: {text!r} is neither true nor false")


def _number(attribute: NumericAttribute, text: str) -> str:
    try:
        value = float(text)
    except ValueError:
        raise AttributeRejected("attribute_type", f"{attribute.name}: {text!r} is not a number") from None
    if not attribute.minimum <= value <= attribute.maximum:
        raise AttributeRejected(
            "attribute_range",
            f"{attribute.name}: {value:g} is outside {attribute.minimum:g} to {attribute.maximum:g}",
        )
    return f"{value:.{attribute.decimals}f}"


def _category(attribute: CategoricalAttribute | OrdinalAttribute, text: str) -> str:
    if not attribute.values:
        return text
    folded = {key.lower(): key for key in attribute.values}
    found = folded.get(text.lower())
    if found is None and text.endswith(".0"):
        # A table with gaps reads whole numbers as 3.0.
        found = folded.get(text[:-2].lower())
    if found is None:
        raise AttributeRejected(
            "attribute_value", f"{attribute.name}: {text!r} is none of {', '.join(attribute.values)}"
        )
    return found


def normalise_attributes(data_set: DataSetConfig, raw: Mapping[str, object]) -> dict[str, str]:
    """Canonical values by attribute name; missing ones are left out.

    Raises:
        PrimaError: an unknown attribute, or a value that it cannot have.
    """
    by_name = {item.name: item for item in data_set.attributes}
    found: dict[str, str] = {}
    for name, value in raw.items():
        if name not in by_name:
            near = difflib.get_close_matches(name, list(by_name), n=1, cutoff=0.5)
            hint = f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(by_name)}."
            raise PrimaError(f"unknown attribute {name!r}", mend=hint)
        try:
            canonical = normalise_value(by_name[name], value, missing=data_set.missing)
        except AttributeRejected as error:
            raise PrimaError(error.detail) from None
        if canonical is not None:
            found[name] = canonical
    return found
