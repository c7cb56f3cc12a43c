"""Attributes of an exam -> one text sequence; what is missing, masked or dropped.

Everything here follows the data set's description alone, so a new data set needs no code. To add a kind of attribute,
give it words in `_clause`, and a block in `data.attribute_vectors`. Nothing derived from labels enters the text.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Mapping
from typing import Literal

from pydantic import Field

from prima_ray.base import PrimaError, StrictConfig, hash_key
from prima_ray.data.description import (
    AttributeConfig,
    BooleanAttribute,
    CategoricalAttribute,
    DataSetConfig,
    NumericAttribute,
    OrdinalAttribute,
)

_TWO_64 = float(2**64)


class MetadataTextConfig(StrictConfig):
    """How attributes become one text sequence: ``<prefix><clause>; <clause>; ... .``"""

    attributes: tuple[str, ...] | None = None
    """The attributes that are said, in this order. None: the description's relevant ones, in its order."""
    missing: Literal["omit", "state"] = "omit"
    """A missing attribute is left out, or said to be missing ("<name> not recorded")."""
    masked: tuple[str, ...] = ()
    """Attributes, or blocks by name, that are missing for everybody: against a leak by missingness."""
    prefix: str = "{subject}: "
    """Opens the text; ``{subject}`` stands for the description's subject."""
    separator: str = "; "
    attribute_dropout: float = Field(default=0.0, ge=0.0, le=1.0)
    """Probability that one attribute of a training exam is treated as missing."""
    block_dropout: float = Field(default=0.0, ge=0.0, le=1.0)
    """Probability that all attributes of a block of a training exam are treated as missing together."""


def expand_names(names: Collection[str], data_set: DataSetConfig, *, what: str) -> tuple[str, ...]:
    """Attribute names, blocks replaced by their attributes, in the order given and without repetition.

    Args:
        what: the key that holds the names, for the error.

    Raises:
        PrimaError: a name is neither an attribute nor a block of the data set.
    """
    blocks = {block.name: block.attributes for block in data_set.blocks}
    known = set(data_set.attribute_names)
    found: dict[str, None] = {}
    for name in names:
        if name not in known and name not in blocks:
            candidates = sorted({*known, *blocks})
            near = difflib.get_close_matches(name, candidates, n=1, cutoff=0.5)
            hint = f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(candidates)}."
            raise PrimaError(f"{what}: {data_set.name} has no attribute {name!r}", mend=hint)
        found.update(dict.fromkeys((name,) if name in known else blocks[name]))
    return tuple(found)


def text_attributes(data_set: DataSetConfig, config: MetadataTextConfig) -> tuple[AttributeConfig, ...]:
    """The attributes that the text speaks of, masked ones included.

    Raises:
        PrimaError: `config` names an attribute or block that the data set does not have.
    """
    expand_names(config.masked, data_set, what="masked")
    if config.attributes is None:
        return tuple(item for item in data_set.attributes if item.relevant)
    by_name = {item.name: item for item in data_set.attributes}
    return tuple(by_name[name] for name in expand_names(config.attributes, data_set, what="attributes"))


def describe(
    attributes: Mapping[str, str],
    data_set: DataSetConfig,
    config: MetadataTextConfig,
    *,
    dropped: Collection[str] = (),
) -> str:
    """One exam's attributes as one text sequence.

    Args:
        attributes: canonical values by attribute name; an absent name is a missing value.
        dropped: attributes to treat as missing in this text (see `draw_dropped`).

    Returns:
        for example ``a skin lesion: on the face; diameter 6 mm; it itches.``

    Raises:
        PrimaError: `config` names an attribute or block that the data set does not have.
    """
    clauses = [clause for _, clause in _clauses(attributes, data_set, config, dropped)]
    prefix = config.prefix.replace("{subject}", data_set.subject)
    text = prefix + config.separator.join(clauses) if clauses else prefix.rstrip(" :,;")
    return f"{text}."


def clause_spans(
    attributes: Mapping[str, str], data_set: DataSetConfig, config: MetadataTextConfig
) -> dict[str, tuple[int, int]]:
    """Where in the text of `describe` each known attribute is spoken of: name -> (start, end) in characters.

    Raises:
        PrimaError: see `describe`.
    """
    found = {}
    start = len(config.prefix.replace("{subject}", data_set.subject))
    for name, clause in _clauses(attributes, data_set, config, ()):
        if name in attributes:
            found[name] = (start, start + len(clause))
        start += len(clause) + len(config.separator)
    return found


def _clauses(
    attributes: Mapping[str, str], data_set: DataSetConfig, config: MetadataTextConfig, dropped: Collection[str]
) -> Iterator[tuple[str, str]]:
    """Attribute and clause, in the order of the text."""
    silent = {*expand_names(config.masked, data_set, what="masked"), *dropped}
    for attribute in text_attributes(data_set, config):
        value = None if attribute.name in silent else attributes.get(attribute.name)
        if value is not None:
            yield attribute.name, _clause(attribute, value)
        elif config.missing == "state":
            yield attribute.name, f"{attribute.name.replace('_', ' ')} not recorded"


def _clause(attribute: AttributeConfig, value: str) -> str:
    phrase = attribute.phrase
    match attribute:
        case BooleanAttribute():
            phrase, words = (attribute.phrase if value == "true" else attribute.phrase_false), value
        case NumericAttribute():
            words = f"{value} {attribute.unit}" if attribute.unit else value
        case CategoricalAttribute() | OrdinalAttribute():
            words = attribute.values.get(value) or value.replace("_", " ").lower()
        case _:
            words = value
    # Not str.format: a value may hold braces of its own.
    return phrase.replace("{value}", words)


def draw_dropped(data_set: DataSetConfig, config: MetadataTextConfig, *key: object) -> frozenset[str]:
    """The attributes that this training exam does without, drawn by ``key`` (seed, epoch, exam) alone."""
    dropped: set[str] = set()
    if config.attribute_dropout:
        dropped.update(
            item.name for item in data_set.attributes if _coin(*key, "drop", item.name) < config.attribute_dropout
        )
    if config.block_dropout:
        for block in data_set.blocks:
            if _coin(*key, "drop block", block.name) < config.block_dropout:
                dropped.update(block.attributes)
    return frozenset(dropped)


def _coin(*key: object) -> float:
    return hash_key(*key) / _TWO_64
