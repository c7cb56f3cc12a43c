"""Vetting in a spreadsheet: the entries as CSV, and the decisions filled in there, back again.

A row is an entry. `decision`, `by` and `note` are to be filled in; with the decision `edited`, `direction`, `strength`
and `summary` may be changed. Statements are shown to be read; they are edited on the review page, beside their
passages.

Texts of the literature are other people's: a cell that a spreadsheet would take for a formula gets an apostrophe in
front, which is taken off again on the way back.
"""

from __future__ import annotations

import csv
import difflib
import io
import re
from collections.abc import Mapping
from pathlib import Path

from pydantic import ValidationError

from prima_ray.base import PrimaError, write_atomic
from prima_ray.knowledge.corpus import Corpus, cited_documents
from prima_ray.knowledge.entries import Entry
from prima_ray.knowledge.vetting import VERBS, Verdict, Vetted, Vetting

COLUMNS = (
    "entry_id", "factor", "diagnosis", "direction", "strength", "summary", "statements", "num_sources", "status",
    "decided_by", "decided_at", "decision", "by", "note", "entry_hash",
)  # fmt: skip
_EDITABLE = ("direction", "strength", "summary")
_MAX_CHARS = 32_000
"""Spreadsheets hold 32,767 characters in a cell."""
_SHOWN = 5
# After a separator too: a spreadsheet set to `;` splits there, whatever this file is separated by.
# The wide forms of = + - @ are formulas to Japanese spreadsheets.
_SIGNS = r"'*[=+\-@\uff1d\uff0b\uff0d\uff20]"
_FORMULA = re.compile(rf"(^|[;\t\r\n])(\s*)(?={_SIGNS})")
_NEUTRALISED = re.compile(rf"(^|[;\t\r\n])(\s*)'(?={_SIGNS})")


def neutralise(text: str) -> str:
    """A cell that no spreadsheet computes; `restore` gives the text back."""
    return _FORMULA.sub(r"\1\2'", text)


def restore(text: str) -> str:
    """The text that `neutralise` was given. An apostrophe that a person typed before a plain word stays."""
    return _NEUTRALISED.sub(r"\1\2", text)


def export_csv(corpus: Corpus, vetting: Vetting, path: str | Path) -> None:
    """Write the spreadsheet: UTF-8 with the mark by which spreadsheets know it.

    Raises:
        PrimaError: the file cannot be written.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, quoting=csv.QUOTE_ALL)
    writer.writeheader()
    for item in vetting.entries.values():
        writer.writerow({key: neutralise(value) for key, value in _row(corpus, item).items()})
    try:
        write_atomic(path, text.getvalue().encode("utf-8-sig"))
    except OSError as error:
        raise PrimaError(f"cannot be written ({error.strerror})", where=path) from None


def _row(corpus: Corpus, item: Vetted) -> dict[str, str]:
    entry, decision = item.entry, item.decision
    return {
        "entry_id": entry.entry_id,
        "factor": corpus.factor_phrase(entry.factor),
        "diagnosis": corpus.diagnosis_phrase(entry.diagnosis),
        "direction": entry.direction,
        "strength": entry.strength or "",
        "summary": entry.summary,
        "statements": _statements(corpus, entry),
        "num_sources": str(len(cited_documents(entry, corpus.chunks))),
        "status": entry.status,
        "decided_by": decision.by if decision else "",
        "decided_at": decision.at if decision else "",
        "decision": "",
        "by": "",
        "note": "",
        "entry_hash": item.entry_hash,
    }


def _statements(corpus: Corpus, entry: Entry) -> str:
    lines = []
    for number, statement in enumerate(entry.statements, start=1):
        lines.append(f"{number}. {statement.text}")
        for quote in statement.quotes:
            chunk = corpus.chunks[quote.chunk_id]
            origin = ", ".join(part for part in (chunk.title, *chunk.heading, chunk.date, chunk.url) if part)
            lines.append(f"“{quote.quote}” ({origin})")
    text = "\n".join(lines)
    return text if len(text) <= _MAX_CHARS else f"{text[:_MAX_CHARS]} [...]"


def import_csv(corpus: Corpus, vetting: Vetting, path: str | Path, *, reviewer: str = "") -> tuple[Verdict, ...]:
    """The decisions of a spreadsheet, in its order. Rows without one, or with one that holds already, are left out.

    Args:
        reviewer: who decides where `by` is empty.

    Raises:
        PrimaError: the file is none of ours, or rows do not match: then no row is taken over.
    """
    verdicts: list[Verdict] = []
    mistakes: list[str] = []
    seen: dict[str, int] = {}
    for number, row in enumerate(_read(Path(path)), start=2):
        name = row["entry_id"]
        try:
            if name not in vetting.entries:
                raise ValueError(f"there is no entry {name!r}")
            if name in seen:
                raise ValueError(f"{name}: stands in row {seen[name]} too")
            seen[name] = number
            verdict = _verdict(corpus, vetting.entries[name], row, reviewer)
        except ValueError as error:
            mistakes.append(f"row {number}: {error}")
            continue
        if verdict:
            verdicts.append(verdict)
    if mistakes:
        more = f"; and {len(mistakes) - _SHOWN} more" if len(mistakes) > _SHOWN else ""
        raise PrimaError(f"nothing was taken over: {'; '.join(mistakes[:_SHOWN])}{more}", where=path)
    return tuple(verdicts)


def _read(path: Path) -> list[dict[str, str]]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise PrimaError(f"cannot be read ({error.strerror})", where=path) from None
    except UnicodeDecodeError:
        raise PrimaError("is not UTF-8 text", where=path, mend="Save it as “CSV UTF-8”.") from None
    first = text.split("\n", 1)[0]
    # A spreadsheet saves with the separator of its language.
    separator = max(",;\t", key=first.count)
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
        absent = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
        if absent:
            raise PrimaError(
                f"has no column {absent[0]!r}", where=path, mend="Export it anew: prima vet CORPUS --export FILE.csv"
            )
        rows = list(reader)
    except csv.Error as error:
        raise PrimaError(f"is not a CSV file ({error})", where=path) from None
    # A row that was cut short has None for what is missing.
    return [{name: restore(row[name] or "") for name in COLUMNS} for row in rows if any(map(_filled, row.values()))]


def _filled(value: object) -> bool:
    return bool(value and str(value).strip())


def _verdict(corpus: Corpus, item: Vetted, row: Mapping[str, str], reviewer: str) -> Verdict | None:
    name, shown = item.entry.entry_id, _row(corpus, item)
    verb, note = row["decision"].strip().lower(), row["note"].strip()
    by = " ".join(row["by"].split()) or " ".join(reviewer.split())
    changed = [key for key in (*_EDITABLE, "statements") if row[key].split() != shown[key].split()]
    if not verb:
        if row["entry_hash"].strip() == item.entry_hash and changed:
            raise ValueError(f"{name}: {changed[0]} was changed without a decision")
        if note:
            raise ValueError(f"{name}: a note without a decision")
        return None
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(VERBS)}"
        raise ValueError(f"{name}: unknown decision {verb!r}; {hint}")
    if not by:
        raise ValueError(f"{name}: who decides? `by` is empty")
    edited = _edit(item.entry, row) if verb == "edited" else None
    if _holds_already(item, verb, by, note, edited):
        return None
    if row["entry_hash"].strip() != item.entry_hash:
        raise ValueError(f"{name}: the entry or a passage it cites is another than when it was exported")
    if "statements" in changed:
        raise ValueError(f"{name}: statements are edited on the review page")
    if verb != "edited" and changed:
        raise ValueError(f"{name}: {changed[0]} was changed, but the decision is {verb!r}; write 'edited'")
    if verb == "edited" and not changed:
        raise ValueError(f"{name}: the decision is 'edited', but nothing was changed")
    return Verdict(
        entry_id=name,
        entry_hash=item.entry_hash,
        decision=verb,
        by=by,
        note=note,
        edited=edited,
    )


def _edit(entry: Entry, row: Mapping[str, str]) -> Entry:
    summary = row["summary"].replace("\r\n", "\n").strip()
    changes = {
        "direction": row["direction"].strip().lower(),
        "strength": row["strength"].strip().lower() or None,
        "summary": entry.summary if summary.split() == entry.summary.split() else summary,
        "status": "edited",
    }
    try:
        return Entry.model_validate({**entry.model_dump(), **changes})
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        said = first["msg"].removeprefix("Value error, ")
        raise ValueError(f"{entry.entry_id}: {f'{key}: ' if key else ''}{said}") from None


def _holds_already(item: Vetted, verb: str, by: str, note: str, edited: Entry | None) -> bool:
    """True where the same file was taken over before."""
    if verb == "reopened":
        last = item.history[-1] if item.history else None
        return item.decision is None and last is not None and (last.decision, last.by, last.note) == (verb, by, note)
    held = item.decision
    if held is None or (held.decision, held.by, held.note) != (verb, by, note):
        return False
    return edited is None or edited == item.entry
