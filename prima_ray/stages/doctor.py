"""Doctor: everything that may keep a stage from running, looked at before it runs.

The checks are functions of `training.checks` and `stages.run_checks`; to add one, see there. Without a config the
machine alone is looked at. Where an address is named the cluster is asked, every node of it; else what would be
started here is computed, and no Ray is started.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from prima_ray.base import PrimaError, StrictConfig, is_uri
from prima_ray.config import input_paths, load_config, read_yaml
from prima_ray.data.run_record import CONFIG
from prima_ray.knowledge.literature import sources_by_key
from prima_ray.stages.run_checks import RUN
from prima_ray.training.checks import Check, Finding, Subject, run_checks
from prima_ray.training.checks.access import ACCESS
from prima_ray.training.checks.budget import BUDGET
from prima_ray.training.checks.machine import MACHINE
from prima_ray.training.checks.storage import STORAGE, temp_folder
from prima_ray.training.cluster import connect, disconnect, named_address, node_ids, on_nodes, planned_view, view
from prima_ray.training.config import RayContextConfig
from prima_ray.training.engine_build import prepare_environment
from prima_ray.training.facts import Facts, observe, probe_folder, sweep
from prima_ray.training.shared_folder import nodes_without

CHECKS: tuple[Check, ...] = (*MACHINE, *ACCESS, *BUDGET, *STORAGE, *RUN)


@dataclass(frozen=True)
class Report:
    """What all checks found."""

    findings: tuple[Finding, ...]
    stage: str | None
    config: str | None
    cluster: str | None

    def count(self, level: str) -> int:
        return sum(finding.level == level for finding in self.findings)

    def to_json(self) -> str:
        head = {"stage": self.stage, "config": self.config, "cluster": self.cluster}
        counts = {"errors": self.count("error"), "warnings": self.count("warning")}
        return json.dumps({**head, **counts, "findings": [asdict(item) for item in self.findings]}, indent=2)

    def to_text(self) -> str:
        """A table: level, check, what was found; below it how to mend it. The sum is the last line."""
        rows = list(_merged(self.findings))
        width = max((len(item.check) for item in rows), default=0)
        lines = []
        for item in rows:
            indent = " " * (len("warning") + width + 4)
            what, *mend = str(item.as_error()).splitlines()
            lines.append(f"{item.level:<7}  {item.check:<{width}}  {what}")
            lines += [f"{indent}{text.strip()}" for text in mend]
        errors, warnings = self.count("error"), self.count("warning")
        lines.append(f"doctor: {_plural(errors, 'error')}, {_plural(warnings, 'warning')}")
        return "\n".join(lines)


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _merged(findings: Sequence[Finding]) -> Iterator[Finding]:
    """What is alike on several machines is one row."""
    groups: dict[Finding, list[str]] = {}
    for finding in findings:
        groups.setdefault(replace(finding, where=None), []).extend([finding.where] if finding.where else [])
    for finding, places in groups.items():
        yield replace(finding, where=", ".join(places) or None)


def run_doctor(
    path: str | None, overrides: Sequence[str], *, stage: str | None, schemas: Mapping[str, type[StrictConfig]]
) -> Report:
    """Look at everything.

    Args:
        path: a stage's config, or a run directory.
        stage: whose config it is; None finds out.
        schemas: the stages' config classes by name.

    Raises:
        PrimaError: nothing says whose config it is.
    """
    prepare_environment()
    if path is None:
        return _report(None, None, None, [])
    if Path(path).is_dir():
        path = str(Path(path) / CONFIG)
    stage = stage or stage_of(path, schemas)
    try:
        config = load_config(schemas[stage], path, overrides)
    except PrimaError as error:
        # The machine can be looked at all the same.
        wrong = Finding("error", error.what, error.where, error.mend, "config")
        return _report(None, stage, path, [wrong])
    return _report(config, stage, path, [Finding("ok", f"a config of {stage}", path, check="config")])


def stage_of(path: str, schemas: Mapping[str, type[StrictConfig]]) -> str:
    """Whose config a file is: by its name, as in `jobs/configs`, else by its keys.

    Raises:
        PrimaError: several stages have these keys, or none has.
    """
    if Path(path).stem in schemas:
        return Path(path).stem
    raw = read_yaml(path)
    able = [name for name, schema in schemas.items() if _has_keys(schema, raw)]
    if len(able) == 1:
        return able[0]
    what = f"this may be a config of {' or '.join(able)}" if able else "no stage has all of these keys"
    raise PrimaError(what, where=path, mend=f"Name the stage: --stage {able[0] if able else next(iter(schemas))}")


def _has_keys(schema: type[StrictConfig], raw: Mapping[str, Any]) -> bool:
    needed = {name for name, item in schema.model_fields.items() if item.is_required()}
    return needed <= set(raw) <= set(schema.model_fields)


def _report(config: StrictConfig | None, stage: str | None, path: str | None, findings: list[Finding]) -> Report:
    context = getattr(config, "context", None if config else RayContextConfig())
    context = context if isinstance(context, RayContextConfig) else None
    address = named_address(context) if context else None
    subject = Subject(here=observe(), config=config, stage=stage, address=address)
    if address and context:
        try:
            connect(context, num_workers=0)
            subject = _asked(subject)
        except PrimaError as error:
            findings.append(Finding("error", error.what, error.where, error.mend, "cluster"))
            subject = _alone(subject)
    elif context:
        workers = subject.loop.worker_range[1] if subject.loop else 0
        subject = _alone(replace(subject, cluster=planned_view(context, num_workers=workers, gpus=_gpus_here())))
    else:
        subject = _alone(subject)
    findings += run_checks(CHECKS, subject)
    disconnect()
    return Report(tuple(findings), stage, path, subject.cluster.address if subject.cluster else None)


def _gpus_here() -> int:
    import torch

    return torch.cuda.device_count()


def _places(subject: Subject) -> tuple[list[str], list[str]]:
    """Folders that are written, and inputs that lie on a disk."""
    folders = [subject.out, getattr(subject.config, "feature_cache", None)]
    if subject.config is None:
        folders = [str(Path.cwd())]
    wanted = [probe_folder(item).address for item in folders if item]
    config = subject.config
    # Literature is read where the stage is started, and may be named by a pattern.
    literature = sources_by_key(config) if config else {}
    inputs = [path for key, path in input_paths(config) if key not in literature] if config else []
    return list(dict.fromkeys(wanted)), [path for path in inputs if not is_uri(path)]


def _here(folders: Sequence[str], inputs: Sequence[str]) -> Facts:
    """This machine, with a file written into every folder, and taken away again."""
    probe = f".prima-doctor-{uuid.uuid4().hex[:12]}"
    try:
        return observe(folders, inputs, probe=probe)
    finally:
        sweep(folders, probe)


def _alone(subject: Subject) -> Subject:
    folders, inputs = _places(subject)
    return replace(subject, here=_here(list(dict.fromkeys([*folders, temp_folder()])), inputs))


def _asked(subject: Subject) -> Subject:
    """Every node looks at itself, and for what this machine has written."""
    folders, inputs = _places(subject)
    here, names = _here(folders, inputs), node_ids()
    facts: dict[str, Facts] = {}
    for node, answer in on_nodes({node: partial(observe, folders, inputs) for node in names}).items():
        if isinstance(answer, PrimaError):
            mend = "Check that prima_ray is installed there, and `ray status`."
            raise PrimaError(answer.what, where=names[node], mend=mend)
        facts[_label(names, node)] = answer
    writable = [state.address for state in here.folders if not state.error]
    blind = {address: found for address in writable if (found := nodes_without(address))}
    return replace(subject, here=here, cluster=view(), nodes=facts, blind=blind)


def _label(names: Mapping[str, str], node: str) -> str:
    """A node's address; with a piece of its id where several have the same, as on one machine."""
    address = names[node]
    return address if list(names.values()).count(address) == 1 else f"{address} ({node[:6]})"
