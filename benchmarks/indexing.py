"""Chunks a second into an index: a pool of Ray Data actors against LlamaIndex's own pipeline in one process.

*ray*: `update_index` with `RayActors`, an actor a CPU, in a running cluster; an index in a new folder every time. What
is timed is all of it: staging, starting the actors (which load the model), cutting, embedding, LanceDB, BM25, the
commit. *local*: the same in this process. *llama*: `IngestionPipeline` with LlamaIndex's `SentenceSplitter`, its own
sentences and the same sizes, and the same encoder as its embedding model, in batches as large; its nodes stay in
memory and nothing is written, and its model is loaded beforehand. All have the same priority. "Steady" leaves the start
of the actors out: it counts from the first committed part on.

    python benchmarks/indexing.py [--documents 600] [--pairs 7] [--quick]
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from _harness import WORK, Figures, interleave, parse, parser, report
from _medquad import absent, medquad

from prima_ray.knowledge.documents import Document
from prima_ray.knowledge.embedding import Embedder, EncoderConfig
from prima_ray.knowledge.embedding_ray import RayActors
from prima_ray.knowledge.index import IndexConfig
from prima_ray.knowledge.indexing import PART_LETTERS, RunParts, run_here, update_index
from prima_ray.knowledge.splitting import ChunkConfig, Splitter
from prima_ray.training.quiet import quiet_worker, runtime_env

BATCH = 8
"""What an `Embedder` takes at a time on a CPU."""


def ours(
    folder: Path, documents: Sequence[Document], config: IndexConfig, embedder: Embedder, run: RunParts
) -> Figures:
    """Build an index from nothing."""
    shutil.rmtree(folder, ignore_errors=True)
    ticks: list[tuple[float, int]] = []
    letters = sum(len(section.text) for item in documents for section in item.sections)
    started = time.perf_counter()
    update_index(
        folder,
        documents,
        config,
        embedder,
        run=run,
        progress=lambda count: ticks.append((time.perf_counter(), count)),
        # In a quick run, too, every actor has several.
        part_letters=min(PART_LETTERS, letters // 8),
    )
    ended = time.perf_counter()
    chunks = sum(count for _, count in ticks)
    return {
        "chunks/s": chunks / (ended - started),
        "steady chunks/s": sum(count for _, count in ticks[1:]) / (ended - ticks[0][0]),
        "chunks": chunks,
    }


def llama(documents: Sequence[Document], config: IndexConfig, embedder: Embedder) -> Figures:
    """The pipeline that LlamaIndex's users write."""
    from llama_index.core.ingestion import IngestionPipeline
    from llama_index.core.node_parser import SentenceSplitter
    from llama_index.core.node_parser.text.utils import split_by_sentence_tokenizer_internal
    from llama_index.core.schema import Document as LlamaDocument
    from nltk.tokenize import PunktSentenceTokenizer

    from prima_ray.knowledge.llama_adapters import LlamaEmbedding

    counter = Splitter(config.chunks, embedder.tokenizer).llama_splitter()._tokenizer
    # LlamaIndex's default, made by hand: where it makes it, nltk reads a file that it refuses if uv has linked it.
    sentences = partial(split_by_sentence_tokenizer_internal, tokenizer=PunktSentenceTokenizer())
    splitter = SentenceSplitter(
        chunk_size=config.chunks.max_tokens,
        chunk_overlap=config.chunks.overlap_tokens,
        tokenizer=counter,
        chunking_tokenizer_fn=sentences,
    )
    pipeline = IngestionPipeline(
        transformations=[splitter, LlamaEmbedding(embedder, embed_batch_size=BATCH)], disable_cache=True
    )
    texts = [
        LlamaDocument(id_=item.doc_id, text="\n\n".join(section.text for section in item.sections))
        for item in documents
    ]
    started = time.perf_counter()
    nodes = pipeline.run(documents=texts)
    seconds = time.perf_counter() - started
    return {"chunks/s": len(nodes) / seconds, "steady chunks/s": len(nodes) / seconds, "chunks": len(nodes)}


def main(argv: Sequence[str] | None = None) -> int:
    """See the module."""
    found = parser(__doc__, shards=False)
    found.add_argument("--documents", type=int, default=600, help="MedQuAD answers (default %(default)s)")
    found.add_argument("--actors", type=int, help="default: one a CPU, or a GPU where there is one")
    arguments = parse(found, argv, documents=60)
    if absent("indexing"):
        return 2
    documents = [document for _, document in medquad(arguments.documents)]
    config = IndexConfig(encoder=EncoderConfig(), chunks=ChunkConfig(context=False))
    embedder = Embedder.load(config.encoder, batch_size=BATCH)
    work = WORK / "indexing"

    # Imports are in nobody's time.
    import llama_index.core.ingestion  # noqa: F401
    import ray
    import ray.data

    quiet_worker()
    # Ray's workers would stand behind whatever else the machine does, and the pipeline in this process would not.
    os.environ.setdefault("RAY_worker_niceness", "0")
    ray.init(
        num_cpus=max(2, os.cpu_count() or 2), include_dashboard=False, log_to_driver=False, runtime_env=runtime_env()
    )
    pairs = interleave(
        {
            "ray": lambda _: ours(work / "ray", documents, config, embedder, RayActors(arguments.actors)),
            "llama": lambda _: llama(documents, config, embedder),
            "local": lambda _: ours(work / "local", documents, config, embedder, run_here),
        },
        pairs=arguments.pairs,
    )
    ray.shutdown()
    section = {
        "pairs": pairs,
        "ratio": ("chunks/s", "ray", "llama"),
        "steady ratios": [round(value, 3) for value in pairs.ratios("steady chunks/s", "ray", "llama")],
        "data": f"MedQuAD, {len(documents)} answers",
        "setting": {
            "encoder": str(embedder.identity),
            "device": str(embedder.device),
            "batch_size": BATCH,
            **config.chunks.model_dump(mode="json"),
            "actors": arguments.actors or "one a CPU or GPU",
        },
    }
    report("indexing", arguments, sections={"": section}, argv=argv)
    return 0


if __name__ == "__main__":
    sys.exit(main())
