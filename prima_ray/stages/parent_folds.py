"""A run must not be scored, or chosen, on exams that a run before it learned from."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from prima_ray.base import PrimaError
from prima_ray.config import read_yaml
from prima_ray.data.fetched import local_copy
from prima_ray.data.plan import ExamIndex, Roles, split_roles
from prima_ray.data.run_record import CONFIG, RECORD, read_record
from prima_ray.stages.rundir import input_hash


def check_parent_folds(index: ExamIndex, roles: Roles, parents: Mapping[str, str]) -> None:
    """What is tested or validated here must have trained no parent on the same shards, nor may what is tested have
    chosen one.

    Args:
        parents: role -> path; what is no run of a stage with folds is not looked at.

    Raises:
        PrimaError: naming the parent, and how many exams.
    """
    for role, path in parents.items():
        theirs = _roles_of(path, index)
        if theirs is None:
            continue
        for mine, learned, what, how in (
            (roles.test, theirs.train, "tested", "learned from"),
            (roles.val, theirs.train, "validated", "learned from"),
            (roles.test, theirs.val, "tested", "was chosen on"),
        ):
            shared = np.intersect1d(mine, learned)
            if len(shared):
                raise PrimaError(
                    f"a leak: inputs.{role} {how} {len(shared)} of the {len(mine)} exams that are {what} here",
                    where=path,
                    mend="Give fold, val_fold and split the values that they have in its config.yaml, or train it "
                    "again with yours.",
                )


def _roles_of(path: str, index: ExamIndex) -> Roles | None:
    """The roles of the exams in a run; None where it has none, or had other shards."""
    local = local_copy(path)
    if not (local / RECORD).is_file():
        return None
    shards, config = read_record(local)["inputs"].get("shards"), read_yaml(local / CONFIG)
    keys = ("fold", "val_fold", "split")
    if not shards or shards["hash"] != input_hash(index.shards) or any(key not in config for key in keys):
        return None
    fold = None if config["fold"] == "none" else config["fold"]
    return split_roles(index, fold=fold, val_fold=config["val_fold"], split=config["split"])
