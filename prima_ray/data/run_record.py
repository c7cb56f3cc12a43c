"""`run.json`, the record of a finished run, and whether the run's files are those that it wrote.

run.json    stage, seed, inputs with hashes, outputs with hashes and sizes, versions, commit; written last
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from prima_ray.base import PrimaError, hash_file, read_json
from prima_ray.data.fetched import CHECKPOINTS, RUN_RECORD, local_copy
from prima_ray.data.storage import Folder, reaching

RECORD = RUN_RECORD
CONFIG = "config.yaml"
_KEYS = ("stage", "seed", "inputs", "outputs", "versions", "git_commit")
_MEND = "Copy the run again, or train it again."


def read_record(path: str | Path, *, stage: str | None = None) -> dict[str, Any]:
    """The run.json of a finished run.

    Raises:
        PrimaError: nothing finished there, or a run of another stage than ``stage``.
    """
    named, path = path, local_copy(path)
    if not path.is_dir():
        raise PrimaError("no such run directory", where=named)
    if not (path / RECORD).exists():
        state = "is not finished" if (path / CONFIG).exists() else "is no run directory"
        raise PrimaError(f"this {state} (run.json is missing)", where=named, mend="Run its stage again to complete it.")
    record: Any = read_json(path / RECORD)
    absent = [key for key in _KEYS if not isinstance(record, dict) or key not in record]
    if absent:
        raise PrimaError(f"damaged: it has no key {absent[0]!r}", where=path / RECORD)
    _check_types(record, where=path / RECORD)
    if stage is not None and record.get("stage") != stage:
        raise PrimaError(f"this is a run of {record.get('stage')}, expected one of {stage}", where=named)
    found: dict[str, Any] = record
    return found


def _check_types(record: Mapping[str, Any], *, where: Path) -> None:
    def texts(value: Any) -> bool:
        return isinstance(value, dict) and all(isinstance(item, str) for item in value.values())

    inputs, sizes = record["inputs"], record.get("sizes", {})
    whole = {
        "stage": isinstance(record["stage"], str),
        "inputs": isinstance(inputs, dict)
        and all(texts(item) and {"path", "hash"} <= set(item) for item in inputs.values()),
        "outputs": texts(record["outputs"]),
        "sizes": isinstance(sizes, dict) and all(isinstance(item, int) for item in sizes.values()),
        "versions": texts(record["versions"]),
    }
    for key, right in whole.items():
        if not right:
            raise PrimaError(f"damaged: {key!r} does not hold what a run writes there", where=where, mend=_MEND)


def checkpoint_folders(run: Folder) -> list[Folder]:
    """Where a run keeps its checkpoints, be they there or not: refine trains twice, each in a folder of its own."""
    return [run.folder(CHECKPOINTS), *(run.folder(name).folder(CHECKPOINTS) for name in run.folders())]


def check_outputs(path: str | Path, record: Mapping[str, Any], *, folder: str = "") -> None:
    """Every file that is going to be read must be the one that the run wrote: a copy may have been cut short or mixed.

    Reads them whole, so a command does it once, before it starts any worker.

    Args:
        folder: of the run; what lies outside of it is not looked at.

    Raises:
        PrimaError: naming the first that is missing or another.
    """
    names = [name for name in record["outputs"] if not folder or name.startswith(f"{folder}/")]
    check_present(Path(path), record, names, mend=_MEND)
    for name in names:
        file = Path(path) / name
        try:
            found = hash_file(file)
        except OSError as error:
            raise PrimaError(f"cannot be read ({error.strerror})", where=file) from None
        if found != record["outputs"][name]:
            raise _replaced(file, "checksum", mend=_MEND)


def check_model(run: str | Path) -> None:
    """The files of a run's model must be those that the run wrote; a model folder without a record has none to be held
    to.

    Raises:
        PrimaError: see `check_outputs`.
    """
    local = local_copy(run)
    if (local / RECORD).exists():
        check_outputs(local, read_record(local), folder="model")


def check_present(run: str | Path, record: Mapping[str, Any], names: Iterable[str], *, mend: str) -> None:
    """Files must be there, in their sizes; what is in them is not read.

    Raises:
        PrimaError: naming the first that is missing, or has another size.
    """
    sizes = record.get("sizes", {})  # runs of before there were sizes do not say
    home = Folder.at(run)
    with reaching(home.address, "cannot be read"):
        found = {name: home.size(name) for name in names}
    for name, size in found.items():
        if size is None:
            raise PrimaError("this file of the run is missing", where=home.where(name), mend=mend)
        if name in sizes and size != sizes[name]:
            raise _replaced(home.where(name), f"{size} bytes, it had {sizes[name]}", mend=mend)


def _replaced(file: str | Path, how: str, *, mend: str) -> PrimaError:
    return PrimaError(f"is not the file that the run wrote ({how})", where=file, mend=mend)
