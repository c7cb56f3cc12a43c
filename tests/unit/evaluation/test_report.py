from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from prima_ray.evaluation.metrics import HEADLINE
from prima_ray.evaluation.report import Report, Table, percent, render, text_table
from prima_ray.evaluation.statistics import Interval

NAN = float("nan")
TABLE = Table(
    title="All exams",
    note="A note.",
    unit="exams",
    num_exams=12,
    num_patients=7,
    rows={
        "ours": dict.fromkeys(HEADLINE, Interval(0.5, 0.25, 1.0)),
        "a baseline": dict.fromkeys(HEADLINE, Interval(0.4, NAN, NAN)),
    },
)
REPORT = Report(
    title="<script>alert(1)</script>",
    subtitle="Test fold 0 of 5.",
    verdict=["First.", "Second."],
    tables=[TABLE],
    baselines={"a baseline": "2 attributes: age, itch"},
    per_class=[{"class": "BCC", "precision": NAN, "recall": 0.5, "f1": 0.25, "auroc": 0.75, "num_exams": 3}],
    phrases={"BCC": "basal cell carcinoma"},
    pictures={"A picture.": b"\x89PNG"},
    facts={"seed": "0"},
    commands=["prima evaluate RUN"],
    warnings=["Beware."],
)


class Page(HTMLParser):
    """Checks that tags close in order, and gathers what would be fetched."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action")]
        if tag not in ("meta", "img", "br", "wbr"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_asks_for_nothing_outside() -> None:
    html = render(REPORT)
    page = Page()
    page.feed(html)
    assert page.open == []
    assert page.fetched == ["data:image/png;base64,iVBORw=="]
    assert "http" not in html
    assert "@import" not in html
    assert "url(" not in html


def test_everything_is_shown_and_nothing_is_run() -> None:
    html = render(REPORT)
    assert "<script>" not in html
    assert "&lt;script&gt;" in html
    for text in (
        "First.",
        "Second.",
        "Beware.",
        "A note.",
        "12 exams of 7 patients",
        "2 attributes: age, itch",
        "A picture.",
        "basal cell carcinoma",
    ):
        assert text in html
    cells = re.findall(r"<td>([\d.]+|n/a)<br><small>(.*?)</small></td>", html)
    assert cells[0] == ("50.0", "25.0&ndash;100.0")
    assert cells[4] == ("40.0", "n/a&ndash;n/a")
    assert "nan" not in html.lower()
    assert "What the baselines read" not in render(replace(REPORT, baselines={}))


def test_the_table_for_a_terminal_is_aligned() -> None:
    assert text_table(TABLE).splitlines() == [
        "All exams: 12 exams of 7 patients, % (95 % interval)",
        "                     macro F1           accuracy  balanced accuracy              AUROC",
        "ours        50.0 (25.0-100.0)  50.0 (25.0-100.0)  50.0 (25.0-100.0)  50.0 (25.0-100.0)",
        "a baseline               40.0               40.0               40.0               40.0",
    ]


@pytest.mark.parametrize(("value", "shown"), [(0.12345, "12.3"), (1.0, "100.0"), (NAN, "n/a"), (-0.004, "-0.4")])
def test_percent(value: float, shown: str) -> None:
    assert percent(value) == shown
