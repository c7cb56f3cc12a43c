from __future__ import annotations

from pathlib import Path

from prima_ray.data.description import DataSetConfig
from prima_ray.inference.evidence import gather_evidence
from prima_ray.knowledge.corpus import Corpus
from prima_ray.knowledge.vetting import Verdict, append, read_log, resolve
from tests.conftest import TOY
from tests.unit.knowledge.toy_corpus import ENTRIES, OLD, entry, make_corpus

DATA_SET = DataSetConfig.model_validate(TOY)


def decide(corpus: Corpus, name: str, decision: str) -> None:
    verdict = {"entry_id": name, "entry_hash": corpus.hashes[name], "decision": decision, "by": "Ana"}
    append(corpus, [Verdict.model_validate(verdict)])


def gathered(corpus: Corpus, *, unvetted: bool = False) -> dict[str, bool]:
    """Attribute:diagnosis -> whether it is vetted."""
    found = gather_evidence(corpus, resolve(corpus, read_log(corpus.path)), DATA_SET, unvetted=unvetted)
    return {f"{item.attribute}:{item.diagnosis}": item.vetted for item in found.items}


def test_what_nobody_accepted_is_shown_where_that_is_allowed_and_rejected_entries_never(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path)
    assert gathered(corpus) == {}
    assert gathered(corpus, unvetted=True) == {"itch:BCC": False, "age:NEV": False}
    decide(corpus, "age:NEV", "accepted")
    assert gathered(corpus) == {"age:NEV": True}
    decide(corpus, "itch:BCC", "rejected")
    # A factor that no attribute records is nothing that an exam can have.
    assert gathered(corpus, unvetted=True) == {"age:NEV": True}


def test_entries_on_given_values_and_likely_diagnoses_come_with_their_words(tmp_path: Path) -> None:
    more = entry("itch", "NEV", "none", (OLD, "nevi become fewer with age"), strength="strong")
    corpus = make_corpus(tmp_path, entries=(*ENTRIES, more))
    evidence = gather_evidence(corpus, resolve(corpus, read_log(tmp_path)), DATA_SET, unvetted=True)

    def about(attributes: dict[str, str], *diagnoses: str) -> list[tuple[str, str, str]]:
        return [(item.attribute, item.diagnosis, item.direction) for item in evidence.about(attributes, diagnoses)]

    known = {"itch": "true", "age": "61"}
    assert about(known, "BCC") == [("itch", "BCC", "raises")]
    # In the order of the diagnoses; what is on the value itself before what is on the attribute as such.
    assert about(known, "NEV", "BCC") == [("itch", "NEV", "none"), ("age", "NEV", "lowers"), ("itch", "BCC", "raises")]
    assert about({"itch": "false", "age": "61"}, "NEV", "BCC") == [("age", "NEV", "lowers")]
    assert about({}, "NEV", "BCC", "SEK") == []
    item = evidence.about({"age": "61"}, ["NEV"])[0]
    assert (item.factor, item.values, item.summary) == ("older age", (), "=1+1: fewer; -2 in a year")
    (source,) = item.sources
    # An address that is none of the web is not handed on.
    assert (source.quote, source.title, source.url) == ("nevi become fewer with age", "Title of doc3", None)
