"""Runs and model folders on an object store, as local folders: fetched once a machine, by whoever reads them.

    $PRIMA_CACHE/fetched/KEY/...        default ~/.cache/prima_ray; KEY is of the address and of what lies there

Libraries read models from disks alone. So an address travels, in configs and to workers, and each machine that opens it
fetches the files it asks for. A file of a finished run is held to the hash in the run's run.json. Something new at
the same address has another key; nothing is ever removed, the folder may be deleted when no job runs.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path, PurePosixPath
from typing import Any

from prima_ray.base import PrimaError, hash_json, is_uri
from prima_ray.data.storage import Folder, reaching

RUN_RECORD = "run.json"
"""What makes a folder a finished run."""
CHECKPOINTS = "checkpoints"
"""What a run goes on from; a finished one needs none."""
_NOT_FETCHED = (CHECKPOINTS, "ray", "tensorboard", "evaluation")
_ALWAYS = (RUN_RECORD, "config.yaml")
MODEL_DEPTH = 3
"""How deep in a run the folder of a model's part may lie."""


def cache_root() -> Path:
    """Where fetched files are kept on this machine."""
    named = os.environ.get("PRIMA_CACHE")
    return Path(named or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "prima_ray") / "fetched"


def local_copy(address: str | Path) -> Path:
    """The local folder of a run, of a folder inside of one, or of any other folder; a local path is its own.

    Raises:
        PrimaError: there is nothing at the address, it cannot be reached, or a file is not the one that its run wrote.
    """
    text = str(address)
    if not is_uri(text):
        return Path(address)
    home = Folder.at(text)
    if home.is_local:
        return home.path
    with reaching(text, "cannot be read"):
        root, inside = _run_root(home)
        files = {name: stamp for name, stamp in root.stamps(without=_NOT_FETCHED).items() if name != ".lease.json"}
        wanted = [name for name in files if name in _ALWAYS or not inside or PurePosixPath(name).is_relative_to(inside)]
        if not any(not inside or PurePosixPath(name).is_relative_to(inside) for name in wanted):
            raise PrimaError("there is nothing at this address", where=text)
        target = cache_root() / hash_json([root.address, files])[:32]
        hashes = _hashes(root) if RUN_RECORD in files else {}
        for name in wanted:
            _fetch(root, name, target / name, wanted=hashes.get(name))
    return target / inside if inside else target


def _run_root(home: Folder) -> tuple[Folder, str]:
    """The finished run that a folder is or lies in, and where in it; else the folder itself."""
    path = PurePosixPath(home.root)
    for depth in range(min(MODEL_DEPTH, len(path.parts) - 1) + 1):
        above = path if not depth else path.parents[depth - 1]
        head, mark, query = home.address.partition("?")
        cut = head.rstrip("/")
        for _ in range(depth):
            cut = cut.rpartition("/")[0]
        root = Folder(cut + mark + query, home.filesystem, str(above))
        if root.exists(RUN_RECORD):
            return root, "" if not depth else str(path.relative_to(above))
    return home, ""


def _hashes(root: Folder) -> dict[str, str]:
    try:
        found: Any = json.loads(root.read(RUN_RECORD))["outputs"]
    except (ValueError, KeyError, TypeError):
        return {}  # whoever reads the record says what is wrong with it
    return found if isinstance(found, dict) else {}


def _fetch(root: Folder, name: str, target: Path, *, wanted: str | None) -> None:
    """One file, aside and then in place: several processes may want it at once."""
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as aside:
        part = Path(aside) / target.name
        found = root.download(name, part)
        if wanted is not None and found != wanted:
            raise PrimaError(
                "is not the file that the run wrote (checksum)",
                where=root.where(name),
                mend="Copy the run again, or train it again.",
            )
        part.replace(target)
