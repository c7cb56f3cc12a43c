"""The texts of a corpus for masked-language modelling, and which entries are held out.

Entries are held out whole, with every text of theirs. Corpora repeat themselves: entries share passages, passages
overlap, and a statement may be a passage's own sentence. A sentence of a held-out entry that also trains is no test of
anything and is left out.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Self

from pydantic import model_validator

from prima_ray.base import StrictConfig, hash_key
from prima_ray.data.text_shards import SideText
from prima_ray.knowledge.chunks import Chunk
from prima_ray.knowledge.corpus import cited_chunks, without_references
from prima_ray.knowledge.entries import Entry
from prima_ray.knowledge.splitting import split_sentences
from prima_ray.models.tokenizer import TextTokenizer

_MARKS = " .,;:!?()[]*\u2022-\u2013\"'\u201c\u201d\u2018\u2019"


class TextsConfig(StrictConfig):
    """Which texts of an entry are read."""

    summaries: bool = True
    statements: bool = True
    quotes: bool = False
    """Their words stand in the passages."""
    passages: bool = True
    """The passages that the entry cites, whole."""

    @model_validator(mode="after")
    def _something(self) -> Self:
        if not (self.summaries or self.statements or self.quotes or self.passages):
            raise ValueError("set one of summaries, statements, quotes and passages: nothing would be read")
        return self


def hold_out(entries: Sequence[Entry], share: float, seed: int) -> frozenset[str]:
    """The ids of the entries that are held out: about ``share`` of every diagnosis's, at least one, never all.

    An entry's place in the draw is a hash of (seed, id), so that a corpus that has grown keeps most of its split.

    Raises:
        ValueError: fewer than two entries.
    """
    if len(entries) < 2:
        raise ValueError("fewer than two entries cannot be split")
    drawn = sorted(entries, key=lambda item: hash_key(seed, "held out", item.entry_id))
    diagnoses = sorted({item.diagnosis for item in entries})
    # One list in which the diagnoses take turns in proportion: any beginning of it is stratified.
    ranked = sorted(
        ((position + 0.5) / len(mine), hash_key(seed, item.entry_id), item.entry_id)
        for mine in ([item for item in drawn if item.diagnosis == name] for name in diagnoses)
        for position, item in enumerate(mine)
    )
    count = min(max(round(share * len(entries)), 1), len(entries) - 1)
    return frozenset(name for _, _, name in ranked[:count])


def entry_texts(entry: Entry, chunks: Mapping[str, Chunk], config: TextsConfig) -> list[str]:
    """What is read of one entry, in its order. References to chunks ("[6c8135a7af961506]") are no words."""
    cited = cited_chunks(entry)
    texts: list[str] = []
    if config.summaries:
        texts.append(without_references(entry.summary, chunks))
    if config.statements:
        texts += [item.text for item in entry.statements]
    if config.quotes:
        texts += [part.quote for item in entry.statements for part in item.quotes]
    if config.passages:
        texts += [chunks[name].text for name in cited]
    return texts


def corpus_texts(
    entries: Iterable[Entry],
    chunks: Mapping[str, Chunk],
    config: TextsConfig,
    *,
    held_out: frozenset[str],
    cut: Callable[[str], list[str]],
) -> tuple[list[SideText], int]:
    """The texts of both sides, each once, and how many sentences of held-out ones were left out: they also train.

    A sentence is left out where it stands in a training text, whatever the case, the white space and the marks around
    it. What is left of its text stays.

    Args:
        cut: a text -> pieces that the encoder reads whole.
    """
    read = [(entry.entry_id, text) for entry in entries for text in dict.fromkeys(entry_texts(entry, chunks, config))]
    trains = "\n".join(fold(text) for owner, text in read if owner not in held_out)
    sides: dict[bool, dict[str, tuple[str, str]]] = {False: {}, True: {}}
    left_out: set[str] = set()
    for owner, text in read:
        kept = text
        if owner in held_out:
            folded = {sentence: fold(sentence) for sentence in split_sentences(text)}
            seen = {sentence for sentence, words in folded.items() if words in trains}
            left_out.update(folded[sentence] for sentence in seen if folded[sentence])
            kept = "".join(sentence for sentence in split_sentences(text) if sentence not in seen)
        for piece in cut(kept):
            sides[owner in held_out].setdefault(fold(piece), (owner, piece))
    texts = [
        SideText(name=f"{owner}:{hash_key(folded):016x}", owner=owner, text=text, held_out=side)
        for side, found in sides.items()
        for folded, (owner, text) in found.items()
        if folded
    ]
    return texts, len(left_out)


def fold(text: str) -> str:
    """The text's words in one way of writing, without the marks around it."""
    return " ".join(text.split()).casefold().strip(_MARKS)


class TextCutter:
    """Cuts a text into pieces that a tokenizer does not cut off: whole sentences, as many as fit."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._encode = tokenizer.bare.encode
        self._room = tokenizer.max_tokens - tokenizer.loaded.num_special_tokens_to_add()

    def __call__(self, text: str) -> list[str]:
        pieces, current, used = [], "", 0
        for sentence in split_sentences(text):
            for part in self._short(sentence):
                tokens = len(self._encode(part, add_special_tokens=False).ids)
                if current and used + tokens > self._room:
                    pieces.append(current)
                    current, used = "", 0
                current, used = current + part, used + tokens
        return [piece.strip() for piece in (*pieces, current) if piece.strip()]

    def _short(self, sentence: str) -> list[str]:
        """A sentence in parts that fit, cut between words where there are any; most are one."""
        places = self._encode(sentence, add_special_tokens=False).offsets
        starts, first, word = [0], 0, 0
        for index, (place, _) in enumerate(places):
            # The tokens of some models begin with the space before the word.
            if place == 0 or sentence[place - 1].isspace() or sentence[place].isspace():
                word = index
            if index - first == self._room:
                first = word if word > first else index
                starts.append(places[first][0])
        return [sentence[start:end] for start, end in itertools.pairwise([*starts, len(sentence)])]
