"""Run directories: the files by which stages know each other.

    config.yaml    the resolved config, written first: what this folder is for
    run.json       stage, inputs with hashes, versions, commit, seed: written last, its presence means "finished"

An existing folder of the same config is resumed or returned; of another config it is a mistake.
"""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prima_ray import __version__
from prima_ray.base import PrimaError, StrictConfig, hash_file, hash_json, is_uri, read_json, write_atomic, write_json
from prima_ray.config import differing_keys, dump_config, read_yaml
from prima_ray.data.fetched import MODEL_DEPTH, local_copy
from prima_ray.data.run_record import CONFIG, RECORD, check_outputs, check_present, read_record
from prima_ray.data.schema import MANIFEST, read_manifest
from prima_ray.data.storage import Folder, WorkingCopy, reaching
from prima_ray.knowledge.corpus import CHUNKS, CORPUS, ENTRIES, TABLE
from prima_ray.knowledge.vetting import LOG

_PACKAGES = ("ray", "torch", "transformers", "timm", "deepspeed", "peft", "pyarrow", "numpy", "scikit-learn")


@dataclass(frozen=True)
class RunDir:
    """An opened run directory."""

    path: Path
    """The folder; of a run on an object store a copy of its small files, for this process alone."""
    stage: str
    finished: bool
    files: WorkingCopy | None = None
    """Brings the copy's files to the store; None for a folder on a disk."""
    check: Callable[[], None] = lambda: None
    """Raises where the folder is not this process's any more."""

    @property
    def address(self) -> Path | str:
        """The run as a user names it, and as every worker finds it."""
        return self.files.store.address if self.files else self.path

    def folder(self, name: str) -> RunDir:
        """A folder of the run, as if it were one of its own."""
        mine = self.files
        inner = WorkingCopy(self.path / name, mine.store.folder(name), without=mine.without) if mine else None
        return RunDir(path=self.path / name, stage=self.stage, finished=False, files=inner, check=self.check)

    def push(self) -> None:
        """Bring what was written to where the run is; nothing to do for a folder on a disk."""
        if self.files:
            self.files.push()


@dataclass(frozen=True)
class ParentState:
    """What a run knows of its parents that a look at them afterwards would not tell."""

    hashes: Mapping[str, str] = field(default_factory=dict)
    """Role -> hash, as the parent was when it was read: decisions may have been added to a corpus since."""
    unvetted: bool = False
    """Entries of a corpus were used that nobody has vetted."""


def is_fresh(out: str) -> bool:
    """True where `open_run` would start a run rather than take one up."""
    path = Path(out)
    return not path.exists() or (path.is_dir() and not any(path.iterdir()))


def open_run(config: StrictConfig, *, out: str, stage: str, execution_keys: frozenset[str] = frozenset()) -> RunDir:
    """Make the folder, or take up the one that is there.

    Args:
        execution_keys: keys (`context`, `writer.calls`) that say where and how fast, not what: they and all below them
            may differ on resume.

    Raises:
        PrimaError: the folder holds something else, or a run of another config.
    """
    path = Path(out)
    wanted = config.model_dump(mode="json")
    if path.exists() and not path.is_dir():
        raise PrimaError("`out` is a file", where=path, mend="Choose another `out`.")
    if is_fresh(out):
        try:
            path.mkdir(parents=True, exist_ok=True)
            write_atomic(path / CONFIG, dump_config(config))
        except OSError as error:
            raise PrimaError(f"`out` cannot be made ({error.strerror})", where=path) from None
        return RunDir(path=path, stage=stage, finished=False)
    if not (path / CONFIG).exists():
        raise no_run(path)
    found = read_yaml(path / CONFIG)
    # `out` led here: how it was written then, or where the folder lay, does not matter.
    same = execution_keys | {"out"}
    shown = differing_keys(found, wanted, ignored=same)
    if shown:
        raise other_config(path, shown)
    return RunDir(path=path, stage=stage, finished=(path / RECORD).exists())


def no_run(where: str | Path) -> PrimaError:
    """`out` holds something else."""
    return PrimaError(
        "`out` exists and is no run directory (it has no config.yaml)", where=where, mend="Choose another `out`."
    )


def other_config(where: str | Path, differing: str) -> PrimaError:
    """`out` holds a run of another config."""
    return PrimaError(
        f"`out` holds a run of another config; it differs in {differing}",
        where=where,
        mend="Choose another `out`, or delete the folder if the run is not needed.",
    )


def finish_run(
    run: RunDir,
    *,
    seed: int,
    inputs: Mapping[str, str],
    parents: ParentState | None = None,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write run.json: the commit of a run. A descendant of an `unvetted` run is `unvetted`.

    Args:
        inputs: role -> path of every parent.
    """
    known = parents or ParentState()
    outputs = output_hashes(run.path)
    record = {
        "stage": run.stage,
        "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": seed,
        "inputs": {
            role: {"path": path, "hash": known.hashes.get(role) or input_hash(path)} for role, path in inputs.items()
        },
        "unvetted": known.unvetted or any(map(is_unvetted, inputs.values())),
        "outputs": outputs,
        "sizes": {name: (run.path / name).stat().st_size for name in outputs},
        "versions": versions(),
        "git_commit": git_commit(),
        **(extra or {}),
    }
    run.check()
    run.push()
    write_json(run.path / RECORD, record)
    if run.files:
        with reaching(run.files.store.address, "cannot be written to"):
            run.files.store.upload(run.path / RECORD, RECORD)


def check_parent(path: str) -> None:
    """The model files below ``path`` must be those that their run wrote: a run, or a folder inside of one.

    A folder that belongs to no run has nothing to be compared with.

    Raises:
        PrimaError: naming the first that is missing or another.
    """
    run = _run_of(path)
    if run is None:
        return
    inside = local_copy(path).absolute().relative_to(run.absolute()).as_posix()
    check_outputs(run, read_record(run), folder="model" if inside == "." else inside)


def check_finished(run: RunDir) -> None:
    """A run that is called finished must have all its files, in their sizes; what is in them is not read.

    Raises:
        PrimaError: its record is damaged, or a file is missing or has another size.
    """
    record = read_record(run.path, stage=run.stage)
    mend = "Copy the run again, or delete the folder and run its stage again."
    check_present(run.address, record, record["outputs"], mend=mend)


def _run_of(path: str) -> Path | None:
    """The finished run that a path is, or lies in."""
    if _is_remote_shards(path):
        return None  # shards: they have no model, and are not fetched
    local = local_copy(path)
    folders = (local, *list(local.absolute().parents)[:MODEL_DEPTH])
    return next((folder for folder in folders if (folder / RECORD).is_file()), None)


def _is_remote_shards(path: str) -> bool:
    if not is_uri(path):
        return False
    with reaching(path, "cannot be read"):
        return Folder.at(path).exists(MANIFEST)


def is_unvetted(path: str) -> bool:
    """True for a run that is marked so, and for a folder inside of one: a text encoder is named by its model folder."""
    run = _run_of(path)
    record = read_json(run / RECORD) if run else None
    return isinstance(record, dict) and bool(record.get("unvetted", False))


def input_hash(path: str) -> str:
    """What identifies a parent: a shard folder's content hash, a corpus with its decisions, a run's outputs, a model
    folder's files.
    """
    if _is_remote_shards(path):
        return read_manifest(path).content_hash
    local = local_copy(path)
    if (local / CORPUS).exists():
        log = local / LOG
        return hash_json([hash_file(local / CORPUS), hash_file(log) if log.exists() else None])
    if (local / MANIFEST).exists():
        return read_manifest(path).content_hash
    if (local / RECORD).exists():
        return hash_json(read_record(local)["outputs"])
    return hash_json(_file_hashes(local))


def output_hashes(path: Path) -> dict[str, str]:
    """Relative path -> SHA-256 of what a child may read: the model, the predictions, the corpus."""
    found = _file_hashes(path / "model", base=path)
    for name in ("predictions.parquet", "manifest.json", CORPUS, ENTRIES, TABLE, CHUNKS):
        if (path / name).exists():
            found[name] = hash_file(path / name)
    return found


def _file_hashes(folder: Path, *, base: Path | None = None) -> dict[str, str]:
    files = sorted(item for item in folder.rglob("*") if item.is_file())
    return {str(item.relative_to(base or folder)): hash_file(item) for item in files}


def versions() -> dict[str, str]:
    """Versions of this program and of what decides its figures."""
    found = {"prima_ray": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_commit() -> str | None:
    """The commit of the checkout this package runs from; None where it is installed."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        # An environment may lie inside somebody else's repository, whose commit says nothing of this program.
        return None
    try:
        answer = subprocess.run(  # noqa: S603 - fixed arguments
            ["git", "-C", str(root), "rev-parse", "HEAD"],  # noqa: S607 - git of the user's PATH
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None
