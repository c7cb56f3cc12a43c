"""The machine as it is broken for real: packages, builds, a compiler, memory."""

from __future__ import annotations

import fcntl
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from prima_ray.training import facts as facts_module
from prima_ray.training.checks import Check, Finding, Subject, run_checks
from prima_ray.training.checks.machine import (
    compiler,
    extension_builds,
    memory,
    same_versions,
    shared_memory,
    torchvision_build,
    torchvision_import,
    versions,
)
from prima_ray.training.config import LoopConfig
from prima_ray.training.facts import SHM, Facts, observe

TOGETHER = "Install torch and torchvision together, from one index: `make setup`, or uv rather than pip."


def texts(check: Check, facts: Facts, **subject: object) -> list[tuple[str, str]]:
    items: list[Finding] = run_checks([check], Subject(here=facts, **subject))  # type: ignore[arg-type]
    return [(item.level, str(item.as_error())) for item in items]


def install(folder: Path, name: str, version: str, *requires: str) -> None:
    """A distribution's metadata, as an installer leaves it."""
    about = folder / f"{name}-{version}.dist-info"
    about.mkdir(parents=True)
    lines = [
        "Metadata-Version: 2.1",
        f"Name: {name}",
        f"Version: {version}",
        *(f"Requires-Dist: {r}" for r in requires),
    ]
    (about / "METADATA").write_text("\n".join(lines) + "\n")


def test_this_environment_is_as_the_requirements_say() -> None:
    ((level, text),) = texts(versions, observe())
    assert level == "ok"
    assert text.startswith(f"python {sys.version.split()[0]}, ray ")


def test_a_package_of_another_version_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "timm", "0.4.12")
    monkeypatch.syspath_prepend(tmp_path)
    assert texts(versions, observe()) == [
        (
            "error",
            "timm 0.4.12; prima_ray needs timm>=1.0.24\n"
            "  Install it as the project does (`make setup`, or the container image).",
        )
    ]


def test_a_package_that_is_missing_and_another_python_are_named() -> None:
    whole = observe()
    without = {name: version for name, version in whole.packages.items() if name != "peft"}
    assert texts(versions, replace(whole, packages=without, python="3.9.1")) == [
        ("error", "Python 3.9.1; prima_ray needs >=3.11\n  Install another Python."),
        (
            "error",
            "peft is not installed; prima_ray needs peft>=0.19\n"
            "  Install it as the project does (`make setup`, or the container image).",
        ),
    ]


def test_a_node_with_another_ray_is_named() -> None:
    here = observe()
    there = replace(here, packages={**here.packages, "ray": "2.61.0"}, python="3.12.1")
    ours, python = here.packages["ray"], ".".join(here.python.split(".")[:2])
    assert texts(same_versions, here, nodes={"10.0.0.7": there, "10.0.0.8": here}) == [
        (
            "error",
            f"10.0.0.7: another version than here: python 3.12 (here {python}), ray 2.61.0 (here {ours})\n"
            "  Use one environment on every machine; the container image is one.",
        )
    ]


def test_torchvision_for_another_torch_is_told_by_its_metadata(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "torchvision", "0.20.1", "numpy", "torch==2.5.1")
    monkeypatch.syspath_prepend(tmp_path)
    torch = observe().packages["torch"]
    assert texts(torchvision_build, observe()) == [
        ("error", f"torchvision 0.20.1 is for torch==2.5.1, not {torch}\n  {TOGETHER}")
    ]


def test_torchvision_whose_compiled_part_is_another_is_told_by_importing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torchvision").mkdir()
    # What torchvision does at import, where its compiled part has not registered its operators.
    (tmp_path / "torchvision" / "__init__.py").write_text(
        'import torch\n@torch.library.register_fake("torchvision::nms_of_another_build")\ndef meta(*_): ...\n'
    )
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    assert texts(torchvision_import, observe()) == [
        (
            "error",
            f"torchvision cannot be imported (operator torchvision::nms_of_another_build does not exist)\n  {TOGETHER}",
        )
    ]


def training(engine: str) -> LoopConfig:
    return LoopConfig.model_validate(
        {
            "out": "runs/x",
            "context": {"kind": "ray"},
            "engine": {"kind": engine},
            "optimizer": {"lr": 1e-3},
            "selection": {"metric": "loss", "mode": "min"},
        }
    )


def test_no_compiler_is_an_error_where_training_would_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    text = (
        "no C++ compiler (no-such-compiler); DeepSpeed needs one to run on CPUs\n"
        "  Install g++ (Debian, Ubuntu: apt-get install g++), or train with `engine.kind: torch`."
    )
    assert texts(compiler, observe(), config=training("deepspeed")) == [("error", text)]
    assert texts(compiler, observe(), config=training("torch")) == [("warning", text)]
    monkeypatch.setenv("CXX", sys.executable)  # a program that is there
    assert texts(compiler, observe(), config=training("deepspeed")) == [
        (
            "warning",
            "DeepSpeed's communication op is not built yet: the first training run takes a minute longer\n"
            "  `python -m prima_ray.training.engine_build` builds it; `make setup` does that.",
        )
    ]


def test_a_lock_of_a_killed_build_and_one_of_a_running_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    for name in ("broken", "running", "whole"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "lock").touch()
    (tmp_path / "whole" / "whole.so").touch()
    with (tmp_path / "running" / "lock").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        facts = observe()
    assert texts(extension_builds, facts) == [
        (
            "warning",
            f"{tmp_path}/broken/lock: the build of this extension was broken off: the next run compiles it again, "
            "which takes a minute\n  `python -m prima_ray.training.engine_build` does it now.",
        ),
        (
            "warning",
            f"{tmp_path}/running/lock: another process is compiling this extension: training would wait for it",
        ),
    ]


def test_memory_that_is_nearly_full(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = replace(observe(), memory_bytes=8 << 30, available_bytes=200 << 20, shm_bytes=64 << 20)
    assert texts(memory, facts) == [
        (
            "error",
            "0.2 of 8.0 GiB of memory are free: Ray kills workers where 95% are used\n"
            "  Stop other programs, or give the machine more memory.",
        )
    ]
    monkeypatch.setenv("RAY_memory_usage_threshold", "0.99")
    assert texts(memory, facts) == [("ok", "0.2 of 8.0 GiB of memory are free")]
    assert texts(shared_memory, facts) == [
        (
            "warning",
            f"{SHM} has 0.1 GiB, Ray's object store takes 2.4: it would lie on the disk\n"
            f"  docker run --shm-size=2g; on Kubernetes an emptyDir of medium Memory at {SHM}.",
        )
    ]


def test_a_containers_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = tmp_path / "memory.max"
    limit.write_text("1073741824\n")
    monkeypatch.setattr(facts_module, "_CGROUP_LIMITS", (limit, tmp_path / "absent"))
    assert observe().memory_bytes == 1 << 30
    limit.write_text("max\n")
    assert observe().memory_bytes == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
