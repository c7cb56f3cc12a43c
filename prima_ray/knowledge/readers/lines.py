"""Lines that a page's width ended, not their writer: one again, since a sentence is read line by line."""

from __future__ import annotations

import re

# A line goes on in the next where it ends in no stop and no colon, and the next begins small: an item of a list begins
# with a mark or a capital.
_SOFT = re.compile(r"(?<=[^\s.!?:;|])[ \t]*\n[ \t]*(?=[a-z(][^|\n]*$)", re.MULTILINE)


def unwrapped(text: str) -> str:
    """Text whose sentences are not broken over lines; only white space changes."""
    return _SOFT.sub(" ", text)
