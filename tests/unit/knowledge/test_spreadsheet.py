from __future__ import annotations

import csv
import io
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prima_ray.base import PrimaError
from prima_ray.knowledge.corpus import Corpus
from prima_ray.knowledge.spreadsheet import COLUMNS, export_csv, import_csv, neutralise, restore
from prima_ray.knowledge.vetting import Verdict, append, read_log, resolve
from tests.unit.knowledge.toy_corpus import ENTRIES, make_corpus

Rows = list[dict[str, str]]


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return make_corpus(tmp_path / "corpus")


def export(corpus: Corpus, path: Path) -> Rows:
    export_csv(corpus, resolve(corpus, read_log(corpus.path)), path)
    return list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8-sig"), newline="")))


def save(path: Path, rows: Rows, *, delimiter: str = ",", encoding: str = "utf-8") -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, delimiter=delimiter, lineterminator="\r\n")
    writer.writeheader()
    writer.writerows(rows)
    path.write_bytes(text.getvalue().encode(encoding))


def take(corpus: Corpus, path: Path, *, reviewer: str = "") -> tuple[Verdict, ...]:
    return import_csv(corpus, resolve(corpus, read_log(corpus.path)), path, reviewer=reviewer)


def change(corpus: Corpus, path: Path, **cells: dict[str, str]) -> None:
    """Export, fill cells in by entry (`sunburn_BCC`), save."""
    rows = export(corpus, path)
    for row in rows:
        row.update(cells.get(row["entry_id"].replace(":", "_"), {}))
    save(path, rows)


def test_a_row_is_an_entry_with_all_that_it_rests_on(corpus: Corpus, tmp_path: Path):
    path = tmp_path / "vetting.csv"
    rows = export(corpus, path)
    assert path.read_bytes().startswith(b"\xef\xbb\xbf")
    assert [row["entry_id"] for row in rows] == [item.entry_id for item in ENTRIES]
    assert rows[0]["statements"] == (
        "1. Says doc1.\n“Sunburns in childhood raise the risk” "
        "(Title of doc1, Skin cancer, Risk factors, 2025-05, https://example.org/doc1)\n"
        "2. Says doc2.\n“40 of 100 patients” (Title of doc2, Skin cancer, Risk factors)"
    )
    assert {key: rows[0][key] for key in ("factor", "diagnosis", "num_sources", "status", "decision", "by")} == {
        "factor": "sunburns in the past",
        "diagnosis": "basal cell carcinoma",
        "num_sources": "2",
        "status": "proposed",
        "decision": "",
        "by": "",
    }


def test_no_cell_is_a_formula(corpus: Corpus, tmp_path: Path):
    rows = export(corpus, tmp_path / "vetting.csv")
    assert rows[3]["summary"] == "'=1+1: fewer; '-2 in a year"
    assert not any(cell.lstrip()[:1] in tuple("=+-@") for row in rows for cell in row.values() if cell)


@pytest.mark.parametrize(
    ("text", "cell"),
    [
        ("=1", "'=1"),
        ("+1", "'+1"),
        ("-1", "'-1"),
        ("@SUM(A1)", "'@SUM(A1)"),
        ("\t=1", "\t'=1"),
        ("\r=1", "\r'=1"),
        ("  =1", "  '=1"),
        ("a\n=1", "a\n'=1"),
        ("a;=1", "a;'=1"),
        ("\uff1d1", "'\uff1d1"),
        ("'=1", "''=1"),
        ("'tis", "'tis"),
        ("a=1-b", "a=1-b"),
        ("", ""),
    ],
)
def test_formulas_are_neutralised_and_restored(text: str, cell: str):
    assert neutralise(text) == cell
    assert restore(cell) == text


@given(st.text("'=+-@; \t\n\rab\uff1d", max_size=12))
def test_every_text_comes_back(text: str):
    assert restore(neutralise(text)) == text


def test_decisions_come_back(corpus: Corpus, tmp_path: Path):
    path = tmp_path / "vetting.csv"
    change(
        corpus,
        path,
        sunburn_BCC={"decision": "Accepted ", "by": " Ana  Sol ", "note": "'=yes"},
        itch_BCC={"decision": "rejected"},
        age_NEV={"decision": "edited", "direction": "none", "strength": "weak", "summary": "Divided."},
    )
    verdicts = take(corpus, path, reviewer="Bo")
    assert [(item.entry_id, item.decision, item.by, item.note) for item in verdicts] == [
        ("sunburn:BCC", "accepted", "Ana Sol", "=yes"),
        ("itch:BCC", "rejected", "Bo", ""),
        ("age:NEV", "edited", "Bo", ""),
    ]
    edited = verdicts[2].edited
    assert edited is not None
    assert (edited.direction, edited.strength, edited.summary) == ("none", "weak", "Divided.")
    assert edited.statements == ENTRIES[3].statements
    append(corpus, verdicts)
    # The same file again says nothing new.
    assert take(corpus, path, reviewer="Bo") == ()
    assert [row["status"] for row in export(corpus, path)] == ["accepted", "proposed", "rejected", "edited"]


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_as_spreadsheets_save_it(corpus: Corpus, tmp_path: Path, delimiter: str, encoding: str):
    path = tmp_path / "vetting.csv"
    rows = export(corpus, path)
    for row in rows:
        row["statements"] = row["statements"].replace("\n", "\r\n")
    rows[1]["decision"] = "accepted"
    rows.append(dict.fromkeys(COLUMNS, ""))
    save(path, list(reversed(rows)), delimiter=delimiter, encoding=encoding)
    assert [item.entry_id for item in take(corpus, path, reviewer="Ana")] == ["sunburn:NEV"]


def say(corpus: Corpus, path: Path) -> str:
    with pytest.raises(PrimaError) as caught:
        take(corpus, path)
    assert caught.value.where == str(path)
    return str(caught.value).removeprefix(f"{path}: ")


@pytest.mark.parametrize(
    ("cells", "said"),
    [
        ({"entry_id": "x:y"}, "there is no entry 'x:y'"),
        ({"entry_id": "itch:BCC"}, "itch:BCC: stands in row 4 too"),
        ({"decision": "accept", "by": "Ana"}, "age:NEV: unknown decision 'accept'; did you mean 'accepted'?"),
        ({"decision": "ok", "by": "Ana"},
         "age:NEV: unknown decision 'ok'; known: accepted, rejected, edited, reopened"),
        ({"decision": "accepted"}, "age:NEV: who decides? `by` is empty"),
        ({"decision": "accepted", "by": "Ana", "entry_hash": "0"},
         "age:NEV: the entry or a passage it cites is another than when it was exported"),
        ({"decision": "accepted", "by": "Ana", "summary": "x"},
         "age:NEV: summary was changed, but the decision is 'accepted'; write 'edited'"),
        ({"decision": "edited", "by": "Ana", "statements": "x"},
         "age:NEV: statements are edited on the review page"),
        ({"decision": "edited", "by": "Ana"}, "age:NEV: the decision is 'edited', but nothing was changed"),
        ({"decision": "edited", "by": "Ana", "direction": "proves"},
         "age:NEV: direction: Input should be 'raises', 'lowers', 'none' or 'no_evidence'"),
        ({"decision": "edited", "by": "Ana", "direction": "no_evidence"},
         "age:NEV: no_evidence: an entry with statements has some"),
        ({"summary": "x"}, "age:NEV: summary was changed without a decision"),
        ({"note": "hm"}, "age:NEV: a note without a decision"),
    ],
)  # fmt: skip
def test_a_row_that_does_not_match_and_nothing_is_taken(
    corpus: Corpus, tmp_path: Path, cells: dict[str, str], said: str
):
    path = tmp_path / "vetting.csv"
    change(corpus, path, age_NEV=cells, sunburn_BCC={"decision": "accepted", "by": "Ana"})
    assert say(corpus, path) == f"nothing was taken over: row 5: {said}"


def test_a_decision_about_what_was_decided_otherwise_since(corpus: Corpus, tmp_path: Path):
    path = tmp_path / "vetting.csv"
    change(corpus, path, age_NEV={"decision": "accepted", "by": "Ana"})
    edited = ENTRIES[3].model_copy(update={"summary": "Fewer."})
    append(
        corpus,
        [Verdict(entry_id="age:NEV", entry_hash=corpus.hashes["age:NEV"], decision="edited", by="Bo", edited=edited)],
    )
    assert say(corpus, path) == (
        "nothing was taken over: row 5: age:NEV: the entry or a passage it cites is another than when it was exported"
    )
    # Rows without a decision may be as old as they like.
    change(corpus, path)
    rows = export(corpus, path)
    rows[3].update(entry_hash="0", summary="Before.")
    save(path, rows)
    assert take(corpus, path) == ()


def test_many_mistakes_are_counted(corpus: Corpus, tmp_path: Path):
    path = tmp_path / "vetting.csv"
    rows = export(corpus, path) * 3
    save(path, rows)
    assert say(corpus, path) == (
        "nothing was taken over: row 6: sunburn:BCC: stands in row 2 too; row 7: sunburn:NEV: stands in row 3 too; "
        "row 8: itch:BCC: stands in row 4 too; row 9: age:NEV: stands in row 5 too; "
        "row 10: sunburn:BCC: stands in row 2 too; and 3 more"
    )


def _text(text: str) -> Callable[[Path], None]:
    return lambda path: path.write_text(text) and None


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: None, "cannot be read (No such file or directory)"),
        (_text("a,b\n1,2\n"), "has no column 'entry_id'\n  Export it anew: prima vet CORPUS --export FILE.csv"),
        (_text(""), "has no column 'entry_id'\n  Export it anew: prima vet CORPUS --export FILE.csv"),
        (_text('"entry_id,'), "is not a CSV file (unexpected end of data)"),
        (lambda path: path.write_bytes("é".encode("latin-1")) and None,
         "is not UTF-8 text\n  Save it as “CSV UTF-8”."),
    ],
)  # fmt: skip
def test_files_that_are_none_of_ours(corpus: Corpus, tmp_path: Path, make: Callable[[Path], None], said: str):
    path = tmp_path / "vetting.csv"
    make(path)
    assert say(corpus, path) == said


def test_a_place_that_cannot_be_written(corpus: Corpus, tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(PrimaError, match=r"file/x.csv: cannot be written \((File exists|Not a directory)\)"):
        export(corpus, tmp_path / "file/x.csv")
