"""`make test` ends as its two pytest runs end, with what failed at the end: a log that is cut off still shows it."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PYTEST = """#!/bin/sh
case "$1" in tests/unit) wanted=$UNIT;; *) sleep 0.3; wanted=$OTHERS;; esac
[ "$wanted" = 0 ] || echo "FAILED $1 - it broke"
echo "=== $1 ended with $wanted"
exit "$wanted"
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with our Makefile, set up, whose tools do nothing."""
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "bin").mkdir()
    for name in ("pytest", "ruff", "mypy", "lint-imports"):
        tool = tmp_path / "bin" / name
        tool.write_text(PYTEST if name == "pytest" else "#!/bin/sh\n")
        tool.chmod(0o755)
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / ".ready").touch()
    return tmp_path


@pytest.mark.parametrize("unit", ["0", "1"])
@pytest.mark.parametrize("others", ["0", "1"])
def test_it_ends_as_the_tests_end(checkout: Path, unit: str, others: str) -> None:
    done = subprocess.run(
        ["make", "--no-print-directory", "test", "BIN=bin"], cwd=checkout, capture_output=True, text=True, check=False,
        env={**os.environ, "UNIT": unit, "OTHERS": others},
    )  # fmt: skip
    assert (done.returncode == 0) == (unit == others == "0"), done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1] == f"=== tests/distributed ended with {others}"
    short = lines[lines.index("And in short, what failed of either:") :]
    assert ("FAILED tests/unit - it broke" in short) == (unit == "1")
    assert ("FAILED tests/distributed - it broke" in short) == (others == "1")
