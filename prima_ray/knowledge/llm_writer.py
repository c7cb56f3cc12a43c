"""Passages -> entries by a language model: retrieve, ask, check, ask again, and record what comes to nothing.

What the model may not do is in `llm_prompt.py`, how its answers are checked in `llm_answer.py`, and who decides in the
end what is kept in `grounding.py`. Calls that were answered are not made again (`llm_calls.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import islice
from pathlib import Path
from typing import Literal, Self

from pydantic import Field

from prima_ray.base import PrimaError
from prima_ray.knowledge.chat_model import ChatModel, Message, RefusedError
from prima_ray.knowledge.entries import Entry, Failure, FailureReason, Pair
from prima_ray.knowledge.extractive import NO_EVIDENCE
from prima_ray.knowledge.llm import LlmConfig
from prima_ray.knowledge.llm_answer import answer_schema, check
from prima_ray.knowledge.llm_calls import CallCache, Caller, CallsConfig, UnansweredError, Usage
from prima_ray.knowledge.llm_limits import StoppedError
from prima_ray.knowledge.llm_prompt import Shown, first_messages, fitting, show, with_mistake
from prima_ray.knowledge.pair_passages import PassagesConfig, ask
from prima_ray.knowledge.retrieval import Retriever
from prima_ray.knowledge.retrievers import fuse
from prima_ray.knowledge.vocabulary import Vocabulary

_MAX_ANSWER = 4000
"""Letters of a failure's last answer that are kept."""
_MISTAKE_TOKENS = 200
_RRF_K = 60


class LlmWriterConfig(PassagesConfig):
    """The writer that asks a language model."""

    kind: Literal["llm"] = "llm"
    llm: LlmConfig
    passages: int = Field(default=20, ge=1)
    """Passages that each query asks for."""
    max_passages: int = Field(default=24, ge=1)
    """Passages that the model reads, the best of all queries; fewer where its context window is smaller."""
    max_statements: int = Field(default=6, ge=1, le=50)
    max_attempts: int = Field(default=3, ge=1)
    """Answers a pair until it counts as failed."""
    calls: CallsConfig = CallsConfig()


class LlmWriter:
    """See `writing.Writer`."""

    def __init__(
        self,
        config: LlmWriterConfig,
        model: ChatModel,
        vocabulary: Vocabulary,
        retriever: Retriever,
        *,
        allow: Sequence[str] | None = None,
        cache: str | Path | None = None,
    ) -> None:
        self._config = config
        self._model = model
        self._vocabulary = vocabulary
        self._retriever = retriever
        self._allow = allow
        self._schema = answer_schema()
        self._caller = Caller(
            model, config.calls, schema=self._schema, cache=CallCache(cache) if cache is not None else None
        )

    @classmethod
    def load(
        cls,
        config: LlmWriterConfig,
        vocabulary: Vocabulary,
        retriever: Retriever,
        *,
        allow: Sequence[str] | None = None,
        cache: str | Path | None = None,
    ) -> Self:
        """A writer with the model that its config names.

        Raises:
            PrimaError: the model cannot be had.
        """
        return cls(config, config.llm.load(), vocabulary, retriever, allow=allow, cache=cache)

    @property
    def usage(self) -> Usage:
        """Of all that was written so far."""
        return self._caller.usage

    def write(
        self, pairs: Iterable[Pair], progress: Callable[[int], object] | None = None
    ) -> Iterator[Entry | Failure]:
        """An entry or a failure a pair, as they are done.

        Whoever stops early (Ctrl-C, an error) waits for the calls under way, since they are paid for, and no longer.

        Raises:
            PrimaError: the endpoint does not take our calls, or answers nothing any more.
        """
        left = iter(pairs)
        self._caller.begin()
        with ThreadPoolExecutor(self._config.calls.concurrency, thread_name_prefix="llm") as threads:
            running: set[Future[Entry | Failure]] = set()
            try:
                while True:
                    # The index is asked by this thread alone, and not much further ahead than the model has come.
                    for factor, diagnosis in islice(left, 2 * self._config.calls.concurrency - len(running)):
                        shown = self._shown(factor, diagnosis)
                        running.add(threads.submit(self._written, factor, diagnosis, shown))
                    if not running:
                        return
                    done, running = wait(running, return_when=FIRST_COMPLETED)
                    for item in done:
                        if isinstance(item.exception(), StoppedError):
                            continue  # another call's error is the reason, and comes
                        written = item.result()
                        if progress:
                            progress(1)
                        yield written
            except BaseException:
                self._caller.stop()
                for item in running:
                    item.cancel()
                raise

    def _shown(self, factor: str, diagnosis: str) -> list[Shown]:
        answers = ask(factor, diagnosis, self._config, self._vocabulary, self._retriever, allow=self._allow)
        hits = fuse(answers, [1.0] * len(answers), rrf_k=_RRF_K)[: self._config.max_passages]
        return show([hit.chunk for hit in hits])

    def _written(self, factor: str, diagnosis: str, found: Sequence[Shown]) -> Entry | Failure:
        if not found:
            return Entry(
                factor=factor, diagnosis=diagnosis, direction="no_evidence", strength=None, summary=NO_EVIDENCE
            )
        shown = self._fitting(factor, diagnosis, found)
        first = first_messages(
            factor, diagnosis, shown, self._vocabulary, schema=self._schema, num=self._config.max_statements
        )
        messages, attempts = first, self._config.max_attempts
        asked: list[list[Message]] = []
        reason: FailureReason = "malformed"
        mistake, said = "", None
        for attempt in range(1, attempts + 1):
            note = {"factor": factor, "diagnosis": diagnosis, "attempt": attempt}
            try:
                reply = self._caller.call(messages, note=note)
            except (RefusedError, UnansweredError) as error:
                reason = "refused" if isinstance(error, RefusedError) else "unanswered"
                return Failure(factor, diagnosis, reason, str(error), attempt - 1, said)
            asked.append(messages)
            said = reply.text[:_MAX_ANSWER]
            checked = check(
                reply.text, factor, diagnosis, shown, self._vocabulary, max_statements=self._config.max_statements
            )
            if checked.entry is not None and (checked.mistake is None or attempt == attempts):
                return checked.entry
            reason, mistake = checked.reason, checked.mistake or ""
            if reply.finish_reason == "length":
                mistake = f"it was cut off after {self._model.max_tokens} tokens; write less. {mistake}"
            messages = with_mistake(first, reply.text, mistake, attempt=attempt)
        for item in asked:
            self._caller.forget(item)
        return Failure(factor, diagnosis, reason, mistake, attempts, said)

    def _fitting(self, factor: str, diagnosis: str, found: Sequence[Shown]) -> list[Shown]:
        """The passages for which the context window has room, beside the rules, an answer and a mistaken one before."""
        model = self._model
        empty = first_messages(
            factor, diagnosis, (), self._vocabulary, schema=self._schema, num=self._config.max_statements
        )
        rules = sum(model.count_tokens(item["content"]) for item in empty)
        again = model.max_tokens if self._config.max_attempts > 1 else 0
        budget = model.context_window - model.max_tokens - rules - again - _MISTAKE_TOKENS
        if budget <= 0:
            raise PrimaError(
                f"a context window of {model.context_window} tokens has no room for passages beside "
                f"the rules ({rules}) and the answer ({model.max_tokens})",
                where=model.where,
                mend="Raise writer.llm.context_window, or lower writer.llm.max_tokens.",
            )
        return fitting(found, budget, model.count_tokens)
