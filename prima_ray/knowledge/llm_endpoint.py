"""A language model behind an endpoint that speaks OpenAI's chat completions: vLLM, Ray Serve, a hosted one."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from prima_ray.base import PrimaError, StrictConfig
from prima_ray.knowledge.chat_model import (
    ChatModel,
    Message,
    RefusedError,
    Reply,
    TransientError,
    as_llama_messages,
    as_reply,
)
from prima_ray.models.tokenizer import first_line

_LETTERS_PER_TOKEN = 3
"""English has about four; where the tokenizer is not known, rather too many tokens are counted than too few."""
_PASSING = (408, 409, 425, 429)
"""Statuses below 500 that may not come again."""


class OpenAiLikeConfig(StrictConfig):
    """Where it is, which model, and what an answer may cost."""

    kind: Literal["openai_like"] = "openai_like"
    api_base: str
    """Up to and with `/v1`."""
    model: str = Field(min_length=1)
    """As the endpoint names it."""
    revision: str | None = None
    """Tells models of the same name apart: kept answers are those of name and revision, at whatever address."""
    api_key_env: str | None = Field(default=None, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    """The environment variable that holds the key; the key itself stands in no file."""
    context_window: int = Field(default=8192, ge=1024)
    max_tokens: int = Field(default=1024, ge=64)
    temperature: float = Field(default=0.0, ge=0.0, le=2.0)
    timeout_s: float = Field(default=120.0, gt=0.0)
    answer_format: Literal["text", "json_object", "json_schema"] = "text"
    """What the endpoint holds the model to, where it can (`response_format`). Answers are checked in any case."""
    extra_body: dict[str, Any] = Field(default_factory=dict)
    """Fields of the request that only this endpoint knows, e.g. `chat_template_kwargs: {enable_thinking: false}`."""
    prompt_price: float | None = Field(default=None, ge=0.0)
    """Of a million tokens, in any currency."""
    completion_price: float | None = Field(default=None, ge=0.0)

    @field_validator("api_base")
    @classmethod
    def _is_address(cls, value: str) -> str:
        parts = urlsplit(value)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{value!r} is no address; it looks like http://127.0.0.1:8000/v1")
        if parts.username or parts.password or parts.query:
            raise ValueError("holds a name, a password or a query; name the key's variable in api_key_env")
        return value.rstrip("/")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.prompt_price is None) != (self.completion_price is None):
            raise ValueError("prompt_price and completion_price: give both or neither")
        if self.context_window < 2 * self.max_tokens:
            raise ValueError(
                f"context_window {self.context_window} leaves no room beside max_tokens {self.max_tokens}: "
                "it is at least twice as large"
            )
        return self

    def load(self) -> ChatModel:
        """The endpoint; it is not asked yet.

        Raises:
            PrimaError: the key's variable is not set, or the client is not installed.
        """
        try:
            from llama_index.llms.openai_like import OpenAILike
        except ImportError:
            raise PrimaError(
                "llama-index-llms-openai-like is not installed", mend="Install prima-ray[llm], or take another model."
            ) from None
        # Without a key of ours the client would send the one in OPENAI_API_KEY to whatever address stands here.
        key = "none"
        if self.api_key_env is not None:
            key = os.environ.get(self.api_key_env, "").strip()
            if not key:
                raise PrimaError(
                    f"the environment variable {self.api_key_env} is not set",
                    where=self.api_base,
                    mend=f"Set {self.api_key_env} to the endpoint's key, or leave api_key_env out.",
                )
        llm = OpenAILike(
            model=self.model,
            api_base=self.api_base,
            api_key=key,
            is_chat_model=True,
            context_window=self.context_window,
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            timeout=self.timeout_s,
            max_retries=0,  # ours count, obey rate limits, and can be interrupted
            additional_kwargs={"extra_body": self.extra_body} if self.extra_body else {},
        )
        return _Endpoint(self, llm, key)


@dataclass(frozen=True)
class _Endpoint:
    config: OpenAiLikeConfig
    llm: Any = field(repr=False)  # its own shows the key
    key: str = field(repr=False)

    @property
    def identity(self) -> Mapping[str, Any]:
        # Not the address: on a cluster it is the node's that happens to serve the model this time.
        names = ("model", "revision", "max_tokens", "temperature", "answer_format", "extra_body")
        return {"kind": self.config.kind, **{name: getattr(self.config, name) for name in names}}

    @property
    def where(self) -> str:
        return self.config.api_base

    @property
    def context_window(self) -> int:
        return self.config.context_window

    @property
    def max_tokens(self) -> int:
        return self.config.max_tokens

    def count_tokens(self, text: str) -> int:
        return -(-len(text) // _LETTERS_PER_TOKEN)

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float | None:
        if self.config.prompt_price is None or self.config.completion_price is None:
            return None
        return (prompt_tokens * self.config.prompt_price + completion_tokens * self.config.completion_price) / 1e6

    def chat(self, messages: Sequence[Message], *, schema: Mapping[str, Any]) -> Reply:
        import openai

        options: dict[str, Any] = {}
        if self.config.answer_format == "json_schema":
            described = {"name": "entry", "schema": schema, "strict": True}
            options["response_format"] = {"type": "json_schema", "json_schema": described}
        elif self.config.answer_format == "json_object":
            options["response_format"] = {"type": "json_object"}
        try:
            return as_reply(self.llm.chat(as_llama_messages(messages), **options))
        except openai.OpenAIError as error:
            raise self._translated(error) from None
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            # A 200 whose body is no completion, as a proxy may give.
            raise TransientError(f"the answer is no chat completion ({first_line(error)})") from None

    def _translated(self, error: Exception) -> Exception:
        import openai

        # Some endpoints repeat the key in their complaint.
        said = first_line(error).replace(self.key, "***") if self.config.api_key_env else first_line(error)
        if isinstance(error, openai.APITimeoutError):
            return TransientError(f"no answer within {self.config.timeout_s:g} s")
        if isinstance(error, openai.APIConnectionError):
            cause = first_line(error.__cause__) if isinstance(error.__cause__, Exception) else said
            return TransientError(f"no connection ({cause})", reached=_was_reached(error.__cause__))
        if not isinstance(error, openai.APIStatusError):
            return TransientError(said)
        return self._of_status(error, said)

    def _of_status(self, error: Any, said: str) -> Exception:
        status: int = error.status_code
        if status in (401, 403):
            named = self.config.api_key_env
            return PrimaError(
                f"the endpoint does not let us in: {said}",
                where=self.where,
                mend=f"Check the key in {named}." if named else "Name the variable with its key in api_key_env.",
            )
        if status == 404:
            return PrimaError(
                f"no such model or address: {said}",
                where=self.where,
                mend=f"Check model ({self.config.model}) and api_base, which ends in /v1 as a rule; "
                "GET api_base/models lists the models.",
            )
        if status in _PASSING or status >= 500:
            return TransientError(said, retry_after_s=_retry_after_s(error.response.headers))
        return RefusedError(said)


def _was_reached(cause: BaseException | None) -> bool:
    import httpx

    return not isinstance(cause, httpx.ConnectError | httpx.UnsupportedProtocol)


def _retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Seconds, by a number or a date."""
    said = headers.get("retry-after", "").strip()
    try:
        wanted = float(said)
    except ValueError:
        try:
            wanted = (parsedate_to_datetime(said) - datetime.now(UTC)).total_seconds()
        except (TypeError, ValueError):
            return None
    return max(0.0, wanted) if wanted == wanted else None  # noqa: PLR0124 - not a number
