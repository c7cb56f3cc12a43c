"""Whole entries on one side, nothing of the training side on the other, and texts that the encoder reads whole."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from prima_ray.knowledge.corpus_texts import TextCutter, TextsConfig, corpus_texts, entry_texts, hold_out
from prima_ray.knowledge.entries import Entry
from prima_ray.knowledge.factors import VocabularyConfig
from prima_ray.knowledge.risk_terms import places, risk_terms
from prima_ray.models.tokenizer import OFFLINE_TEXT_MODEL, TextTokenizer
from tests.unit.knowledge.toy_corpus import CHUNKS, DIAGNOSES, ENTRIES, FACTORS, OTHER, SUN, entry

BY_ID = {item.chunk_id: item for item in CHUNKS}


def many(count: int) -> list[Entry]:
    return [
        entry(f"factor{number}", f"D{number % 4}", "raises", (SUN, "raise the risk"), summary=f"Summary {number}.")
        for number in range(count)
    ]


def texts(entries: Any, held_out: set[str], **keys: Any) -> Any:
    return corpus_texts(entries, BY_ID, TextsConfig(**keys), held_out=frozenset(held_out), cut=lambda text: [text])


@pytest.mark.parametrize(("count", "share", "wanted"), [(40, 0.2, 8), (2, 0.01, 1), (2, 0.99, 1), (9, 0.5, 4)])
def test_the_share_that_is_held_out(count: int, share: float, wanted: int):
    entries = many(count)
    found = hold_out(entries, share, 0)
    assert len(found) == wanted
    assert found < {item.entry_id for item in entries}


def test_the_split_is_stratified_by_diagnosis_and_depends_on_the_seed_alone():
    entries = many(40)
    found = hold_out(entries, 0.2, 0)
    assert sorted(name.split(":")[1] for name in found) == ["D0", "D0", "D1", "D1", "D2", "D2", "D3", "D3"]
    assert hold_out(list(reversed(entries)), 0.2, 0) == found
    assert hold_out(entries, 0.2, 1) != found
    with pytest.raises(ValueError, match="fewer than two"):
        hold_out(entries[:1], 0.2, 0)


def test_a_corpus_that_has_grown_keeps_most_of_its_split():
    before, after = hold_out(many(40), 0.2, 0), hold_out(many(44), 0.2, 0)
    assert len(before & after) >= 5


def test_what_is_read_of_an_entry():
    item = ENTRIES[0]
    assert entry_texts(item, BY_ID, TextsConfig(quotes=True)) == [
        "sunburn and BCC.",
        *("Says doc1.", "Says doc2."),
        *("Sunburns in childhood raise the risk", "40 of 100 patients"),
        *(BY_ID[name].text for name in sorted((SUN.chunk_id, OTHER.chunk_id))),
    ]
    assert entry_texts(item, BY_ID, TextsConfig(summaries=False, statements=False)) == [
        BY_ID[name].text for name in sorted((SUN.chunk_id, OTHER.chunk_id))
    ]
    with pytest.raises(ValidationError, match="nothing would be read"):
        TextsConfig(summaries=False, statements=False, passages=False)


def test_all_texts_of_an_entry_are_on_its_side():
    found, left_out = texts(many(10), {"factor0:D0", "factor5:D1"}, passages=False, statements=False)
    assert left_out == 0
    assert {item.owner for item in found if item.held_out} == {"factor0:D0", "factor5:D1"}
    assert len(found) == len({item.name for item in found}) == 10


def test_sentences_that_also_train_are_left_out_of_the_held_out_side():
    held = entry(
        "itch", "BCC", "raises", (OTHER, "Itching was reported"), (SUN, "raise the risk"),
        summary="New. \u201cONE  a.\u201d And so on.",
    )  # fmt: skip
    trains = entry("sunburn", "BCC", "raises", (SUN, "Sunburns"), summary="One A. And more.")
    found, left_out = texts([held, trains], {"itch:BCC"})
    # White space, case and marks aside; a statement and a passage are the same.
    assert [item.text for item in found if item.held_out] == ["New. And so on.", "Says doc2.", OTHER.text]
    assert left_out > 2
    # On one side, equal texts count once.
    twice, _ = texts([trains, trains.model_copy(update={"factor": "age"})], set())
    assert [item.text for item in twice] == ["One A. And more.", "Says doc1.", SUN.text]


def test_references_to_chunks_are_no_words():
    item = ENTRIES[0].model_copy(update={"summary": f"Raises it [{SUN.chunk_id}]; see [2] [{OTHER.chunk_id}]."})
    assert entry_texts(item, BY_ID, TextsConfig(statements=False, passages=False)) == ["Raises it; see [2]."]


def test_a_long_text_is_cut_between_sentences_into_what_the_encoder_reads():
    tokenizer = TextTokenizer(OFFLINE_TEXT_MODEL, max_tokens=12)
    cutter = TextCutter(tokenizer)
    text = "Sun is a risk. Age is too. Moles matter a lot. Old " + "melanoma " * 25 + "ends."
    pieces = cutter(text)
    assert pieces[:2] == ["Sun is a risk. Age is too.", "Moles matter a lot."]
    assert " ".join(pieces) == text
    assert all(len(tokenizer.bare.encode(piece).ids) <= 12 for piece in pieces)
    assert pieces[2] == "Old melanoma melanoma melanoma"
    assert cutter(" \n ") == []
    # A word without end is cut all the same.
    endless = "z" * 90
    assert "".join(cutter(endless)) == endless


def test_risk_terms_are_phrases_and_what_the_vocabulary_adds():
    terms = risk_terms(FACTORS, DIAGNOSES)
    text = "Nevi and older  age: a nevus, basal cell carcinoma, a Nevus."
    assert [[text[slice(*span)] for span in spans] for spans in places(text, terms)] == [
        ["older  age"], ["nevus", "Nevus"], ["basal cell carcinoma"],
    ]  # fmt: skip
    bracketed = [FACTORS[0].model_copy(update={"phrase": "many moles (nevi)"})]
    assert places("Many moles.", risk_terms(bracketed, {})) == [((0, 10),)]
    more = VocabularyConfig.model_validate(
        {"factors": [{"key": "itch", "phrase": "it itches", "terms": ["itch*"]}], "diagnoses": []}
    )
    assert places("Itching was seen.", risk_terms(FACTORS, DIAGNOSES, more)) == [((0, 7),)]
    assert places("Nothing.", risk_terms((), {})) == []
