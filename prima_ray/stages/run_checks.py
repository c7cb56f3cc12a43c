"""Checks of `prima doctor` that know what stages read and write: inputs, the run directory, its checkpoints."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from pyarrow import fs as pafs

from prima_ray.base import PrimaError, is_uri
from prima_ray.config import differing_keys, input_paths, parse_yaml
from prima_ray.data.run_record import CONFIG, RECORD, checkpoint_folders, read_record
from prima_ray.data.schema import MANIFEST, join, open_filesystem, read_manifest
from prima_ray.data.storage import Folder, reaching
from prima_ray.knowledge.files import find_files
from prima_ray.knowledge.literature import sources_by_key
from prima_ray.stages.out_lock import LOCK
from prima_ray.stages.registry import execution_keys
from prima_ray.stages.rundir import RunDir, check_finished, no_run, other_config
from prima_ray.training.checkpoint import TornError, load_checkpoint, newest_first
from prima_ray.training.checks import Check, Finding, Subject
from prima_ray.training.config import EXECUTION_KEYS
from prima_ray.training.facts import is_held


def inputs(subject: Subject) -> Iterator[Finding]:
    """Every path that the config reads is there; shards and runs are finished and have all their files."""
    if subject.config is None:
        return
    literature = sources_by_key(subject.config)
    for key, path in input_paths(subject.config):
        try:
            if key in literature:
                files = find_files(path, literature[key].suffixes, key=key)
                found = f"{len(files)} file{'' if len(files) == 1 else 's'}"
            else:
                found = _look_at(key.rpartition(".")[2], path)
            yield Finding("ok", f"{key}: {found}", path)
        except PrimaError as error:
            yield Finding("error", f"{key}: {error.what}", error.where, error.mend)


def _look_at(role: str, path: str) -> str:
    filesystem, root = open_filesystem(path)
    with reaching(path, "cannot be read"):
        kind = filesystem.get_file_info(root.rstrip("/") or root).type
        if kind == pafs.FileType.NotFound:
            raise PrimaError(
                "there is nothing at this path", where=path, mend="Run the stage that makes it, or correct the path."
            )
        if role == "shards" or filesystem.get_file_info(join(root, MANIFEST)).type == pafs.FileType.File:
            return _look_at_shards(path)
        if kind == pafs.FileType.File:
            with filesystem.open_input_stream(root) as stream:
                stream.read(1)
            return "can be read"
        filesystem.get_file_info(pafs.FileSelector(root))
        is_run = any(Folder.at(path).exists(name) for name in (CONFIG, RECORD))
    if is_run and is_uri(path):
        # Without bringing the run here, which its stage does once.
        return _finished_there(Folder.at(path))
    if is_run:
        record = read_record(path)
        check_finished(RunDir(Path(path), record["stage"], finished=True))
        return f"a finished run of {record['stage']}"
    return "can be read"


def _finished_there(run: Folder) -> str:
    with reaching(run.address, "cannot be read"):
        if not run.exists(RECORD):
            mend = "Run its stage again to complete it."
            raise PrimaError(f"this is not finished ({RECORD} is missing)", where=run.address, mend=mend)
        return f"a finished run of {json.loads(run.read(RECORD))['stage']}"


def _look_at_shards(path: str) -> str:
    manifest = read_manifest(path)
    filesystem, root = open_filesystem(path)
    files = [*manifest.files, *manifest.side_files]
    for file, info in zip(files, filesystem.get_file_info([join(root, file.path) for file in files]), strict=True):
        where = join(path, file.path)
        if info.type != pafs.FileType.File:
            raise PrimaError(
                "this file of the shards is missing", where=where, mend="Copy them again, or ingest again."
            )
        if info.size != file.bytes:
            text = f"{info.size} bytes, the manifest says {file.bytes}"
            raise PrimaError(text, where=where, mend="Copy the shards again, or ingest again.")
    return f"{manifest.num_exams} exams in {len(manifest.files)} files"


def run_directory(subject: Subject) -> Iterator[Finding]:
    """`out` is free, or holds a run of this config."""
    if subject.config is None or subject.out is None:
        return
    folder = Folder.at(subject.out)
    if folder.is_local and folder.path.is_file():
        raise PrimaError("`out` is a file", where=subject.out, mend="Choose another `out`.")
    with reaching(subject.out, "`out` cannot be reached"):
        if folder.is_empty():
            yield Finding("ok", "nothing there yet: a new run", subject.out)
            return
        if not folder.exists(CONFIG):
            raise no_run(subject.out)
        found = parse_yaml(folder.read(CONFIG).decode(), where=folder.where(CONFIG))
        is_finished = folder.exists(RECORD)
    execution = execution_keys(subject.stage) if subject.stage else EXECUTION_KEYS
    shown = differing_keys(found, subject.config.model_dump(mode="json"), ignored=execution | {"out"})
    if shown:
        raise other_config(subject.out, shown)
    if folder.is_local and is_held(folder.path / LOCK):
        mend = "Wait for it to end, or choose another `out`."
        yield Finding("warning", "another process is working in this folder", subject.out, mend)
    elif is_finished:
        yield Finding("ok", "a finished run of this config: the stage returns it at once", subject.out)
    else:
        yield Finding("ok", "an unfinished run of this config: the stage goes on with it", subject.out)


def checkpoints(subject: Subject) -> Iterator[Finding]:
    """The newest checkpoint is whole, or the one before it is."""
    if subject.loop is None or subject.out is None:
        return
    for home in checkpoint_folders(Folder.at(subject.out)):
        yield from _look_back(home)


def _look_back(home: Folder) -> Iterator[Finding]:
    names = newest_first(home)
    for name in names:
        try:
            _, progress = load_checkpoint(home.folder(name).address)
        except TornError as error:
            mend = "Nothing needs to be done: the one before it is used."
            if name == names[-1]:
                mend = "Delete the folder, or leave it: training starts from the beginning, for no other one is whole."
            yield Finding("warning", f"a torn checkpoint: {error.what}", error.where, mend)
        else:
            state = "training is done" if progress.done else "training goes on from here"
            yield Finding("ok", f"step {progress.step} is whole; {state}", home.where(name))
            return


RUN: tuple[Check, ...] = (inputs, run_directory, checkpoints)
