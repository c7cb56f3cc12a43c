"""The ground floor: the config base class, the error a user can mend, paths, hashes and atomic writes.

Everything in the package may import this module; this module imports nothing of the package.
"""

from __future__ import annotations

import errno
import hashlib
import ipaddress
import json
import math
import os
import re
import tempfile
import typing
from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationInfo, model_validator

_ENV = re.compile(r"\$\{(?P<name>[A-Z_][A-Z0-9_]*)(?::-(?P<default>[^}]*))?\}")


class PrimaError(Exception):
    """A mistake that the user can mend: what is wrong, where, and how to mend it.

    The command line prints it in one or two lines and exits with 2; the server answers with a 4xx.
    """

    def __init__(self, what: str, *, where: str | Path | None = None, mend: str | None = None) -> None:
        super().__init__(what, where, mend)
        self.what = what
        self.where = str(where) if where is not None else None
        self.mend = mend

    def __str__(self) -> str:
        head = f"{self.where}: {self.what}" if self.where else self.what
        return f"{head}\n  {self.mend}" if self.mend else head

    def __reduce__(self) -> tuple[Any, ...]:
        # Ray pickles exceptions across processes; keyword-only arguments need help.
        return (_rebuild_error, (type(self), self.what, self.where, self.mend))


def _rebuild_error(cls: type[PrimaError], what: str, where: str | None, mend: str | None) -> PrimaError:
    return cls(what, where=where, mend=mend)


class StrictConfig(BaseModel):
    """Base of every config: frozen, and unknown keys are mistakes."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    @model_validator(mode="before")
    @classmethod
    def _truth_is_no_number(cls, data: Any) -> Any:
        """pydantic takes `true` for 1; as a text it is what it looks like, a mistake."""
        if not isinstance(data, Mapping):
            return data
        numbers = {
            name
            for name, field in cls.model_fields.items()
            if isinstance(data.get(name), bool)
            and (kinds := _plain_types(field.annotation)) & {int, float}
            and not kinds & {bool, Any}
        }
        return {key: str(value).lower() if key in numbers else value for key, value in data.items()}


def _plain_types(annotation: Any) -> set[Any]:
    """The types that a value may be of, those of containers' items left out."""
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        return _plain_types(typing.get_args(annotation)[0])
    if origin in (typing.Union, UnionType):
        return {kind for argument in typing.get_args(annotation) for kind in _plain_types(argument)}
    if origin is typing.Literal:
        return {type(value) for value in typing.get_args(annotation)}
    return {annotation}


def is_uri(path: str) -> bool:
    """True for ``s3://...`` and its like, which no local path rule touches."""
    return "://" in path


def is_loopback(host: str) -> bool:
    """True for a host that other machines cannot reach."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def expand_env(text: str) -> str:
    """Replace ``${NAME}`` and ``${NAME:-default}`` by the environment's values.

    Raises:
        ValueError: a variable without a default is not set.
    """

    def value(match: re.Match[str]) -> str:
        found = os.environ.get(match["name"])
        if found is not None:
            # A relative path in a variable was written by somebody standing in the working directory.
            return found if is_uri(found) else os.path.abspath(found)
        if match["default"] is None:
            raise ValueError(f"environment variable {match['name']} is not set")
        return match["default"]

    return _ENV.sub(value, text)


def _resolve_input(value: Any, info: ValidationInfo) -> Any:
    if isinstance(value, Path):
        value = str(value)
    if not isinstance(value, str):
        return value
    value = expand_env(value)
    if is_uri(value) or os.path.isabs(value):
        return value
    base = (info.context or {}).get("base_dir")
    return os.path.normpath(os.path.join(base, value)) if base else value


InputPath = Annotated[str, BeforeValidator(_resolve_input)]
"""A path to read. Relative paths start at the folder of the YAML that names them; URIs stay as they are."""


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text, so it can be hashed."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=str)


def hash_json(value: Any) -> str:
    """SHA-256 (hex) of the canonical JSON of ``value``."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def hash_file(path: str | Path) -> str:
    """SHA-256 (hex) of a local file, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_key(*parts: object) -> int:
    """A 64-bit integer that depends on the parts alone: the seed of one exam's augmentation, of one epoch's order.

    Independent of process, rank and ``PYTHONHASHSEED``.
    """
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


def write_atomic(path: str | Path, data: bytes | str) -> None:
    """Write a small file so that a reader sees the old content or the new, never a part of it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    payload = data.encode() if isinstance(data, str) else data
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files private; what a stage writes is as readable as any other file of the user.
        Path(temporary).chmod(0o666 & ~_umask())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def write_json(path: str | Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically. Non-finite numbers become null (JSON has none)."""
    write_atomic(path, json_text(value))


def json_text(value: Any) -> str:
    """``value`` as indented JSON, a line's end behind it; see `write_json`."""
    return json.dumps(_finite(value), indent=2, ensure_ascii=False, default=str) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises:
        PrimaError: there is no such file, or it holds no JSON.
    """
    try:
        return json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise PrimaError("no such file", where=path) from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise PrimaError(f"not valid JSON ({error})", where=path) from None


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def is_disk_full(error: BaseException | None) -> bool:
    """Whatever library wrote: most raise OSError, safetensors and Arrow only quote the number."""
    if error is None:
        return False
    if isinstance(error, OSError) and error.errno in _FULL:
        return True
    if any(f"{words} {number}" in str(error).lower() for words in ("os error", "errno") for number in _FULL):
        return True
    return is_disk_full(error.__cause__ or error.__context__)
