"""Cells of a table and answers of a form -> canonical attribute values. One home for ingest, predict and serving.

Canonical: `true`/`false`; numbers with the attribute's decimals; categories as the description spells them; text with
single spaces.
To add a kind of attribute, give it a branch in `normalise_value`.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping
from functools import lru_cache

from prima_ray.base import PrimaError
from prima_ray.data.description import (
    AttributeConfig,
    BooleanAttribute,
    CategoricalAttribute,
    DataSetConfig,
    NumericAttribute,
    OrdinalAttribute,
)
from prima_ray.data.rejection import RecordRejected

_DECIMALS = 6
_FORMATTED = re.compile(r"[\s_]")
"""What Python reads inside a number and no table means."""


class AttributeRejected(RecordRejected):
    """A value that its attribute cannot have."""


def is_missing(raw: object, missing: tuple[str, ...]) -> bool:
    """True for None, NaN, the empty cell, and the spellings in ``missing`` (case and outer spaces are ignored)."""
    if raw is None or (isinstance(raw, float) and math.isnan(raw)):
        return True
    text = str(raw).strip().lower()
    return not text or text in _folded(missing)


@lru_cache(maxsize=1024)
def _folded(spellings: tuple[str, ...]) -> dict[str, str]:
    """Lower-case spelling -> spelling."""
    return {item.lower(): item for item in spellings}


def normalise_value(attribute: AttributeConfig, raw: object, *, missing: tuple[str, ...]) -> str | None:
    """The canonical value, or None where it is missing. A canonical value stays as it is.

    Args:
        missing: the data set's spellings of "not recorded"; the attribute's own are added. A spelling that is one of
            the attribute's values means that value, unless the attribute itself calls it missing.

    Raises:
        AttributeRejected: `attribute_type`, `attribute_range` or `attribute_value`.
    """
    if is_missing(raw, attribute.missing):
        return None
    text = str(raw).strip()
    text = _folded_map(tuple(attribute.synonyms.items())).get(text.lower(), text) if attribute.synonyms else text
    if is_missing(text, missing) and not _is_value(attribute, text):
        return None
    match attribute:
        case BooleanAttribute():
            return _boolean(attribute, text)
        case NumericAttribute():
            return _number(attribute, text)
        case CategoricalAttribute() | OrdinalAttribute():
            return _category(attribute, text)
        case _:
            return " ".join(text.split())[: attribute.max_chars].rstrip()


@lru_cache(maxsize=1024)
def _folded_map(pairs: tuple[tuple[str, str], ...]) -> dict[str, str]:
    return {key.lower(): value for key, value in pairs}


def _is_value(attribute: AttributeConfig, text: str) -> bool:
    """True where the description lists the text among the attribute's values: `none` may be a degree of severity."""
    match attribute:
        case BooleanAttribute():
            return text.lower() in _folded(attribute.true_values) or text.lower() in _folded(attribute.false_values)
        case CategoricalAttribute() | OrdinalAttribute():
            return text.lower() in _folded(tuple(attribute.values))
        case _:
            return False


def _boolean(attribute: BooleanAttribute, text: str) -> str:
    # `true` and `false` are how the shards spell it, in whatever language the table is.
    if text.lower() == "true" or text.lower() in _folded(attribute.true_values):
        return "true"
    if text.lower() == "false" or text.lower() in _folded(attribute.false_values):
        return "false"
    raise AttributeRejected("attribute_type", f"{attribute.name}: {_short(text)} is neither true nor false")


def _number(attribute: NumericAttribute, text: str) -> str:
    try:
        value = float(text) if not _FORMATTED.search(text) else None
    except ValueError:
        value = None
    if value is None:
        raise AttributeRejected("attribute_type", f"{attribute.name}: {_short(text)} is not a number")
    if not attribute.minimum <= value <= attribute.maximum:
        raise AttributeRejected(
            "attribute_range",
            f"{attribute.name}: {value:g} is outside {attribute.minimum:g} to {attribute.maximum:g}",
        )
    if attribute.decimals is None:
        shown = f"{value:.{_DECIMALS}f}".rstrip("0").rstrip(".")
    else:
        shown = f"{value:.{attribute.decimals}f}"
    return shown.removeprefix("-") if float(shown) == 0 else shown


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}...")


def _category(attribute: CategoricalAttribute | OrdinalAttribute, text: str) -> str:
    if not attribute.values:
        return text
    folded = _folded(tuple(attribute.values))
    found = folded.get(text.lower())
    if found is None and text.endswith(".0"):
        # A table with gaps reads whole numbers as 3.0.
        found = folded.get(text[:-2].lower())
    if found is None:
        raise AttributeRejected(
            "attribute_value", f"{attribute.name}: {_short(text)} is none of {', '.join(attribute.values)}"
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
            near = difflib.get_close_matches(name[:100], list(by_name), n=1, cutoff=0.5)
            hint = f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(by_name)}."
            raise PrimaError(f"unknown attribute {_short(name)}", mend=hint)
        try:
            canonical = normalise_value(by_name[name], value, missing=data_set.missing)
        except AttributeRejected as error:
            raise PrimaError(error.detail) from None
        if canonical is not None:
            found[name] = canonical
    return found
