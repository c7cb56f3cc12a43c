"""Between HTTP and a model: what the app asks, and what answers it in this process. No Ray.

`Model` is a loaded run that answers batches; `LocalEngine` runs it in threads; `serve_engine.ServeEngine` runs it in
replicas of Ray Serve. All three give the same answers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

from prima_ray.base import PrimaError
from prima_ray.data.description import DataSetConfig
from prima_ray.inference.predictor import Exam
from prima_ray.inference.reference import Reference
from prima_ray.serving.schemas import ModelCard


@dataclass(frozen=True)
class Question:
    """One exam that is asked about."""

    exam: Exam
    explain: bool = False


@dataclass(frozen=True)
class Answer:
    """What a model says, as fields of `schemas.Diagnosis`, and what it took."""

    fields: dict[str, Any]
    card: ModelCard
    seconds: dict[str, float] = field(default_factory=dict)
    """Stage -> seconds of the batch that the exam was in."""
    batch_size: int = 1
    drift: Mapping[str, str] = field(default_factory=dict)
    """Variable of the model's reference -> this exam's answer."""


@dataclass(frozen=True)
class Served:
    """What is served now."""

    card: ModelCard
    data_set: DataSetConfig
    read_attributes: tuple[str, ...]
    reference: Reference | None = None
    """What was usual at training; None where the model does not say."""


class Unavailable(Exception):  # noqa: N818 - an answer
    """Nobody can answer now; whoever asks may ask again."""

    def __init__(self, detail: str, *, reason: str, retry_after_s: float = 5.0) -> None:
        super().__init__(detail)
        self.detail, self.reason, self.retry_after_s = detail, reason, retry_after_s


class Engine(Protocol):
    """What the app asks."""

    def served(self) -> Served:
        """The model that the next request will be answered by."""

    async def answer(self, question: Question) -> Answer:
        """One exam's answer.

        Raises:
            PrimaError: the exam cannot be used.
            Unavailable: too many wait, or no replica answers in time.
        """

    async def check(self) -> None:
        """Readiness: the known exam is predicted as at training time.

        Raises:
            PrimaError: it is not.
            Unavailable: nobody answers.
        """


class Answering(Protocol):
    """A loaded model."""

    @property
    def served(self) -> Served: ...

    def answer(self, questions: Sequence[Question]) -> list[Answer | PrimaError]:
        """In the order of the questions. One that cannot be answered does not keep the others from it."""

    def check(self) -> None:
        """See `Engine.check`."""


class LocalEngine:
    """A model in this process, an exam at a time in so many threads."""

    def __init__(self, model: Answering, *, threads: int = 1, max_waiting: int = 128, timeout_s: float = 30.0) -> None:
        self._model = model
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="model")
        self._waiting, self._max_waiting, self._timeout_s = 0, max_waiting, timeout_s

    def served(self) -> Served:
        return self._model.served

    async def answer(self, question: Question) -> Answer:
        if self._waiting >= self._max_waiting:
            raise Unavailable("too many requests are waiting", reason="queue_full", retry_after_s=1.0)
        self._waiting += 1
        try:
            async with asyncio.timeout(self._timeout_s):
                found = (await self._run(self._model.answer, [question]))[0]
        except TimeoutError:
            raise Unavailable(f"no answer within {self._timeout_s:g} s", reason="timeout") from None
        finally:
            self._waiting -= 1
        if isinstance(found, PrimaError):
            raise found
        return cast(Answer, found)

    async def check(self) -> None:
        await self._run(self._model.check)

    async def _run(self, function: Any, *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *arguments)
