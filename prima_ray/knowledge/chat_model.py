"""What a language model is to those who call it: messages in, a reply with its tokens out.

There are three kinds of trouble: a `PrimaError` that the user must mend, a `TransientError` that time may mend, and a
`RefusedError` that neither will.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

Message = Mapping[Literal["role", "content"], str]
"""`role` is `system`, `user` or `assistant`."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What a model said."""

    text: str
    finish_reason: str | None
    """`length`: it was cut off at `max_tokens`."""
    prompt_tokens: int | None
    """None where the endpoint does not tell."""
    completion_tokens: int | None


class TransientError(Exception):
    """A call that may succeed later."""

    def __init__(self, detail: str, *, retry_after_s: float | None = None, reached: bool = True) -> None:
        super().__init__(detail)
        self.detail = detail
        self.retry_after_s = retry_after_s
        """What the endpoint asked for."""
        self.reached = reached
        """False where nobody listens at the address."""


class RefusedError(Exception):
    """A request that the endpoint would not take, and will not take later."""

    def __init__(self, detail: str) -> None:
        super().__init__(detail)
        self.detail = detail


class ChatModel(Protocol):
    """A language model that is ready to be asked."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """All that an answer depends on besides the messages."""
        ...

    @property
    def where(self) -> str:
        """Its address or name, for messages."""
        ...

    @property
    def context_window(self) -> int:
        """Tokens of prompt and answer together."""
        ...

    @property
    def max_tokens(self) -> int:
        """Tokens of an answer, at most."""
        ...

    def count_tokens(self, text: str) -> int:
        """As many tokens as the text has, or a few more."""
        ...

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float | None:
        """In the currency of the config's prices; None without prices."""
        ...

    def chat(self, messages: Sequence[Message], *, schema: Mapping[str, Any]) -> Reply:
        """Ask once. Called by several threads.

        Args:
            schema: of the JSON that is expected, for endpoints that can be held to one.

        Raises:
            PrimaError: a mistake of the user's.
            TransientError: ask again later.
            RefusedError: do not ask again.
        """
        ...


def as_llama_messages(messages: Sequence[Message]) -> list[Any]:
    """Messages as LlamaIndex has them."""
    from llama_index.core.llms import ChatMessage

    return [ChatMessage(role=item["role"], content=item["content"]) for item in messages]


def as_reply(response: Any) -> Reply:
    """LlamaIndex's answer; a model that says nothing says the empty text."""
    # A model behind an endpoint is counted in the response, one in this process in the message.
    counted = {**response.message.additional_kwargs, **response.additional_kwargs}
    finished = counted.get("finish_reason")
    if finished is None and response.raw is not None:
        finished = getattr(response.raw.choices[0], "finish_reason", None)
    return Reply(
        text=response.message.content or "",
        finish_reason=finished,
        prompt_tokens=counted.get("prompt_tokens"),
        completion_tokens=counted.get("completion_tokens"),
    )


def apart(text: str, marks: re.Pattern[str]) -> str:
    """The text with none of the marks in it, though it looks the same.

    A blank of no width stands after a mark's first letter; where quotes are compared it does not count.
    """
    return marks.sub(lambda found: f"{found[0][0]}\u200b{found[0][1:]}", text)
