"""The writers of entries, and what they have in common.

To add one: a config with a `kind` and a class with `write` and `usage`, a line in the union, a branch in `make_writer`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Protocol

from pydantic import Field

from prima_ray.knowledge.entries import Entry, Failure, Pair
from prima_ray.knowledge.extractive import ExtractiveConfig, ExtractiveWriter
from prima_ray.knowledge.llm_calls import Usage
from prima_ray.knowledge.llm_endpoint import OpenAiLikeConfig
from prima_ray.knowledge.llm_writer import LlmWriter, LlmWriterConfig
from prima_ray.knowledge.retrieval import Retriever
from prima_ray.knowledge.vocabulary import Vocabulary

WriterConfig = Annotated[ExtractiveConfig | LlmWriterConfig, Field(discriminator="kind")]


class Writer(Protocol):
    """Pairs -> entries that `grounding.ground` has yet to hold against their passages."""

    @property
    def usage(self) -> Usage | None:
        """What a language model was asked so far; None for a writer that has none."""
        ...

    def write(
        self, pairs: Iterable[Pair], progress: Callable[[int], object] | None = None
    ) -> Iterator[Entry | Failure]:
        """An entry or a failure a pair, in any order.

        Args:
            progress: is told the pairs that are done since it was last told.
        """
        ...


def check_writer(config: WriterConfig) -> None:
    """What can be told before there is an index: that an endpoint's client is installed and its key is set.

    Raises:
        PrimaError: one of them is not.
    """
    if isinstance(config, LlmWriterConfig) and isinstance(config.llm, OpenAiLikeConfig):
        config.llm.load()


def make_writer(
    config: WriterConfig,
    vocabulary: Vocabulary,
    retriever: Retriever,
    *,
    allow: Sequence[str] | None = None,
    cache: str | Path | None = None,
) -> Writer:
    """The writer that a config names.

    Args:
        allow: names of the sources that may be quoted; None: all that the retriever has.
        cache: a folder in which a language model's answers are kept, so that no call is made twice; None: nowhere.

    Raises:
        PrimaError: the language model cannot be had.
    """
    if isinstance(config, ExtractiveConfig):
        return ExtractiveWriter(config, vocabulary, retriever, allow)
    return LlmWriter.load(config, vocabulary, retriever, allow=allow, cache=cache)
