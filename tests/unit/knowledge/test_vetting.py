from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from prima_ray.base import PrimaError
from prima_ray.knowledge.corpus import Corpus, read_corpus
from prima_ray.knowledge.entries import Entry
from prima_ray.knowledge.vetting import Verdict, Vetting, append, parse_log, read_log, resolve, take_over
from tests.unit.knowledge.toy_corpus import CHUNKS, ENTRIES, OTHER, SUN, chunk, entry, make_corpus

BCC, ITCH, AGE, SILENT = "sunburn:BCC", "itch:BCC", "age:NEV", "sunburn:NEV"
MEND = "\n  Restore the log from a copy; every decision since then has to be made again."


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return make_corpus(tmp_path / "corpus")


def state(corpus: Corpus) -> Vetting:
    return resolve(corpus, read_log(corpus.path))


def decide(corpus: Corpus, entry_id: str, decision: str, *, by: str = "Ana", at: int = 1, **keys: Any) -> None:
    current = state(corpus).entries[entry_id]
    verdict = Verdict.model_validate(
        {"entry_id": entry_id, "entry_hash": current.entry_hash, "decision": decision, "by": by, **keys}
    )
    append(corpus, [verdict], now=lambda: f"2026-01-{at:02}T10:00:00+00:00")


def say(corpus: Corpus) -> str:
    with pytest.raises(PrimaError) as caught:
        read_log(corpus.path)
    return str(caught.value)


def statuses(corpus: Corpus) -> list[str]:
    return [item.entry.status for item in state(corpus).entries.values()]


# ----------------------------------------------------------------------------------------------------- decisions


def test_without_a_log_everything_is_proposed(corpus: Corpus):
    assert statuses(corpus) == ["proposed"] * 4
    assert state(corpus).used() == ()
    assert [item.entry_id for item in state(corpus).used(unvetted=True)] == [BCC, SILENT, ITCH, AGE]


def test_decisions_and_what_is_used(corpus: Corpus):
    decide(corpus, BCC, "accepted", note="as in the guideline")
    decide(corpus, ITCH, "rejected")
    edited = ENTRIES[3].model_copy(update={"summary": "Fewer."})
    decide(corpus, AGE, "edited", edited=edited, by="Bo", at=2)
    assert statuses(corpus) == ["accepted", "proposed", "rejected", "edited"]
    found = state(corpus)
    assert [item.entry_id for item in found.used()] == [BCC, AGE]
    assert [item.entry_id for item in found.used(unvetted=True)] == [BCC, SILENT, AGE]
    assert found.used()[1].summary == "Fewer."
    decision = found.entries[BCC].decision
    assert decision is not None
    assert (decision.by, decision.at, decision.note) == ("Ana", "2026-01-01T10:00:00+00:00", "as in the guideline")
    assert read_corpus(corpus.path).entries == ENTRIES


def test_the_last_decision_counts_and_the_earlier_ones_stay_in_the_log(corpus: Corpus):
    for verb in ("accepted", "rejected", "accepted"):
        decide(corpus, BCC, verb)
    assert statuses(corpus)[0] == "accepted"
    assert [item.decision for item in state(corpus).entries[BCC].history] == ["accepted", "rejected", "accepted"]


def test_an_edit_that_another_accepts_is_accepted_as_edited(corpus: Corpus):
    decide(corpus, AGE, "edited", edited=ENTRIES[3].model_copy(update={"direction": "none"}))
    decide(corpus, AGE, "accepted", by="Bo")
    found = state(corpus).entries[AGE]
    assert (found.entry.status, found.entry.direction) == ("accepted", "none")


def test_what_is_reopened_is_as_it_was_proposed(corpus: Corpus):
    decide(corpus, AGE, "edited", edited=ENTRIES[3].model_copy(update={"direction": "none"}))
    decide(corpus, AGE, "reopened", by="Bo", at=3)
    found = state(corpus).entries[AGE]
    assert (found.entry, found.decision) == (ENTRIES[3], None)
    assert found.reopened == "Bo re-opened it on 2026-01-03"
    assert len(found.history) == 2


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"by": " \n"}, "a decision needs the name of who decides"),
        ({"decision": "edited"}, "edited: given exactly where the decision is `edited`"),
        ({"edited": ENTRIES[0]}, "edited: given exactly where the decision is `edited`"),
        ({"decision": "edited", "edited": ENTRIES[1]}, "edited: is of sunburn:NEV, not of sunburn:BCC"),
    ],
)
def test_verdicts_that_make_no_sense(keys: dict[str, Any], message: str):
    with pytest.raises(ValidationError) as caught:
        Verdict.model_validate({"entry_id": BCC, "entry_hash": "x", "decision": "accepted", "by": "Ana", **keys})
    assert caught.value.errors()[0]["msg"] == f"Value error, {message}"


def test_a_decision_about_what_another_has_changed_meanwhile_is_refused(corpus: Corpus):
    before = state(corpus).entries[AGE]
    decide(corpus, AGE, "edited", edited=ENTRIES[3].model_copy(update={"summary": "Fewer."}))
    late = Verdict(entry_id=AGE, entry_hash=before.entry_hash, decision="rejected", by="Bo")
    fine = Verdict(entry_id=BCC, entry_hash=corpus.hashes[BCC], decision="accepted", by="Bo")
    with pytest.raises(PrimaError) as caught:
        append(corpus, [fine, late])
    assert str(caught.value) == (
        f"{corpus.path}: age:NEV: the entry or a passage it cites is another by now\n  Look at it again, then decide."
    )
    assert statuses(corpus) == ["proposed", "proposed", "proposed", "edited"]


def test_what_does_not_exist_cannot_be_decided_or_cited(corpus: Corpus):
    with pytest.raises(PrimaError) as caught:
        append(corpus, [Verdict(entry_id="x:y", entry_hash="", decision="accepted", by="Ana")])
    assert str(caught.value) == f"{corpus.path}: there is no entry 'x:y'"
    with pytest.raises(PrimaError) as caught:
        decide(corpus, AGE, "edited", edited=entry("age", "NEV", "raises", (SUN, "never said")))
    assert str(caught.value) == (
        f"{corpus.path}: age:NEV: statement 1 quotes 'never said', which does not stand in the passage {SUN.chunk_id!r}"
    )
    assert read_log(corpus.path).decisions == ()


# ------------------------------------------------------------------------------------------- what opens it again


def test_an_edited_source_reopens_the_entries_that_cite_it(corpus: Corpus):
    """The passage has another id then, as its text is another; the entry says the same."""
    for name in (BCC, SILENT, ITCH, AGE):
        decide(corpus, name, "accepted", at=5)
    new = chunk("doc2", OTHER.text.replace("40", "40 (since: 41)"), url=None)
    entries = tuple(
        item.model_validate_json(item.model_dump_json().replace(OTHER.chunk_id, new.chunk_id)) for item in ENTRIES
    )
    quoted = entries[0].model_dump()
    quoted["statements"][1]["quotes"][0]["quote"] = "of 100 patients"
    again = make_corpus(corpus.path, entries=entries[2:], chunks=[SUN, new, CHUNKS[2]])
    assert statuses(again) == ["proposed", "accepted"]
    found = state(again)
    assert found.entries[ITCH].reopened == "Ana accepted it on 2026-01-05; a passage that it cites has changed since"
    assert found.unknown == (BCC, SILENT)
    again = make_corpus(corpus.path, entries=[Entry.model_validate(quoted)], chunks=[SUN, new])
    assert state(again).entries[BCC].reopened == "Ana accepted it on 2026-01-05; the entry has been rewritten since"


def test_a_rewritten_entry_is_open_again_and_the_old_words_are_accepted_still(corpus: Corpus):
    decide(corpus, BCC, "accepted", at=5)
    rewritten = (ENTRIES[0].model_copy(update={"summary": "Other words."}), *ENTRIES[1:])
    again = make_corpus(corpus.path, entries=rewritten)
    assert state(again).entries[BCC].reopened == "Ana accepted it on 2026-01-05; the entry has been rewritten since"
    decide(again, BCC, "rejected", by="Bo")
    assert state(again).entries[BCC].reopened is None
    assert statuses(again)[0] == "rejected"
    # Each decision is about its own words.
    back = make_corpus(corpus.path)
    assert statuses(back)[0] == "accepted"


def test_an_edit_of_what_has_changed_since_does_not_come_back(corpus: Corpus):
    decide(corpus, AGE, "edited", edited=ENTRIES[3].model_copy(update={"direction": "none"}))
    decide(corpus, AGE, "accepted", by="Bo")
    rewritten = (*ENTRIES[:3], ENTRIES[3].model_copy(update={"summary": "Other words."}))
    found = state(make_corpus(corpus.path, entries=rewritten)).entries[AGE]
    assert (found.entry.status, found.entry.direction, found.entry.summary) == ("proposed", "lowers", "Other words.")
    assert len(found.history) == 2


def test_an_edit_that_cites_a_passage_which_is_gone_is_open_again(corpus: Corpus):
    cites_another = entry("age", "NEV", "lowers", (OTHER, "40 of 100 patients"))
    decide(corpus, AGE, "edited", edited=cites_another, at=2)
    again = make_corpus(corpus.path, entries=[ENTRIES[3]], chunks=[CHUNKS[2]])
    assert state(again).entries[AGE].reopened == (
        "Ana edited it on 2026-01-02; a passage that the edit cites has changed since"
    )


def test_a_new_corpus_takes_an_earlier_log_over(corpus: Corpus, tmp_path: Path):
    decide(corpus, BCC, "accepted")
    decide(corpus, AGE, "rejected")
    rewritten = (*ENTRIES[:3], ENTRIES[3].model_copy(update={"summary": "Other words."}))
    again = make_corpus(tmp_path / "new", entries=rewritten)
    assert len(take_over(again, corpus.path / "vetting.jsonl").decisions) == 2
    assert statuses(again) == ["accepted", "proposed", "proposed", "proposed"]
    decide(again, ITCH, "accepted")
    assert statuses(again) == ["accepted", "proposed", "accepted", "proposed"]
    with pytest.raises(PrimaError) as caught:
        take_over(again, corpus.path / "vetting.jsonl")
    said = "the corpus has decisions of its own; an earlier log comes before the first of them"
    assert str(caught.value) == f"{again.path}/vetting.jsonl: {said}"
    with pytest.raises(PrimaError) as caught:
        take_over(again, tmp_path / "none.jsonl")
    assert str(caught.value) == f"{tmp_path}/none.jsonl: cannot be read (No such file or directory)"


# ------------------------------------------------------------------------------------------------ the log itself


def lines(corpus: Corpus) -> list[str]:
    return (corpus.path / "vetting.jsonl").read_text().splitlines(keepends=True)


def rewrite(corpus: Corpus, new: list[str]) -> None:
    (corpus.path / "vetting.jsonl").write_text("".join(new))


@pytest.fixture
def decided(corpus: Corpus) -> Corpus:
    for number, name in enumerate((BCC, ITCH, AGE), start=1):
        decide(corpus, name, "accepted", at=number)
    return corpus


def test_a_line_has_everything_and_names_the_one_before(decided: Corpus):
    first, second, _ = (json.loads(line) for line in lines(decided))
    assert set(first) == {
        "entry_id", "entry_hash", "wording_hash", "decision", "by", "at", "note", "edited", "previous", "hash",
    }  # fmt: skip
    assert (first["previous"], second["previous"]) == (None, first["hash"])


def test_changed_removed_and_moved_lines_are_noticed(decided: Corpus):
    path, written = decided.path / "vetting.jsonl", lines(decided)
    for number in (1, 2, 3):
        changed = [line.replace("Ana", "Eva") if at == number else line for at, line in enumerate(written, start=1)]
        rewrite(decided, changed)
        assert say(decided) == f"{path}: line {number} was changed after it was written{MEND}"
    for new, said in (
        (written[1:], "line 1 does not follow the beginning: a line was removed or moved"),
        ([written[0], written[2]], "line 2 does not follow line 1: a line was removed or moved"),
        ([written[1], written[0], written[2]], "line 1 does not follow the beginning: a line was removed or moved"),
        ([*written, written[2]], "line 4 does not follow line 3: a line was removed or moved"),
        (written[:2], "lines were removed: 3 decisions were written, 2 are there"),
        ([], "lines were removed: 3 decisions were written, 0 are there"),
        (["\n", *written], "line 1 is no decision: it was changed"),
    ):
        rewrite(decided, new)
        assert say(decided) == f"{path}: {said}{MEND}"
    path.unlink()
    assert say(decided) == f"{path}: lines were removed: 3 decisions were written, 0 are there{MEND}"


def test_another_log_in_its_place_is_noticed(decided: Corpus, tmp_path: Path):
    other = make_corpus(tmp_path / "other")
    for name in (BCC, ITCH, AGE):
        decide(other, name, "rejected")
    rewrite(decided, lines(other))
    path = decided.path / "vetting.jsonl"
    assert say(decided) == f"{path}: line 3 is not the one that was written{MEND}"
    (decided.path / "vetting.head.json").write_text("{}")
    assert say(decided) == f"{decided.path}/vetting.head.json: damaged: expected the keys `decisions` and `hash`"


def test_a_line_that_a_crash_cut_off_is_reported_and_does_not_count(decided: Corpus, caplog: pytest.LogCaptureFixture):
    path = decided.path / "vetting.jsonl"
    whole = path.read_bytes()
    with path.open("ab") as file:
        file.write(whole[:40])
    with caplog.at_level(logging.WARNING):
        log = read_log(decided.path)
    assert (len(log.decisions), log.torn) == (3, whole[:40].decode())
    assert caplog.messages == [f"{path}: the last line was never finished (40 characters; a crash?) and does not count"]
    decide(decided, SILENT, "accepted")
    assert path.read_bytes().startswith(whole)
    assert (len(read_log(decided.path).decisions), read_log(decided.path).torn) == (4, "")


def test_a_whole_line_without_its_end_counts(decided: Corpus):
    path = decided.path / "vetting.jsonl"
    path.write_bytes(path.read_bytes().removesuffix(b"\n"))
    assert (len(read_log(decided.path).decisions), read_log(decided.path).torn) == (3, "")
    decide(decided, SILENT, "accepted")
    assert statuses(decided) == ["accepted"] * 4


def test_every_cut_of_a_log_is_read_or_told(decided: Corpus):
    """A crash may come at any byte; what was complete before it counts."""
    data = (decided.path / "vetting.jsonl").read_bytes()
    for size in range(len(data)):
        log = parse_log(data[:size], where="log")
        assert len(log.decisions) in (data[:size].count(b"\n"), data[:size].count(b"\n") + 1)


def test_a_folder_that_cannot_be_written_is_told(corpus: Corpus):
    (corpus.path / "vetting.jsonl").mkdir()
    with pytest.raises(PrimaError) as caught:
        append(corpus, [Verdict(entry_id=BCC, entry_hash=corpus.hashes[BCC], decision="accepted", by="Ana")])
    assert str(caught.value) == f"{corpus.path}/vetting.jsonl: cannot be written (Is a directory)"


def test_a_disk_that_is_full_takes_nothing_half(decided: Corpus, monkeypatch: pytest.MonkeyPatch):
    before = (decided.path / "vetting.jsonl").read_bytes()
    real = __import__("os").write
    monkeypatch.setattr("os.write", lambda descriptor, data: real(descriptor, data[:50]))
    with pytest.raises(PrimaError) as caught:
        decide(decided, SILENT, "accepted")
    assert str(caught.value) == f"{decided.path}/vetting.jsonl: cannot be written (no space left)"
    monkeypatch.undo()
    assert (decided.path / "vetting.jsonl").read_bytes() == before
    assert len(read_log(decided.path).decisions) == 3


APPENDS = """
import sys
from prima_ray.knowledge.corpus import read_corpus
from prima_ray.knowledge.entries import Entry
from prima_ray.knowledge.vetting import Verdict, append
corpus = read_corpus(sys.argv[1])
for number in range(10):
    verb = "accepted" if number % 2 else "rejected"
    append(corpus, [Verdict(entry_id="itch:BCC", entry_hash=corpus.hashes["itch:BCC"], decision=verb, by=sys.argv[2])])
"""


def test_reviewers_may_append_at_once(corpus: Corpus):
    started = [
        subprocess.Popen([sys.executable, "-c", APPENDS, str(corpus.path), name]) for name in ("Ana", "Bo", "Cy")
    ]
    assert [process.wait(timeout=120) for process in started] == [0, 0, 0]
    log = read_log(corpus.path)
    assert sorted(item.by for item in log.decisions) == ["Ana"] * 10 + ["Bo"] * 10 + ["Cy"] * 10
