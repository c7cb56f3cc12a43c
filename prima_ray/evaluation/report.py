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
    num_exams: int
    num_patients: int
    rows: Mapping[str, Mapping[str, Interval]]
    """Model -> figure -> value and interval; the first model is ours."""


@dataclass(frozen=True)
class Report:
    """Everything that the page shows."""

    title: str
    subtitle: str
    verdict: str
    tables: Sequence[Table]
    per_class: Sequence[Mapping[str, Any]]
    pictures: Mapping[str, bytes]
    """Caption -> PNG."""
    facts: Mapping[str, str]
    """What the run is: data, folds, seed, versions."""
    commands: Sequence[str]
    """How to make it again."""
    warnings: Sequence[str] = field(default_factory=tuple)


def render(report: Report) -> str:
    """The page, with no reference to anything outside it."""
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["percent"] = percent
    template = environment.from_string((files("prima_ray.evaluation") / "report.html.j2").read_text(encoding="utf-8"))
    pictures = {caption: base64.b64encode(data).decode() for caption, data in report.pictures.items()}
    return template.render(report=report, pictures=pictures, headline=HEADLINE)


def percent(value: float) -> str:
    """One decimal, without the sign: tables say once that they are in percent."""
    return f"{100 * value:.1f}" if math.isfinite(value) else "n/a"


def text_table(table: Table) -> str:
    """The same table for a terminal, in percent."""
    width = max(len(name) for name in table.rows)
    lines = [f"{table.title} ({table.num_exams} exams of {table.num_patients} patients), %"]
    lines.append(" " * width + "".join(f"{title:>26}" for title in HEADLINE.values()))
    for name, figures in table.rows.items():
        cells = [f"{percent(item.value)} ({percent(item.low)}-{percent(item.high)})" for item in figures.values()]
        lines.append(f"{name:<{width}}" + "".join(f"{cell:>26}" for cell in cells))
    return "\n".join(lines)
