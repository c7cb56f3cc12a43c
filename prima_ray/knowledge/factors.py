"""Risk factors and the words that name them, declared in YAML beside the data set's attributes.

A factor may be an attribute of the data set, a few of its values, or nothing that the table records. All that is known
of its wording stands here, and so does that of the diagnoses: the code that reads sentences names neither. To add a
factor: an entry under `factors` with the terms by which texts call it (`mentions.py` says how a term is written).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Literal, Self

from pydantic import Field, model_validator

from prima_ray.base import PrimaError, StrictConfig
from prima_ray.data.description import (
    AttributeConfig,
    BooleanAttribute,
    CategoricalAttribute,
    DataSetConfig,
    NumericAttribute,
    OrdinalAttribute,
    TextAttribute,
    leak_columns,
)
from prima_ray.knowledge.mentions import check_term

Role = Literal["risk", "sign", "site"]


class FactorConfig(StrictConfig):
    """What may make a diagnosis more likely or less."""

    key: str = Field(pattern=r"^[a-z0-9_]+$")
    phrase: str = Field(min_length=1)
    """The factor in words, for a person."""
    role: Role = "risk"
    """`risk`: it is there before the disease. `sign`: how a lesion looks or feels. `site`: where it is. The three are
    spoken of in different words ("risk factor for", "a sign of", "the most common site is")."""
    terms: tuple[str, ...]
    """How texts call it: a sentence with one of them mentions the factor."""
    but_not: tuple[str, ...] = ()
    """Longer wordings in which a term means something else."""
    opposites: tuple[str, ...] = ()
    """How texts call the contrary: "round or flat" says nothing for either."""
    attribute: str | None = None
    """The data set's attribute that records it."""
    values: tuple[str | bool, ...] = ()
    """The values of the attribute that are meant; empty for a number, whose high values are."""

    @model_validator(mode="after")
    def _terms_read(self) -> Self:
        if not self.terms:
            raise ValueError(f"factor {self.key!r} has no terms: no sentence could mention it; list how texts call it")
        _check_terms(f"factor {self.key!r}", (*self.terms, *self.but_not, *self.opposites))
        if self.values and self.attribute is None:
            raise ValueError(f"factor {self.key!r} has values, but no attribute that could have them")
        return self


class DiagnosisTerms(StrictConfig):
    """How texts call a class of the data set, besides its phrase and synonyms."""

    name: str
    """The class."""
    terms: tuple[str, ...] = ()
    but_not: tuple[str, ...] = ()
    """Longer wordings in which a term means something else."""
    not_under: tuple[str, ...] = ()
    """Words of a title or a heading under which the terms mean the disease of another organ."""


class UmbrellaConfig(StrictConfig):
    """A wording that covers several diagnoses."""

    terms: tuple[str, ...] = Field(min_length=1)
    but_not: tuple[str, ...] = ()
    means: tuple[str, ...] = Field(min_length=1)
    """Classes."""
    alone: bool = True
    """False: it stands for a class only where the title or a heading names that class."""

    @model_validator(mode="after")
    def _terms_read(self) -> Self:
        _check_terms("umbrellas", (*self.terms, *self.but_not))
        return self


class VocabularyConfig(StrictConfig):
    """The factors and the words for them and for the diagnoses."""

    factors: tuple[FactorConfig, ...]
    diagnoses: tuple[DiagnosisTerms, ...] = ()
    umbrellas: tuple[UmbrellaConfig, ...] = ()
    unspecific: tuple[str, ...] = ()
    """Words that mean the disease spoken of ("the condition"): under a heading that names a diagnosis, that one."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.factors:
            raise ValueError("factors: none is listed")
        for what, names in (
            ("factor", [item.key for item in self.factors]),
            ("diagnosis", [item.name for item in self.diagnoses]),
        ):
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise ValueError(f"{what} {twice[0]!r} is given twice")
        for item in self.diagnoses:
            _check_terms(f"diagnosis {item.name!r}", (*item.terms, *item.but_not, *item.not_under))
        _check_terms("unspecific", self.unspecific)
        return self


def check_vocabulary(config: VocabularyConfig, data_set: DataSetConfig, *, where: str | None = None) -> None:
    """Compare the vocabulary with the description of the data set.

    Raises:
        PrimaError: a class, an attribute or a value that the data set does not have.
    """
    named = [item.name for item in config.diagnoses] + [name for item in config.umbrellas for name in item.means]
    for name in named:
        _known("diagnosis", name, data_set.class_names, data_set, where)
    attributes = {item.name: item for item in data_set.attributes}
    for factor in config.factors:
        if factor.attribute is None:
            continue
        if leak_columns(data_set.leaks, [factor.attribute]):
            raise PrimaError(
                f"factor {factor.key!r} is the column {factor.attribute!r}, which gives the label away", where=where
            )
        _known(f"factor {factor.key!r}: attribute", factor.attribute, tuple(attributes), data_set, where)
        _check_values(factor, attributes[factor.attribute], data_set, where)


def _check_values(factor: FactorConfig, attribute: AttributeConfig, data_set: DataSetConfig, where: str | None) -> None:
    match attribute:
        case NumericAttribute() | TextAttribute():
            if factor.values:
                raise PrimaError(
                    f"factor {factor.key!r}: the attribute {attribute.name!r} is {attribute.kind} and has no values",
                    where=where,
                    mend="Leave values out.",
                )
            return
        case BooleanAttribute():
            allowed: tuple[str, ...] = ("true", "false")
        case OrdinalAttribute() | CategoricalAttribute():
            allowed = tuple(attribute.values)
    for value in factor.values:
        text = str(value).lower() if isinstance(value, bool) else value
        # A categorical attribute without a list takes every value.
        if allowed:
            _known(f"factor {factor.key!r}: value", text, allowed, data_set, where)


def _known(what: str, name: str, known: Iterable[str], data_set: DataSetConfig, where: str | None) -> None:
    names = list(known)
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
        hint = f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(names)}."
        raise PrimaError(f"{what} {name!r} is none of {data_set.name}", where=where, mend=hint)


def _check_terms(what: str, terms: Iterable[str]) -> None:
    for term in terms:
        problem = check_term(term)
        if problem:
            raise ValueError(f"{what}: the term {term!r} {problem}")
