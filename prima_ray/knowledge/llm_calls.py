"""Calls of a language model: none twice, not too many at once, tried again where that helps, counted.

An answer is a file in the cache as soon as it is there, named by a hash of the model's identity and the messages. A job
that was killed finds it, and so does one with another writer's config, another address or more threads. Answers that
came to nothing are dropped: the next run asks anew.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from prima_ray.base import PrimaError, StrictConfig, hash_json, read_json, write_json
from prima_ray.knowledge.chat_model import ChatModel, Message, RefusedError, Reply, TransientError
from prima_ray.knowledge.llm_limits import RateLimiter, StoppedError

CACHE_VERSION = 1


class CallsConfig(StrictConfig):
    """How many calls at a time, and how patiently."""

    concurrency: int = Field(default=4, ge=1)
    """Calls at a time. A model in this process works on one at a time whatever is said here."""
    requests_per_minute: int | None = Field(default=None, ge=1)
    tokens_per_minute: int | None = Field(default=None, ge=1)
    """Of prompts and answers together; an estimate until the answer is there."""
    max_retries: int = Field(default=5, ge=0)
    """After a call that failed for a reason that may pass: too many requests, a server's error, no answer in time."""
    backoff_s: float = Field(default=1.0, gt=0.0)
    """The wait before the first retry; it doubles each time, less up to half by chance. `Retry-After` overrules it."""
    max_wait_s: float = Field(default=120.0, gt=0.0)
    """The longest wait. An endpoint that asks for a longer one is not asked again for this call."""
    give_up_after: int = Field(default=5, ge=1)
    """Calls in a row without an answer, after which the work ends with an error."""


@dataclass(slots=True)
class Usage:
    """What was asked and what it took."""

    calls: int = 0
    """Answers that were had from the model."""
    cached_calls: int = 0
    """Answers that an earlier run had."""
    retries: int = 0
    prompt_tokens: int = 0
    """Of `calls`."""
    completion_tokens: int = 0
    uncounted_calls: int = 0
    """Calls whose tokens the endpoint did not tell: not in the sums."""
    cached_prompt_tokens: int = 0
    """Of `cached_calls`: paid for before."""
    cached_completion_tokens: int = 0
    cost: float | None = None
    """Of `calls`, by the config's prices; None without prices."""

    def as_dict(self) -> dict[str, int | float | None]:
        """Plain data, for a report."""
        return asdict(self)


class UnansweredError(Exception):
    """A call that came to nothing, however often it was made."""


class _Record(StrictConfig):
    key: str
    reply: Reply
    model: dict[str, Any]
    where: str
    note: dict[str, Any]
    at: str


class CallCache:
    """A file an answer; several processes may share the folder."""

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)

    def get(self, key: str) -> Reply | None:
        """The answer that was kept; None where there is none, or its file is damaged."""
        try:
            found = read_json(self._path(key))
            record = _Record.model_validate(found)
        except (PrimaError, ValidationError):
            return None
        return record.reply if record.key == key else None

    def put(self, key: str, reply: Reply, *, model: Mapping[str, Any], where: str, note: Mapping[str, Any]) -> None:
        """Keep an answer. The note says what it is an answer to, for people."""
        at = datetime.now(UTC).isoformat(timespec="seconds")
        record = {
            "key": key,
            "reply": asdict(reply),
            "model": dict(model),
            "where": where,
            "note": dict(note),
            "at": at,
        }
        write_json(self._path(key), record)

    def drop(self, key: str) -> None:
        """Keep an answer no longer."""
        self._path(key).unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        return self._folder / key[:2] / f"{key}.json"


class Caller:
    """Asks a model on behalf of several threads."""

    def __init__(
        self,
        model: ChatModel,
        config: CallsConfig,
        *,
        schema: Mapping[str, Any],
        cache: CallCache | None = None,
    ) -> None:
        self.usage = Usage(cost=model.cost(0, 0))
        self._model = model
        self._config = config
        self._schema = schema
        self._cache = cache
        self._stop = threading.Event()
        self._limiter = RateLimiter(config.requests_per_minute, config.tokens_per_minute, stop=self._stop)
        self._lock = threading.Lock()
        self._answered = False
        self._lost_in_a_row = 0

    def begin(self) -> None:
        """Calls may be made, also after a stop."""
        self._stop.clear()

    def stop(self) -> None:
        """Begin no call any more; those under way are finished, since they are paid for."""
        self._stop.set()

    def call(self, messages: Sequence[Message], *, note: Mapping[str, Any]) -> Reply:
        """The model's answer, the kept one where there is one.

        Raises:
            PrimaError: a mistake of the user's, or an endpoint that answers nothing any more.
            RefusedError: the endpoint would not take the request.
            UnansweredError: the call failed as often as it may.
            StoppedError: after `stop`.
        """
        key = self._key(messages)
        kept = self._cache.get(key) if self._cache else None
        if kept is not None:
            with self._lock:
                self.usage.cached_calls += 1
                self.usage.cached_prompt_tokens += kept.prompt_tokens or 0
                self.usage.cached_completion_tokens += kept.completion_tokens or 0
            return kept
        try:
            reply = self._ask(messages)
        except PrimaError:
            # What stops one call stops all.
            self.stop()
            raise
        if self._cache:
            self._cache.put(key, reply, model=self._model.identity, where=self._model.where, note=note)
        return reply

    def forget(self, messages: Sequence[Message]) -> None:
        """Do not keep the answer: it was of no use."""
        if self._cache:
            self._cache.drop(self._key(messages))

    def _key(self, messages: Sequence[Message]) -> str:
        return hash_json([CACHE_VERSION, self._model.identity, [dict(item) for item in messages]])

    def _ask(self, messages: Sequence[Message]) -> Reply:
        estimate = sum(self._model.count_tokens(item["content"]) for item in messages) + self._model.max_tokens
        for attempt in range(self._config.max_retries + 1):
            if self._stop.is_set():
                raise StoppedError
            ticket = self._limiter.wait(estimate)
            try:
                reply = self._model.chat(messages, schema=self._schema)
            except RefusedError as error:
                if not self._answered:
                    self._lose(error.detail)
                raise
            except TransientError as error:
                self._wait_after(error, attempt)
                continue
            counted = (reply.prompt_tokens or 0) + (reply.completion_tokens or 0)
            self._limiter.settle(ticket, counted or estimate)
            self._count(reply)
            return reply
        raise AssertionError("the last attempt returns or raises")

    def _wait_after(self, error: TransientError, attempt: int) -> None:
        if not error.reached and not self._answered:
            raise PrimaError(
                error.detail,
                where=self._model.where,
                mend="Start the model's server there, or mend writer.llm.api_base.",
            )
        asked = error.retry_after_s
        if attempt == self._config.max_retries or (asked is not None and asked > self._config.max_wait_s):
            self._lose(error.detail)
            much = f"; it asks to be left alone for {asked:g} s" if asked else ""
            raise UnansweredError(f"{error.detail}{much} (attempt {attempt + 1})")
        with self._lock:
            self.usage.retries += 1
        if asked:
            # It is the same endpoint for all threads.
            self._limiter.close(asked)
            return
        longest = min(self._config.max_wait_s, self._config.backoff_s * 2**attempt)
        self._limiter.sleep(longest * random.uniform(0.5, 1.0))

    def _lose(self, detail: str) -> None:
        with self._lock:
            self._lost_in_a_row += 1
            if self._lost_in_a_row < self._config.give_up_after:
                return
        raise PrimaError(
            f"no answer to {self._config.give_up_after} calls in a row, the last time: {detail}",
            where=self._model.where,
            mend="Look after the model's server and run again: no finished call is repeated.",
        )

    def _count(self, reply: Reply) -> None:
        with self._lock:
            self._answered = True
            self._lost_in_a_row = 0
            self.usage.calls += 1
            if reply.prompt_tokens is None or reply.completion_tokens is None:
                self.usage.uncounted_calls += 1
            self.usage.prompt_tokens += reply.prompt_tokens or 0
            self.usage.completion_tokens += reply.completion_tokens or 0
            self.usage.cost = self._model.cost(self.usage.prompt_tokens, self.usage.completion_tokens)
