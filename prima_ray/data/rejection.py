"""Why a record is turned away: one exception for photos, attributes and rows, with a reason that programs can read."""

from __future__ import annotations


class RecordRejected(Exception):  # noqa: N818 - an outcome with a reason, not a fault
    """A record that cannot be used: a short fixed reason, and what was seen."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"
