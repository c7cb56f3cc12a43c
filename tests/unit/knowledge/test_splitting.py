from __future__ import annotations

import json
import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from prima_ray.base import PrimaError
from prima_ray.config import validate_config
from prima_ray.knowledge.documents import Document, make_document
from prima_ray.knowledge.splitting import ChunkConfig, Splitter, context_of, searchable, split_sentences
from prima_ray.models.tokenizer import OFFLINE_TEXT_MODEL, TextTokenizer
from tests.unit.knowledge.test_literature import LITERATURE, needs_data

TOKENIZER = TextTokenizer(OFFLINE_TEXT_MODEL, max_tokens=128)
# A list of a PDQ summary as it stands there.
RUN_TOGETHER = (
    "Risk factors for melanoma skin cancer:having a fair complexion, which includes:fair skin that freckles and burns "
    "easily, does not tan, or tans poorlyblue or green or other light-colored eyesred or blond hairbeing exposed to "
    "natural sunlight or artificial sunlight over long periods of timehaving a history of many blistering sunburns, "
    "especially as a child or teenagerhaving many moles (also called nevi)having a family history of unusual moles "
    "(atypical nevus syndrome)having a family or personal history of melanomabeing White"
)


def document(*texts: str, title: str = "Nevi", heading: tuple[str, ...] = ("Risk",)) -> Document:
    return make_document(doc_id="d", title=title, source="here", sections=[(heading, text) for text in texts])


def splitter(**keys: object) -> Splitter:
    return Splitter(ChunkConfig.model_validate({"max_tokens": 32, "overlap_tokens": 0, **keys}), TOKENIZER)


def num_tokens(text: str) -> int:
    return len(TOKENIZER.loaded(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One. Two? Three! 4 more.", ["One. ", "Two? ", "Three! ", "4 more."]),
        ('He said "Stop." Then (so it was.) He went.', ['He said "Stop." ', "Then (so it was.) ", "He went."]),
        ("Moles, e.g. Spitz nevi, of Dr. A. Smith et al. He.", ["Moles, e.g. Spitz nevi, of Dr. A. Smith et al. He."]),
        ("See Fig. 3 and No. 4. Then go.", ["See Fig. 3 and No. 4. ", "Then go."]),
        ("a 1.5 mm mole. it grew", ["a 1.5 mm mole. it grew"]),
        ("As follows:\n- red hair\n- age", ["As follows:\n", "- red hair\n", "- age"]),
        ("Points: - Skin is big. - Moles grow.", ["Points: - Skin is big. ", "- Moles grow."]),
        ("Age | Risk\n50 | 2\n\nText that\ngoes on", ["Age | Risk\n", "50 | 2\n\n", "Text that\ngoes on"]),
        ("First programs.Study Design: all.Then", ["First programs.", "Study Design: all.", "Then"]),
        ("many moles (also called nevi)having mole(s)that", ["many moles (also called nevi)", "having mole(s)that"]),
        ("to quit smoking;giving you help", ["to quit smoking;", "giving you help"]),
        ("at www.Cancer.Gov or a.b@My.Org", ["at www.Cancer.Gov or a.b@My.Org"]),
        ("", [""]),
        ("\n", ["\n"]),
    ],
)  # fmt: skip
def test_sentences_items_and_rows(text: str, expected: list[str]):
    assert split_sentences(text) == expected


@given(st.text(alphabet="aB1 .!?;:()\n-|•é\"'", max_size=80))
def test_joined_sentences_are_the_text(text: str):
    assert "".join(split_sentences(text)) == text


WORDS = st.sampled_from(["Moles", "risk", "melanoma.", "UV", "(nevi)and", "e.g.", "x;yes", "-", "\n", "\n\n", "5%."])


@settings(max_examples=40, deadline=None)
@example(["(nevi)and"] * 40, 0)
@given(st.lists(WORDS, min_size=1, max_size=150), st.sampled_from([0, 8, 16]))
def test_a_chunk_is_a_piece_of_its_section_and_fits(words: list[str], overlap: int):
    text = " ".join(words)
    made = make_document(doc_id="d", title="t", source="s", sections=[((), text), ((), "Never empty.")])
    for chunk in splitter(overlap_tokens=overlap).split(made):
        assert any(chunk.text in section.text for section in made.sections)
        assert num_tokens(chunk.text) <= 32
    if overlap == 0:
        # Nothing is lost, but what was there before. "(nevi)and" may be cut after the bracket.
        kept = {word for chunk in splitter().split(made) for word in re.findall(r"\w+", chunk.text)}
        assert kept == {word for section in made.sections for word in re.findall(r"\w+", section.text)}


def test_chunks_are_whole_sentences_under_their_headings():
    sentences = [f"Sentence number {number} speaks of moles and of the sun." for number in range(8)]
    made = document(" ".join(sentences), "Short.", "Short.", heading=("Risk", "Sun"))
    chunks = splitter().split(made)
    assert [chunk.text for chunk in chunks] == [
        *(" ".join(sentences[start : start + 2]) for start in range(0, 8, 2)),
        "Short.",  # once, though it stands there twice
    ]
    assert {(chunk.title, chunk.heading, chunk.doc_id) for chunk in chunks} == {("Nevi", ("Risk", "Sun"), "d")}
    assert len({chunk.chunk_id for chunk in chunks}) == len(chunks)
    overlapping = splitter(overlap_tokens=16).split(made)
    assert [chunk.text for chunk in overlapping[:3]] == [" ".join(sentences[start : start + 2]) for start in range(3)]


def test_items_that_run_together_are_cut_and_stay_letter_for_letter():
    chunks = splitter().split(document(RUN_TOGETHER))
    assert len(chunks) > 3
    assert all(chunk.text in RUN_TOGETHER and num_tokens(chunk.text) <= 32 for chunk in chunks)
    assert any(chunk.text.endswith("(also called nevi)") for chunk in chunks)


def test_a_word_without_end_is_cut():
    # WordPiece makes one token of it, however long it is.
    picture = "".join(f"{number:05}" for number in range(800))
    chunks = splitter().split(document(f"A picture: {picture} and its end."))
    assert max(len(chunk.text) for chunk in chunks) <= 32 * 20
    assert picture in "".join(chunk.text for chunk in chunks)


def test_title_and_headings_are_read_first_and_shortened_where_the_text_would_be_cut():
    chunk = splitter().split(document("Sun harms."))[0]
    assert context_of("Nevi", ("Risk", "Nevi")) == "Nevi > Risk"
    assert splitter().encoder_text(chunk) == searchable(chunk, ChunkConfig()) == "Nevi > Risk\nSun harms."
    assert splitter(context=False).encoder_text(chunk) == "Sun harms."
    assert searchable(chunk, ChunkConfig(context=False)) == "Sun harms."
    long = splitter().split(document("Sun harms.", title="sun " * 200))[0]
    # 128 tokens for the encoder, 32 for the text, 4 to spare.
    assert splitter().encoder_text(long) == ("sun " * 92).strip() + "\nSun harms."


def test_more_than_half_in_common_is_refused():
    with pytest.raises(PrimaError) as caught:
        validate_config(ChunkConfig, {"max_tokens": 100, "overlap_tokens": 51}, where="corpus.yaml")
    assert str(caught.value) == "corpus.yaml: overlap_tokens: 51 is more than half of max_tokens"


@needs_data
def test_sections_of_pdq_are_cut_without_a_letter_changed():
    lines = (LITERATURE / "pdq_cancer_risk/sections.jsonl").read_text().splitlines()
    longest = sorted(map(json.loads, lines), key=lambda row: -len(row["text"]))[:25]
    cut = splitter(max_tokens=96, overlap_tokens=16)
    for row in longest:
        made = document(row["text"])
        chunks = cut.split(made)
        assert len(chunks) > 5
        for chunk in chunks:
            assert chunk.text in made.sections[0].text
            assert num_tokens(chunk.text) <= 96
