"""Building DeepSpeed's op: what is said without a compiler, and what the environment lacks outside an activated one."""

from __future__ import annotations

import os
import sysconfig

import pytest

from prima_ray.base import PrimaError
from prima_ray.training.engine_build import build_communication_op, main, prepare_environment


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


def test_the_scripts_of_this_python_are_put_last_on_the_path_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/usr/bin")
    monkeypatch.setenv("DEEPSPEED_LOG_LEVEL", "info")
    prepare_environment()
    prepare_environment()
    assert os.environ["PATH"] == f"/usr/bin{os.pathsep}{sysconfig.get_path('scripts')}"
    assert os.environ["DEEPSPEED_LOG_LEVEL"] == "info"
