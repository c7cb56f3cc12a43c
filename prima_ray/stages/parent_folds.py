"""A run must not be scored, or chosen, on exams that a run before it learned from."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from prima_ray.base import PrimaError
from prima_ray.config import read_yaml
from prima_ray.data.fetched import local_copy
from prima_ray.data.plan import ExamIndex, Roles, split_roles
from prima_ray.data.run_record import CONFIG, RECORD, read_record
from prima_ray.data.schema import read_manifest
from prima_ray.stages.rundir import input_hash

_log = logging.getLogger(__name__)
_KEYS = ("fold", "val_fold", "split")


def check_parent_folds(index: ExamIndex, roles: Roles, parents: Mapping[str, str]) -> None:
    """What is tested or validated here must have trained no parent, nor may what is tested have chosen one.

    A parent on other shards of a data set of the same name is compared by the names of exams; of one whose shards are
    gone it is said that nothing is known.

    Args:
        parents: role -> path; what is no run of a stage with folds is not looked at.

    Raises:
        PrimaError: naming the parent, and how many exams.
    """
    for role, path in parents.items():
        theirs = _exams_of(path, index, role)
        if theirs is None:
            continue
        trained, chosen = theirs
        for mine, other, what, how in (
            (roles.test, trained, "tested", "learned from"),
            (roles.val, trained, "validated", "learned from"),
            (roles.test, chosen, "tested", "was chosen on"),
        ):
            shared = other & set(index.exam_ids[mine])
            if shared:
                raise PrimaError(
                    f"a leak: inputs.{role} {how} {len(shared)} of the {len(mine)} exams that are {what} here",
                    where=path,
                    mend="Give fold, val_fold and split the values that they have in its config.yaml, or train it "
                    "again with yours.",
                )


def _exams_of(path: str, index: ExamIndex, role: str) -> tuple[set[Any], set[Any]] | None:
    """The exams that a run learned from, and those that chose it; None where there is nothing to compare."""
    local = local_copy(path)
    if not (local / RECORD).is_file():
        return None
    shards, config = read_record(local)["inputs"].get("shards"), read_yaml(local / CONFIG)
    if not shards or any(key not in config for key in _KEYS):
        return None
    theirs = index if shards["hash"] == input_hash(index.shards) else _other_shards(shards, index, role)
    if theirs is None:
        return None
    fold = None if config["fold"] == "none" else config["fold"]
    found = split_roles(theirs, fold=fold, val_fold=config["val_fold"], split=config["split"])
    return set(theirs.exam_ids[found.train]), set(theirs.exam_ids[found.val])


def _other_shards(recorded: Mapping[str, str], index: ExamIndex, role: str) -> ExamIndex | None:
    """The shards that a parent learned from, if they are still there and of a data set of this name."""
    path = recorded["path"]
    try:
        if read_manifest(path).data_set.name != index.manifest.data_set.name:
            return None
        if input_hash(path) == recorded["hash"]:
            return ExamIndex.read(path)
    except PrimaError:
        pass
    _log.warning(
        "warning: inputs.%s learned from other shards (%s), which are gone: whether it knows exams that are tested "
        "here cannot be told",
        role,
        path,
    )
    return None
