"""Does a MedQuAD question find an answer equal to its own among all 16,407? BM25, dense, and both fused.

Answers are indexed without their questions, titles and headings, which would give them away. A question counts as
answered at rank r where the r-th best *answer* (by its best chunk) has the text of its own answer; several questions
share one. Settings (BM25's k1 and b; the weight, the constant and the depth of the fusion) are chosen by MRR on one
half of the questions and reported on the other; questions of equal answers are in the same half.

The index is kept in `runs/benchmarks` and brought up to date, so that a run that was broken off goes on; it is the one
that `benchmarks/index_whole.py` makes.

    python benchmarks/retrieval.py [--questions N] [--rerank CROSS_ENCODER] [--quick]
"""

from __future__ import annotations

import itertools
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from _harness import WORK, circumstances, parse, parser
from _medquad import Question, absent, medquad

from prima_ray.base import hash_key, write_json
from prima_ray.knowledge.bm25 import Bm25, Bm25Config
from prima_ray.knowledge.chunks import Chunk
from prima_ray.knowledge.embedding import Embedder, EncoderConfig, Vectors
from prima_ray.knowledge.index import TABLE, Filter, Index, IndexConfig, open_database
from prima_ray.knowledge.indexing import update_index
from prima_ray.knowledge.rerank import RerankConfig
from prima_ray.knowledge.retrieval import Hit
from prima_ray.knowledge.retrievers import fuse
from prima_ray.knowledge.splitting import ChunkConfig

BLOCK, CHECKED = 256, 40
DEPTH = 200
"""Chunks that each retriever gives: answers of twenty ranks are in them."""
BM25_GRID = {"k1": (0.8, 1.2, 1.6, 2.0), "b": (0.4, 0.6, 0.75, 0.9)}
HYBRID_GRID = {"dense_weight": (0.3, 0.4, 0.5, 0.6, 0.7), "rrf_k": (5, 20, 60), "depth": (50, 200)}

Answers = list[list[Hit]]


@dataclass(frozen=True)
class Judge:
    """Knows which answer each chunk is of."""

    answer_of: dict[str, str]
    """Document -> content hash."""

    def rank(self, question: Question, hits: Iterable[Hit]) -> int | None:
        """Of the first equal answer, from 1; a document counts once."""
        seen: set[str] = set()
        for hit in hits:
            if hit.chunk.doc_id in seen:
                continue
            seen.add(hit.chunk.doc_id)
            if self.answer_of[hit.chunk.doc_id] == question.answer:
                return len(seen)
        return None

    def figures(self, questions: Sequence[Question], answers: Iterable[Iterable[Hit]]) -> dict[str, float]:
        """Recall at 1, 5 and 20, and the mean reciprocal rank."""
        ranks = [self.rank(question, hits) for question, hits in zip(questions, answers, strict=True)]
        found = {f"recall@{k}": np.mean([rank is not None and rank <= k for rank in ranks]) for k in (1, 5, 20)}
        found["MRR"] = np.mean([1 / rank if rank else 0.0 for rank in ranks])
        return {name: round(float(value), 4) for name, value in found.items()}


def settings(grid: dict[str, tuple[Any, ...]]) -> list[dict[str, Any]]:
    """Every combination."""
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def best(
    grid: Sequence[dict[str, Any]], judge: Judge, questions: Sequence[Question], answer: Callable[..., Answers]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The setting of the greatest MRR, and all of them with their figures."""
    tried = [{**setting, **judge.figures(questions, answer(**setting))} for setting in grid]
    for row in tried:
        print("  ".join(f"{key} {value}" for key, value in row.items()), file=sys.stderr, flush=True)
    chosen = max(range(len(grid)), key=lambda place: tried[place]["MRR"])
    return dict(grid[chosen]), tried


def main(argv: Sequence[str] | None = None) -> int:
    """See the module."""
    found = parser(__doc__, shards=False)
    found.add_argument("--questions", type=int, help="at most so many a half (default: all)")
    found.add_argument("--answers", type=int, help="index the first so many only (default: all)")
    found.add_argument("--work", type=Path, default=WORK / "retrieval", help="folder of the index")
    found.add_argument("--encoder", default=EncoderConfig().name, help="default %(default)s")
    found.add_argument("--rerank", help="a cross-encoder, by name or folder, over the hybrid's first 50")
    arguments = parse(found, argv, questions=40, answers=300, work=WORK / "retrieval_quick")
    if absent("retrieval"):
        return 2
    # The first of equal answers' documents is no better than the others: all 16,407 are indexed.
    pairs = list(medquad(arguments.answers))
    judge = Judge({document.doc_id: question.answer for question, document in pairs})
    embedder = Embedder.load(EncoderConfig(name=arguments.encoder))
    config = IndexConfig(encoder=EncoderConfig(name=arguments.encoder), chunks=ChunkConfig(context=False))
    seconds = _build(arguments, config, embedder, pairs)
    index = Index.open(arguments.work)
    chunks = sorted(index.chunks(), key=lambda chunk: chunk.chunk_id)
    halves = [_half(number, [question for question, _ in pairs], arguments.questions) for number in (0, 1)]
    vectors = _read_vectors(index, arguments.work, chunks)
    dense = [_dense(index, chunks, vectors, embedder, half) for half in halves]
    bm25_setting, bm25_tried = best(
        settings(BM25_GRID), judge, halves[0], lambda **keys: _words(chunks, halves[0], Bm25Config(**keys))
    )
    words = [_words(chunks, half, Bm25Config(**bm25_setting)) for half in halves]

    def fused(half: int, *, dense_weight: float, rrf_k: int, depth: int) -> Answers:
        return [
            fuse((one[:depth], other[:depth]), (dense_weight, 1 - dense_weight), rrf_k=rrf_k)
            for one, other in zip(dense[half], words[half], strict=True)
        ]

    setting, hybrid_tried = best(settings(HYBRID_GRID), judge, halves[0], lambda **keys: fused(0, **keys))
    hybrid = fused(1, **setting)
    answers = {"bm25": words[1], "dense": dense[1], "hybrid": hybrid}
    if arguments.rerank:
        answers["reranked"] = _rerank(arguments.rerank, halves[1], hybrid)
    figures = {name: judge.figures(halves[1], item) for name, item in answers.items()}
    print(f"\n{len(halves[1])} questions, {len(pairs)} answers in {index.meta.num_chunks} chunks")
    for name, row in figures.items():
        print(f"{name:<9}" + "  ".join(f"{key} {value:.3f}" for key, value in row.items()))
    print(f"chosen on {len(halves[0])} other questions: bm25 {bm25_setting}, hybrid {setting}")
    if arguments.quick:
        print("quick: nothing was written", file=sys.stderr)
        return 0
    write_json(
        arguments.out / "retrieval.json",
        {
            "benchmark": "retrieval",
            **circumstances("retrieval", argv),
            "num_questions": {"chosen_on": len(halves[0]), "reported_on": len(halves[1])},
            "num_answers": len(pairs),
            "num_chunks": index.meta.num_chunks,
            "encoder": str(embedder.identity),
            "figures": figures,
            "chosen": {"bm25": bm25_setting, "hybrid": setting},
            "tried": {"bm25": bm25_tried, "hybrid": hybrid_tried},
            "seconds_to_index": seconds,
        },
    )
    return 0


def _build(arguments: Namespace, config: IndexConfig, embedder: Embedder, pairs: Sequence[Any]) -> float:
    from tqdm import tqdm

    started = time.perf_counter()
    with tqdm(desc="index", unit="chunk", file=sys.stderr, mininterval=5.0) as bar:
        documents = (document for _, document in pairs)
        report = update_index(arguments.work, documents, config, embedder, prune=True, progress=bar.update)
    print(report, file=sys.stderr)
    return round(time.perf_counter() - started, 1)


def _half(number: int, questions: Sequence[Question], limit: int | None) -> list[Question]:
    mine = [item for item in questions if item.half == number]
    # Not the file's first ones, which are of one site.
    return sorted(mine, key=lambda item: hash_key(item.text, item.answer))[:limit]


def _read_vectors(index: Index, folder: Path, chunks: Sequence[Chunk]) -> Vectors:
    """The vectors of the chunks, (N, width), in their order."""
    table = open_database(folder).open_table(TABLE)
    table.checkout(index.meta.table_version)
    rows = table.search().select(["chunk_id", "vector"]).limit(len(chunks)).to_arrow()
    vectors = rows["vector"].combine_chunks().values.to_numpy().reshape(len(chunks), -1)
    place = {name: row for row, name in enumerate(rows["chunk_id"].to_pylist())}
    return np.ascontiguousarray(vectors[[place[chunk.chunk_id] for chunk in chunks]])


def _dense(
    index: Index, chunks: Sequence[Chunk], vectors: Vectors, embedder: Embedder, questions: Sequence[Question]
) -> Answers:
    """What `Index.nearest` answers, all questions of a block at once; it is asked a few of them to be sure."""
    asked = embedder.embed([item.text for item in questions])
    found: Answers = []
    for start in range(0, len(asked), BLOCK):
        for scores in asked[start : start + BLOCK] @ vectors.T:
            places = np.argpartition(scores, -DEPTH)[-DEPTH:] if len(scores) > DEPTH else np.arange(len(scores))
            order = places[np.lexsort((places, -scores[places]))]
            found.append([Hit(chunks[place], float(scores[place])) for place in order])
    for vector, hits in list(zip(asked, found, strict=True))[:: max(1, len(found) // CHECKED)]:
        alone = np.array([score for _, score in index.nearest(vector, k=DEPTH, where=Filter())])
        if not np.allclose(alone, [hit.score for hit in hits], atol=1e-5):
            raise SystemExit("the index answers otherwise than the product of matrices")
    return found


def _words(chunks: Sequence[Chunk], questions: Sequence[Question], config: Bm25Config) -> Answers:
    """Answers of BM25 with other settings than the index was built with.

    Args:
        chunks: in the order of their ids; the sort is stable, so equal scores are in that order, too.
    """
    bm25 = Bm25.build((chunk.text for chunk in chunks), config)
    found = []
    for question in questions:
        scores = bm25.scores(question.text)
        places = np.flatnonzero(scores > 0)
        if len(places) > DEPTH:
            # With all that tie with the last one, among which the sort below decides.
            places = places[scores[places] >= np.partition(scores[places], -DEPTH)[-DEPTH]]
        order = places[np.argsort(-scores[places], kind="stable")][:DEPTH]
        found.append([Hit(chunks[place], float(scores[place])) for place in order])
    return found


def _rerank(name: str, questions: Sequence[Question], answers: Answers) -> Answers:
    config = RerankConfig(name=name)
    encoder = config.load()
    found = []
    for question, hits in zip(questions, answers, strict=True):
        first = hits[: config.depth]
        scores = encoder.score(question.text, [hit.chunk.text for hit in first])
        found.append(sorted((Hit(hit.chunk, score) for hit, score in zip(first, scores, strict=True)),
                            key=lambda hit: -hit.score))  # fmt: skip
    return found


if __name__ == "__main__":
    sys.exit(main())
