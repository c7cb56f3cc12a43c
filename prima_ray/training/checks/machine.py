"""What is installed on a machine, and what memory it has."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from importlib import import_module
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement

from prima_ray.training.checks import Check, Finding, Subject
from prima_ray.training.engine_build import INSTALL_COMPILER, NEEDS_COMPILER, compiler_name
from prima_ray.training.facts import SHM, Facts, requirements

SHOWN = ("ray", "torch", "torchvision", "transformers", "timm", "deepspeed")
"""Versions worth a line; the others are named where they are wrong."""
_STORE_SHARE = 0.3
"""Of the memory, for Ray's object store: its default."""
_GIB = 1 << 30
_INSTALL = "Install it as the project does (`make setup`, or the container image)."


def versions(subject: Subject) -> Iterator[Finding]:
    """Python and every package as the project's requirements say, on every machine."""
    for name, facts in subject.machines():
        wrong = list(_wrong_versions(facts, name))
        yield from wrong
        if not wrong:
            shown = ", ".join(f"{package} {facts.packages[package]}" for package in SHOWN if package in facts.packages)
            yield Finding("ok", f"python {facts.python}, {shown}", name)


def _wrong_versions(facts: Facts, where: str | None) -> Iterator[Finding]:
    needed, python = requirements()
    if not python.contains(facts.python):
        yield Finding("error", f"Python {facts.python}; prima_ray needs {python}", where, "Install another Python.")
    for item in needed:
        found = facts.packages.get(item.name)
        if found is None:
            yield Finding("error", f"{item.name} is not installed; prima_ray needs {_wanted(item)}", where, _INSTALL)
        elif not item.specifier.contains(found, prereleases=True):
            yield Finding("error", f"{item.name} {found}; prima_ray needs {_wanted(item)}", where, _INSTALL)


def _wanted(item: Requirement) -> str:
    return f"{item.name}{item.specifier}"


def same_versions(subject: Subject) -> Iterator[Finding]:
    """What is pickled here is read there: Python's minor version and Ray's must be the same, torch's should be."""
    for name, facts in subject.nodes.items():
        ours, theirs = _decisive(subject.here), _decisive(facts)
        differing = [f"{key} {theirs[key]} (here {ours[key]})" for key in ours if ours[key] != theirs[key]]
        if differing:
            mend = "Use one environment on every machine; the container image is one."
            yield Finding("error", f"another version than here: {', '.join(differing)}", name, mend)


def _decisive(facts: Facts) -> dict[str, str]:
    return {
        "python": ".".join(facts.python.split(".")[:2]),
        **{name: facts.packages.get(name, "none") for name in ("ray", "torch", "deepspeed")},
    }


def torchvision_build(subject: Subject) -> Iterator[Finding]:
    """torchvision is compiled for one torch alone; timm imports it."""
    del subject  # of this machine: what a node imports, its first worker says
    mend = "Install torch and torchvision together, from one index: `make setup`, or uv rather than pip."
    with suppress(PackageNotFoundError):
        for item in map(Requirement, requires("torchvision") or []):
            if item.name == "torch" and not item.specifier.contains(version("torch"), prereleases=True):
                text = f"torchvision {version('torchvision')} is for torch{item.specifier}, not {version('torch')}"
                yield Finding("error", text, mend=mend)


def torchvision_import(subject: Subject) -> Iterator[Finding]:
    """Version numbers may match where the builds do not (a CPU torch with a CUDA torchvision)."""
    del subject
    try:
        import_module("torchvision")
    except Exception as error:  # ImportError, or what its compiled part raises
        text = f"torchvision cannot be imported ({str(error).strip().splitlines()[0]})"
        mend = "Install torch and torchvision together, from one index: `make setup`, or uv rather than pip."
        yield Finding("error", text, mend=mend)
    else:
        yield Finding("ok", "torchvision can be imported")


def compiler(subject: Subject) -> Iterator[Finding]:
    """DeepSpeed compiles its communication op for CPUs, unless that was done at set-up."""
    for name, facts in subject.machines():
        if facts.op_is_built:
            yield Finding("ok", "DeepSpeed's communication op is built", name)
        elif facts.compiler is None:
            text = f"no C++ compiler ({compiler_name()}); {NEEDS_COMPILER}"
            yield Finding("error" if subject.compiles else "warning", text, name, INSTALL_COMPILER)
        else:
            text = "DeepSpeed's communication op is not built yet: the first training run takes a minute longer"
            mend = "`python -m prima_ray.training.engine_build` builds it; `make setup` does that."
            yield Finding("warning" if subject.compiles else "ok", text, name, mend if subject.compiles else None)


def extension_builds(subject: Subject) -> Iterator[Finding]:
    """A build that was killed is done again; one that is running is waited for, in silence."""
    for name, facts in subject.machines():
        for build in facts.builds:
            where = build.path if name is None else f"{name}: {build.path}"
            if build.state == "running":
                yield Finding(
                    "warning", "another process is compiling this extension: training would wait for it", where
                )
            elif build.state == "broken off":
                yield Finding(
                    "warning",
                    "the build of this extension was broken off: the next run compiles it again, which takes a minute",
                    where,
                    "`python -m prima_ray.training.engine_build` does it now.",
                )


def memory(subject: Subject) -> Iterator[Finding]:
    """Ray kills workers on a machine whose memory is nearly full (95 %, or RAY_memory_usage_threshold)."""
    threshold = float(os.environ.get("RAY_memory_usage_threshold", "0.95"))  # noqa: SIM112 - Ray's name
    for name, facts in subject.machines():
        if facts.memory_bytes is None or facts.available_bytes is None:
            continue
        used = 1 - facts.available_bytes / facts.memory_bytes
        text = f"{_gib(facts.available_bytes)} of {_gib(facts.memory_bytes)} GiB of memory are free"
        if used >= threshold:
            mend = "Stop other programs, or give the machine more memory."
            yield Finding("error", f"{text}: Ray kills workers where {threshold:.0%} are used", name, mend)
        else:
            yield Finding("ok", text, name)


def shared_memory(subject: Subject) -> Iterator[Finding]:
    """Ray's object store lies in /dev/shm; where that is too small (Docker: 64 MB) it lies on the disk, and is slow."""
    for name, facts in subject.machines():
        if facts.shm_bytes is None or facts.memory_bytes is None:
            continue
        wanted = _STORE_SHARE * facts.memory_bytes
        text = f"{SHM} has {_gib(facts.shm_bytes)} GiB, Ray's object store takes {_gib(wanted)}"
        if facts.shm_bytes < wanted:
            mend = f"docker run --shm-size={wanted / _GIB:.0f}g; on Kubernetes an emptyDir of medium Memory at {SHM}."
            yield Finding("warning", f"{text}: it would lie on the disk", name, mend)
        else:
            yield Finding("ok", text, name)


def _gib(size: float) -> str:
    return f"{size / _GIB:.1f}"


MACHINE: tuple[Check, ...] = (
    versions,
    same_versions,
    torchvision_build,
    torchvision_import,
    compiler,
    extension_builds,
    memory,
    shared_memory,
)
