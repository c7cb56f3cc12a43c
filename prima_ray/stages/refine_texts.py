"""The texts that refine reads: taken from the corpus once, when the run begins, and the same ever after.

texts/        the texts as shards
split.json    the corpus as it was read, and which entries are on which side: written last
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from prima_ray.base import PrimaError, StrictConfig, read_json, write_json
from prima_ray.data.fetched import local_copy
from prima_ray.data.text_shards import SideText, write_text_shards
from prima_ray.knowledge.corpus import Corpus, read_corpus
from prima_ray.knowledge.corpus_texts import TextCutter, TextsConfig, corpus_texts, hold_out
from prima_ray.knowledge.entries import Entry
from prima_ray.knowledge.vetting import read_log, resolve
from prima_ray.models.tokenizer import TextTokenizer
from prima_ray.stages.rundir import ParentState, input_hash

TEXTS = "texts"
SPLIT = "split.json"
_log = logging.getLogger(__name__)


class Split(StrictConfig):
    """`split.json`."""

    corpus_hash: str
    unvetted: bool
    """Entries were used that nobody has vetted."""
    train: tuple[str, ...]
    held_out: tuple[str, ...]
    """Entry ids."""
    num_train_texts: int
    num_held_out_texts: int
    num_left_out: int
    """Sentences of held-out entries that also train."""

    @property
    def state(self) -> ParentState:
        return ParentState(hashes={"corpus": self.corpus_hash}, unvetted=self.unvetted)


@dataclass(frozen=True)
class TextsRequest:
    """What decides the texts."""

    corpus: str
    texts: TextsConfig
    held_out: float
    seed: int
    unvetted: bool
    tokenizer: TextTokenizer


def prepare_texts(run: Path, request: TextsRequest) -> Split:
    """Write the texts of both sides into the run, or find them there; tells how many.

    Raises:
        PrimaError: too few entries can be used for a split, or a damaged corpus or split.
    """
    split = _read_split(run)
    if split is None:
        split, texts = _choose_texts(request)
        write_text_shards(run / TEXTS, texts)
        write_json(run / SPLIT, split.model_dump(mode="json"))
    _log.info(
        "refine: %d texts of %d entries train, %d of %d are held out, without %d sentences that also train",
        split.num_train_texts,
        len(split.train),
        split.num_held_out_texts,
        len(split.held_out),
        split.num_left_out,
    )
    if split.unvetted:
        _log.warning("warning: entries that nobody has vetted are used; this run and its descendants are marked so")
    return split


def _choose_texts(request: TextsRequest) -> tuple[Split, list[SideText]]:
    # The hash first: a decision that comes in between makes the record too old, never too new.
    digest = input_hash(request.corpus)
    corpus = read_corpus(local_copy(request.corpus))
    entries = _usable(corpus, unvetted=request.unvetted)
    held_out = hold_out(entries, request.held_out, request.seed)
    texts, num_left_out = corpus_texts(
        entries, corpus.chunks, request.texts, held_out=held_out, cut=TextCutter(request.tokenizer)
    )
    counts = {side: sum(item.held_out == side for item in texts) for side in (False, True)}
    for side, name in ((False, "trains"), (True, "is held out")):
        if not counts[side]:
            raise PrimaError(
                f"no text {name}: the entries have all of theirs in common",
                where=request.corpus,
                mend="Set `texts` to read more of an entry, or choose another `seed` or `held_out`.",
            )
    split = Split(
        corpus_hash=digest,
        unvetted=any(item.status == "proposed" for item in entries),
        train=tuple(item.entry_id for item in entries if item.entry_id not in held_out),
        held_out=tuple(item.entry_id for item in entries if item.entry_id in held_out),
        num_train_texts=counts[False],
        num_held_out_texts=counts[True],
        num_left_out=num_left_out,
    )
    return split, texts


def _usable(corpus: Corpus, *, unvetted: bool) -> list[Entry]:
    """Entries that may be used and say something."""
    vetting = resolve(corpus, read_log(corpus.path))
    speaking = [item for item in vetting.used(unvetted=unvetted) if item.direction != "no_evidence"]
    if len(speaking) >= 2:
        return speaking
    waiting = sum(item.direction != "no_evidence" for item in vetting.used(unvetted=True)) - len(speaking)
    count = f"{len(speaking) or 'no'} entr{'y' if len(speaking) == 1 else 'ies'} with evidence"
    if waiting:
        raise PrimaError(
            f"{count} of this corpus {'is' if len(speaking) == 1 else 'are'} accepted, two are needed; "
            f"{waiting} wait for a decision",
            where=corpus.path,
            mend=f"Run `prima vet {corpus.path}`, or set `unvetted: true` for an experiment: the run is then marked.",
        )
    rejected = sum(
        item.entry.status == "rejected" and item.entry.direction != "no_evidence" for item in vetting.entries.values()
    )
    raise PrimaError(
        f"{count} can be used, two are needed: one trains, one is held out"
        + (f"; {rejected} {'was' if rejected == 1 else 'were'} rejected" if rejected else ""),
        where=corpus.path,
        mend="Make the corpus anew from more literature"
        + (f", or look at what was rejected again: `prima vet {corpus.path}`." if rejected else "."),
    )


def _read_split(run: Path) -> Split | None:
    if not (run / SPLIT).exists():
        return None
    try:
        return Split.model_validate(read_json(run / SPLIT))
    except ValidationError:
        raise PrimaError(
            "damaged: this is no split", where=run / SPLIT, mend="Delete the run's folder and refine again."
        ) from None
