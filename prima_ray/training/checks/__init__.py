"""What may keep a job from running, found before it runs: one function a check.

A check takes a `Subject` and yields findings: what, where, and how to mend it. To add one: a function in the module of
its subject (`machine`, `budget`, `storage`, or `stages.run_checks` for what only stages know), and its name in that
module's tuple. `prima doctor` runs all of them; training runs those of `before_workers`, which are quick and need no
other node's answer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from prima_ray.base import PrimaError, StrictConfig
from prima_ray.data.storage import reason
from prima_ray.training.cluster import ClusterView
from prima_ray.training.config import DeepSpeedEngineConfig, LoopConfig, RayContextConfig
from prima_ray.training.facts import Facts

_log = logging.getLogger(__name__)
Level = Literal["ok", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """What a check says."""

    level: Level
    what: str
    where: str | None = None
    mend: str | None = None
    check: str = ""
    """Its function's name; `run_checks` fills it in."""

    def as_error(self) -> PrimaError:
        return PrimaError(self.what, where=self.where, mend=self.mend)


@dataclass(frozen=True)
class Subject:
    """What is looked at. Without a config: the machine alone."""

    here: Facts
    config: StrictConfig | None = None
    stage: str | None = None
    cluster: ClusterView | None = None
    """None: no Ray is used, or the cluster could not be joined."""
    address: str | None = None
    """The cluster that would be joined."""
    nodes: Mapping[str, Facts] = field(default_factory=dict)
    """By the node's name; empty where this machine is all there is, or nobody was asked."""
    blind: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Folder -> nodes that cannot use it, and why: `shared_folder.nodes_without`."""

    @property
    def ray(self) -> RayContextConfig | None:
        """The context, where it is Ray's."""
        context = getattr(self.config, "context", None)
        return context if isinstance(context, RayContextConfig) else None

    @property
    def loop(self) -> LoopConfig | None:
        """The config, where it is one of training."""
        return self.config if isinstance(self.config, LoopConfig) else None

    @property
    def out(self) -> str | None:
        found = getattr(self.config, "out", None)
        return found if isinstance(found, str) else None

    @property
    def compiles(self) -> bool:
        """Whether training loads DeepSpeed's communication op for CPUs."""
        loop = self.loop
        if loop is None or not isinstance(loop.engine, DeepSpeedEngineConfig):
            return False
        return isinstance(loop.context, RayContextConfig) and not loop.context.gpus_per_worker

    def machines(self) -> Iterator[tuple[str | None, Facts]]:
        """(name, facts) of every machine that the job may run on."""
        if self.nodes:
            yield from self.nodes.items()
        else:
            yield None, self.here


Check = Callable[[Subject], Iterator[Finding]]


def run_checks(checks: Iterable[Check], subject: Subject) -> list[Finding]:
    """All findings, in the order of the checks. What a check could not look at is a finding too."""
    found = []
    for check in checks:
        name = check.__name__.replace("_", " ")
        try:
            found += [replace(finding, check=name) for finding in check(subject)]
        except PrimaError as error:
            found.append(Finding("error", error.what, error.where, error.mend, name))
        except OSError as error:
            found.append(Finding("error", f"could not be looked at ({reason(error)})", check=name))
    return found


def refuse(findings: Iterable[Finding]) -> None:
    """Log the warnings.

    Raises:
        PrimaError: the first error.
    """
    for finding in findings:
        if finding.level == "error":
            raise finding.as_error()
        if finding.level == "warning":
            _log.warning("warning: %s", finding.as_error())
