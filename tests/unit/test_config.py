from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field

from prima_ray.base import InputPath, PrimaError, StrictConfig
from prima_ray.config import dump_config, input_paths, load_config, parse_yaml


class Torch(StrictConfig):
    kind: Literal["torch"] = "torch"


class DeepSpeed(StrictConfig):
    kind: Literal["deepspeed"] = "deepspeed"
    zero_stage: Literal[0, 1, 2, 3] = 1


class Optimizer(StrictConfig):
    lr: float = Field(default=1e-3, gt=0)


class Inputs(StrictConfig):
    shards: InputPath
    encoder: InputPath | None = None


Engine = Annotated[Torch | DeepSpeed, Field(discriminator="kind")]


class Stage(StrictConfig):
    out: str
    inputs: Inputs
    optimizer: Optimizer = Optimizer()
    engine: Engine = Torch()
    engines: dict[str, Engine] = Field(default_factory=dict)
    names: tuple[str, ...] = ()
    sources: tuple[Inputs, ...] = ()
    files: tuple[InputPath, ...] = ()


def write(folder: Path, text: str) -> Path:
    path = folder / "stage.yaml"
    path.write_text(text)
    return path


def error_of(folder: Path, text: str, *overrides: str) -> str:
    path = write(folder, text)
    with pytest.raises(PrimaError) as caught:
        load_config(Stage, path, overrides)
    return str(caught.value).replace(str(path), "FILE")


GOOD = "out: runs/a\ninputs: {shards: ../shards}\n"


def test_scalars_follow_yaml_1_2():
    assert parse_yaml("{a: 1e-4, b: NO, c: 12, d: true, e: on, f: -.5, g: 0012a}", where="x") == {
        "a": 1e-4,
        "b": "NO",
        "c": 12,
        "d": True,
        "e": "on",
        "f": -0.5,
        "g": "0012a",
    }


def test_input_paths_are_relative_to_the_yaml_and_out_is_not(tmp_path: Path):
    folder = tmp_path / "configs"
    folder.mkdir()
    config = load_config(Stage, write(folder, GOOD))
    assert config.inputs.shards == str(tmp_path / "shards")
    assert config.out == "runs/a"


def test_input_paths_of_set_are_relative_to_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write(tmp_path, GOOD)
    monkeypatch.chdir("/")
    config = load_config(Stage, path, ["inputs.shards=data/x", "inputs.encoder=s3://bucket/key"])
    assert config.inputs.shards == "/data/x"
    assert config.inputs.encoder == "s3://bucket/key"
    whole = load_config(Stage, path, ["inputs={shards: data/x, encoder: gs://bucket/key}"])
    assert whole.inputs == Inputs(shards="/data/x", encoder="gs://bucket/key")


def test_input_paths_in_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write(tmp_path, GOOD + "sources: [{shards: a}, {shards: /b, encoder: c}]\nfiles: [d, s3://bucket/e]\n")
    monkeypatch.chdir("/")
    config = load_config(Stage, path, ["files=[d, data/e]"])
    assert dict(input_paths(config)) == {
        "inputs.shards": str(tmp_path.parent / "shards"),
        "sources.0.shards": str(tmp_path / "a"),
        "sources.1.shards": "/b",
        "sources.1.encoder": str(tmp_path / "c"),
        "files.0": "/d",
        "files.1": "/data/e",
    }
    assert load_config(Stage, path).files == (str(tmp_path / "d"), "s3://bucket/e")


def test_environment_variables_in_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write(tmp_path, "out: a\ninputs: {shards: '${PRIMA_TEST_ROOT:-../fallback}/x'}\n")
    monkeypatch.delenv("PRIMA_TEST_ROOT", raising=False)
    assert load_config(Stage, path).inputs.shards == str(tmp_path.parent / "fallback" / "x")
    monkeypatch.setenv("PRIMA_TEST_ROOT", "/data")
    assert load_config(Stage, path).inputs.shards == "/data/x"


def test_set_overrides_yaml_and_values_are_yaml(tmp_path: Path):
    config = load_config(
        Stage, write(tmp_path, GOOD), ["optimizer.lr=3e-5", "engine={kind: deepspeed, zero_stage: 2}", "names=[a, b]"]
    )
    assert config.optimizer.lr == 3e-5
    assert config.engine == DeepSpeed(zero_stage=2)
    assert config.names == ("a", "b")


@pytest.mark.parametrize("overrides", [("engine.kind=torch",), ("engine.zero_stage=2", "engine.kind=deepspeed")])
def test_another_kind_leaves_out_what_only_the_former_one_has(tmp_path: Path, overrides: tuple[str, ...]):
    """In either order: the kind is the section, the other keys are in it."""
    given = "engine: {kind: deepspeed, zero_stage: 1}\n" if len(overrides) == 1 else "engine: {kind: torch}\n"
    config = load_config(Stage, write(tmp_path, GOOD + given), overrides)
    assert config.engine == (Torch() if len(overrides) == 1 else DeepSpeed(zero_stage=2))


def test_another_kind_hides_no_mistake(tmp_path: Path):
    text = GOOD + "engine: {kind: deepspeed, zero_stag: 1}\n"
    assert error_of(tmp_path, text, "engine.kind=torch") == "FILE: unknown key 'engine.zero_stag'; known: kind"


def test_mistakes_of_the_file_and_of_set_together_are_named_by_the_file(tmp_path: Path):
    wanted = "FILE: optimizer.lr: input should be greater than 0 (got -1); unknown key 'zzz'; known: "
    assert error_of(tmp_path, GOOD + "zzz: 1\n", "optimizer.lr=-1").startswith(wanted)


def test_a_dumped_config_loads_as_itself(tmp_path: Path):
    config = load_config(Stage, write(tmp_path, GOOD))
    assert load_config(Stage, write(tmp_path, dump_config(config))) == config


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        (GOOD + "optimzer: {}\n", (), "FILE: unknown key 'optimzer', did you mean 'optimizer'?"),
        (GOOD + "optimizer: {lrr: 1}\n", (), "FILE: unknown key 'optimizer.lrr', did you mean 'optimizer.lr'?"),
        (
            GOOD,
            ("engine.kind=deepspeed", "engine.zero_stag=2"),
            "--set: unknown key 'engine.zero_stag', did you mean 'engine.zero_stage'?",
        ),
        (GOOD + "zzz: 1\n", (), "FILE: unknown key 'zzz'; known: engine, engines, files, inputs, names, optimizer, "
         "out, sources"),
        ("out: a\n", (), "FILE: missing key 'inputs'"),
        ("out: a\ninputs: {}\n", (), "FILE: missing key 'inputs.shards'"),
        (GOOD, ("optimizer.lr=-1",), "--set: optimizer.lr: input should be greater than 0 (got -1)"),
        (
            GOOD,
            ("optimizer.lr=fast",),
            "--set: optimizer.lr: input should be a valid number, unable to parse string as a number (got 'fast')",
        ),
        (
            GOOD,
            ("optimizer.lr=true",),
            "--set: optimizer.lr: input should be a valid number, unable to parse string as a number (got 'true')",
        ),
        (
            GOOD,
            ("engine={kind: deepspeed, zero_stage: true}",),
            "--set: engine.zero_stage: input should be 0, 1, 2 or 3 (got 'true')",
        ),
        (GOOD, ("engine.zero_stage=1",), "FILE: missing key 'engine.kind': give 'deepspeed' or 'torch'"),
        (GOOD, ("engine.kind=jax",), "--set: engine.kind: expected 'deepspeed' or 'torch' (got 'jax')"),
        (
            GOOD,
            ("engines={first: {zero_stage: 1}}",),
            "--set: missing key 'engines.first.kind': give 'deepspeed' or 'torch'",
        ),
        (GOOD + "out: b\n", (), "FILE: not valid YAML at line 3, column 1: the key 'out' is given twice"),
        (GOOD, ("novalue",), "--set novalue: expected key=value\n  Example: --set optimizer.lr=1e-4"),
        (GOOD, ("out.x=1",), "--set out.x: out is a value, it has no keys"),
        ("- a\n", (), "FILE: holds a list, not keys and values"),
        ("inputs: {shards: '${PRIMA_NEVER_SET}'}\nout: a\n", (), "FILE: inputs.shards: environment variable "
         "PRIMA_NEVER_SET is not set"),
    ],
)  # fmt: skip
def test_mistakes_are_named_where_they_are(tmp_path: Path, text: str, overrides: tuple[str, ...], message: str):
    assert error_of(tmp_path, text, *overrides) == message


def test_missing_files_and_folders_are_said(tmp_path: Path):
    with pytest.raises(PrimaError, match="no such config file"):
        load_config(Stage, tmp_path / "none.yaml")
    with pytest.raises(PrimaError, match="is a folder, not a config file"):
        load_config(Stage, tmp_path)
