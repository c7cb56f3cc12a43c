"""Terms: what they find, what they pass over, and how a badly written one is told."""

from __future__ import annotations

import pytest

from prima_ray.knowledge.mentions import check_term, compile_terms


def found(term: str, text: str, *but_not: str) -> list[str]:
    return [text[start:end] for start, end in compile_terms([term], but_not).find(text)]


@pytest.mark.parametrize(
    ("term", "text", "expected"),
    [
        ("coal dust", "Coal-dust, COAL DUST and coal\ndust.", ["Coal-dust", "COAL DUST", "coal\ndust"]),
        ("lump", "Lumps, a lump; lumpy.", ["Lumps", "lump"]),
        ("rash", "two rashes", ["rashes"]),
        ("swell*", "swelling, swollen, Swells", ["swelling", "Swells"]),
        ("ABC", "ABC, ABCs, abc, ABCD", ["ABC", "ABCs"]),
        ("work ... dust", "work with fine dust; work, dust", ["work with fine dust", "work, dust"]),
        ("work ... dust", "work one two three four dust", ["work one two three four dust"]),
        ("work ... dust", "work one two three four five dust. Work. Dust", []),
        ("cough chronic", "Cough, chronic", ["Cough, chronic"]),
        ("lung", "lunge, plunge, lung", ["lung"]),
        ("Baker* cough", "Baker's cough, bakers cough", ["bakers cough"]),
    ],
)
def test_a_term_finds(term: str, text: str, expected: list[str]) -> None:
    assert found(term, text) == expected


def test_a_longer_wording_in_which_it_means_something_else_hides_it() -> None:
    assert found("cold", "a cold, not the cold war; cold", "cold war") == ["cold", "cold"]


def test_no_terms_find_nothing() -> None:
    assert compile_terms([]).find("anything") == ()


@pytest.mark.parametrize(
    ("term", "problem"),
    [
        ("", "is empty"),
        ("  ", "is empty"),
        ("... dust", "begins or ends with '...', which stands for words between two others"),
        ("coal(dust", "holds 'coal(dust': a term is words, '*' at the end of one, and '...' between two"),
        ("co*al", "holds 'co*al': a term is words, '*' at the end of one, and '...' between two"),
        ("coal dust", None),
        ("5-FU", None),
        ("Bowen* disease", None),
    ],
)
def test_how_a_term_is_written(term: str, problem: str | None) -> None:
    assert check_term(term) == problem
