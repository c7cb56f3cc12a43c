"""What is written of a request: a line of log, and a line of audit. Nothing that was sent is in either.

A photo stands in the audit by the SHA-256 of its file, by which whoever has the file can show that it was the one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prima_ray.base import PrimaError
from prima_ray.serving.engine import Answer

_log = logging.getLogger(__name__)


def log_request(**fields: Any) -> None:
    """One line of JSON: request id, route, status, milliseconds, the key's name, why it was refused."""
    kept = {key: value for key, value in fields.items() if value is not None}
    _log.info("%s", json.dumps({"time": _now(), **kept}))


def lines_to_stderr() -> None:
    """For a process of somebody else's, where nobody has set Python's logging up: without this requests are counted
    there, and not logged."""
    logger = logging.getLogger("prima_ray")
    if not logger.handlers:
        logger.addHandler(logging.StreamHandler())
    logger.setLevel(logging.INFO)
    logger.propagate = False


class Audit:
    """A file to which lines are appended, whole ones even from several processes."""

    def __init__(self, path: str | None) -> None:
        """Raises:
        PrimaError: the file cannot be written.
        """
        self._file: int | None = None
        if path is None:
            return
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        except OSError as error:
            raise PrimaError(f"the audit file cannot be written ({error.strerror})", where=path) from None

    def write(self, request_id: str, *, key: str | None, photos: Sequence[bytes], answer: Answer) -> None:
        """A line of one diagnosis."""
        if self._file is None:
            return
        line = {
            "time": _now(),
            "request_id": request_id,
            "key": key,
            "model": answer.card.name,
            "model_version": answer.card.version,
            "data_version": answer.card.data_version,
            "photos": [hashlib.sha256(data).hexdigest() for data in photos],
            "abstained": answer.fields["abstained"],
        }
        os.write(self._file, (json.dumps(line) + "\n").encode())


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
