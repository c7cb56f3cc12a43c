"""Sentences and lists, in texts whose line ends may be lost."""

from __future__ import annotations

import pytest

from prima_ray.knowledge.sentences import split_text


def texts(text: str) -> list[str]:
    return [item.text for item in split_text(text)]


def led(text: str) -> list[tuple[str, tuple[str, ...]]]:
    return [(item.text, tuple(lead.text for lead in item.leads)) for item in split_text(text)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One thing. Another thing.", ["One thing.", "Another thing."]),
        ("Dust (e.g. flour) harms. So does smoke.", ["Dust (e.g. flour) harms.", "So does smoke."]),
        ("Dr. Baker and co. coughed, cf. Fig. 2 of it.", ["Dr. Baker and co. coughed, cf. Fig. 2 of it."]),
        ("It doubled (1.4 vs. 0.7; P = .03). Then it fell.", ["It doubled (1.4 vs. 0.7; P = .03).", "Then it fell."]),
        ("So says J. Baker et al. They disagree.", ["So says J. Baker et al. They disagree."]),
        ("Is it so? It is! “Yes.” No.", ["Is it so?", "It is!", "“Yes.”", "No."]),
        ("Type one: never.Type two: always.", ["Type one: never.", "Type two: always."]),
        ("One line\nanother line", ["One line", "another line"]),
        ("", []),
        (" \n\n ", []),
    ],
)
def test_prose(text: str, expected: list[str]) -> None:
    assert texts(text) == expected


def test_every_sentence_stands_in_the_text() -> None:
    text = (
        "Bakers cough. Causes are:\n- Flour.\n- Dust, e.g. of wood.Smoke too.\n"
        "The end - almost - of it. Key - a - b: - c."
    )
    assert all(item.text in text for item in split_text(text))


def test_items_carry_the_line_that_introduces_them_and_prose_ends_the_list() -> None:
    text = (
        "Bakers cough. Causes of cough include the following:\n- Flour. It is fine.\n* Dust.\n1. Smoke.\nThat is all."
    )
    lead = ("Causes of cough include the following:",)
    assert led(text) == [
        ("Bakers cough.", ()),
        ("Causes of cough include the following:", ()),
        ("Flour.", lead),
        ("It is fine.", lead),
        ("Dust.", lead),
        ("Smoke.", lead),
        ("That is all.", ()),
    ]


def test_a_lead_brings_the_sentence_before_it_along() -> None:
    found = split_text("Some things are specific to cough.\nThese include:\n- Flour.")[-1]
    assert [(lead.text, lead.before) for lead in found.leads] == [
        ("These include:", "Some things are specific to cough.")
    ]


def test_a_list_within_a_list_adds_its_lead() -> None:
    text = "Causes of cough: - Dust, which includes the following: - Flour. - Sawdust. - Causes of sneezing: - Pepper."
    assert led(text) == [
        ("Causes of cough:", ()),
        ("Dust, which includes the following:", ("Causes of cough:",)),
        ("Flour.", ("Causes of cough:", "Dust, which includes the following:")),
        ("Sawdust.", ("Causes of cough:", "Dust, which includes the following:")),
        ("Causes of sneezing:", ("Causes of cough:", "Dust, which includes the following:")),
        ("Pepper.", ("Causes of cough:", "Dust, which includes the following:", "Causes of sneezing:")),
    ]


def test_a_list_on_one_line_without_stops_runs_on_into_prose() -> None:
    text = "Cough is more common in people who - bake bread - saw wood - smoke. Most recover. See a doctor."
    lead = ("Cough is more common in people who",)
    assert led(text) == [
        ("Cough is more common in people who", ()),
        ("bake bread", lead),
        ("saw wood", lead),
        ("smoke.", lead),
        ("Most recover.", ()),
        ("See a doctor.", ()),
    ]


def test_items_that_run_into_each_other() -> None:
    text = "- Causes of cough:being a baker for a long timehaving a cat, also a small oneusing chalk"
    lead = ("Causes of cough:",)
    assert led(text) == [
        ("Causes of cough:", ()),
        ("being a baker for a long time", lead),
        ("having a cat, also a small one", lead),
        ("using chalk", lead),
    ]


def test_a_dash_in_prose_is_a_dash() -> None:
    assert texts("The baker - an old man - coughed.") == ["The baker - an old man - coughed."]
