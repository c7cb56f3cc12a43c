"""A small corpus for tests: three factors, two diagnoses, hostile text in a passage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prima_ray.knowledge.chunks import Chunk, chunk_id
from prima_ray.knowledge.corpus import Corpus, FactorLink, read_corpus, write_corpus
from prima_ray.knowledge.entries import Entry

PLANTED = '<script>alert("planted")</script>'
FACTORS = (
    FactorLink(key="sunburn", phrase="sunburns in the past"),
    FactorLink(key="itch", phrase="it itches", role="sign", attribute="itch", values=("true",)),
    FactorLink(key="age", phrase="older age", attribute="age"),
)
DIAGNOSES = {"BCC": "basal cell carcinoma", "NEV": "nevus"}


def chunk(name: str, text: str, **keys: Any) -> Chunk:
    heading = tuple(keys.pop("heading", ("Skin cancer", "Risk factors")))
    fields = {
        "doc_id": name,
        "url": f"https://example.org/{name}",
        "source": "pdq",
        "title": f"Title of {name}",
        "date": "2025-05",
        "licence": "public domain",
        **keys,
    }
    return Chunk(chunk_id=chunk_id(fields["doc_id"], heading, text), heading=heading, text=text, **fields)


SUN = chunk("doc1", f"Sunburns  in childhood\nraise the risk of basal cell carcinoma. {PLANTED} Older age does too.")
OTHER = chunk("doc2", "Itching was reported by 40 of 100 patients with a basal cell carcinoma.", url=None, date=None)
OLD = chunk("doc3", "=HYPERLINK is no word, but nevi become fewer with age.", url="javascript:alert(1)", licence=None)
CHUNKS = (SUN, OTHER, OLD)


def entry(factor: str, diagnosis: str, direction: str = "raises", *cites: tuple[Chunk, str], **keys: Any) -> Entry:
    return Entry.model_validate(
        {
            "factor": factor,
            "diagnosis": diagnosis,
            "direction": direction,
            "strength": "moderate" if cites else None,
            "summary": f"{factor} and {diagnosis}.",
            "statements": [
                {"text": f"Says {item.doc_id}.", "quotes": [{"chunk_id": item.chunk_id, "quote": quote}]}
                for item, quote in cites
            ],
            **keys,
        }
    )


ENTRIES = (
    entry("sunburn", "BCC", "raises", (SUN, "Sunburns in childhood raise the risk"), (OTHER, "40 of 100 patients")),
    entry("sunburn", "NEV", "no_evidence"),
    entry("itch", "BCC", "raises", (OTHER, "Itching was reported"), strength="weak"),
    entry("age", "NEV", "lowers", (OLD, "nevi become fewer with age"), summary="=1+1: fewer; -2 in a year"),
)


def make_corpus(folder: Path, *, entries: Any = ENTRIES, chunks: Any = CHUNKS, factors: Any = FACTORS) -> Corpus:
    write_corpus(folder, entries, chunks, factors=factors, diagnoses=DIAGNOSES)
    return read_corpus(folder)
