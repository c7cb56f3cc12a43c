"""Does every quote of a corpus stand in its source? Knows the corpus's files and the sources, and nothing of prima_ray.

A quote counts as found where its document, as the JSON lines of the literature have it, holds it letter for letter, but
for white space and the forms of quotation marks and dashes. Prints what is not found; exit code 1 where anything is.

    python benchmarks/verify_quotes.py [--corpus RUN] [--literature FOLDER]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow.parquet as pq

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("PRIMA_SHARED") or REPOSITORY.parent / "shared")
_FORMS = str.maketrans("\u201c\u201d\u2018\u2019\u2013\u2014\u2212\u00a0", "\"\"''--- ")


def plain(text: str) -> str:
    """Compatibility forms, plain marks, single blanks."""
    return re.sub(r"\s+", " ", unicodedata.normalize("NFKC", text).translate(_FORMS)).strip()


def read_sources(folder: Path) -> dict[str, list[str]]:
    """The texts of every document, by its id."""
    texts: dict[str, list[str]] = defaultdict(list)
    for file in sorted(folder.rglob("*.jsonl")):
        with file.open(encoding="utf-8") as lines:
            for record in map(json.loads, lines):
                texts[record["doc_id"]].append(plain(record.get("text") or record.get("answer") or ""))
    return texts


def read_quotes(corpus: Path) -> Iterator[tuple[str, str, str]]:
    """(entry, chunk, quote) of every statement."""
    with (corpus / "corpus.jsonl").open(encoding="utf-8") as lines:
        for entry in map(json.loads, lines):
            for statement in entry["statements"]:
                if not statement["quotes"]:
                    raise SystemExit(f"{entry['factor']} x {entry['diagnosis']}: a statement without a quote")
                for quote in statement["quotes"]:
                    yield f"{entry['factor']} x {entry['diagnosis']}", quote["chunk_id"], quote["quote"]


def main(argv: Sequence[str] | None = None) -> int:
    command = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("--corpus", type=Path, default=REPOSITORY / "runs" / "pad_ufes_20" / "corpus")
    command.add_argument("--literature", type=Path, default=SHARED / "data" / "literature")
    options = command.parse_args(argv)
    corpus, literature = options.corpus, options.literature
    for path in (corpus / "corpus.jsonl", literature):
        if not path.exists():
            sys.stderr.write(f"{path} is not there\n")
            return 2
    documents = {row["chunk_id"]: row["doc_id"] for row in pq.read_table(corpus / "chunks.parquet").to_pylist()}
    texts = read_sources(literature)
    missing, total, cited = [], 0, set()
    for entry, chunk, quote in read_quotes(corpus):
        total += 1
        document = documents.get(chunk, "")
        cited.add(document)
        if not any(plain(quote) in text for text in texts.get(document, ())):
            missing.append(f"{entry}: {document or chunk}: {quote}")
    for line in missing:
        print(line)
    print(f"{total - len(missing)} of {total} quotes stand in the {len(cited)} documents that they name")
    return 1 if missing or not total else 0


if __name__ == "__main__":
    sys.exit(main())
