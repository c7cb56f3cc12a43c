"""BM25 over chunks, by bm25s: scores are computed when the index is built, a query adds up rows of a sparse matrix.

Stored beside the table and read by memory mapping. It is built anew when chunks have changed, since a word's weight
depends on all of them; that takes seconds where embedding takes minutes.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from prima_ray.base import PrimaError, StrictConfig, read_json, write_json

_WORD = re.compile(r"\w\w+")
_CONFIG = "terms.json"


class Bm25Config(StrictConfig):
    """Lucene's BM25."""

    k1: float = Field(default=1.2, ge=0)
    """How fast more of the same word stops counting."""
    b: float = Field(default=0.75, ge=0, le=1)
    """How much long chunks are held back."""
    stem: bool = True
    """Words count by their stem (Snowball's English one): `moles` finds `mole`."""
    stop_words: bool = True
    """English words such as `the` do not count."""


class Terms:
    """Text -> the words that BM25 counts."""

    def __init__(self, config: Bm25Config) -> None:
        import bm25s  # noqa: F401 - it sets its logger to DEBUG when it is imported
        import Stemmer
        from bm25s.stopwords import STOPWORDS_EN

        logging.getLogger("bm25s").setLevel(logging.WARNING)
        self._left_out = frozenset(STOPWORDS_EN) if config.stop_words else frozenset()
        self._stem = Stemmer.Stemmer("english").stemWords if config.stem else list

    def __call__(self, text: str) -> list[str]:
        words = [word for word in _WORD.findall(text.casefold()) if word not in self._left_out]
        found: list[str] = self._stem(words)
        return found


class Bm25:
    """Scores of all chunks for a query, in the order in which the chunks were given."""

    def __init__(self, config: Bm25Config, scorer: Any) -> None:
        self.config = config
        self._terms = Terms(config)
        self._scorer = scorer

    @classmethod
    def build(cls, texts: Iterable[str], config: Bm25Config) -> Bm25:
        """Read every text once. Held in memory: a number a word of each, and the result."""
        import bm25s

        terms, vocabulary, ids = Terms(config), dict[str, int](), list[NDArray[np.int32]]()
        for text in texts:
            ids.append(np.array([vocabulary.setdefault(word, len(vocabulary)) for word in terms(text)], dtype=np.int32))
        if not vocabulary:
            # bm25s cannot be without any; no query has this word.
            vocabulary[""] = 0
        scorer = bm25s.BM25(method="lucene", k1=config.k1, b=config.b)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # 0 / 0 where there is no text, or none has a word
            scorer.index(([row.tolist() for row in ids], vocabulary), create_empty_token=False, show_progress=False)
        return cls(config, scorer)

    def save(self, folder: Path) -> None:
        """Write into a folder of its own."""
        folder.mkdir(parents=True, exist_ok=True)
        self._scorer.save(folder, show_progress=False)
        write_json(folder / _CONFIG, self.config.model_dump(mode="json"))

    @classmethod
    def load(cls, folder: Path) -> Bm25:
        """Read what `save` wrote; the matrix stays on disk and is mapped.

        Raises:
            PrimaError: a file is missing or damaged.
        """
        import bm25s

        config = Bm25Config.model_validate(read_json(folder / _CONFIG))
        try:
            scorer = bm25s.BM25.load(folder, mmap=True, show_progress=False)
        except (OSError, ValueError) as error:
            raise PrimaError(f"damaged ({error})", where=folder) from None
        return cls(config, scorer)

    def scores(self, query: str) -> NDArray[np.float32]:
        """(N,): zero for chunks without any of the query's words."""
        known = self._scorer.get_tokens_ids(self._terms(query))
        if not known:
            return np.zeros(self._scorer.scores["num_docs"], dtype=np.float32)
        found: NDArray[np.float32] = self._scorer.get_scores_from_ids(known)
        return found
