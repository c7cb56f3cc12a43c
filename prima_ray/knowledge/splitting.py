"""Documents -> chunks: whole sentences of one section, as many as fit, by LlamaIndex's `SentenceSplitter`.

LlamaIndex brings the packing; where a sentence ends is decided here. Its own default is nltk's Punkt, which needs data
files and knows neither list items, table rows nor texts whose items run together ("moles (also called nevi)having a
family history"). Every chunk is a piece of its section, letter for letter, so that what is quoted of it can be found
in the source.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable
from typing import Any, Self

from pydantic import Field, model_validator

from prima_ray.base import StrictConfig
from prima_ray.knowledge.chunks import Chunk, chunk_id
from prima_ray.knowledge.documents import Document
from prima_ray.models.tokenizer import TextTokenizer

_CLOSING = r"[\"'\u201d\u2019)\]]*"
_ENDS = (
    # An end mark, then what looks like the start of a sentence or of a list item.
    re.compile(rf"[.!?…]{_CLOSING}\s+(?=[\"'\u201c\u2018(\[]*[^\W_a-z]|[-\u2013•*]\s)"),
    # A line that does not go on in lower case: a paragraph, a list item, a row of a table.
    re.compile(r"\n\s*(?=[^\sa-z])"),
    re.compile(rf"[.!?:;|…]{_CLOSING}[^\S\n]*\n\s*(?=\S)"),
    # Run together: "programs.Study Design", "(also called nevi)having", "to quit smoking;giving you".
    re.compile(r"[a-z0-9)\]][.!?](?=[A-Z][a-z])"),
    re.compile(r"(?<=\s)\([^()\n]{4,}\)(?=[a-z]{3})"),
    re.compile(r"[a-z]{3};(?=[a-z]{3})"),
)
_NO_END = re.compile(
    r"(?:\b(?:e\.g|i\.e|vs|cf|Dr|Mr|Mrs|Ms|Prof|St|al|ca|approx)|(?:^|[\s(])[A-Z])\.$",
    re.IGNORECASE,
)
_BEFORE_NUMBER = re.compile(r"\b(?:no|nos|fig|figs|vol|p|pp|eq|ref|refs|sec)\.\s+$", re.IGNORECASE)
_ADDRESS = re.compile(r"://|www\.|@")
_LOOK_BACK = 80
"""Letters before an end that are looked at: abbreviations and addresses are shorter."""
_LETTERS_PER_TOKEN = 20
"""A token counts for at least so many: WordPiece makes one token of a word without end, such as an encoded picture."""


class ChunkConfig(StrictConfig):
    """How documents are cut."""

    max_tokens: int = Field(default=200, ge=32)
    """Of a chunk's text, as the encoder counts them."""
    overlap_tokens: int = Field(default=40, ge=0)
    """At most so many are repeated from the chunk before, whole sentences only."""
    context: bool = True
    """Title and headings are read before the text, by the encoder and by BM25."""

    @model_validator(mode="after")
    def _overlap_fits(self) -> Self:
        if self.overlap_tokens > self.max_tokens // 2:
            raise ValueError(f"overlap_tokens: {self.overlap_tokens} is more than half of max_tokens")
        return self


def split_sentences(text: str) -> list[str]:
    """Sentences, list items and rows of a text; joined they are the text."""
    cuts = {match.end() for pattern in _ENDS for match in pattern.finditer(text) if _ends(text, match)}
    places = [0, *sorted(cuts - {0, len(text)}), len(text)]
    return [text[start:end] for start, end in itertools.pairwise(places)]


def _ends(text: str, match: re.Match[str]) -> bool:
    """False for the point of an abbreviation, an initial or an address."""
    found = match.group()
    if "\n" in found:
        return True
    before = text[max(0, match.end() - _LOOK_BACK) : match.end()]
    if not found[-1].isspace():
        word = before.rsplit(None, 1)[-1]
        return not _ADDRESS.search(word)
    if _NO_END.search(before.rstrip()):
        return False
    return not (text[match.end()].isdigit() and _BEFORE_NUMBER.search(before))


def context_of(title: str, heading: Iterable[str]) -> str:
    """Title and headings on one line, each once."""
    return " > ".join(dict.fromkeys((title, *heading)))


def searchable(chunk: Chunk, config: ChunkConfig) -> str:
    """What BM25 reads of a chunk."""
    return f"{context_of(chunk.title, chunk.heading)}\n{chunk.text}" if config.context else chunk.text


class Splitter:
    """Cuts documents with one encoder's tokenizer. LlamaIndex is imported at the first document."""

    def __init__(self, config: ChunkConfig, tokenizer: TextTokenizer) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self._splitter: Any = None

    def split(self, document: Document) -> list[Chunk]:
        """The chunks of a document in their order, each once."""
        found: dict[str, Chunk] = {}
        for section in document.sections:
            for text in self._split_text(section.text):
                name = chunk_id(document.doc_id, section.heading, text)
                found[name] = Chunk(
                    chunk_id=name,
                    doc_id=document.doc_id,
                    text=text,
                    url=document.url,
                    source=document.source,
                    title=document.title,
                    heading=section.heading,
                    date=document.date,
                    licence=document.licence,
                )
        return list(found.values())

    def encoder_text(self, chunk: Chunk) -> str:
        """What the encoder reads of a chunk: a long line of headings is shortened, so that the text is read whole."""
        if not self.config.context:
            return chunk.text
        context = context_of(chunk.title, chunk.heading)
        room = self.tokenizer.max_tokens - self.config.max_tokens - _SPECIAL
        places = self.tokenizer.bare.encode(context, add_special_tokens=False).offsets
        if len(places) > room:
            context = context[: places[room - 1][1]] if room > 0 else ""
        return f"{context}\n{chunk.text}" if context else chunk.text

    def llama_splitter(self) -> Any:
        """The `SentenceSplitter`. Tokenizer and sentences are ours: its defaults would be OpenAI's and nltk's."""
        from llama_index.core.node_parser import SentenceSplitter

        return SentenceSplitter(
            chunk_size=self.config.max_tokens,
            chunk_overlap=self.config.overlap_tokens,
            tokenizer=_TokenCounter(self.tokenizer),
            chunking_tokenizer_fn=split_sentences,
            # Paragraphs are told apart by `split_sentences`; a form feed is in no cleaned text.
            paragraph_separator="\f",
            include_metadata=False,
            include_prev_next_rel=False,
        )

    def _split_text(self, text: str) -> list[str]:
        if self._splitter is None:
            self._splitter = self.llama_splitter()
        found: list[str] = self._splitter.split_text(text)
        return found


_SPECIAL = 4
"""Room for the encoder's special tokens, and for what joining context and text may add."""


class _TokenCounter:
    """Text -> something as long as its tokens are many, which is all that LlamaIndex asks for."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._encode = tokenizer.bare.encode

    def __call__(self, text: str) -> range:
        tokens = len(self._encode(text, add_special_tokens=False).ids)
        return range(max(tokens, math.ceil(len(text) / _LETTERS_PER_TOKEN)))
