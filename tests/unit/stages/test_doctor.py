"""`prima doctor` on runs, shards and configs that are really broken; no Ray is started."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from prima_ray.base import read_json, write_json
from prima_ray.cli import main
from prima_ray.stages import finetune
from prima_ray.stages.registry import STAGES, config_class
from tests.conftest import train_tiny, write_toy_shards

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No cluster is named, whatever the shell that runs the tests has set."""
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(shards, a finished run of finetune on them): copy before you damage it."""
    folder = tmp_path_factory.mktemp("doctor")
    shards = write_toy_shards(folder / "shards", num_exams=40, num_folds=4)
    return folder / "shards", train_tiny("finetune", shards, folder / "run")


@pytest.fixture
def run(trained: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy of the run, with a config that names the copy."""
    shutil.copytree(trained[1], tmp_path / "run")
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    config["out"] = str(tmp_path / "run")
    (tmp_path / "finetune.yaml").write_text(yaml.safe_dump(config))
    return tmp_path / "run"


def doctor(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, dict[str, Any]]:
    code = main(["doctor", *map(str, arguments), "--json"])
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return code, found


def said(report: dict[str, Any], check: str) -> list[tuple[str, str | None, str, str | None]]:
    return [
        (item["level"], item["where"], item["what"], item["mend"])
        for item in report["findings"]
        if item["check"] == check
    ]


def test_the_machine_alone(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["doctor"])
    out = capsys.readouterr().out
    lines = out.splitlines()
    ray = sys.modules.get("ray")
    assert ray is None or not ray.is_initialized()
    assert {line[:7].rstrip() for line in lines if not line.startswith((" ", "doctor"))} <= {"ok", "warning", "error"}
    assert lines[-1].startswith("doctor: ")
    assert code == (0 if lines[-1].startswith("doctor: 0 errors") else 2)


def test_a_whole_run_has_no_errors(run: Path, trained: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    code, report = doctor(capsys, run.parent / "finetune.yaml")
    assert (code, report["errors"], report["stage"], report["cluster"]) == (0, 0, "finetune", None)
    assert said(report, "inputs") == [("ok", str(trained[0]), "inputs.shards: 40 exams in 5 files", None)]
    assert said(report, "run directory") == [
        ("ok", str(run), "a finished run of this config: the stage returns it at once", None)
    ]
    ((level, where, what, _),) = said(report, "checkpoints")
    assert (level, what) == ("ok", "step 6 is whole; training is done")
    assert where == f"{run}/checkpoints/step-00000006"


def test_a_run_directory_is_looked_at_by_its_config(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump({**config, "out": str(run)}))
    code, report = doctor(capsys, run, "--stage", "finetune")
    assert (code, report["config"]) == (0, str(run / "config.yaml"))


def test_an_out_of_another_config(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, report = doctor(capsys, run.parent / "finetune.yaml", "--set", "optimizer.lr=0.5", "--set", "micro_batch=4")
    assert code == 2
    assert said(report, "run directory") == [
        (
            "error",
            str(run),
            "`out` holds a run of another config; it differs in optimizer.lr",
            "Choose another `out`, or delete the folder if the run is not needed.",
        )
    ]


def test_an_out_that_is_no_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = run.parent / "other"
    other.mkdir()
    (other / "notes.txt").touch()
    code, report = doctor(capsys, run.parent / "finetune.yaml", "--set", f"out={other}")
    assert code == 2
    text = "`out` exists and is no run directory (it has no config.yaml)"
    assert said(report, "run directory") == [("error", str(other), text, "Choose another `out`.")]
    code, report = doctor(capsys, run.parent / "finetune.yaml", "--set", f"out={run.parent / 'new'}")
    assert code == 0
    assert said(report, "run directory") == [("ok", str(run.parent / "new"), "nothing there yet: a new run", None)]
    assert not (run.parent / "new").exists()


def test_a_torn_checkpoint(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "run.json").unlink()
    newest, *_ = sorted((run / "checkpoints").glob("step-*"), reverse=True)
    torn = newest.with_name("step-00000007")
    shutil.copytree(newest, torn)
    with (torn / "state.safetensors").open("r+b") as file:
        file.truncate(100)
    wanted = read_json(torn / "checkpoint.json")["sha256"][:12]
    code, report = doctor(capsys, run.parent / "finetune.yaml")
    assert code == 0
    first, second = said(report, "checkpoints")
    assert first[:2] == ("warning", str(torn))
    assert first[2].startswith("a torn checkpoint: checksum is ")
    assert first[2].endswith(f", its manifest says {wanted}")
    assert first[3] == "Nothing needs to be done: the one before it is used."
    assert second[:3] == ("ok", str(newest), "step 6 is whole; training is done")
    assert said(report, "run directory")[0][2] == "an unfinished run of this config: the stage goes on with it"


def test_the_only_checkpoint_is_torn(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    oldest, *_ = targets = sorted((run / "checkpoints").glob("step-*"))
    for target in targets:
        (target / "checkpoint.json").unlink()
    _, report = doctor(capsys, run.parent / "finetune.yaml")
    assert said(report, "checkpoints")[-1] == (
        "warning",
        f"{oldest}/checkpoint.json",
        "a torn checkpoint: no such file",
        "Delete the folder, or leave it: training starts from the beginning, for no other one is whole.",
    )


def test_shards_that_are_cut_short_missing_or_not_there(
    run: Path, trained: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    shards = run.parent / "shards"
    shutil.copytree(trained[0], shards)
    arguments = (run.parent / "finetune.yaml", "--set", f"inputs.shards={shards}", "--set", f"out={run.parent / 'new'}")
    part = shards / "part-00001.parquet"
    size = part.stat().st_size
    with part.open("r+b") as file:
        file.truncate(10)
    code, report = doctor(capsys, *arguments)
    assert code == 2
    text = f"inputs.shards: 10 bytes, the manifest says {size}"
    assert said(report, "inputs") == [("error", str(part), text, "Copy the shards again, or ingest again.")]
    part.unlink()
    _, report = doctor(capsys, *arguments)
    text = "inputs.shards: this file of the shards is missing"
    assert said(report, "inputs") == [("error", str(part), text, "Copy them again, or ingest again.")]
    shutil.rmtree(shards)
    _, report = doctor(capsys, *arguments)
    text = "inputs.shards: there is nothing at this path"
    mend = "Run the stage that makes it, or correct the path."
    assert said(report, "inputs") == [("error", str(shards), text, mend)]


def test_a_parent_that_is_not_finished(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "run.json").unlink()
    code, report = doctor(
        capsys, run.parent / "finetune.yaml", "--set", f"inputs.align={run}", "--set", "image_tower=null",
        "--set", f"out={tmp_path / 'new'}",
    )  # fmt: skip
    assert code == 2
    assert said(report, "inputs")[-1] == (
        "error",
        str(run),
        "inputs.align: this is not finished (run.json is missing)",
        "Run its stage again to complete it.",
    )


def test_literature_is_looked_at_files_folders_and_patterns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    there = tmp_path / "data/literature/pdq_cancer_risk/sections.jsonl"
    there.parent.mkdir(parents=True)
    there.write_text("{}")
    for name in ("a.txt", "b.txt", "c.md"):
        (tmp_path / "notes").mkdir(exist_ok=True)
        (tmp_path / "notes" / name).write_text("x")
    monkeypatch.setenv("PRIMA_SHARED", str(tmp_path))
    config = yaml.safe_load((ROOT / "jobs/configs/pad_ufes_20/corpus.yaml").read_text())
    for key in ("data_set", "factors"):
        config[key] = str(ROOT / "jobs/configs/pad_ufes_20" / config[key])
    config["literature"]["sources"] += [
        {"kind": "text", "path": str(tmp_path / path), "source": "notes"}
        for path in ("notes/*.txt", "notes", "notes/*.rst")
    ]
    (tmp_path / "corpus.yaml").write_text(yaml.safe_dump({**config, "out": str(tmp_path / "out")}))
    code, report = doctor(capsys, tmp_path / "corpus.yaml")
    assert code == 2
    found = {text: level for level, _, text, _ in said(report, "inputs")}
    assert {
        text.removeprefix("literature.sources."): level for text, level in found.items() if "literature" in text
    } == {
        "0.path: 1 file": "ok",
        "1.path: no such file or folder": "error",
        "2.path: 2 files": "ok",
        "3.path: 3 files": "ok",
        "4.path: no file matches the pattern": "error",
    }


def test_a_mistake_in_the_config_leaves_the_machine_to_be_looked_at(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run.parent / "finetune.yaml"
    path.write_text(path.read_text().replace("global_batch:", "globl_batch:"))
    code, report = doctor(capsys, path)
    assert code == 2
    text = "unknown key 'globl_batch', did you mean 'global_batch'?"
    assert said(report, "config") == [("error", str(path), text, None)]
    assert said(report, "versions")[0][0] == "ok"


def test_the_stage_is_known_by_the_name_or_the_keys(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = run.parent / "mine.yaml"
    path.write_text((ROOT / "jobs/configs/paper/fuse.yaml").read_text())
    assert doctor(capsys, path)[1]["stage"] == "fuse"
    path.write_text(
        "out: x\ninputs: {shards: y}\noptimizer: {lr: 1e-3}\nimage_tower: {name: resnet10t, image_size: 32}\n"
    )
    assert main(["doctor", str(path)]) == 2
    assert capsys.readouterr().err == (
        f"prima: {path}: this may be a config of align or finetune\n  Name the stage: --stage align\n"
    )
    path.write_text("colour: red\n")
    assert main(["doctor", str(path)]) == 2
    assert capsys.readouterr().err == (
        f"prima: {path}: no stage has all of these keys\n  Name the stage: --stage ingest\n"
    )


def test_every_shipped_config_is_known_by_its_keys_alone() -> None:
    from prima_ray.stages.doctor import stage_of

    schemas = {name: config_class(name) for name in STAGES}
    for path in sorted((ROOT / "jobs/configs").rglob("*.yaml")):
        if path.stem in STAGES:
            assert stage_of(str(path), schemas) == path.stem


def test_training_refuses_what_doctor_refuses(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The quick checks run before workers are claimed; here on a cluster that is not started, so by themselves."""
    from prima_ray.base import PrimaError
    from prima_ray.config import load_config
    from prima_ray.training.checks.before_workers import check_before_workers
    from prima_ray.training.cluster import ClusterView, Node

    overrides = ["context={kind: ray, address: 'a:1', cpus_per_worker: 1}", "num_workers=2"]
    config = load_config(finetune.FinetuneConfig, run.parent / "finetune.yaml", overrides)
    check_before_workers(config, ClusterView("a:1", (Node("a", 4, 0),)))
    with pytest.raises(PrimaError, match="leave 0 of the cluster's 2 CPUs to Ray Data"):
        check_before_workers(config, ClusterView("a:1", (Node("a", 2, 0),)))
    copy = run.parent / "runtime_resources"
    copy.mkdir()
    monkeypatch.chdir(copy)
    with pytest.raises(PrimaError, match="`out` lies in Ray's copy of the working directory"):
        check_before_workers(config.model_copy(update={"out": "x"}), ClusterView("a:1", (Node("a", 4, 0),)))


def test_json_says_all_of_it(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, report = doctor(capsys, run.parent / "finetune.yaml")
    assert set(report) == {"stage", "config", "cluster", "errors", "warnings", "findings"}
    assert {frozenset(item) for item in report["findings"]} == {frozenset({"check", "level", "what", "where", "mend"})}
    write_json(run.parent / "report.json", report)
