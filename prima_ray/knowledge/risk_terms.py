"""The words of a corpus's own field in a text: what a refined encoder should be able to guess."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from prima_ray.knowledge.corpus import FactorLink
from prima_ray.knowledge.factors import VocabularyConfig
from prima_ray.knowledge.mentions import Span, Terms, check_term, compile_terms

_BRACKETS = re.compile(r"\s*\([^()]*\)")


def risk_terms(
    factors: Iterable[FactorLink], diagnoses: Mapping[str, str], vocabulary: VocabularyConfig | None = None
) -> Terms:
    """The phrases of factors and diagnoses, with and without what they say in brackets, and the vocabulary's terms."""
    phrases = [*(item.phrase for item in factors), *diagnoses.values()]
    words = [*phrases, *(_BRACKETS.sub("", phrase) for phrase in phrases)]
    if vocabulary:
        declared = [*(item.terms for item in vocabulary.factors), *(item.terms for item in vocabulary.diagnoses)]
        words += [term for terms in declared for term in terms]
    return compile_terms(word for word in words if check_term(word) is None)


def places(text: str, terms: Terms) -> list[tuple[Span, ...]]:
    """Where each term stands in a text, in the order of first places; the same words in other places belong together.

    Who guesses a word must not read it elsewhere in the text.
    """
    found: dict[str, list[Span]] = {}
    for start, end in terms.find(text):
        found.setdefault(" ".join(text[start:end].split()).casefold(), []).append((start, end))
    return [tuple(spans) for spans in found.values()]
