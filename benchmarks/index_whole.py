"""All 16,407 answers of MedQuAD into an index whose builder is killed half-way and started again.

The builder is a process of its own. It gets SIGKILL once `--kill-at` chunks are committed; the table is counted, and
the same command goes on. Printed, and written to the result file: the chunks that the second process embedded, which
with those found in the table must be all of them; how much memory each process had taken at its peak, and how that
grew with what was committed. Exit code 1 where a chunk was embedded twice or is missing.

The index is `runs/benchmarks/retrieval`, which `benchmarks/retrieval.py` then finds finished.

    python benchmarks/index_whole.py [--answers N] [--kill-at CHUNKS] [--quick]
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from _harness import REPOSITORY, WORK, circumstances, parse, parser
from _medquad import absent, medquad

from prima_ray.base import write_json
from prima_ray.knowledge.embedding import Embedder, EncoderConfig
from prima_ray.knowledge.index import TABLE, Index, IndexConfig, open_database
from prima_ray.knowledge.indexing import update_index
from prima_ray.knowledge.splitting import ChunkConfig

CONFIG = IndexConfig(chunks=ChunkConfig(context=False))
"""As `benchmarks/retrieval.py` has it: headings would give the answers away."""


def build(arguments: argparse.Namespace) -> None:
    """The builder: a line of JSON at its start, after every part, and at the end."""
    committed, started = 0, time.perf_counter()
    embedder = Embedder.load(EncoderConfig())

    def tell(count: int) -> None:
        nonlocal committed
        committed += count
        _say(committed=committed, peak_mib=_peak_mib(), seconds=round(time.perf_counter() - started, 1))

    tell(0)
    documents = (document for _, document in medquad(arguments.answers))
    report = update_index(arguments.work, documents, CONFIG, embedder, prune=True, progress=tell)
    _say(
        committed=committed,
        peak_mib=_peak_mib(),
        seconds=round(time.perf_counter() - started, 1),
        unchanged_documents=report.num_unchanged,
        added_documents=report.num_added,
        embedded=report.num_embedded,
    )


def _say(**figures: float) -> None:
    print(json.dumps(figures), flush=True)


def _peak_mib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def run_builder(arguments: argparse.Namespace, *, kill_at: int | None) -> list[dict[str, Any]]:
    """What the builder said, until it ended or had committed ``kill_at`` chunks and was killed."""
    command = [sys.executable, str(Path(__file__)), "--builder", "--work", str(arguments.work)]
    if arguments.answers is not None:
        command += ["--answers", str(arguments.answers)]
    said: list[dict[str, Any]] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY) as builder:
        for line in builder.stdout or ():
            said.append(json.loads(line))
            print(line.strip(), file=sys.stderr, flush=True)
            if kill_at is not None and said[-1]["committed"] >= kill_at:
                builder.kill()
                return said
    if builder.returncode:
        raise SystemExit(f"the builder ended with {builder.returncode}")
    if kill_at is not None:
        raise SystemExit(f"the builder had ended before {kill_at} chunks were committed; lower --kill-at")
    return said


def main(argv: Sequence[str] | None = None) -> int:
    """See the module."""
    found = parser(__doc__, shards=False)
    found.add_argument("--answers", type=int, help="the first so many only (default: all)")
    found.add_argument("--kill-at", type=int, default=15_000, help="chunks (default %(default)s)")
    found.add_argument("--work", type=Path, default=WORK / "retrieval", help="folder of the index; it is made anew")
    found.add_argument("--builder", action="store_true", help=argparse.SUPPRESS)
    arguments = parse(found, argv, answers=600, kill_at=400, work=WORK / "index_whole_quick")
    if absent("index_whole"):
        return 2
    if arguments.builder:
        build(arguments)
        return 0
    shutil.rmtree(arguments.work, ignore_errors=True)
    killed = run_builder(arguments, kill_at=arguments.kill_at)
    kept = open_database(arguments.work).open_table(TABLE).count_rows()
    resumed = run_builder(arguments, kill_at=None)
    last = resumed[-1]
    total = Index.open(arguments.work).meta.num_chunks
    again = last["embedded"] + kept - total
    peaks = [row["peak_mib"] for row in (killed[0], killed[-1], last)]
    print(f"\n{total} chunks of {last['unchanged_documents'] + last['added_documents']} answers")
    print(f"killed with {kept} chunks in the table ({kept / total:.0%}); then {last['embedded']} were embedded")
    print(f"embedded again: {again}")
    print(f"peak memory: {peaks[0]} MiB with the encoder loaded, {peaks[1]} MiB when killed, {peaks[2]} MiB resumed")
    if arguments.quick:
        print("quick: nothing was written", file=sys.stderr)
    else:
        write_json(
            arguments.out / "index_whole.json",
            {
                "benchmark": "index_whole",
                **circumstances("index_whole", argv),
                "num_chunks": total,
                "kept_after_the_kill": kept,
                "embedded_after_it": last["embedded"],
                "embedded_again": again,
                "killed": [*killed[:: max(1, len(killed) // 12)], killed[-1]],
                "resumed": [*resumed[:: max(1, len(resumed) // 12)], last],
            },
        )
    return 0 if again == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
