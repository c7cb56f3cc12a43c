"""Building DeepSpeed's op: what is said without a compiler, and what the environment lacks outside an activated one."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from prima_ray.base import PrimaError
from prima_ray.training.engine_build import build_communication_op, main, prepare_environment, tell_of_a_build


def test_without_a_compiler_the_error_names_the_package_and_the_way_around(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(PrimaError) as caught:
        build_communication_op()
    assert str(caught.value) == (
        "no C++ compiler (no-such-compiler); DeepSpeed needs one to run on CPUs\n"
        "  Install g++ (Debian, Ubuntu: apt-get install g++), or train with `engine.kind: torch`."
    )
    monkeypatch.setattr("logging.disable", lambda level: None)
    assert main() == 2
    assert capsys.readouterr().err == f"{caught.value}\n"


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """As outside an activated environment; what the test sets goes again."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "")
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    monkeypatch.setenv("PATH", "/usr/bin")
    return monkeypatch


def test_the_scripts_of_this_python_come_first_on_the_path_once(environment: pytest.MonkeyPatch) -> None:
    prepare_environment()
    prepare_environment()
    assert os.environ["PATH"] == f"{sysconfig.get_path('scripts')}{os.pathsep}/usr/bin"


def test_the_build_lies_in_the_environment_unless_a_folder_is_named(environment: pytest.MonkeyPatch) -> None:
    prepare_environment()
    assert os.environ["TORCH_EXTENSIONS_DIR"] == f"{sys.prefix}/torch_extensions"
    environment.setenv("TORCH_EXTENSIONS_DIR", "/somewhere")
    prepare_environment()
    assert os.environ["TORCH_EXTENSIONS_DIR"] == "/somewhere"


def test_an_environment_that_cannot_be_written_to_leaves_the_build_to_the_cache(
    environment: pytest.MonkeyPatch,
) -> None:
    environment.setattr(os, "access", lambda path, mode: False)
    prepare_environment()
    assert "TORCH_EXTENSIONS_DIR" not in os.environ


def test_a_build_is_told_of_once(
    environment: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    environment.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    with caplog.at_level("INFO"):
        tell_of_a_build()
    assert f"compiling DeepSpeed's communication op into {tmp_path}" in caplog.text
    caplog.clear()
    (tmp_path / "deepspeed_shm_comm").mkdir()
    (tmp_path / "deepspeed_shm_comm" / "deepspeed_shm_comm.so").touch()
    with caplog.at_level("INFO"):
        tell_of_a_build()
    assert caplog.text == ""


@pytest.mark.skipif(sys.platform != "linux", reason="the op is for Linux")
def test_set_up_has_built_the_op_where_training_looks_for_it(environment: pytest.MonkeyPatch) -> None:
    prepare_environment()
    library = Path(os.environ["TORCH_EXTENSIONS_DIR"]) / "deepspeed_shm_comm" / "deepspeed_shm_comm.so"
    if not library.exists():
        pytest.skip(f"{library} is not there: not set up by `make setup`")
    before = library.stat().st_mtime_ns
    code = "from prima_ray.training.engine_build import build_communication_op as b; print(b())"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert Path(answer.stdout.split()[-1]) == library
    assert library.stat().st_mtime_ns == before
