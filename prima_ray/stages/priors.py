"""A corpus's priors in a run: read once, written to `priors.json`, and the same ever after.

A corpus may be vetted while a run trains, or between two halves of it. What was resolved when the run began holds to
its end and for the runs that build on it; `priors.json` has it, with the reasons.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from prima_ray.base import PrimaError, read_json, write_json
from prima_ray.data.attribute_vectors import SoftTargetEncoder
from prima_ray.data.description import DataSetConfig
from prima_ray.data.fetched import local_copy
from prima_ray.data.metadata import MetadataTextConfig, text_attributes
from prima_ray.knowledge.corpus import read_corpus
from prima_ray.knowledge.priors import Priors, PriorsConfig, apply_priors, resolve_priors
from prima_ray.knowledge.vetting import read_log, resolve
from prima_ray.stages.rundir import ParentState, input_hash

PRIORS = "priors.json"
_CHOICE = ("text_attributes", "soft_targets")
_log = logging.getLogger(__name__)


def described_with_priors(
    data_set: DataSetConfig, corpus: str | None, config: PriorsConfig, *, run: Path
) -> DataSetConfig:
    """The description with the corpus's choices in it; as it is where there is no corpus.

    Raises:
        PrimaError: the corpus or its log is damaged, or the config names what the data set does not have.
    """
    if corpus is None:
        return data_set
    priors = read_priors(run)
    if priors is None:
        # The hash first: a decision that comes in between makes the record too old, never too new.
        digest, local = input_hash(corpus), local_copy(corpus)
        read = read_corpus(local)
        priors = resolve_priors(data_set, read, resolve(read, read_log(local)), config, corpus_hash=digest)
        write_json(run / PRIORS, priors.model_dump(mode="json"))
    decided = sum(item.relevant_by == "literature" for item in priors.attributes)
    _log.info("priors: the corpus speaks of %d of %d attributes", decided, len(priors.attributes))
    if priors.unvetted:
        _log.warning("warning: entries that nobody has vetted are used; this run and its descendants are marked so")
    if not any(item.evidence for item in priors.attributes):
        _log.warning("warning: no usable entry of %s speaks of an attribute: is it vetted?", corpus)
    return apply_priors(data_set, priors)


def record_choice(
    run: Path, data_set: DataSetConfig, text: MetadataTextConfig, encoder: SoftTargetEncoder | None
) -> None:
    """Add to `priors.json` what became of the priors: the attributes of the text, the weights of the soft targets."""
    priors = read_priors(run)
    if priors is None:
        return
    choice = {
        "text_attributes": [item.name for item in text_attributes(data_set, text)],
        "soft_targets": {block.name: block.weight for block in encoder.blocks} if encoder else None,
    }
    write_json(run / PRIORS, {**priors.model_dump(mode="json"), **choice})


def inherited_description(data_set: DataSetConfig, parent: str | None) -> DataSetConfig:
    """The description with the choices that a parent run was made with."""
    priors = read_priors(local_copy(parent)) if parent else None
    return apply_priors(data_set, priors) if priors else data_set


def parent_state(run: Path) -> ParentState:
    """For the record: the corpus as it was read, and whether unvetted entries were used."""
    priors = read_priors(run)
    return ParentState(hashes={"corpus": priors.corpus_hash}, unvetted=priors.unvetted) if priors else ParentState()


def read_priors(run: Path) -> Priors | None:
    """A run's priors; None where it has none.

    Raises:
        PrimaError: the file is damaged.
    """
    path = run / PRIORS
    if not path.exists():
        return None
    raw: Any = read_json(path)
    try:
        return Priors.model_validate({key: value for key, value in raw.items() if key not in _CHOICE})
    except (ValidationError, AttributeError):
        raise PrimaError(
            "damaged: these are no priors", where=path, mend="Copy the run again, or train it again."
        ) from None
