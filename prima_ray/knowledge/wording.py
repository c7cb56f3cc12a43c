"""What a sentence says about a relation, from its wording alone: does something raise, lower, or neither.

The words are in `lexicon.py`. Which factor and which diagnosis a clause speaks of, and what is compared with what,
`claims.py` finds out.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from prima_ray.knowledge import lexicon
from prima_ray.knowledge.mentions import Span

Effect = Literal["raises", "lowers", "none"]
Certainty = Literal["strong", "plain", "hedged"]

_READERS: dict[str, dict[Effect, re.Pattern[str]]] = {
    "risk": {"none": lexicon.DENIES, "lowers": lexicon.LOWERS, "raises": lexicon.RAISES},
    "sign": {"none": lexicon.SIGN_DENIES, "lowers": lexicon.SIGN_LOWERS, "raises": lexicon.SIGN_RAISES},
    "site": {"none": lexicon.SITE_DENIES, "lowers": lexicon.SITE_LOWERS, "raises": lexicon.SITE_RAISES},
}


@dataclass(frozen=True, slots=True)
class Wording:
    """What a clause says, and how firmly."""

    effect: Effect
    certainty: Certainty
    cue: Span
    """The words that say it."""


def read_wording(clause: str, role: str = "risk") -> Wording | None:
    """What a clause says of a relation; None where it says nothing.

    Args:
        clause: one clause: with two that say opposite things, the tighter wording counts.
        role: `risk`, `sign` or `site` (`FactorConfig.role`).
    """
    readers = _READERS[role]
    certainty = read_certainty(clause)
    denial = readers["none"].search(clause)
    if denial:
        return Wording("none", certainty, denial.span())
    found = [
        (match.end() - match.start(), match.start(), effect, match.span())
        for effect in ("lowers", "raises")
        for match in readers[effect].finditer(clause)
    ]
    # Of two that share words, the earlier is the fuller: "inversely associated" holds "associated".
    found = [item for item in found if not any(other[1] < item[1] < other[3][1] for other in found)]
    if not found:
        return None
    _, start, effect, span = min(found)
    if role == "risk" and _negated(clause[:start]):
        return Wording("none", certainty, span)
    if role != "risk" and effect == "raises" and _negated(clause[:start]):
        return Wording("none", certainty, span)
    return Wording(effect, certainty, span)  # type: ignore[arg-type]


def _negated(before: str) -> bool:
    """A negator among the words before, none of which ends its reach."""
    reach = re.split(r"[;:()]|,\s", before)[-1]
    return bool(lexicon.NEGATORS.search(lexicon.NO_NEGATORS.sub(" ", reach)))


def read_certainty(text: str) -> Certainty:
    """Emphasis outweighs a hedge in the same sentence: "most studies suggest a stronger ..."."""
    if lexicon.EMPHASIS.search(text):
        return "strong"
    return "hedged" if lexicon.HEDGES.search(text) else "plain"


def is_opinion(sentence: str) -> bool:
    """True for a sentence on what people think of a risk, or do about it."""
    return bool(lexicon.OPINIONS.search(sentence))


def is_advice(sentence: str) -> bool:
    """True for a sentence that tells the reader what to do, or asks."""
    return any(item.search(sentence) for item in (lexicon.COMMANDS, lexicon.ADVICE, lexicon.QUESTIONS))


def is_instruction(sentence: str) -> bool:
    """True for a sentence that tells the reader what to do, or speaks to a machine that reads along."""
    return any(item.search(sentence) for item in (lexicon.COMMANDS, lexicon.ADVICE, lexicon.TO_MACHINES))


def is_single_study(sentence: str) -> bool:
    """True where one study or trial is reported, rather than what many show together."""
    return bool(lexicon.SINGLE_STUDY.search(sentence)) and not lexicon.POOLED.search(sentence)


def speaks_of_course(text: str) -> bool:
    """True where treatment, stage or outlook is named."""
    return bool(lexicon.COURSE.search(text))


def heads_course(heading: str) -> bool:
    """True for a heading of a section on treatment, stage or outlook."""
    return bool(lexicon.COURSE_HEADINGS.search(heading)) and not lexicon.RISK_HEADINGS.search(heading)


def is_excluded(clause: str, start: int) -> bool:
    """True where what begins at ``start`` is spoken of as absent: "without ...", "avoiding ..."."""
    return bool(lexicon.EXCLUDED.search(clause[:start]))


def is_treated(clause: str, start: int) -> bool:
    """True where what begins at ``start`` is what something is put on or given to: "applied to ..."."""
    return bool(lexicon.TREATED.search(clause[:start]))


def split_clauses(sentence: str) -> tuple[str, ...]:
    """Clauses that may say different things: cut at semicolons and before "but", "while" and their like."""
    return tuple(part.strip() for part in lexicon.CLAUSES.split(sentence) if part and part.strip())


def outcome_spans(clause: str) -> tuple[Span, ...]:
    """Where the clause names what the risk is of: after "risk of", before "risk", after "prevents"."""
    spans = []
    for match in lexicon.OUTCOME_BEFORE.finditer(clause):
        end = lexicon.OUTCOME_END.search(clause, match.end())
        spans.append((match.end(), end.start() if end else len(clause)))
    spans += [match.span(1) for match in lexicon.OUTCOME_AFTER.finditer(clause)]
    return tuple(span for span in spans if clause[slice(*span)].strip())


def names_patients(clause: str, start: int) -> bool:
    """True where what begins at ``start`` is what somebody has or had: "patients with ...", "a history of ..."."""
    return bool(lexicon.PATIENTS.search(clause[:start]))


def compared_side(clause: str) -> Span | None:
    """The side of a comparison that the other is held against: what follows "than"."""
    match = lexicon.COMPARED.search(clause)
    if match is None:
        return None
    comma = clause.find(",", match.end())
    return match.end(), comma if comma >= 0 else len(clause)
