"""What a data set says about itself: classes, attributes, leaks, blocks. Written once in YAML, carried by every run.

The description is all that turns a row of a table into text and vectors, so the shards keep a copy in their manifest
and every trained model keeps one beside its weights.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from prima_ray.base import StrictConfig


class ClassConfig(StrictConfig):
    """One diagnosis of the closed set."""

    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9_.+-]+$")
    """The name in tables and column names (`prob_<name>`)."""
    phrase: str
    """The diagnosis in words, for prompts and reports."""
    synonyms: tuple[str, ...] = ()
    """Other spellings in the table."""
    malignant: bool | None = None


class _Attribute(StrictConfig):
    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9_]+$")
    column: str | None = None
    """The table's column; the attribute's name where absent."""
    phrase: str
    """A clause for the text; ``{value}`` stands for the value (in words, with its unit)."""
    question: str | None = None
    """The label of the form field; derived from the name where absent."""
    missing: tuple[str, ...] = ()
    """Spellings that mean "not recorded", besides the empty cell and the data set's own `missing`."""
    synonyms: dict[str, str] = Field(default_factory=dict)
    """Spellings that mean the same: ``{BRASIL: BRAZIL}``."""
    relevant: bool = True
    """Visually relevant: enters the text."""
    disease_related: bool = False
    """Weighted by 3 in the soft targets."""

    @property
    def table_column(self) -> str:
        return self.column or self.name

    @model_validator(mode="after")
    def _spellings(self) -> Self:
        for spelling, value in self.synonyms.items():
            folded = {key.lower() for key in self.synonyms}
            if value.lower() in folded and value.lower() != spelling.lower():
                raise ValueError(f"synonym {spelling!r} leads to {value!r}, which is a synonym itself")
        return self


class CategoricalAttribute(_Attribute):
    """One of a few unordered values."""

    kind: Literal["categorical"]
    values: dict[str, str] = Field(default_factory=dict)
    """Allowed value -> its words in the text. Empty: every value is allowed and read as lower-case words."""

    @model_validator(mode="after")
    def _closed(self) -> Self:
        _check_values(self.values, self.synonyms)
        return self


class OrdinalAttribute(_Attribute):
    """One of a few ordered values."""

    kind: Literal["ordinal"]
    values: dict[str, str] = Field(min_length=2)
    """Allowed value, from least to most -> its words in the text."""

    @model_validator(mode="after")
    def _closed(self) -> Self:
        _check_values(self.values, self.synonyms)
        return self


class BooleanAttribute(_Attribute):
    """Yes or no. ``phrase`` is said when true, ``phrase_false`` when false."""

    kind: Literal["boolean"]
    phrase_false: str
    true_values: tuple[str, ...] = ("true", "yes", "1", "1.0")
    false_values: tuple[str, ...] = ("false", "no", "0", "0.0")


class NumericAttribute(_Attribute):
    """A number with a unit and a range outside which a record is quarantined."""

    kind: Literal["numeric"]
    unit: str | None = None
    minimum: float
    maximum: float
    decimals: int | None = Field(default=None, ge=0, le=6)
    """Numbers are rounded to so many; `null` keeps what the table has, up to six."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.minimum < self.maximum:
            raise ValueError(f"minimum {self.minimum:g} is not below maximum {self.maximum:g}")
        for key, limit in (("minimum", self.minimum), ("maximum", self.maximum)):
            # A value that is rounded out of its range would be refused the next time it is read.
            if self.decimals is not None and math.isfinite(limit) and round(limit, self.decimals) != limit:
                raise ValueError(f"{key} {limit:g} has more than the {self.decimals} decimals that are kept")
        return self


class TextAttribute(_Attribute):
    """Free text, searched for the diagnosis at ingest."""

    kind: Literal["text"]
    max_chars: int = Field(default=500, ge=1)


AttributeConfig = Annotated[
    CategoricalAttribute | OrdinalAttribute | BooleanAttribute | NumericAttribute | TextAttribute,
    Field(discriminator="kind"),
]


def _check_values(values: dict[str, str], synonyms: dict[str, str]) -> None:
    folded = [value.lower() for value in values]
    _unique("value (case is ignored)", folded)
    for spelling, value in synonyms.items():
        if values and value.lower() not in folded:
            raise ValueError(f"synonym {spelling!r} leads to {value!r}, which is none of {', '.join(values)}")


class BlockConfig(StrictConfig):
    """Attributes that are recorded or missing together, so that their absence may tell the label."""

    name: str
    attributes: tuple[str, ...] = Field(min_length=1)


class DataSetConfig(StrictConfig):
    """A data set's description. Values of attributes are strings everywhere; absent means missing."""

    name: str
    title: str = ""
    license: str = ""
    citation: str = ""
    subject: str = "lesion"
    """What a picture shows, in the prompt: "a skin lesion"."""
    classes: tuple[ClassConfig, ...] = Field(min_length=2)
    attributes: tuple[AttributeConfig, ...] = ()
    missing: tuple[str, ...] = ("", "NA", "N/A", "nan", "None", "null", "UNK", "unknown")
    """Spellings that mean "not recorded" in every column (case is ignored)."""
    leaks: tuple[str, ...] = ()
    """Columns that give the label away: never an attribute, under this or another name. Case and outer or repeated
    blanks are ignored."""
    blocks: tuple[BlockConfig, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        _unique("class", [item.name for item in self.classes])
        _unique(
            "the spelling of a class (case is ignored)",
            [text for item in self.classes for text in {item.name.lower(), *(word.lower() for word in item.synonyms)}],
        )
        _unique("attribute", [item.name for item in self.attributes])
        _unique("block", [item.name for item in self.blocks])
        names = {item.name for item in self.attributes}
        for block in self.blocks:
            for name in block.attributes:
                if name not in names:
                    raise ValueError(f"block {block.name!r} names the unknown attribute {name!r}")
        leaks = {fold_column(name) for name in self.leaks}
        for item in self.attributes:
            if {fold_column(item.name), fold_column(item.table_column)} & leaks:
                raise ValueError(
                    f"attribute {item.name!r} reads the column {item.table_column!r}, which `leaks` says gives the "
                    "label away; remove it from the attributes"
                )
        return self

    @property
    def class_names(self) -> tuple[str, ...]:
        return tuple(item.name for item in self.classes)

    @property
    def attribute_names(self) -> tuple[str, ...]:
        return tuple(item.name for item in self.attributes)

    @property
    def block_attributes(self) -> frozenset[str]:
        """Every attribute of every block."""
        return frozenset(name for block in self.blocks for name in block.attributes)


def fold_column(name: str) -> str:
    """What two column names share that differ in case or blanks alone."""
    return " ".join(unicodedata.normalize("NFKC", name).split()).casefold()


def leak_columns(leaks: Iterable[str], columns: Iterable[str]) -> list[str]:
    """The columns that `leaks` names."""
    folded = {fold_column(leak) for leak in leaks}
    return [column for column in columns if fold_column(column) in folded]


def _unique(what: str, names: list[str]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{what} {twice[0]!r} is given twice")
