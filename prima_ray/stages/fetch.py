"""Fetch: model weights by name into a folder, checksummed, to be carried to machines with no network.

    TO/<name>/*.safetensors, config.json, tokenizer files ...    what `image_tower.weights`, `text_tower.path` and
                                                                 `fusion.path` read
    TO/<name>/checksums.json                                     source, revision, SHA-256 of every file; written last

A model is brought under `TO/.partial` and moved when it is whole; an interrupted fetch goes on where it stopped.
Pickles and code are never brought. To bring another kind of file, add its pattern to `_WANTED`.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from prima_ray.base import PrimaError, hash_file, read_json, write_json
from prima_ray.models.image_tower import near_models
from prima_ray.models.tokenizer import OFFLINE_TEXT_MODEL, first_line, resolve_text_model

_log = logging.getLogger(__name__)

CHECKSUMS = "checksums.json"
_WEIGHTS = "*.safetensors"
_INDEX = "*.safetensors.index.json"
_POOLING = "1_Pooling/config.json"
_WANTED = (
    _WEIGHTS,
    _INDEX,
    "*config*.json",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "modules.json",
    "*.model",
    "*.jinja",
    "LICENSE*",
    "NOTICE*",
)
_NEVER = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*.msgpack", "*.h5", "*.npz", "*.py")


@dataclass(frozen=True)
class _Model:
    """What a name stands for."""

    name: str
    """The folder below TO."""
    folder: Path | None = None
    """To copy from."""
    repo: str = ""
    """Of the hub, where there is no folder."""


def run_fetch(names: Sequence[str], *, to: str, verify: bool = False) -> int:
    """Bring the named models below the folder ``to``, or compare what is there with its checksums.

    Args:
        names: timm names, `owner/name` of the hub, or local folders.

    Returns:
        0. The last line printed is `run: FOLDER`.

    Raises:
        PrimaError: an unknown name, no network, no safetensors weights, or files that differ from their checksums.
    """
    root = Path(to)
    models = [_resolve(name) for name in names]
    if verify:
        problems = [problem for model in models for problem in _differences(root / model.name)]
        if problems:
            raise PrimaError("; ".join(problems), where=root, mend="Delete the model's folder and fetch it again.")
    for model in models:
        target = root / model.name
        if not verify:
            _bring(model, target, root / ".partial" / model.name)
        files = read_json(target / CHECKSUMS)["files"]
        size = sum(item["bytes"] for item in files.values())
        _log.info("%s: %d files, %s%s", target, len(files), _megabytes(size), ", as recorded" if verify else "")
    print(f"run: {root}")  # noqa: T201 - the command's answer
    return 0


def _resolve(name: str) -> _Model:
    if name == OFFLINE_TEXT_MODEL:
        return _Model(name=name, folder=Path(resolve_text_model(name)))
    folder = Path(name).expanduser()
    if folder.is_dir():
        return _Model(name=folder.resolve().name, folder=folder)
    if name.startswith((".", "/", "~")):
        raise PrimaError("no such model folder", where=name)
    if "/" in name:
        return _Model(name=name, repo=name)
    import timm

    try:
        published = timm.models.get_pretrained_cfg(name)
    except RuntimeError:
        published = None
    if published is None or not published.hf_hub_id:
        hints = (near_models(name), "A model of transformers is named owner/name.")
        raise PrimaError(f"timm publishes no weights {name!r}", mend=" ".join(hint for hint in hints if hint))
    return _Model(name=published.hf_hub_id.partition("/")[2], repo=published.hf_hub_id)


def _bring(model: _Model, target: Path, partial: Path) -> None:
    if (target / CHECKSUMS).exists():
        _log.info("%s: already here", model.name)
        return
    if target.exists():
        raise PrimaError(
            f"exists without a {CHECKSUMS}: not brought by `prima fetch`", where=target, mend="Choose another folder."
        )
    partial.mkdir(parents=True, exist_ok=True)
    if model.folder is not None:
        source, revision, hashes = str(model.folder), None, _copy(model.folder, partial)
    else:
        source = model.repo
        revision, hashes = _download(model.repo, partial)
    _check_index(partial, hashes)
    for leftover in [item for item in partial.iterdir() if item.name.startswith(".")]:
        shutil.rmtree(leftover, ignore_errors=True)
    files = {name: {"bytes": (partial / name).stat().st_size, "sha256": digest} for name, digest in hashes.items()}
    write_json(partial / CHECKSUMS, {"source": source, "revision": revision, "files": files})
    target.parent.mkdir(parents=True, exist_ok=True)
    partial.replace(target)
    for parent in partial.parents:
        if parent == target.parent or any(parent.iterdir()):
            break
        parent.rmdir()
        if parent.name == ".partial":
            break


def choose_files(names: Iterable[str], *, where: str | Path) -> list[str]:
    """What of a model's files is brought, sorted.

    Raises:
        PrimaError: no safetensors weights are among them.
    """
    found = sorted(names)
    chosen = [name for name in found if name == _POOLING or ("/" not in name and _is_wanted(name))]
    if not any(fnmatch(name, _WEIGHTS) for name in chosen):
        others = [name for name in found if any(fnmatch(name, pattern) for pattern in _NEVER)]
        raise PrimaError(
            f"holds no safetensors weights{f', only {others[0]}' if others else ''}",
            where=where,
            mend="Pickled weights can run code, so they are never brought: choose a model published as safetensors.",
        )
    return chosen


def _is_wanted(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in _WANTED) and not any(fnmatch(name, item) for item in _NEVER)


def _copy(folder: Path, partial: Path) -> dict[str, str]:
    names = (str(PurePosixPath(item.relative_to(folder))) for item in folder.rglob("*") if item.is_file())
    hashes = {}
    for name in choose_files(names, where=folder):
        _log.info("%s/%s: %s", folder, name, _megabytes((folder / name).stat().st_size))
        (partial / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / name, partial / name)
        hashes[name] = hash_file(partial / name)
        if hashes[name] != hash_file(folder / name):
            raise PrimaError("changed while it was copied", where=folder / name)
    return hashes


def _download(repo: str, partial: Path) -> tuple[str, dict[str, str]]:
    """Revision, and the hash of every file."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    # OSError, and the error of the hub's HTTP library, which changes with its version.
    network_errors = tuple(kind for kind in HfHubHTTPError.__bases__ if issubclass(kind, Exception))
    # Read now: the library reads it once, at import.
    hub = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    try:
        info = hub.model_info(repo, files_metadata=True)
        published = {item.rfilename: item for item in info.siblings or ()}
        hashes = {}
        for name in choose_files(published, where=f"{hub.endpoint}/{repo}"):
            _log.info("%s/%s: %s", repo, name, _megabytes(published[name].size or 0))
            file = hub.hf_hub_download(repo, name, revision=info.sha, local_dir=partial)
            hashes[name] = hash_file(file)
            recorded = published[name].lfs
            if recorded is not None and recorded.sha256 != hashes[name]:
                Path(file).unlink()
                raise PrimaError(
                    f"{name} arrived damaged: its SHA-256 is {hashes[name][:12]}, the hub says {recorded.sha256[:12]}",
                    where=repo,
                    mend="Run the command again.",
                )
    except GatedRepoError:
        raise PrimaError(
            "its owner gives it to registered users only",
            where=repo,
            mend="Accept its licence on the hub, and log in with `hf auth login` or HF_TOKEN.",
        ) from None
    except RepositoryNotFoundError:
        raise PrimaError("no such model on the hub, or it is private", where=repo) from None
    except network_errors as error:
        raise PrimaError(
            f"could not be fetched from {hub.endpoint} ({first_line(error)})",
            where=repo,
            mend="Check the network and HF_ENDPOINT; the same command continues where it stopped.",
        ) from None
    return str(info.sha), hashes


def _check_index(folder: Path, hashes: Mapping[str, str]) -> None:
    """A sharded model is whole when every shard that its index names is here."""
    for name in hashes:
        if fnmatch(name, _INDEX):
            shards = set(json.loads((folder / name).read_text())["weight_map"].values())
            missing = sorted(shards - set(hashes))
            if missing:
                raise PrimaError(f"names {missing[0]}, which is not there", where=name)


def _differences(target: Path) -> Iterator[str]:
    if not (target / CHECKSUMS).exists():
        yield f"{target.name}: no {CHECKSUMS}: it was not fetched, or not to its end"
        return
    recorded = read_json(target / CHECKSUMS)["files"]
    here = {str(PurePosixPath(item.relative_to(target))) for item in target.rglob("*") if item.is_file()}
    for name, item in recorded.items():
        if name not in here:
            yield f"{target.name}/{name} is missing"
        elif hash_file(target / name) != item["sha256"]:
            yield f"{target.name}/{name} differs from its checksum"
    for name in sorted(here - set(recorded) - {CHECKSUMS}):
        yield f"{target.name}/{name} was not fetched"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
