"""The report of one run: a single HTML file with its pictures inside, readable at a desk and on a phone."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

from prima_ray.evaluation.metrics import HEADLINE
from prima_ray.evaluation.statistics import Interval


@dataclass(frozen=True)
class Table:
    """Figures of several models on one set of exams."""

    title: str
    note: str
    unit: str
    """What `num_exams` counts: exams, or photos."""
    num_exams: int
    num_patients: int
    rows: Mapping[str, Mapping[str, Interval]]
    """Model -> figure -> value and interval; the first model is ours."""


Cell = str | tuple[str, str]
"""What stands in a table: a text, or a text over a small one."""


@dataclass(frozen=True)
class Grid:
    """Any other table; its cells are ready to be shown."""

    heads: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""
    ours: bool = False
    """The first row is ours."""


@dataclass(frozen=True)
class Section:
    """A part of the page: a heading, what it means, facts, tables, pictures (caption -> PNG)."""

    title: str
    note: str = ""
    grids: Sequence[Grid] = ()
    pictures: Mapping[str, bytes] = field(default_factory=dict)
    facts: Mapping[str, str] = field(default_factory=dict)
    """Name -> text of any length; before the tables."""


@dataclass(frozen=True)
class Report:
    """Everything that the page shows."""

    title: str
    subtitle: str
    verdict: Sequence[str]
    """A sentence a set of exams, and what else a reader should see first."""
    tables: Sequence[Table]
    baselines: Mapping[str, str]
    """Title -> what it reads."""
    per_class: Sequence[Mapping[str, Any]]
    phrases: Mapping[str, str]
    """Class -> what it is in words."""
    pictures: Mapping[str, bytes]
    """Caption -> PNG."""
    facts: Mapping[str, str]
    """What the run is: data, folds, seed, versions."""
    commands: Sequence[str]
    """How to make it again."""
    warnings: Sequence[str] = ()
    sections: Sequence[Section] = ()
    """What stands between the classes and what the run is."""
    rows_title: str = "All exams of the test fold, in %."
    """What the figures class by class are of."""


def render(report: Report) -> str:
    """The page, with no reference to anything outside it."""
    return render_page("report.html.j2", report.pictures, report=report, headline=HEADLINE)


def render_page(template: str, pictures: Mapping[str, bytes], **values: Any) -> str:
    """A template of this folder, with our style, and pictures (caption -> PNG) inside the page."""
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["percent"] = percent
    environment.filters["base64"] = lambda data: base64.b64encode(data).decode()
    here = files("prima_ray.evaluation")
    page = environment.from_string((here / template).read_text(encoding="utf-8"))
    style = (here / "report.css").read_text(encoding="utf-8")
    return page.render(pictures=pictures, style=style, **values)


def percent(value: float) -> str:
    """One decimal, without the sign: tables say once that they are in percent."""
    return f"{100 * value:.1f}" if math.isfinite(value) else "n/a"


def text_table(table: Table) -> str:
    """The same table for a terminal, in percent: value and, in brackets, its interval."""
    heads = ["", *HEADLINE.values()]
    rows = [[name, *map(_cell, figures.values())] for name, figures in table.rows.items()]
    widths = [max(len(row[column]) for row in [heads, *rows]) for column in range(len(heads))]
    lines = [
        "  ".join(cell.ljust(width) if column == 0 else cell.rjust(width) for column, (cell, width) in enumerate(pairs))
        for pairs in (list(zip(row, widths, strict=True)) for row in [heads, *rows])
    ]
    title = f"{table.title}: {table.num_exams} {table.unit} of {table.num_patients} patients, % (95 % interval)"
    return "\n".join([title, *(line.rstrip() for line in lines)])


def _cell(item: Interval) -> str:
    if not math.isfinite(item.low):
        return percent(item.value)
    return f"{percent(item.value)} ({percent(item.low)}-{percent(item.high)})"
