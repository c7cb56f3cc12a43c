"""How pages about the corpus are rendered: one look, every text escaped, nothing fetched.

Direction and status are always a symbol and a word: colour alone says nothing to many people, and to a printer.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from prima_ray.knowledge.documents import is_address
from prima_ray.knowledge.passages import spell_out

if TYPE_CHECKING:
    import jinja2

DIRECTIONS = {
    "raises": ("▲", "raises"),
    "lowers": ("▼", "lowers"),
    "none": ("○", "no clear relation"),
    "no_evidence": ("\N{EN DASH}", "no evidence"),
}
STATUSES = {
    "proposed": ("…", "not vetted"),
    "accepted": ("✓", "accepted"),
    "edited": ("✎", "accepted, edited"),
    "rejected": ("✗", "rejected"),
}


@dataclass(frozen=True)
class Name:
    """A key, and how people call it."""

    key: str
    phrase: str


def render(template: str, **values: Any) -> str:
    """A page of `templates/`."""
    return _environment().get_template(template).render(**values)


@lru_cache(maxsize=1)
def _environment() -> jinja2.Environment:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("prima_ray.knowledge", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: spell_out(value) if type(value) is str else value,
    )
    environment.tests["address"] = lambda value: isinstance(value, str) and is_address(value)
    environment.filters["day"] = lambda stamp: str(stamp)[:10]
    environment.globals.update(directions=DIRECTIONS, statuses=STATUSES)
    return environment
