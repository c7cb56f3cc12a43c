"""What the review page shows: the list of entries, and one entry beside its passages. See `review` for the server."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode

from pydantic import ValidationError

from prima_ray.knowledge.chunks import Chunk
from prima_ray.knowledge.corpus import Corpus, cited_documents, without_references
from prima_ray.knowledge.documents import clean_text
from prima_ray.knowledge.entries import Entry
from prima_ray.knowledge.pages import Name, render
from prima_ray.knowledge.passages import marked
from prima_ray.knowledge.vetting import Log, Vetted, Vetting

FILTERS = ("factor", "diagnosis", "status")
Filter = Mapping[str, str]
"""By `FILTERS`; empty: all."""


@dataclass(frozen=True)
class Passage:
    """A passage with the quoted words marked."""

    chunk: Chunk
    pieces: list[tuple[str, bool]]


def matches(entry: Entry, wanted: Filter) -> bool:
    """True where the entry is among those shown."""
    return all(not wanted.get(key) or getattr(entry, key) == wanted[key] for key in FILTERS)


def entry_address(entry_id: str, wanted: Filter) -> str:
    """The entry's page; it remembers what was filtered."""
    return f"/entry?{urlencode({'id': entry_id, **_given(wanted)})}"


def list_address(wanted: Filter) -> str:
    return f"/?{urlencode(_given(wanted))}" if _given(wanted) else "/"


def _given(wanted: Filter) -> dict[str, str]:
    return {key: wanted[key] for key in FILTERS if wanted.get(key)}


def list_page(corpus: Corpus, vetting: Vetting, log: Log, wanted: Filter, *, message: str, nonce: str) -> str:
    """All entries that match."""
    shown = [item for item in vetting.entries.values() if matches(item.entry, wanted)]
    warnings = []
    if log.torn:
        warnings.append(
            "The last line of the log was never finished: somebody's last decision may be missing. Look at the entry "
            "that was decided last."
        )
    if vetting.unknown:
        warnings.append(f"The log speaks of entries that are not in this corpus: {', '.join(vetting.unknown)}.")
    return render(
        "review_list.html.j2",
        nonce=nonce,
        folder=str(corpus.path),
        message=message,
        warnings=warnings,
        num_entries=len(corpus.entries),
        num_decided=sum(item.entry.status != "proposed" for item in vetting.entries.values()),
        filter={key: wanted.get(key, "") for key in FILTERS},
        factors=_names(corpus, "factor"),
        diagnoses=_names(corpus, "diagnosis"),
        rows=[
            {
                "address": entry_address(item.entry.entry_id, wanted),
                "factor": corpus.factor_phrase(item.entry.factor),
                "diagnosis": corpus.diagnosis_phrase(item.entry.diagnosis),
                "entry": item.entry,
                "num_sources": len(cited_documents(item.entry, corpus.chunks)),
                "reopened": item.reopened,
            }
            for item in shown
        ],
    )


def _names(corpus: Corpus, which: str) -> list[Name]:
    phrase = corpus.factor_phrase if which == "factor" else corpus.diagnosis_phrase
    return [Name(key, phrase(key)) for key in dict.fromkeys(getattr(entry, which) for entry in corpus.entries)]


def entry_page(
    corpus: Corpus,
    vetting: Vetting,
    entry_id: str,
    wanted: Filter,
    *,
    token: str,
    nonce: str,
    reviewer: str,
    message: str = "",
    form: Mapping[str, str] | None = None,
) -> str:
    """One entry, to be decided.

    Args:
        form: what was filled in and refused: it is shown again, so that nothing has to be typed twice.
    """
    item = vetting.entries[entry_id]
    names = [name for name, other in vetting.entries.items() if matches(other.entry, wanted) or name == entry_id]
    at = names.index(entry_id)
    return render(
        "review_entry.html.j2",
        nonce=nonce,
        token=token,
        item=item,
        factor=corpus.factor_phrase(item.entry.factor),
        diagnosis=corpus.diagnosis_phrase(item.entry.diagnosis),
        num_sources=len(cited_documents(item.entry, corpus.chunks)),
        summary=without_references(item.entry.summary, corpus.chunks),
        statements=[_statement(corpus, item.entry, number) for number in range(len(item.entry.statements))],
        filter={key: wanted.get(key, "") for key in FILTERS},
        back=list_address(wanted),
        previous=entry_address(names[at - 1], wanted) if at else None,
        next=entry_address(names[at + 1], wanted) if at + 1 < len(names) else None,
        position=f"{at + 1} of {len(names)}",
        reviewer=reviewer,
        note=(form or {}).get("note", ""),
        message=message,
        draft=_draft(corpus, item.entry, form),
    )


def _statement(corpus: Corpus, entry: Entry, number: int) -> dict[str, Any]:
    statement = entry.statements[number]
    cited: dict[str, list[str]] = {}
    for quote in statement.quotes:
        cited.setdefault(quote.chunk_id, []).append(quote.quote)
    passages = [
        Passage(corpus.chunks[name], marked(corpus.chunks[name].text, quotes)) for name, quotes in cited.items()
    ]
    return {"text": statement.text, "passages": passages}


def _draft(corpus: Corpus, entry: Entry, form: Mapping[str, str] | None) -> dict[str, Any]:
    typed = form if form and form.get("decision") == "edited" else {}
    return {
        "open": bool(typed),
        "direction": typed.get("direction", entry.direction),
        "strength": typed.get("strength", entry.strength or ""),
        "summary": typed.get("summary", entry.summary),
        "statements": [
            {
                "text": typed.get(f"statement_{outer}", statement.text),
                "drop": f"drop_{outer}" in typed,
                "quotes": [
                    {
                        "title": corpus.chunks[quote.chunk_id].title,
                        "quote": typed.get(f"quote_{outer}_{inner}", quote.quote),
                    }
                    for inner, quote in enumerate(statement.quotes)
                ],
            }
            for outer, statement in enumerate(entry.statements)
        ],
    }


def edited_entry(item: Vetted, form: Mapping[str, str]) -> Entry:
    """The entry as the form has it.

    Raises:
        ValueError: what is wrong with it, for who filled it in.
    """
    entry = item.entry
    statements = [
        {
            "text": _typed(form, f"statement_{outer}", statement.text),
            "quotes": [
                {"chunk_id": quote.chunk_id, "quote": _typed(form, f"quote_{outer}_{inner}", quote.quote)}
                for inner, quote in enumerate(statement.quotes)
            ],
        }
        for outer, statement in enumerate(entry.statements)
        if f"drop_{outer}" not in form
    ]
    try:
        edited = Entry.model_validate(
            {
                **entry.model_dump(),
                "direction": form.get("direction", entry.direction),
                "strength": form.get("strength", entry.strength) or None,
                "summary": _typed(form, "summary", entry.summary),
                "status": "edited",
                "statements": statements,
            }
        )
    except ValidationError as error:
        first = error.errors()[0]
        key = " ".join(str(part + 1 if isinstance(part, int) else part) for part in first["loc"])
        said = first["msg"].removeprefix("Value error, ")
        raise ValueError(f"{key}: {said}" if key else said) from None
    if edited.model_copy(update={"status": entry.status}) == entry:
        raise ValueError("nothing was changed: accept the entry as it is")
    return edited


def _typed(form: Mapping[str, str], key: str, before: str) -> str:
    """What the field holds; as before where only white space differs, for browsers rewrite line ends."""
    text = form.get(key)
    return before if text is None or text.split() == before.split() else clean_text(text)
