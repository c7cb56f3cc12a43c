"""Corpus: literature -> what it says of every risk factor and diagnosis, with the words that it rests on.

Run again, it goes on where it stopped, and takes in what was added to the literature: documents that are in the index
are not embedded again, entries are written anew, and decisions about those that have not changed stay. What a language
model answered is kept in `calls`, so that no call is made twice.
"""

from __future__ import annotations

import json
import logging
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from prima_ray.base import InputPath, PrimaError, StrictConfig, hash_json, is_uri, write_atomic, write_json
from prima_ray.config import load_config, read_yaml, validate_config
from prima_ray.data.description import DataSetConfig
from prima_ray.data.run_record import RECORD, read_record
from prima_ray.knowledge.book import write_book
from prima_ray.knowledge.chunks import Chunk
from prima_ray.knowledge.corpus import CORPUS, cited_chunks, read_corpus, write_corpus
from prima_ray.knowledge.documents import QUARANTINE_SCHEMA
from prima_ray.knowledge.embedding import Embedder
from prima_ray.knowledge.embedding_ray import RayActors
from prima_ray.knowledge.entries import Entry, Failure, Pair
from prima_ray.knowledge.extractive import ExtractiveConfig
from prima_ray.knowledge.factors import VocabularyConfig, check_vocabulary
from prima_ray.knowledge.grounding import Dropped, ground
from prima_ray.knowledge.index import Index, IndexConfig
from prima_ray.knowledge.indexing import (
    EncodedPart,
    IndexReport,
    Part,
    PartEncoder,
    RunParts,
    run_here,
    update_index,
)
from prima_ray.knowledge.literature import LiteratureConfig, Reading, read_literature
from prima_ray.knowledge.llm_calls import Usage
from prima_ray.knowledge.pair_passages import pair_queries
from prima_ray.knowledge.retrievers import RetrievalConfig, make_retriever, prepare
from prima_ray.knowledge.support import LexicalConfig, SupportConfig, make_support
from prima_ray.knowledge.vetting import read_log, resolve
from prima_ray.knowledge.vocabulary import Vocabulary
from prima_ray.knowledge.writing import WriterConfig, check_writer, make_writer
from prima_ray.stages.out_lock import open_alone
from prima_ray.stages.rundir import RunDir, check_finished, finish_run
from prima_ray.training.cluster import connect
from prima_ray.training.config import LocalContextConfig, RayContextConfig, RayFirstContextConfig

_log = logging.getLogger(__name__)
INDEX_FOLDER = "index"
QUARANTINE = "quarantine.parquet"
DROPPED = "dropped.jsonl"
FAILURES = "failures.jsonl"
CALLS_FOLDER = "calls"
EXECUTION_KEYS = frozenset(
    {"context", "embedding", "max_failures", "writer.calls"}
    | {
        f"writer.llm.{key}"
        for key in ("api_base", "api_key_env", "timeout_s", "prompt_price", "completion_price", "device")
    }
)


class EmbeddingConfig(StrictConfig):
    """How the literature is embedded; the same vectors whatever is said here."""

    batch_size: int | None = Field(default=None, ge=1)
    """Texts at a time; `null`: 8 on a CPU, 128 on a GPU."""
    num_actors: int | None = Field(default=None, ge=1)
    """Of the pool; `null`: one a GPU where the cluster has any, else one a CPU."""


class CorpusConfig(StrictConfig):
    """The literature, the factors, and how entries are written."""

    out: str
    """A folder that every node can read: the index lies in it."""
    seed: int = Field(default=42, ge=0)
    data_set: InputPath
    """A YAML with a section `data_set`, as ingest reads it: its classes are the diagnoses."""
    factors: InputPath
    """A YAML of the risk factors and the words for them (`knowledge/factors.py`)."""
    literature: LiteratureConfig
    index: IndexConfig = IndexConfig()
    retrieval: RetrievalConfig = RetrievalConfig()
    writer: WriterConfig = ExtractiveConfig()
    max_failures: int = Field(default=0, ge=0)
    """Pairs on which the writer may come to no entry; with more the run is not finished."""
    support: SupportConfig = LexicalConfig()
    embedding: EmbeddingConfig = EmbeddingConfig()
    context: RayFirstContextConfig = RayContextConfig()
    """`ray` embeds in a pool of actors, `local` in this process."""


@dataclass
class _Report:
    """What `metrics.json` says."""

    literature: dict[str, Any] = field(default_factory=dict)
    index: dict[str, Any] = field(default_factory=dict)
    entries: dict[str, int] = field(default_factory=dict)
    sources_cited: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    failures: dict[str, int] = field(default_factory=dict)
    usage: dict[str, int | float | None] | None = None
    """What a language model was asked; None where there is none."""
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - started, 1)


@dataclass
class _Written:
    """What became of the pairs, in their order."""

    entries: list[Entry] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    dropped: list[Dropped] = field(default_factory=list)
    usage: Usage | None = None


def run(config: CorpusConfig) -> Path:
    """Make the corpus, or bring it up to date; returns its folder.

    Raises:
        PrimaError: a mistake in the config, its inputs or the literature; or more pairs than `max_failures` failed.
    """
    if is_uri(config.out):
        raise PrimaError("a corpus is a folder on a disk", where=config.out, mend="Name one that all nodes can read.")
    check_writer(config.writer)
    data_set, words = _read_descriptions(config)
    reading = read_literature(config.literature)
    with open_alone(config, out=config.out, stage="corpus", execution_keys=EXECUTION_KEYS) as run_dir:
        _make(config, run_dir, reading, words=words, data_set=data_set)
    return run_dir.path


def _make(
    config: CorpusConfig, run_dir: RunDir, reading: Reading, *, words: VocabularyConfig, data_set: DataSetConfig
) -> None:
    report = _Report()
    embedder = Embedder.load(config.index.encoder, batch_size=config.embedding.batch_size)
    with report.timed("index"):
        index = _index(config, run_dir.path / INDEX_FOLDER, reading, embedder, report)
    made_of = {
        "literature": index.content_hash(),
        "factors": hash_json(words.model_dump(mode="json")),
        "data_set": hash_json(data_set.model_dump(mode="json")),
    }
    if _is_done(run_dir, made_of, max_failures=config.max_failures):
        check_finished(run_dir)
        _log.info("%s: already finished, nothing to do", run_dir.path)
        return
    _write_quarantine(run_dir.path, reading)
    with report.timed("write"):
        written = _write_entries(
            config, Vocabulary(words, data_set), index, embedder, cache=run_dir.path / CALLS_FOLDER
        )
    # What it says is about the corpus that was there until now.
    (run_dir.path / RECORD).unlink(missing_ok=True)
    _save(run_dir.path, written, index, words=words, data_set=data_set)
    _tell_entries(run_dir, report, written)
    if len(written.failures) > config.max_failures:
        raise _unfinished(run_dir.path, written)
    finish_run(
        run_dir,
        seed=config.seed,
        inputs={},
        extra={
            "made_of": made_of,
            "failed_pairs": len(written.failures),
            "literature": config.literature.model_dump(mode="json"),
        },
    )


def _read_descriptions(config: CorpusConfig) -> tuple[DataSetConfig, VocabularyConfig]:
    raw = read_yaml(config.data_set)
    section = raw.get("data_set") if isinstance(raw, dict) else None
    if section is None:
        raise PrimaError("has no section `data_set`", where=config.data_set, mend="Name the config of the ingest.")
    data_set = validate_config(DataSetConfig, section, where=config.data_set)
    words = load_config(VocabularyConfig, config.factors)
    check_vocabulary(words, data_set, where=config.factors)
    return data_set, words


def _index(config: CorpusConfig, folder: Path, reading: Reading, embedder: Embedder, report: _Report) -> Index:
    from tqdm import tqdm

    runner = run_here if isinstance(config.context, LocalContextConfig) else _in_cluster(config, config.context)
    with tqdm(desc="corpus: index", unit="chunk", file=sys.stderr, mininterval=1.0) as bar:
        done = update_index(folder, reading, config.index, embedder, run=runner, prune=True, progress=bar.update)
    index = Index.open(folder)
    if not index.meta.num_chunks:
        reasons = Counter(item.reason for item in reading.quarantined)
        shutil.rmtree(folder)  # with nothing in it, it would only keep the run from being given up
        raise PrimaError(
            "no document was read",
            where=config.out,
            mend=f"Check literature.sources and allow. Quarantined: {_counts(reasons) or 'nothing'}.",
        )
    report.literature = {
        "documents": dict(sorted(reading.num_documents.items())),
        "duplicates": dict(sorted(reading.num_duplicates.items())),
        "quarantined": dict(Counter(item.reason for item in reading.quarantined)),
    }
    report.index = {
        **asdict(done),
        "num_documents": index.meta.num_documents,
        "num_chunks": index.meta.num_chunks,
        "encoder": index.meta.encoder.model_dump(mode="json"),
    }
    _tell_index(reading, index, done)
    return index


def _in_cluster(config: CorpusConfig, context: RayContextConfig) -> RunParts:
    """Actors of a cluster that is joined, or started, only where there is something to embed."""

    def run(encoder: PartEncoder, parts: Iterable[Part]) -> Iterator[EncodedPart]:
        rest = iter(parts)
        for first in rest:
            connect(context, num_workers=0)
            yield from RayActors(config.embedding.num_actors)(encoder, chain([first], rest))

    return run


def _tell_index(reading: Reading, index: Index, done: IndexReport) -> None:
    _log.info(
        "corpus: %d documents in %d passages; %d documents are new, %d changed, %d gone; %d passages were embedded",
        index.meta.num_documents,
        index.meta.num_chunks,
        done.num_added,
        done.num_changed,
        done.num_removed,
        done.num_embedded,
    )
    if reading.quarantined:
        reasons = Counter(item.reason for item in reading.quarantined)
        _log.info("corpus: quarantined: %s (%s)", _counts(reasons), QUARANTINE)


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{number} {name}" for name, number in sorted(counts.items(), key=lambda item: -item[1]))


def _is_done(run_dir: RunDir, made_of: Mapping[str, str], *, max_failures: int) -> bool:
    if not run_dir.finished or not (run_dir.path / CORPUS).exists():
        return False
    record: dict[str, Any] = read_record(run_dir.path)
    failed: int = record.get("failed_pairs", 0)
    return record.get("made_of") == made_of and failed <= max_failures


def _write_quarantine(folder: Path, reading: Reading) -> None:
    rows = [asdict(item) for item in reading.quarantined]
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, QUARANTINE_SCHEMA), sink)
    write_atomic(folder / QUARANTINE, sink.getvalue().to_pybytes())


def _write_entries(
    config: CorpusConfig, vocabulary: Vocabulary, index: Index, embedder: Embedder, *, cache: Path
) -> _Written:
    from tqdm import tqdm

    retriever = make_retriever(config.retrieval, index, embedder)
    support = make_support(config.support, embedder)
    chunks = {chunk.chunk_id: chunk for chunk in index.chunks()}
    writer = make_writer(config.writer, vocabulary, retriever, allow=config.literature.allow, cache=cache)
    pairs = vocabulary.pairs
    prepare(retriever, [query for pair in pairs for query in pair_queries(*pair, config.writer, vocabulary)])
    found: dict[Pair, Entry | Failure] = {}
    with tqdm(total=len(pairs), desc="corpus: entries", unit="entry", file=sys.stderr, mininterval=1.0) as bar:
        for item in writer.write(pairs, progress=bar.update):
            found[item.factor, item.diagnosis] = item
    written = _Written(usage=writer.usage)
    for pair in pairs:
        item = found[pair]
        if isinstance(item, Failure):
            written.failures.append(item)
            continue
        grounded = ground(item, chunks, support)
        written.entries.append(grounded.entry)
        written.dropped += grounded.dropped
    return written


def _save(folder: Path, written: _Written, index: Index, *, words: VocabularyConfig, data_set: DataSetConfig) -> None:
    cited = {name for entry in written.entries for name in cited_chunks(entry)}
    # What a person's edit cites stays at hand, also where the entry as it is written now does not cite it.
    cited |= {
        name for decision in read_log(folder).decisions if decision.edited for name in cited_chunks(decision.edited)
    }
    chunks: list[Chunk] = [chunk for chunk in index.chunks() if chunk.chunk_id in cited]
    write_corpus(
        folder,
        written.entries,
        sorted(chunks, key=lambda chunk: chunk.chunk_id),
        factors=words.factors,
        diagnoses={item.name: item.phrase for item in data_set.classes},
    )
    for name, items in ((DROPPED, written.dropped), (FAILURES, written.failures)):
        lines = [json.dumps(asdict(item), ensure_ascii=False) + "\n" for item in items]
        write_atomic(folder / name, "".join(lines))


def _tell_entries(run_dir: RunDir, report: _Report, written: _Written) -> None:
    corpus = read_corpus(run_dir.path)
    vetting = resolve(corpus, read_log(run_dir.path))
    book = write_book(corpus, vetting)
    report.entries = dict(Counter(entry.direction for entry in corpus.entries))
    report.sources_cited = len({chunk.doc_id for chunk in corpus.chunks.values()})
    report.dropped = dict(Counter(item.reason for item in written.dropped))
    report.failures = dict(Counter(item.reason for item in written.failures))
    report.usage = written.usage.as_dict() if written.usage else None
    write_json(run_dir.path / "metrics.json", {"stage": "corpus", **asdict(report)})
    reopened = sum(item.reopened is not None for item in vetting.entries.values())
    open_ = sum(item.entry.status == "proposed" for item in vetting.entries.values())
    _log.info(
        "corpus: %d entries: %s; %d documents are cited",
        len(corpus.entries),
        _counts(report.entries),
        report.sources_cited,
    )
    if report.dropped:
        _log.info("corpus: statements dropped: %s (%s)", _counts(report.dropped), DROPPED)
    if written.failures:
        _log.warning(
            "corpus: %d pairs have no entry, since their writing failed: %s (%s)",
            len(written.failures),
            _counts(report.failures),
            FAILURES,
        )
    if written.usage:
        _log.info("corpus: language model: %s", _usage(written.usage))
    _log.info("corpus: %d entries wait for a decision%s", open_, f", {reopened} of them again" if reopened else "")
    _log.info("corpus: seconds: %s", ", ".join(f"{name} {value:.0f}" for name, value in report.seconds.items()))
    _log.info("corpus: read it: %s\ncorpus: vet it: prima vet %s", book, run_dir.path)


def _usage(usage: Usage) -> str:
    told = [
        f"{usage.calls} calls",
        f"{usage.cached_calls} answers from earlier runs",
        f"{usage.retries} retries",
        f"{usage.prompt_tokens} tokens of prompts and {usage.completion_tokens} of answers",
    ]
    if usage.uncounted_calls:
        told.append(f"{usage.uncounted_calls} calls of which the endpoint told no tokens")
    if usage.cost is not None:
        told.append(f"cost {usage.cost:.4g}")
    return ", ".join(told)


def _unfinished(folder: Path, written: _Written) -> PrimaError:
    failed = len(written.failures)
    return PrimaError(
        f"{failed} of {failed + len(written.entries)} pairs failed "
        f"({_counts(Counter(item.reason for item in written.failures))}); the corpus is written without them, "
        "and the run is not finished",
        where=folder / FAILURES,
        mend="Run the same command again: these pairs alone are asked anew. "
        f"To do without them, set max_failures={failed}.",
    )
