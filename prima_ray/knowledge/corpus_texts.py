"""The texts of a corpus for masked-language modelling, and which entries are held out.

Entries are held out whole, with every text of theirs. Corpora repeat themselves: entries share passages, and a
statement may be a passage's own sentence. What a held-out entry has in common with the texts that train is no test of
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
from prima_ray.knowledge.corpus import cited_chunks
from prima_ray.knowledge.entries import Entry
from prima_ray.knowledge.splitting import split_sentences
from prima_ray.models.tokenizer import TextTokenizer


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
    """What is read of one entry, in its order."""
    texts: list[str] = [entry.summary] if config.summaries else []
    if config.statements:
        texts += [item.text for item in entry.statements]
    if config.quotes:
        texts += [part.quote for item in entry.statements for part in item.quotes]
    if config.passages:
        texts += [chunks[name].text for name in cited_chunks(entry)]
    return texts


def corpus_texts(
    entries: Iterable[Entry],
    chunks: Mapping[str, Chunk],
    config: TextsConfig,
    *,
    held_out: frozenset[str],
    cut: Callable[[str], list[str]],
) -> tuple[list[SideText], int]:
    """The texts of both sides, each once, and how many held-out ones were left out because they also train.

    A held-out text is left out where it equals a training text or stands inside of one, whatever the case and the
    white space.

    Args:
        cut: a text -> pieces that the encoder reads whole.
    """
    sides: dict[bool, dict[str, tuple[str, str]]] = {False: {}, True: {}}
    for entry in entries:
        side = sides[entry.entry_id in held_out]
        for text in entry_texts(entry, chunks, config):
            for piece in cut(text):
                side.setdefault(_fold(piece), (entry.entry_id, piece))
    trains = "\n".join(sides[False])
    kept = {folded: found for folded, found in sides[True].items() if folded not in trains}
    texts = [
        SideText(name=f"{owner}:{hash_key(folded):016x}", owner=owner, text=text, held_out=is_held_out)
        for is_held_out, side in ((False, sides[False]), (True, kept))
        for folded, (owner, text) in side.items()
        if folded
    ]
    return texts, len(sides[True]) - len(kept)


def _fold(text: str) -> str:
    return " ".join(text.split()).casefold()


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
