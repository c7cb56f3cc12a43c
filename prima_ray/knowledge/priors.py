"""What the corpus says of a data set's attributes: which are visually relevant, which are related to a diagnosis.

A chain of rules, the first that applies decides; each attribute's answer says which one it was and why.

    visually relevant      1. the config says so (`priors.relevant`)
                           2. the attribute describes the lesion or the skin: a factor of it is a sign or a site, or
                              `priors.visible` names it
                           3. an entry relates a factor of the attribute to a class: it bears on what the picture shows;
                              or entries speak of it and none does: then it is not relevant
                           4. as the data set's description has it
    related to a disease   1. the config (`priors.disease_related`), then 3. and 4. alike

An entry relates a factor to a class where its direction is `raises` or `lowers`, and its strength and number of sources
are at least what the config asks. Only entries on classes of the data set count, and only accepted or edited ones,
unless `priors.unvetted` lets in what nobody has decided about.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

from pydantic import Field

from prima_ray.base import StrictConfig
from prima_ray.data.description import DataSetConfig
from prima_ray.data.metadata import expand_names
from prima_ray.knowledge.corpus import Corpus, cited_documents
from prima_ray.knowledge.entries import Direction, Entry, Status, Strength
from prima_ray.knowledge.vetting import Vetting

Rule = Literal["config", "visible", "literature", "description"]
_STRENGTHS: tuple[Strength, ...] = ("weak", "moderate", "strong")


class PriorsConfig(StrictConfig):
    """How entries become priors. Names are attributes or blocks of the data set."""

    unvetted: bool = False
    """Use entries nobody has decided about too. For experiments: the run and every descendant are marked."""
    min_strength: Strength = "weak"
    min_sources: int = Field(default=1, ge=1)
    visible: tuple[str, ...] = ()
    """Attributes that describe the lesion or the skin, besides those of a sign or a site: relevant whatever the
    literature says of risk."""
    relevant: dict[str, bool] = Field(default_factory=dict)
    """Decided here, against everything else."""
    disease_related: dict[str, bool] = Field(default_factory=dict)


class Evidence(StrictConfig):
    """An entry that speaks of an attribute."""

    entry_id: str
    phrase: str
    direction: Direction
    strength: Strength | None
    num_sources: int
    status: Status
    relates: bool
    """It counts: a direction, strong enough, from enough sources."""


class AttributePrior(StrictConfig):
    """What holds for one attribute, and why."""

    attribute: str
    relevant: bool
    relevant_by: Rule
    relevant_reason: str
    disease_related: bool
    disease_related_by: Rule
    disease_related_reason: str
    num_sources: int
    """Documents behind the entries that relate it to a class, each once."""
    evidence: tuple[Evidence, ...]


class Priors(StrictConfig):
    """`priors.json` of a run, less what the run made of it."""

    corpus: str
    """The corpus's path."""
    corpus_hash: str
    """Of its content and of what had been decided when it was read."""
    unvetted: bool
    """An entry that nobody has decided about was used."""
    attributes: tuple[AttributePrior, ...]
    ignored_attributes: tuple[str, ...] = ()
    """Attributes that factors name and the data set does not have."""


def resolve_priors(
    data_set: DataSetConfig, corpus: Corpus, vetting: Vetting, config: PriorsConfig, *, corpus_hash: str
) -> Priors:
    """The priors of a data set.

    Raises:
        PrimaError: the config names an attribute or block that the data set does not have.
    """
    used = [item for item in vetting.used(unvetted=config.unvetted) if item.diagnosis in data_set.class_names]
    attribute_of = {item.key: item.attribute for item in corpus.factors}
    spoken: dict[str, list[Entry]] = {}
    for entry in used:
        name = attribute_of.get(entry.factor)
        if name is not None:
            spoken.setdefault(name, []).append(entry)
    visible = {
        item.attribute: f"it describes the lesion ({item.key} is a {item.role})"
        for item in corpus.factors
        if item.role in ("sign", "site")
    }
    named = expand_names(config.visible, data_set, what="priors.visible")
    visible |= dict.fromkeys(named, "it describes the lesion or the skin (priors.visible)")
    relevant = _by_attribute(config.relevant, data_set, what="priors.relevant")
    related = _by_attribute(config.disease_related, data_set, what="priors.disease_related")
    found = []
    for attribute in data_set.attributes:
        name, entries = attribute.name, spoken.get(attribute.name, [])
        evidence = tuple(_evidence(corpus, entry, config) for entry in entries)
        literature = _literature(evidence)
        described = "no usable entry speaks of it; as the data set's description has it"
        sees = _first(
            ("config", relevant.get(name), "priors.relevant says so"),
            ("visible", True if name in visible else None, visible.get(name, "")),
            ("literature", *literature),
            ("description", attribute.relevant, described),
        )
        relates = _first(
            ("config", related.get(name), "priors.disease_related says so"),
            ("literature", *literature),
            ("description", attribute.disease_related, described),
        )
        counted = [entry for entry, item in zip(entries, evidence, strict=True) if item.relates]
        found.append(
            AttributePrior(
                attribute=name,
                relevant=sees[1],
                relevant_by=sees[0],
                relevant_reason=sees[2],
                disease_related=relates[1],
                disease_related_by=relates[0],
                disease_related_reason=relates[2],
                num_sources=len({name for entry in counted for name in cited_documents(entry, corpus.chunks)}),
                evidence=evidence,
            )
        )
    return Priors(
        corpus=str(corpus.path),
        corpus_hash=corpus_hash,
        unvetted=any(entry.status == "proposed" for entries in spoken.values() for entry in entries),
        attributes=tuple(found),
        ignored_attributes=tuple(sorted(set(spoken) - set(data_set.attribute_names))),
    )


def apply_priors(data_set: DataSetConfig, priors: Priors) -> DataSetConfig:
    """The description with the priors' choices in it."""
    by_name = {item.attribute: item for item in priors.attributes}
    attributes = tuple(
        item.model_copy(
            update={"relevant": by_name[item.name].relevant, "disease_related": by_name[item.name].disease_related}
        )
        if item.name in by_name
        else item
        for item in data_set.attributes
    )
    return data_set.model_copy(update={"attributes": attributes})


def _by_attribute(choices: Mapping[str, bool], data_set: DataSetConfig, *, what: str) -> dict[str, bool]:
    # An attribute's own line comes before that of its block.
    blocks = {block.name for block in data_set.blocks} - set(data_set.attribute_names)
    ordered = sorted(choices, key=lambda name: name not in blocks)
    return {name: choices[key] for key in ordered for name in expand_names((key,), data_set, what=what)}


def _evidence(corpus: Corpus, entry: Entry, config: PriorsConfig) -> Evidence:
    number = len(cited_documents(entry, corpus.chunks))
    strong = entry.strength is not None and _STRENGTHS.index(entry.strength) >= _STRENGTHS.index(config.min_strength)
    return Evidence(
        entry_id=entry.entry_id,
        phrase=corpus.factor_phrase(entry.factor),
        direction=entry.direction,
        strength=entry.strength,
        num_sources=number,
        status=entry.status,
        relates=entry.direction in ("raises", "lowers") and strong and number >= config.min_sources,
    )


def _literature(evidence: Iterable[Evidence]) -> tuple[bool | None, str]:
    """What the entries say together; None where there are none."""
    items = list(evidence)
    if not items:
        return None, ""
    counted = [item for item in items if item.relates]
    if not counted:
        return False, f"{len(items)} entries speak of it and none relates it to a class as asked"
    told = ", ".join(
        f"{item.entry_id} ({item.direction}, {item.strength}, {item.num_sources} sources)" for item in counted
    )
    return True, f"related to a class by {told}"


def _first(*rules: tuple[Rule, bool | None, str]) -> tuple[Rule, bool, str]:
    """The first rule that has an answer; the last always has."""
    for name, answer, reason in rules:
        if answer is not None:
            return name, answer, reason
    raise AssertionError("the description always answers")
