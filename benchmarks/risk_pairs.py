"""How well the extractive writer agrees with the pairs labelled by hand (docs/risk_pairs.md).

    python benchmarks/risk_pairs.py [--half development|held-out|both] [--wrong] [--pair FACTOR DIAGNOSIS]

Reads the literature of $PRIMA_SHARED, takes every section as a passage, finds passages by BM25, writes and grounds the
entries of the labelled pairs, and prints precision, recall and coverage. The halves are split by a hash of the factor:
rules are tuned on the development half alone, so `--wrong` and `--pair` show no other unless asked to.
"""

from __future__ import annotations

import argparse
import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

import yaml

from prima_ray.base import hash_json
from prima_ray.config import load_config, read_yaml, validate_config
from prima_ray.data.description import DataSetConfig
from prima_ray.knowledge.agreement import DIRECTIONS, Agreement, LabelledPair, compare, is_development
from prima_ray.knowledge.chunks import Chunk, chunk_id
from prima_ray.knowledge.documents import Document
from prima_ray.knowledge.entries import Entry
from prima_ray.knowledge.extractive import ExtractiveConfig, write_entry
from prima_ray.knowledge.factors import VocabularyConfig, check_vocabulary
from prima_ray.knowledge.grounding import ground
from prima_ray.knowledge.literature import LiteratureConfig, read_literature
from prima_ray.knowledge.passages import normalise
from prima_ray.knowledge.retrieval import Hit
from prima_ray.knowledge.vocabulary import Vocabulary

REPOSITORY = Path(__file__).resolve().parents[1]
CONFIGS = REPOSITORY / "jobs" / "configs" / "pad_ufes_20"
PAIRS = REPOSITORY / "tests" / "data" / "risk_pairs.yaml"
LITERATURE = Path(os.environ.get("PRIMA_SHARED") or REPOSITORY.parent / "shared") / "data" / "literature"
ALLOW = ("pdq", "medquad")

_WORD = re.compile(r"[^\W_]+")


class BM25:
    """A lexical retriever over passages held in memory: enough to measure the writer with nothing else at work."""

    def __init__(self, chunks: Sequence[Chunk], *, k1: float = 1.2, b: float = 0.75) -> None:
        self.chunks = chunks
        self._postings: dict[str, list[tuple[int, float]]] = defaultdict(list)
        lengths = []
        counts = []
        for chunk in chunks:
            words = Counter(_stems(" ".join((chunk.title, *chunk.heading, chunk.text))))
            counts.append(words)
            lengths.append(sum(words.values()))
        mean = sum(lengths) / len(lengths)
        for index, words in enumerate(counts):
            for word, count in words.items():
                saturation = count * (k1 + 1) / (count + k1 * (1 - b + b * lengths[index] / mean))
                self._postings[word].append((index, saturation))

    def search(self, query: str, *, k: int, sources: tuple[str, ...] | None = None) -> list[Hit]:
        scores: dict[int, float] = defaultdict(float)
        for word in sorted(set(_stems(query))):
            found = self._postings.get(word, [])
            weight = math.log(1 + (len(self.chunks) - len(found) + 0.5) / (len(found) + 0.5))
            for index, saturation in found:
                scores[index] += weight * saturation
        ranked = sorted(scores.items(), key=lambda item: (-item[1], item[0]))
        hits = (Hit(self.chunks[index], score) for index, score in ranked)
        return [hit for hit in hits if sources is None or hit.chunk.source in sources][:k]


def _stems(text: str) -> Iterable[str]:
    for word in _WORD.findall(text.lower()):
        yield re.sub(r"(?:ies|es|is|us|i|s)$", "", word) if len(word) > 4 else word


def read_documents() -> list[Document]:
    """PDQ's sections and MedQuAD's answers on the skin."""
    config = validate_config(
        LiteratureConfig,
        {
            "sources": [
                {
                    "kind": "jsonl",
                    "path": str(LITERATURE / "pdq_cancer_risk" / "sections.jsonl"),
                    "source": "pdq",
                    "heading_separator": " > ",
                    "columns": {"document": ["doc_id"], "title": "title", "heading": "section", "url": "url"},
                },
                {
                    "kind": "jsonl",
                    "path": str(LITERATURE / "medquad" / "medquad_skin.jsonl"),
                    "source": "medquad",
                    "columns": {
                        "document": ["doc_id"], "title": "focus", "heading": "question", "text": "answer", "url": "url",
                    },
                },
            ],
            "allow": list(ALLOW),
        },
        where="benchmarks/risk_pairs.py",
    )  # fmt: skip
    return list(read_literature(config))


def section_chunks(documents: Iterable[Document]) -> list[Chunk]:
    """A passage a section."""
    return [
        Chunk(
            chunk_id=chunk_id(document.doc_id, section.heading, section.text),
            doc_id=document.doc_id,
            text=section.text,
            url=document.url,
            source=document.source,
            title=document.title,
            heading=section.heading,
            date=document.date,
            licence=document.licence,
        )
        for document in documents
        for section in document.sections
    ]


def read_vocabulary() -> Vocabulary:
    """The factors and diagnoses of PAD-UFES-20."""
    data_set = DataSetConfig.model_validate(read_yaml(CONFIGS / "ingest.yaml")["data_set"])
    config = load_config(VocabularyConfig, CONFIGS / "factors.yaml")
    check_vocabulary(config, data_set, where="factors.yaml")
    return Vocabulary(config, data_set)


def read_pairs() -> list[LabelledPair]:
    """The labels, without what only a person reads."""
    raw = yaml.safe_load(PAIRS.read_text(encoding="utf-8"))
    return [
        LabelledPair.model_validate({key: pair[key] for key in LabelledPair.model_fields if key in pair})
        for pair in raw
    ]


class Passages:
    """Which of the labels' passages (a PDQ section, a MedQuAD answer) hold a quote."""

    def __init__(self, chunks: Sequence[Chunk]) -> None:
        import json

        self._doc_of = {chunk.chunk_id: chunk.doc_id for chunk in chunks}
        self._texts: dict[str, list[tuple[str, str]]] = defaultdict(list)
        for file, body in (("pdq_cancer_risk/sections.jsonl", "text"), ("medquad/medquad_skin.jsonl", "answer")):
            with (LITERATURE / file).open(encoding="utf-8") as lines:
                for record in map(json.loads, lines):
                    self._texts[record["doc_id"]].append((record["id"], normalise(record[body])))

    def __call__(self, chunk: str, quote: str) -> Collection[str]:
        wanted = normalise(quote)
        return [key for key, text in self._texts[self._doc_of[chunk]] if wanted in text]


def table(found: Agreement) -> str:
    """Figures of one set of pairs."""
    lines = [
        f"accuracy {found.accuracy:.1%} of {found.num_pairs}, "
        f"coverage {_part(found.coverage)} of {found.with_evidence}, "
        f"{found.statements} statements, {found.located / max(found.statements, 1):.0%} in a listed passage, "
        f"{found.trapped} citing a trap ({_part(found.false_citations)})",
        f"{'':12} labelled written right precision recall",
    ]
    for direction in DIRECTIONS:
        score = found.by_direction[direction]
        lines.append(
            f"{direction:12} {score.labelled:8} {score.written:7} {score.right:5} "
            f"{_part(score.precision):>9} {_part(score.recall):>6}"
        )
    return "\n".join(lines)


def _part(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def main(argv: Sequence[str] | None = None) -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--half", choices=("development", "held-out", "both"), default="both")
    arguments.add_argument("--wrong", action="store_true", help="list the pairs that are told otherwise than labelled")
    arguments.add_argument("--pair", nargs=2, metavar=("FACTOR", "DIAGNOSIS"), help="print one entry")
    options = arguments.parse_args(argv)

    chunks = section_chunks(read_documents())
    vocabulary, retriever, config = read_vocabulary(), BM25(chunks), ExtractiveConfig()
    by_id = {chunk.chunk_id: chunk for chunk in chunks}

    def entry(factor: str, diagnosis: str) -> Entry:
        written = write_entry(factor, diagnosis, config, vocabulary, retriever, allow=ALLOW)
        return ground(written, by_id).entry

    if options.pair:
        print(entry(*options.pair).model_dump_json(indent=2))
        return
    pairs = read_pairs()
    if options.half != "both":
        pairs = [pair for pair in pairs if is_development(pair.factor) == (options.half == "development")]
    entries = [entry(pair.factor, pair.diagnosis) for pair in pairs]
    print(f"{len(chunks)} passages, corpus {hash_json([item.model_dump() for item in entries])[:12]}")
    halves = {
        "development": [pair for pair in pairs if is_development(pair.factor)],
        "held-out": [pair for pair in pairs if not is_development(pair.factor)],
        "all": pairs if options.half == "both" else [],
    }
    passages = Passages(chunks)
    for name, chosen in halves.items():
        for what, some in (("", chosen), (", without the arguable", [pair for pair in chosen if not pair.arguable])):
            if some:
                found = compare(entries, some, passages)
                print(f"\n{name}{what}\n{table(found)}")
                if options.wrong and not what and name != "all":
                    for wrong in found.wrong:
                        print("  {} x {}: labelled {}, written {}".format(*wrong))


if __name__ == "__main__":
    main()
