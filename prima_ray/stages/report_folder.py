"""The folder of a report, `report.html` and `metrics.json`: only an earlier report of the command is overwritten."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prima_ray.base import PrimaError, read_json

_MEND = "Name a new folder, or the one of an earlier report."


@dataclass(frozen=True)
class ReportKind:
    """By what a report is known."""

    command: str
    """`prima <command>`; the page names it."""
    keys: frozenset[str]
    """That its metrics.json has, and no other file of that name."""


def check_report_folder(target: Path, kind: ReportKind, *, run: Path | None = None) -> None:
    """See that a report may be written.

    Args:
        run: a folder that is not to be taken for the report's, however it is spelt.

    Raises:
        PrimaError: a file is in the way, the folder cannot be written, or it holds something else.
    """
    there = next(folder for folder in (target, *target.absolute().parents) if os.path.lexists(folder))
    if not there.is_dir():
        what = "is a file, not a folder" if there == target else "cannot be made (its folder is a file)"
        raise PrimaError(f"--out {what}", where=target, mend=_MEND)
    if not os.access(there, os.W_OK | os.X_OK):
        raise PrimaError("--out cannot be written (Permission denied)", where=target, mend=_MEND)
    if there != target:
        return
    if run is not None and target.resolve() == run.resolve():
        raise PrimaError("--out is the run itself, whose metrics.json is another", where=target, mend=_MEND)
    foreign = sorted(item.name for item in target.iterdir() if not _is_ours(item, kind))
    if foreign:
        raise foreign_file(foreign[0], kind, where=target)


def foreign_file(name: str, kind: ReportKind, *, where: str | Path) -> PrimaError:
    """The folder holds something that is not ours to overwrite."""
    what = f"--out holds something that is no report of `prima {kind.command}`: {name}"
    return PrimaError(what, where=where, mend=_MEND)


def _is_ours(file: Path, kind: ReportKind) -> bool:
    if not file.is_file():
        return False
    if file.name == "metrics.json":
        found: Any = None
        with contextlib.suppress(PrimaError):
            found = read_json(file)
        return isinstance(found, dict) and kind.keys <= set(found)
    if file.name == "report.html":
        return f"prima {kind.command}".encode() in file.read_bytes()
    # What a kill leaves of `write_atomic`.
    return file.name.startswith((".metrics.json.", ".report.html."))
