"""Who decided what about an entry: an append-only log, and the state that follows from it.

`vetting.jsonl` holds a decision a line. Each line carries its own hash and that of the line before, so that a changed
or removed line is noticed; `vetting.head.json` says how far the log had come, so that a cut one is too. This guards
against accidents and against edits by hand. It is no signature: who can write the folder can write a whole new log.

A decision is about what its author had before them: the entry as it then was and the passages it cites (`entry_hash`).
Where either is another today, the decision does not count and the entry is open again.
"""

from __future__ import annotations

import datetime
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from prima_ray.base import PrimaError, StrictConfig, canonical_json, hash_json, read_json, write_json
from prima_ray.knowledge.corpus import Corpus, citation_problem, entry_hash, wording_hash
from prima_ray.knowledge.entries import Entry

LOG = "vetting.jsonl"
HEAD = "vetting.head.json"
Verb = Literal["accepted", "rejected", "edited", "reopened"]
VERBS: tuple[Verb, ...] = ("accepted", "rejected", "edited", "reopened")
USED = ("accepted", "edited")
"""Who edits an entry vouches for it."""

_log = logging.getLogger(__name__)
_MEND = "Restore the log from a copy; every decision since then has to be made again."


class Verdict(StrictConfig):
    """What a person wants to say of an entry."""

    entry_id: str
    entry_hash: str
    """Of the entry as the person saw it."""
    decision: Verb
    by: str = Field(max_length=200)
    note: str = Field(default="", max_length=10_000)
    edited: Entry | None = None

    @field_validator("by")
    @classmethod
    def _named(cls, value: str) -> str:
        name = " ".join(value.split())
        if not name:
            raise ValueError("a decision needs the name of who decides")
        return name

    @model_validator(mode="after")
    def _edit(self) -> Self:
        if (self.edited is not None) != (self.decision == "edited"):
            raise ValueError("edited: given exactly where the decision is `edited`")
        if self.edited and self.edited.entry_id != self.entry_id:
            raise ValueError(f"edited: is of {self.edited.entry_id}, not of {self.entry_id}")
        return self


class Decision(Verdict):
    """A line of the log."""

    wording_hash: str
    """Of what the entry said: tells a rewritten entry from an edited source."""
    at: str
    """UTC, ISO 8601."""
    previous: str | None
    """The hash of the line before; None on the first."""
    hash: str = ""
    """Of everything above."""


@dataclass(frozen=True)
class Log:
    """What a log holds."""

    decisions: tuple[Decision, ...] = ()
    torn: str = ""
    """The beginning of a line that was never finished: a crash while it was written. It is no decision."""
    size: int = 0
    """Bytes of the complete lines."""

    @property
    def head(self) -> str | None:
        return self.decisions[-1].hash if self.decisions else None


@dataclass(frozen=True)
class Vetted:
    """An entry with what was decided about it."""

    entry: Entry
    """What holds today, with its status."""
    entry_hash: str
    """Of that."""
    proposed: Entry
    """As it was written."""
    decision: Decision | None = None
    """The one that the status comes from."""
    reopened: str | None = None
    """Why it is open again, where an earlier decision does not count any more."""
    history: tuple[Decision, ...] = ()


@dataclass(frozen=True)
class Vetting:
    """Every entry of a corpus, in its order."""

    entries: Mapping[str, Vetted]
    unknown: tuple[str, ...] = field(default=())
    """Ids that the log decides about and the corpus does not hold (any more)."""

    def used(self, *, unvetted: bool = False) -> tuple[Entry, ...]:
        """Accepted and edited entries; with ``unvetted`` those nobody has decided about too. Rejected ones never."""
        wanted = (*USED, "proposed") if unvetted else USED
        return tuple(item.entry for item in self.entries.values() if item.entry.status in wanted)


def utc_now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


# ------------------------------------------------------------------------------------------------------- the log


def read_log(folder: str | Path) -> Log:
    """The decisions of a corpus folder; none where there is no log yet. A torn last line is reported and left out.

    Raises:
        PrimaError: a line was changed or removed.
    """
    # First: whoever appends meanwhile writes the head last.
    head, path = _read_head(Path(folder)), Path(folder) / LOG
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        data = b""
    log = parse_log(data, where=path)
    if head is not None:
        count, digest = head
        if len(log.decisions) < count:
            raise PrimaError(
                f"lines were removed: {count} decisions were written, {len(log.decisions)} are there",
                where=path,
                mend=_MEND,
            )
        if count and log.decisions[count - 1].hash != digest:
            raise PrimaError(f"line {count} is not the one that was written", where=path, mend=_MEND)
    if log.torn:
        _log.warning(
            "%s: the last line was never finished (%d characters; a crash?) and does not count", path, len(log.torn)
        )
    return log


def _read_head(folder: Path) -> tuple[int, str | None] | None:
    path = folder / HEAD
    if not path.exists():
        return None
    raw = read_json(path)
    try:
        return int(raw["decisions"]), raw["hash"]
    except (KeyError, TypeError, ValueError):
        raise PrimaError("damaged: expected the keys `decisions` and `hash`", where=path) from None


def parse_log(data: bytes, *, where: str | Path) -> Log:
    """See `read_log`."""
    *lines, tail = data.split(b"\n")
    decisions: list[Decision] = []
    for number, line in enumerate(lines, start=1):
        decisions.append(_parse_line(line, number, decisions[-1].hash if decisions else None, where))
    size, torn = len(data) - len(tail), ""
    if tail:
        try:
            decisions.append(_parse_line(tail, 0, decisions[-1].hash if decisions else None, where))
            # Whole but for its end: an editor took the newline away, or the crash came in the last byte.
            size = len(data)
        except PrimaError:
            torn = tail.decode(errors="replace")
    return Log(tuple(decisions), torn, size)


def _parse_line(line: bytes, number: int, previous: str | None, where: str | Path) -> Decision:
    try:
        raw = json.loads(line)
        decision = Decision.model_validate(raw)
    except (ValueError, ValidationError, RecursionError):
        raise PrimaError(f"line {number} is no decision: it was changed", where=where, mend=_MEND) from None
    # Of the line as it stands: defaults of a later version of the record would change what a dump of it says.
    if decision.hash != _content_hash(raw):
        raise PrimaError(f"line {number} was changed after it was written", where=where, mend=_MEND)
    if decision.previous != previous:
        before = "the beginning" if previous is None else f"line {number - 1}"
        raise PrimaError(
            f"line {number} does not follow {before}: a line was removed or moved", where=where, mend=_MEND
        )
    return decision


def append(corpus: Corpus, verdicts: Sequence[Verdict], *, now: Callable[[], str] = utc_now) -> tuple[Decision, ...]:
    """Write decisions to the log, all of them or none, and safely beside other reviewers.

    Raises:
        PrimaError: the log is damaged or cannot be written, an entry is unknown, an edit cites what is not there, or
            somebody decided otherwise in between.
    """
    with _locked(corpus.path / LOG) as descriptor:
        log = read_log(corpus.path)
        state, lines = dict(resolve(corpus, log).entries), []
        head, at = log.head, now()
        for verdict in verdicts:
            current = _check(verdict, state, corpus)
            drawn = Decision(**verdict.model_dump(), wording_hash=wording_hash(current.entry), at=at, previous=head)
            decision = drawn.model_copy(update={"hash": _content_hash(drawn.model_dump(mode="json"))})
            state[verdict.entry_id] = _apply(current, decision, corpus)
            lines.append(decision)
            head = decision.hash
        text = "".join(canonical_json(item.model_dump(mode="json")) + "\n" for item in lines)
        _write(descriptor, corpus.path, log, text.encode(), lines)
    return tuple(lines)


def _check(verdict: Verdict, state: Mapping[str, Vetted], corpus: Corpus) -> Vetted:
    current = state.get(verdict.entry_id)
    if current is None:
        raise PrimaError(f"there is no entry {verdict.entry_id!r}", where=corpus.path)
    if verdict.entry_hash != current.entry_hash:
        raise PrimaError(
            f"{verdict.entry_id}: the entry or a passage it cites is another by now",
            where=corpus.path,
            mend="Look at it again, then decide.",
        )
    problem = citation_problem(verdict.edited, corpus.chunks) if verdict.edited else None
    if problem:
        raise PrimaError(f"{verdict.entry_id}: {problem}", where=corpus.path)
    return current


def _content_hash(raw: Mapping[str, Any]) -> str:
    return hash_json({key: value for key, value in raw.items() if key != "hash"})


@contextmanager
def _locked(path: Path) -> Iterator[int]:
    import fcntl  # which Windows lacks: corpora are read there, and vetted elsewhere

    try:
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
    except OSError as error:
        raise PrimaError(f"cannot be written ({error.strerror})", where=path) from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)  # which unlocks


def _write(descriptor: int, folder: Path, log: Log, payload: bytes, decisions: Sequence[Decision]) -> None:
    if not decisions:
        return
    if log.torn:
        # Nobody was told that it was decided; behind it, the next line would be lost too.
        os.ftruncate(descriptor, log.size)
    elif log.size and os.pread(descriptor, 1, log.size - 1) != b"\n":
        payload = b"\n" + payload
    try:
        written = os.write(descriptor, payload)
        if written < len(payload):
            raise OSError(None, "no space left")
        os.fsync(descriptor)
        write_json(folder / HEAD, {"decisions": len(log.decisions) + len(decisions), "hash": decisions[-1].hash})
    except OSError as error:
        os.ftruncate(descriptor, log.size)
        raise PrimaError(f"cannot be written ({error.strerror})", where=folder / LOG) from None


def take_over(corpus: Corpus, source: str | Path) -> Log:
    """Begin the corpus's log with that of an earlier corpus: what has not changed since stays decided.

    Raises:
        PrimaError: the corpus has decisions of its own, or the source is damaged or missing.
    """
    source = Path(source)
    try:
        data = source.read_bytes()
    except OSError as error:
        raise PrimaError(f"cannot be read ({error.strerror})", where=source) from None
    earlier = parse_log(data, where=source)
    with _locked(corpus.path / LOG) as descriptor:
        log = read_log(corpus.path)
        if log.decisions:
            raise PrimaError(
                "the corpus has decisions of its own; an earlier log comes before the first of them",
                where=corpus.path / LOG,
            )
        # Letter for letter: the lines carry hashes of themselves.
        _write(descriptor, corpus.path, log, data[: earlier.size].removesuffix(b"\n") + b"\n", earlier.decisions)
    return earlier


# ------------------------------------------------------------------------------------------------- what follows


def resolve(corpus: Corpus, log: Log) -> Vetting:
    """Each entry's status and content. The last decision that is about what stands there counts."""
    state = {
        item.entry_id: Vetted(
            item.model_copy(update={"status": "proposed"}),
            corpus.hashes[item.entry_id],
            item.model_copy(update={"status": "proposed"}),
        )
        for item in corpus.entries
    }
    unknown: dict[str, None] = {}
    for decision in log.decisions:
        if decision.entry_id in state:
            state[decision.entry_id] = _apply(state[decision.entry_id], decision, corpus)
        else:
            unknown[decision.entry_id] = None
    return Vetting(state, tuple(unknown))


def _apply(current: Vetted, decision: Decision, corpus: Corpus) -> Vetted:
    history = (*current.history, decision)
    why = _why_stale(current, decision, corpus)
    if why:
        # What was decided about this very content before still stands.
        reopened = why if current.decision is None else current.reopened
        return Vetted(current.entry, current.entry_hash, current.proposed, current.decision, reopened, history)
    if decision.decision == "reopened":
        # Open means: as it was proposed. An edit stays in the history.
        base = corpus.hashes[current.proposed.entry_id]
        reopened = f"{decision.by} re-opened it on {decision.at[:10]}"
        return Vetted(current.proposed, base, current.proposed, None, reopened, history)
    entry = (decision.edited or current.entry).model_copy(update={"status": decision.decision})
    digest = entry_hash(entry, corpus.chunks) if decision.edited else current.entry_hash
    return Vetted(entry, digest, current.proposed, decision, None, history)


def _why_stale(current: Vetted, decision: Decision, corpus: Corpus) -> str | None:
    said = f"{decision.by} {decision.decision.replace('reopened', 're-opened')} it on {decision.at[:10]}"
    if decision.entry_hash != current.entry_hash:
        if decision.wording_hash == wording_hash(current.entry):
            return f"{said}; a passage that it cites has changed since"
        return f"{said}; the entry has been rewritten since"
    if decision.edited and citation_problem(decision.edited, corpus.chunks):
        return f"{said}; a passage that the edit cites has changed since"
    return None
