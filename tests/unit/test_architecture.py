"""What holds for the project as a whole: imports are cheap, dependencies are explained, config files load."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
# Modules that other modules import only when called, because they need Ray, or LlamaIndex's base classes.
LAZY_MODULES = (
    "prima_ray.data.ray_source",
    "prima_ray.knowledge.llama_adapters",
    "prima_ray.training.elastic_ray",
)
HEAVY = (
    "ray",
    "deepspeed",
    "timm",
    "peft",
    "transformers",
    "sklearn",
    "matplotlib",
    "mlflow",
    "torchvision",
    "llama_index",
    "lancedb",
    "bm25s",
)


def _packages() -> list[str]:
    files = (ROOT / "prima_ray").rglob("*.py")
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in files]
    return sorted(set(names) - set(LAZY_MODULES))


def test_importing_the_package_loads_no_heavy_library_and_prints_nothing() -> None:
    script = (
        f"import importlib, sys\nfor name in {_packages()!r}: importlib.import_module(name)\n"
        f"sys.stderr.write(' '.join(name for name in {HEAVY!r} if name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("", "")


def test_every_dependency_has_its_reason() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    listed = [
        *project["project"]["dependencies"],
        *(item for extra in project["project"]["optional-dependencies"].values() for item in extra),
        *project["dependency-groups"]["dev"],
    ]
    explained = (ROOT / "docs/dependencies.md").read_text()
    names = [re.split(r"[\[<>=~!; ]", item, maxsplit=1)[0] for item in listed]
    assert [name for name in names if not re.search(rf"\b{re.escape(name)}\b", explained)] == []


def test_every_shipped_config_is_a_yaml_mapping_without_machine_paths() -> None:
    files = sorted((ROOT / "jobs/configs").rglob("*.yaml"))
    assert files
    for path in files:
        text = path.read_text()
        assert isinstance(yaml.safe_load(text), dict), path
        assert not re.search(r"[\s'\"]/\w", text), path
