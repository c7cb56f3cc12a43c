"""Vet: a corpus's entries are accepted, rejected or edited, on a local page or in a spreadsheet."""

from __future__ import annotations

import logging
from pathlib import Path

from prima_ray.base import PrimaError, is_loopback, is_uri
from prima_ray.knowledge.book import write_book
from prima_ray.knowledge.corpus import Corpus, read_corpus
from prima_ray.knowledge.review import ReviewServer
from prima_ray.knowledge.spreadsheet import export_csv, import_csv
from prima_ray.knowledge.vetting import Vetting, append, read_log, resolve, take_over

_log = logging.getLogger(__name__)
PORT = 8710


def run_vet(
    corpus: str,
    *,
    host: str = "127.0.0.1",
    port: int = PORT,
    reviewer: str = "",
    export: str | None = None,
    import_: str | None = None,
) -> Path:
    """What `prima vet` does: serve the review page until it is interrupted, or write or read a spreadsheet.

    Args:
        reviewer: the name that the page proposes, and that signs a spreadsheet's rows without one.
        export: the CSV file to write.
        import_: a CSV file with decisions, or the `vetting.jsonl` of an earlier corpus.

    Returns:
        the corpus, or the file that was written.

    Raises:
        PrimaError: no whole corpus there, its log is damaged, or rows do not match.
    """
    if is_uri(corpus):
        raise PrimaError("a corpus is vetted on a local disk", where=corpus, mend="Copy the folder here, and back.")
    if export and import_:
        raise PrimaError("give --export or --import, not both", mend="See `prima vet --help`.")
    read = read_corpus(corpus)
    if export:
        export_csv(read, _vetting(read), export)
        _log.info("%d entries are in %s: fill in `decision`, `by`, `note`", len(read.entries), export)
        return Path(export)
    if import_:
        _import(read, import_, reviewer)
    else:
        _serve(read, host, port, reviewer)
    state = _vetting(read)
    write_book(read, state)
    decided = sum(item.entry.status != "proposed" for item in state.entries.values())
    _log.info("%d of %d entries are decided", decided, len(state.entries))
    return read.path


def _vetting(corpus: Corpus) -> Vetting:
    return resolve(corpus, read_log(corpus.path))


def _import(corpus: Corpus, path: str, reviewer: str) -> None:
    if path.endswith(".jsonl"):
        earlier = take_over(corpus, path)
        _log.info("earlier decisions taken over: %d", len(earlier.decisions))
        return
    verdicts = import_csv(corpus, _vetting(corpus), path, reviewer=reviewer)
    append(corpus, verdicts)
    _log.info("decisions taken over: %d", len(verdicts))


def _serve(corpus: Corpus, host: str, port: int, reviewer: str) -> None:
    _vetting(corpus)  # a damaged log is said here rather than on a page
    if not is_loopback(host):
        _log.warning(
            "warning: %s can be reached from other machines, and nothing is encrypted: whoever sees the address below "
            "can decide in anybody's name. `ssh -L` to 127.0.0.1 does without.",
            host,
        )
    with ReviewServer(corpus, host=host, port=port, reviewer=reviewer) as server:
        _log.info("review page: %s\nCtrl-C ends it; what was decided is kept.", server.address)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return  # which is how one leaves
