from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from prima_ray.base import PrimaError, hash_file, read_json, write_json
from prima_ray.knowledge.chunks import CHUNK_SCHEMA
from prima_ray.knowledge.corpus import (
    CORPUS_SCHEMA,
    entry_hash,
    read_corpus,
    wording_hash,
    write_corpus,
)
from tests.unit.knowledge.toy_corpus import CHUNKS, ENTRIES, FACTORS, OLD, OTHER, SUN, chunk, entry, make_corpus


def test_what_is_written_is_read(tmp_path: Path):
    corpus = make_corpus(tmp_path)
    assert corpus.entries == ENTRIES
    assert corpus.chunks == {item.chunk_id: item for item in CHUNKS}
    assert corpus.factors == FACTORS
    assert (corpus.factor_phrase("age"), corpus.factor_phrase("blue_eyes")) == ("older age", "blue eyes")
    assert (corpus.diagnosis_phrase("BCC"), corpus.diagnosis_phrase("MEL")) == ("basal cell carcinoma", "MEL")
    table = pq.read_table(tmp_path / "corpus.parquet")
    assert table.schema.equals(CORPUS_SCHEMA)
    lines = [json.loads(line) for line in (tmp_path / "corpus.jsonl").read_text().splitlines()]
    assert table.to_pylist() == lines
    assert list(lines[0]) == ["factor", "diagnosis", "direction", "strength", "summary", "status", "statements"]
    assert pq.read_schema(tmp_path / "chunks.parquet").equals(CHUNK_SCHEMA)


def test_two_corpora_of_the_same_content_are_the_same_files(tmp_path: Path):
    for name in ("a", "b"):
        make_corpus(tmp_path / name)
    assert read_json(tmp_path / "a/corpus.json") == read_json(tmp_path / "b/corpus.json")


def test_the_hash_is_of_what_a_person_reads():
    by_id = {item.chunk_id: item for item in CHUNKS}
    first = ENTRIES[0]
    base = entry_hash(first, by_id)
    assert entry_hash(first.model_copy(update={"status": "accepted"}), by_id) == base
    assert entry_hash(first.model_copy(update={"summary": "x"}), by_id) != base
    for changes, same in (
        ({"text": SUN.text + " Or not."}, False),
        ({"heading": ("Elsewhere",)}, False),
        ({"doc_id": "another"}, False),
        ({"date": "2026", "url": None, "title": "x", "licence": "x"}, True),
    ):
        assert (entry_hash(first, {**by_id, SUN.chunk_id: SUN.model_copy(update=changes)}) == base) is same
    # A passage that it does not cite.
    assert entry_hash(first, {**by_id, OLD.chunk_id: OLD.model_copy(update={"text": "x"})}) == base


def test_the_wording_is_the_same_wherever_the_quotes_stand():
    moved = chunk("doc2", f"New. {OTHER.text}")
    one, two = (entry("itch", "BCC", "raises", (item, "Itching was reported")) for item in (OTHER, moved))
    same = two.model_copy(update={"statements": (two.statements[0].model_copy(update={"text": "Says doc2."}),)})
    assert wording_hash(one) == wording_hash(same)
    assert wording_hash(one) != wording_hash(one.model_copy(update={"direction": "lowers"}))


@pytest.mark.parametrize(
    ("entries", "chunks", "message"),
    [
        ((*ENTRIES, ENTRIES[0]), CHUNKS, "the entry 'sunburn:BCC' is there twice"),
        (ENTRIES, (*CHUNKS, SUN), f"the passage {SUN.chunk_id!r} is there twice"),
        (
            ENTRIES,
            (SUN, OTHER),
            f"age:NEV: statement 1 cites the passage {OLD.chunk_id!r}, which the corpus does not hold",
        ),
        (
            [entry("itch", "BCC", "raises", (OTHER, "never said"))],
            CHUNKS,
            f"itch:BCC: statement 1 quotes 'never said', which does not stand in the passage {OTHER.chunk_id!r}",
        ),
    ],
)
def test_what_cannot_be_traced_is_not_written(tmp_path: Path, entries: object, chunks: object, message: str):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        write_corpus(tmp_path, entries, chunks)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def say(folder: Path) -> str:
    with pytest.raises(PrimaError) as caught:
        read_corpus(folder)
    return str(caught.value)


MEND = "\n  Copy the corpus again, or make it again."


def test_no_corpus_and_half_a_corpus(tmp_path: Path):
    assert say(tmp_path / "none") == f"{tmp_path}/none: no such corpus\n  Run `prima corpus` to make or complete it."
    make_corpus(tmp_path)
    (tmp_path / "chunks.parquet").rename(tmp_path / "aside")
    assert say(tmp_path) == f"{tmp_path}/chunks.parquet: this file of the corpus is missing{MEND}"
    (tmp_path / "aside").rename(tmp_path / "chunks.parquet")
    (tmp_path / "corpus.json").unlink()
    assert say(tmp_path) == (
        f"{tmp_path}: no complete corpus here (corpus.json is missing)\n  Run `prima corpus` to make or complete it."
    )


@pytest.mark.parametrize("name", ["corpus.jsonl", "corpus.parquet", "chunks.parquet"])
def test_a_changed_file_is_told(tmp_path: Path, name: str):
    make_corpus(tmp_path)
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data.replace(b"doc", b"dok"))
    assert say(tmp_path) == f"{tmp_path}/{name}: damaged: this is not the file that was written (checksum){MEND}"


def test_a_changed_file_with_the_right_checksum_is_told(tmp_path: Path):
    make_corpus(tmp_path)

    def rewrite(name: str, change: Callable[[str], str]) -> None:
        make_corpus(tmp_path)
        path = tmp_path / name
        path.write_text(change(path.read_text()))
        record = read_json(tmp_path / "corpus.json")
        write_json(tmp_path / "corpus.json", {**record, "files": {**record["files"], name: hash_file(path)}})

    rewrite("corpus.jsonl", lambda text: text.replace("Itching was", "Itching is"))
    assert say(tmp_path) == (
        f"{tmp_path}: damaged: itch:BCC: statement 1 quotes 'Itching is reported', which does not stand in the passage "
        f"{OTHER.chunk_id!r}{MEND}"
    )
    rewrite("corpus.jsonl", lambda text: text.replace('"raises"', '"proves"', 1))
    assert say(tmp_path).startswith(f"{tmp_path}/corpus.jsonl: damaged: line 1: direction: Input should be 'raises'")
    for record, said in (
        ("[]", "a corpus of version None, this program reads version 1"),
        ('{"version": 1}', f"damaged: num_entries: Field required{MEND}"),
    ):
        (tmp_path / "corpus.json").write_text(record)
        assert say(tmp_path) == f"{tmp_path}/corpus.json: {said}"


def test_writing_anew_that_breaks_off_leaves_no_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    make_corpus(tmp_path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("prima_ray.knowledge.corpus.write_atomic", full)
    with pytest.raises(OSError, match="No space left"):
        make_corpus(tmp_path, entries=ENTRIES[:1])
    assert say(tmp_path).startswith(f"{tmp_path}: no complete corpus here")
