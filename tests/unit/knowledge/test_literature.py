from __future__ import annotations

import json
import logging
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from prima_ray.base import PrimaError
from prima_ray.config import load_config, parse_yaml, validate_config
from prima_ray.data.rejection import RecordRejected
from prima_ray.knowledge.documents import QUARANTINE_SCHEMA, Document, Quarantined
from prima_ray.knowledge.literature import LiteratureConfig, read_literature
from tests.unit.knowledge.reading import literature, reasons, sections

ROOT = Path(__file__).parents[3]
LITERATURE = Path(os.environ.get("PRIMA_SHARED", ROOT.parent / "shared")) / "data" / "literature"
needs_data = pytest.mark.skipif(not LITERATURE.is_dir(), reason="the literature is not in $PRIMA_SHARED/data")
PDQ = {
    "kind": "jsonl",
    "path": str(LITERATURE / "pdq_cancer_risk/sections.jsonl"),
    "source": "pdq",
    "columns": {
        "document": ["doc_id"],
        "title": "title",
        "heading": "section",
        "text": "text",
        "url": "url",
        "date": "last_modified",
        "licence": "license",
    },
    "heading_separator": " > ",
}
# MedQuAD's ids are unique within their file only.
MEDQUAD = {
    "kind": "jsonl",
    "path": str(LITERATURE / "medquad/medquad_answered.jsonl.gz"),
    "source": "medquad",
    "columns": {
        "document": ["file", "id"],
        "title": "focus",
        "heading": "question",
        "text": "answer",
        "url": "url",
        "licence": "license",
    },
}
SKIN = {**MEDQUAD, "path": str(LITERATURE / "medquad/medquad_skin.jsonl")}


def lines(path: Path, *rows: dict[str, Any]) -> dict[str, Any]:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"kind": "jsonl", "path": str(path)}


def note(path: Path, text: str) -> dict[str, Any]:
    path.write_text(text)
    return {"kind": "text", "path": str(path)}


def message(*sources: dict[str, Any], **keys: Any) -> str:
    with pytest.raises(PrimaError) as caught:
        read_literature(literature(*sources, **keys))
    return str(caught.value)


def test_the_same_text_is_read_once_under_whatever_name(tmp_path: Path):
    first = note(tmp_path / "a.txt", "Sun raises the risk.\n")
    again = note(tmp_path / "b.md", "Sun  raises the\r\nrisk.")
    third = lines(
        tmp_path / "c.jsonl", {"doc_id": "x", "text": "Sun raises the risk."}, {"doc_id": "y", "text": "Other."}
    )
    reading = read_literature(literature(first, {**again, "source": "there"}, third))
    assert [item.doc_id for item in reading] == ["here/a.txt", "y"]
    assert (reading.num_documents, reading.num_duplicates) == (Counter(here=2), Counter(here=1, there=1))
    assert reading.quarantined == []


def test_of_two_texts_with_one_id_the_first_counts(tmp_path: Path):
    first = lines(tmp_path / "a.jsonl", *({"doc_id": name, "text": f"{name} {i}"} for i, name in enumerate("xyx")))
    second = lines(tmp_path / "b.jsonl", {"doc_id": "z", "text": "z"}, {"doc_id": "y", "text": "new"})
    reading = read_literature(literature(first, second))
    assert [item.doc_id for item in reading] == ["x", "y", "z"]
    assert reasons(reading) == [
        (
            "line 3",
            "conflicting_document",
            f"x was read before with another text ({tmp_path}/a.jsonl, line 1); "
            "the lines of a document must follow each other",
        ),
        ("line 2", "conflicting_document", f"y was read before with another text ({tmp_path}/a.jsonl, line 2)"),
    ]


def test_a_source_that_is_not_allowed_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    first = note(tmp_path / "a.txt", "one")
    second = {**note(tmp_path / "b.txt", "two"), "source": "there"}
    opened = []
    monkeypatch.setattr(
        "prima_ray.knowledge.files.SourceFile.read", lambda self, *_, **__: opened.append(self.name) or b"x"
    )
    reading = read_literature(literature(first, second, allow=["here"]))
    assert [item.source for item in reading] == ["here"]
    assert opened == ["a.txt"]
    expected = Quarantined(
        "there", str(tmp_path / "b.txt"), None, "source_not_allowed", "the source 'there' is not in allow"
    )
    assert reading.quarantined == [expected]


def test_records_may_name_their_source_themselves(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    rows = [
        {"doc_id": "1", "text": "a", "from": "CDC"},
        {"doc_id": "1", "text": "b", "from": "blog"},
        {"doc_id": "2", "text": "c"},
    ]
    source = {**lines(tmp_path / "a.jsonl", *rows), "columns": {"source": "from"}}
    reading = read_literature(literature(source, allow=["CDC", "here", "NIH"]))
    with caplog.at_level(logging.WARNING):
        assert [(item.doc_id, item.source) for item in reading] == [("1", "CDC"), ("2", "here")]
    assert reasons(reading) == [("line 2", "source_not_allowed", "the source 'blog' is not in allow")]
    assert caplog.messages == ["allow: no document of the source 'NIH' was read"]


def test_a_link_out_of_the_folder_is_not_read(tmp_path: Path):
    (tmp_path / "texts").mkdir()
    note(tmp_path / "secret.txt", "secret")
    note(tmp_path / "texts/a.txt", "one")
    (tmp_path / "texts/b.txt").symlink_to(tmp_path / "secret.txt")
    reading = read_literature(literature({"kind": "text", "path": str(tmp_path / "texts")}))
    assert [item.doc_id for item in reading] == ["here/a.txt"]
    assert reasons(reading) == [(None, "path_outside", "the file is a link that leaves the folder")]


def test_one_bad_file_costs_that_file(tmp_path: Path):
    for name, data in {"a.txt": b"one", "b.txt": b"caf\xe9", "c.txt": b"two"}.items():
        (tmp_path / name).write_bytes(data)
    reading = read_literature(literature({"kind": "text", "path": str(tmp_path)}))
    assert [item.doc_id for item in reading] == ["here/a.txt", "here/c.txt"]
    assert [item.path for item in reading.quarantined] == [str(tmp_path / "b.txt")]
    table = pa.Table.from_pylist(
        [{name: getattr(item, name) for name in QUARANTINE_SCHEMA.names} for item in reading.quarantined],
        schema=QUARANTINE_SCHEMA,
    )
    assert table["reason"].to_pylist() == ["encoding"]


def test_a_file_that_vanishes_is_quarantined(tmp_path: Path):
    reading = read_literature(literature(note(tmp_path / "a.txt", "one")))
    (tmp_path / "a.txt").unlink()
    assert list(reading) == []
    assert [reason for _, reason, _ in reasons(reading)] == ["unreadable_file"]


def test_a_rejection_is_not_swallowed_where_the_reader_of_the_documents_raises_it(tmp_path: Path):
    reading = read_literature(literature(note(tmp_path / "a.txt", "one")))

    def take(document: Document) -> None:
        raise RecordRejected("mine", f"not the reading's: {document.doc_id}")

    with pytest.raises(RecordRejected, match="mine"):
        list(map(take, reading))
    assert reading.quarantined == []


NOTES = {"kind": "text", "path": "notes"}


@pytest.mark.parametrize(
    ("keys", "sources", "expected"),
    [
        ({}, [NOTES], "notes: no such file or folder\n  Check sources.0.path."),
        ({}, [], "corpus.yaml: sources: none is listed"),
        ({"allow": []}, [NOTES], "corpus.yaml: allow: no source is listed, so that nothing could be read"),
        (
            {"allow": ["hear"]},
            [NOTES],
            "corpus.yaml: allow: 'hear' is the name of no source; did you mean 'here'?",
        ),
        (
            {"allow": ["xyz"]},
            [NOTES, {**NOTES, "source": "there"}],
            "corpus.yaml: allow: 'xyz' is the name of no source; the sources are here, there",
        ),
        (
            {},
            [{**NOTES, "kind": "jsonl", "columns": {"txt": "x"}}],
            "corpus.yaml: unknown key 'sources.0.columns.txt', did you mean 'sources.0.columns.text'?",
        ),
        ({}, [{**NOTES, "url": "x.org"}], "corpus.yaml: sources.0.url: must begin with http:// or https://"),
        (
            {},
            [{**NOTES, "date": "May"}],
            "corpus.yaml: sources.0.date: 'May' is no date such as 2025, 2025-05 or 2025-05-08",
        ),
    ],
)
def test_mistakes_in_the_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keys: dict[str, Any], sources: list[dict[str, Any]], expected: str
):
    monkeypatch.chdir(tmp_path)
    assert message(*sources, **keys) == expected


def test_the_config_in_the_documentation_is_one():
    text = (ROOT / "docs/literature.md").read_text().partition("```yaml\n")[2].partition("```")[0]
    config = validate_config(LiteratureConfig, parse_yaml(text, where="docs"), where="docs")
    pdq, medquad = literature(PDQ, MEDQUAD).sources
    assert [item.model_copy(update={"path": ""}) for item in config.sources[:2]] == [
        item.model_copy(update={"path": ""}) for item in (pdq, medquad)
    ]


def test_paths_start_at_the_file_that_names_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "notes").mkdir()
    note(tmp_path / "notes/a.md", "one")
    (tmp_path / "corpus.yaml").write_text(
        "sources: [{kind: text, path: 'notes/*.md', source: notes}]\nallow: [notes]\n"
    )
    config = load_config(LiteratureConfig, tmp_path / "corpus.yaml")
    assert [item.doc_id for item in read_literature(config)] == ["notes/a.md"]


def test_every_reason_is_explained():
    explained = (ROOT / "docs/literature.md").read_text()
    code = "".join(path.read_text() for path in (ROOT / "prima_ray/knowledge").rglob("*.py"))
    named = set(re.findall(r'RecordRejected\(\s*"(\w+)"', code))
    assert len(named) > 15
    assert [name for name in sorted(named) if f"`{name}`" not in explained] == []


@needs_data
def test_pdq_is_read_by_config_alone():
    reading = read_literature(literature(PDQ))
    documents = list(reading)
    assert (len(documents), sum(len(item.sections) for item in documents)) == (85, 1826)
    assert (reading.quarantined, reading.num_duplicates) == ([], Counter())
    listed = json.loads((LITERATURE / "pdq_cancer_risk/documents.json").read_text())
    assert [(item.doc_id, item.title, item.url, item.date, len(item.sections)) for item in documents] == [
        (item["doc_id"], item["title"], item["url"], item["last_modified"], item["sections"]) for item in listed
    ]
    assert documents[0].licence == "PDQ text: free to use as text (see README); US National Cancer Institute"
    assert max(len(item.heading) for document in documents for item in document.sections) > 2


@needs_data
def test_medquad_is_read_by_config_alone_and_its_duplicates_are_dropped():
    reading = read_literature(literature(SKIN, MEDQUAD))
    documents = [next(reading.__iter__()) for _ in range(236)]
    assert reading.num_documents == Counter(medquad=236)
    assert documents[0].doc_id == "1_CancerGov_QA/0000003_1.xml#0000003_1-2"
    assert [path for path, _ in sections(documents[0])] == [("Who is at risk for Adult Soft Tissue Sarcoma? ?",)]
    for _ in reading:
        pass
    # The 236 stand in the large file as well, and 48 of NIDDK's stand there twice.
    assert reading.num_documents["medquad"] == 16_407 - 48
    assert reading.num_duplicates["medquad"] == 236 + 48
    assert reading.quarantined == []
