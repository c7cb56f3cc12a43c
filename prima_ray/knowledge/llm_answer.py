"""A language model's answer -> an entry, or what is wrong with it, in words that the model is told.

Nothing of an answer is mended. It is one JSON object of the schema, cites passages that were shown, and its direction
is not the contrary of what it quotes; else it is a mistake. Whether quotes stand and statements follow, `grounding.py`
decides after all attempts; that a quote does not stand is told the model too, as long as it may try again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import Field, ValidationError

from prima_ray.base import StrictConfig
from prima_ray.knowledge.claims import find_claims
from prima_ray.knowledge.entries import Direction, Entry, FailureReason, Quote, Statement, Strength
from prima_ray.knowledge.llm_prompt import Shown
from prima_ray.knowledge.passages import find_words, normalise
from prima_ray.knowledge.vocabulary import Vocabulary

_THOUGHT = re.compile(r"^\s*<think>.*?</think>", re.DOTALL)
_FENCED = re.compile(r"^\s*```(?:json)?\s*\n(.*?)\n?\s*```\s*$", re.DOTALL)
_CONTRARY: dict[Direction, str] = {"raises": "lowers", "lowers": "raises"}


class AnsweredQuote(StrictConfig):
    """Words of a passage, copied letter for letter."""

    passage: str
    quote: str = Field(min_length=1, max_length=2000)


class AnsweredStatement(StrictConfig):
    """One thing that the passages say, and the words it rests on."""

    text: str = Field(min_length=1, max_length=1000)
    quotes: tuple[AnsweredQuote, ...] = Field(min_length=1, max_length=8)


class Answer(StrictConfig):
    """What a model is asked for."""

    direction: Direction
    strength: Strength | None
    summary: str = Field(min_length=1, max_length=2000)
    statements: tuple[AnsweredStatement, ...] = Field(max_length=50)


@dataclass(frozen=True, slots=True)
class Checked:
    """An answer that was read."""

    entry: Entry | None
    """None where it cannot be used."""
    mistake: str | None
    """For the model; with an entry, one that an entry may have."""
    reason: FailureReason = "malformed"


def answer_schema() -> dict[str, Any]:
    """JSON schema of an answer, of the keywords that endpoints which hold a model to one understand."""
    schema: dict[str, Any] = _bare(Answer.model_json_schema())
    return schema


def _bare(node: Any) -> Any:
    if isinstance(node, list):
        return [_bare(item) for item in node]
    if not isinstance(node, dict):
        return node
    dropped = ("title", "description", "default", "minLength", "maxLength", "minItems", "maxItems")
    return {
        key: {name: _bare(part) for name, part in value.items()} if key in ("properties", "$defs") else _bare(value)
        for key, value in node.items()
        if key not in dropped
    }


class _MistakeError(Exception):
    """Why an answer cannot be used."""

    def __init__(self, told: str, reason: FailureReason = "malformed") -> None:
        super().__init__(told)
        self.told = told
        self.reason = reason


def check(
    text: str, factor: str, diagnosis: str, shown: Sequence[Shown], vocabulary: Vocabulary, *, max_statements: int
) -> Checked:
    """Read an answer on a pair."""
    by_label = {item.label: item for item in shown}
    try:
        answer = Answer.model_validate(_json_of(text))
        _check_citations(answer, by_label, max_statements)
        entry = _entry(answer, factor, diagnosis, by_label)
        _check_direction(answer, factor, diagnosis, by_label, vocabulary)
    except ValidationError as error:
        return Checked(None, _told(error))
    except _MistakeError as mistake:
        return Checked(None, mistake.told, mistake.reason)
    return Checked(entry, _not_standing(answer, by_label))


def _json_of(text: str) -> Any:
    """The one JSON object of a text that holds nothing else but a model's thoughts and a code fence.

    Raises:
        _MistakeError: there is none, or more.
    """
    said = _THOUGHT.sub("", text).strip()
    fence = _FENCED.match(said)
    said = fence[1].strip() if fence else said
    if not said:
        raise _MistakeError("it is empty.")
    try:
        found = json.loads(said, object_pairs_hook=_distinct)
    except json.JSONDecodeError as error:
        raise _MistakeError(f"it is not one JSON object ({error.msg} at letter {error.pos}).") from None
    except RecursionError:
        raise _MistakeError("it is nested too deeply.") from None
    except ValueError:
        # Python reads no integer of thousands of digits.
        raise _MistakeError("it holds a number that is too long.") from None
    if not isinstance(found, dict):
        raise _MistakeError("it is JSON, but no object.")
    return found


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if len(set(keys)) < len(keys):
        raise _MistakeError("a key stands twice in an object.")
    return dict(pairs)


def _told(error: ValidationError) -> str:
    problems = []
    for item in error.errors()[:3]:
        place = ".".join(map(str, item["loc"]))
        message = item["msg"].removeprefix("Value error, ")
        problems.append(f"{place}: {message}" if place else message)
    return f"it does not follow the schema ({'; '.join(problems)})."


def _entry(answer: Answer, factor: str, diagnosis: str, by_label: Mapping[str, Shown]) -> Entry:
    return Entry(
        factor=factor,
        diagnosis=diagnosis,
        direction=answer.direction,
        strength=answer.strength,
        summary=answer.summary,
        statements=tuple(
            Statement(
                text=part.text,
                quotes=tuple(
                    Quote(chunk_id=by_label[item.passage].chunk.chunk_id, quote=item.quote) for item in part.quotes
                ),
            )
            for part in answer.statements
        ),
    )


def _check_citations(answer: Answer, by_label: Mapping[str, Shown], max_statements: int) -> None:
    unknown = [item.passage for part in answer.statements for item in part.quotes if item.passage not in by_label]
    if unknown:
        labels = list(by_label)
        known = f"{labels[0]} to {labels[-1]}"
        raise _MistakeError(f"it cites the passage {unknown[0]!r}, the passages are {known}.")
    if len(answer.statements) > max_statements:
        raise _MistakeError(f"it has {len(answer.statements)} statements, at most {max_statements} are wanted.")
    for item, passage in _cited(answer, by_label):
        # It instructs, so it is no evidence, wherever the model has it from.
        if not _stands(item, passage.text) and _stands(item, passage.chunk.text):
            raise _MistakeError(f"it quotes a part of {item.passage} that was left out.")


def _check_direction(
    answer: Answer, factor: str, diagnosis: str, by_label: Mapping[str, Shown], vocabulary: Vocabulary
) -> None:
    """A mistake where all quotes whose wording can be read say the contrary of the direction."""
    wrong = _CONTRARY.get(answer.direction)
    if wrong is None:
        return
    said: set[str] = set()
    for item, passage in _cited(answer, by_label):
        quoted = normalise(item.quote)
        for claim in find_claims(passage.chunk, factor, diagnosis, vocabulary):
            sentence = normalise(claim.quotes[-1])
            if quoted and (quoted in sentence or sentence in quoted):
                said.add(claim.effect)
    if wrong in said and answer.direction not in said:
        raise _MistakeError(f"direction is {answer.direction}, but what it quotes says {wrong}.", "contradictory")


def _cited(answer: Answer, by_label: Mapping[str, Shown]) -> Iterator[tuple[AnsweredQuote, Shown]]:
    for statement in answer.statements:
        for item in statement.quotes:
            yield item, by_label[item.passage]


def _not_standing(answer: Answer, by_label: Mapping[str, Shown]) -> str | None:
    for item, passage in _cited(answer, by_label):
        if not _stands(item, passage.text):
            return f"the text of {item.passage} does not say {json.dumps(item.quote, ensure_ascii=False)}."
    return None


def _stands(item: AnsweredQuote, text: str) -> bool:
    return find_words(text, item.quote) is not None
