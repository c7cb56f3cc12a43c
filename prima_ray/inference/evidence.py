"""What the risk corpus says of an exam: entries on its attributes and its likely diagnoses, word for word with their
sources.

A model folder carries the entries that it may show, chosen when it is written: accepted and edited ones, rejected ones
never, and those that nobody has decided about only where the run is marked as unvetted; they say so. Evidence explains
no prediction: the model did not look it up. It is what literature says about the same facts.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from prima_ray.base import StrictConfig
from prima_ray.data.description import DataSetConfig
from prima_ray.knowledge.corpus import Corpus, without_references
from prima_ray.knowledge.entries import Direction, Entry, Status, Strength
from prima_ray.knowledge.vetting import Vetting


class Source(StrictConfig):
    """A quote and where it stands."""

    quote: str
    title: str
    url: str | None
    source: str
    licence: str | None


class EvidenceItem(StrictConfig):
    """An entry of the corpus, on an attribute of the data set."""

    attribute: str
    values: tuple[str, ...]
    """The attribute's values that it speaks of; empty: of the attribute as such, whatever its value."""
    factor: str
    """In words."""
    diagnosis: str
    direction: Direction
    strength: Strength | None
    summary: str
    vetted: bool
    """A person has accepted or edited it."""
    sources: tuple[Source, ...]


class Evidence(StrictConfig):
    """`model/evidence.json`."""

    items: tuple[EvidenceItem, ...]

    def about(self, attributes: Mapping[str, str], diagnoses: Collection[str]) -> tuple[EvidenceItem, ...]:
        """The items on given values and diagnoses: by diagnosis in the order given, those on a value before those on an
        attribute as such, well supported ones first.

        Args:
            attributes: canonical values.
            diagnoses: classes, the most important first.
        """
        order = {name: place for place, name in enumerate(diagnoses)}
        strengths = {"strong": 0, "moderate": 1, "weak": 2, None: 3}
        found = [
            item
            for item in self.items
            if item.diagnosis in order
            and item.attribute in attributes
            and (not item.values or attributes[item.attribute] in item.values)
        ]
        return tuple(sorted(found, key=lambda item: (order[item.diagnosis], not item.values, strengths[item.strength])))


def gather_evidence(corpus: Corpus, vetting: Vetting, data_set: DataSetConfig, *, unvetted: bool) -> Evidence:
    """The entries that a model of this data set may show.

    Args:
        unvetted: let in what nobody has decided about.
    """
    factors = {item.key: item for item in corpus.factors}
    items = []
    for entry in vetting.used(unvetted=unvetted):
        factor = factors.get(entry.factor)
        if factor is None or factor.attribute not in data_set.attribute_names:
            continue
        if entry.diagnosis not in data_set.class_names or not entry.statements:
            continue
        items.append(
            EvidenceItem(
                attribute=factor.attribute,
                values=factor.values,
                factor=factor.phrase,
                diagnosis=entry.diagnosis,
                direction=entry.direction,
                strength=entry.strength,
                summary=without_references(entry.summary, corpus.chunks),
                vetted=_is_vetted(entry.status),
                sources=tuple(_sources(entry, corpus)),
            )
        )
    return Evidence(items=tuple(items))


def _is_vetted(status: Status) -> bool:
    return status in ("accepted", "edited")


def _sources(entry: Entry, corpus: Corpus) -> Iterable[Source]:
    seen = set()
    for statement in entry.statements:
        for quote in statement.quotes:
            chunk = corpus.chunks[quote.chunk_id]
            if (quote.quote, chunk.doc_id) not in seen:
                seen.add((quote.quote, chunk.doc_id))
                # An address that a page may link to; a source's could be any text.
                url = chunk.url if chunk.url and chunk.url.startswith(("https://", "http://")) else None
                yield Source(quote=quote.quote, title=chunk.title, url=url, source=chunk.source, licence=chunk.licence)
