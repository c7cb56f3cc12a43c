"""How well the corpus of the shipped preset agrees with the pairs labelled by hand (docs/risk_pairs.md).

    python benchmarks/risk_pairs.py [--corpus RUN] [--half development|held-out|both] [--wrong]
                                    [--pair FACTOR DIAGNOSIS]

Makes the corpus of jobs/configs/pad_ufes_20 in runs/pad_ufes_20/corpus, or takes the one that is there or is named,
and prints precision, recall and coverage of its entries as they were proposed; with both halves it also writes
benchmarks/results/risk_pairs.json. The halves are split by a hash of the factor: rules are tuned on the development
half alone, so `--wrong` and `--pair` show no other unless asked to.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import yaml

from prima_ray.base import PrimaError, hash_json, write_json
from prima_ray.config import load_config
from prima_ray.knowledge.agreement import DIRECTIONS, Agreement, LabelledPair, compare, is_development
from prima_ray.knowledge.chunks import Chunk
from prima_ray.knowledge.corpus import read_corpus
from prima_ray.knowledge.passages import normalise
from prima_ray.stages import corpus as corpus_stage

REPOSITORY = Path(__file__).resolve().parents[1]
CONFIG = REPOSITORY / "jobs" / "configs" / "pad_ufes_20" / "corpus.yaml"
PAIRS = REPOSITORY / "tests" / "data" / "risk_pairs.yaml"
RESULT = REPOSITORY / "benchmarks" / "results" / "risk_pairs.json"
LITERATURE = Path(os.environ.get("PRIMA_SHARED") or REPOSITORY.parent / "shared") / "data" / "literature"


def read_pairs() -> list[LabelledPair]:
    """The labels, without what only a person reads."""
    raw = yaml.safe_load(PAIRS.read_text(encoding="utf-8"))
    return [
        LabelledPair.model_validate({key: pair[key] for key in LabelledPair.model_fields if key in pair})
        for pair in raw
    ]


class Passages:
    """Which of the labels' passages (a PDQ section, a MedQuAD answer) hold a quote."""

    def __init__(self, chunks: Mapping[str, Chunk]) -> None:
        self._doc_of = {name: chunk.doc_id for name, chunk in chunks.items()}
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


def plain(found: Agreement) -> dict[str, object]:
    """The same for the result file; shares are null where nothing is to be shared."""
    return {
        "num_pairs": found.num_pairs,
        "accuracy": found.accuracy,
        "coverage": found.coverage,
        "statements": found.statements,
        "located": found.located,
        "trapped": found.trapped,
        "by_direction": {
            name: {"labelled": score.labelled, "written": score.written, "right": score.right}
            for name, score in found.by_direction.items()
        },
    }


def main(argv: Sequence[str] | None = None) -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--corpus", help="a run of prima corpus on the literature of $PRIMA_SHARED")
    arguments.add_argument("--half", choices=("development", "held-out", "both"), default="both")
    arguments.add_argument("--wrong", action="store_true", help="list the pairs that are told otherwise than labelled")
    arguments.add_argument("--pair", nargs=2, metavar=("FACTOR", "DIAGNOSIS"), help="print one entry")
    options = arguments.parse_args(argv)
    if not LITERATURE.is_dir():
        sys.stderr.write(f"{LITERATURE} is not there: set PRIMA_SHARED\n")
        return 2
    try:
        run = options.corpus or corpus_stage.run(load_config(corpus_stage.CorpusConfig, CONFIG))
        made = read_corpus(run)
    except PrimaError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    by_pair = {(entry.factor, entry.diagnosis): entry for entry in made.entries}
    if options.pair:
        print(by_pair[tuple(options.pair)].model_dump_json(indent=2))
        return 0
    pairs = read_pairs()
    if options.half != "both":
        pairs = [pair for pair in pairs if is_development(pair.factor) == (options.half == "development")]
    entries = [by_pair[pair.factor, pair.diagnosis] for pair in pairs]
    print(f"{len(made.entries)} entries, of the labelled {hash_json([item.model_dump() for item in entries])[:12]}")
    halves = {
        "development": [pair for pair in pairs if is_development(pair.factor)],
        "held-out": [pair for pair in pairs if not is_development(pair.factor)],
        "all": pairs if options.half == "both" else [],
    }
    passages, result = Passages(made.chunks), {}
    for name, chosen in halves.items():
        for what, some in (("", chosen), (", without the arguable", [pair for pair in chosen if not pair.arguable])):
            if some:
                found = compare(entries, some, passages)
                result[f"{name}{what}"] = plain(found)
                print(f"\n{name}{what}\n{table(found)}")
                if options.wrong and not what and name != "all":
                    for wrong in found.wrong:
                        print("  {} x {}: labelled {}, written {}".format(*wrong))
    if options.half == "both" and options.corpus is None:
        write_json(RESULT, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
