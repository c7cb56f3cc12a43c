from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from prima_ray.base import PrimaError, StrictConfig
from prima_ray.data.run_record import check_outputs, read_record
from prima_ray.stages import rundir
from prima_ray.stages.rundir import ParentState, RunDir, check_finished, check_parent, finish_run, input_hash, open_run
from tests.unit.knowledge.toy_corpus import make_corpus


class Inner(StrictConfig):
    lr: float = 1.0


class Config(StrictConfig):
    out: str = "x"
    optimizer: Inner = Inner()
    num_workers: int = 1


def test_a_new_run_writes_its_config_and_is_not_finished(tmp_path: Path):
    run = open_run(Config(), out=str(tmp_path / "a" / "b"), stage="align")
    assert not run.finished
    assert (run.path / "config.yaml").read_text() == "out: x\noptimizer:\n  lr: 1.0\nnum_workers: 1\n"


def test_the_same_config_takes_the_run_up_and_another_is_refused(tmp_path: Path):
    out = str(tmp_path / "run")
    run = open_run(Config(), out=out, stage="align")
    assert not open_run(Config(), out=out, stage="align").finished
    finish_run(run, seed=0, inputs={})
    assert open_run(Config(), out=out, stage="align").finished
    assert open_run(Config(num_workers=2), out=out, stage="align", execution_keys=frozenset({"num_workers"})).finished
    faster = Config(optimizer=Inner(lr=2.0))
    assert open_run(faster, out=out, stage="align", execution_keys=frozenset({"optimizer.lr"})).finished
    assert open_run(faster, out=out, stage="align", execution_keys=frozenset({"optimizer"})).finished
    with pytest.raises(PrimaError) as caught:
        open_run(faster, out=out, stage="align", execution_keys=frozenset({"lr", "optimizer.l"}))
    assert str(caught.value) == (
        f"{out}: `out` holds a run of another config; it differs in optimizer.lr\n"
        "  Choose another `out`, or delete the folder if the run is not needed."
    )


def test_the_same_folder_by_another_name_is_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Relative, absolute, or copied to elsewhere: `out` led here."""
    monkeypatch.chdir(tmp_path)
    finish_run(open_run(Config(out="run"), out="run", stage="align"), seed=0, inputs={})
    absolute = str(tmp_path / "run")
    assert open_run(Config(out=absolute), out=absolute, stage="align").finished
    (tmp_path / "run").rename(tmp_path / "moved")
    assert open_run(Config(out="./moved/"), out="./moved/", stage="align").finished


def test_a_folder_of_something_else_is_not_touched(tmp_path: Path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(PrimaError, match="is no run directory"):
        open_run(Config(), out=str(tmp_path), stage="align")
    assert [item.name for item in tmp_path.iterdir()] == ["thesis.tex"]


def test_the_record_names_parents_by_hash_and_outputs(tmp_path: Path):
    parent = tmp_path / "encoder"
    parent.mkdir()
    (parent / "config.json").write_text("{}")
    run = open_run(Config(), out=str(tmp_path / "run"), stage="align")
    (run.path / "model").mkdir()
    (run.path / "model" / "w.bin").write_bytes(b"1")
    finish_run(run, seed=3, inputs={"text_encoder": str(parent)}, extra={"note": 1})
    record = json.loads((run.path / "run.json").read_text())
    assert record["seed"] == 3
    assert record["inputs"]["text_encoder"]["path"] == str(parent)
    assert len(record["inputs"]["text_encoder"]["hash"]) == 64
    assert list(record["outputs"]) == ["model/w.bin"]
    assert record["versions"]["torch"]
    assert read_record(run.path, stage="align")["note"] == 1
    with pytest.raises(PrimaError, match="this is a run of align, expected one of fuse"):
        read_record(run.path, stage="fuse")


def test_an_unfinished_run_is_told_from_no_run(tmp_path: Path):
    open_run(Config(), out=str(tmp_path / "run"), stage="align")
    with pytest.raises(PrimaError, match="is not finished"):
        read_record(tmp_path / "run")
    with pytest.raises(PrimaError, match="no such run directory"):
        read_record(tmp_path / "none")
    with pytest.raises(PrimaError, match="is no run directory"):
        read_record(tmp_path)


def test_a_place_that_cannot_be_written_and_a_damaged_config_are_said(tmp_path: Path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(PrimaError) as caught:
        open_run(Config(), out=str(tmp_path / "file" / "run"), stage="align")
    assert str(caught.value) == f"{tmp_path / 'file' / 'run'}: `out` cannot be made (Not a directory)"
    with pytest.raises(PrimaError) as caught:
        open_run(Config(), out=str(tmp_path / "file"), stage="align")
    assert str(caught.value) == f"{tmp_path / 'file'}: `out` is a file\n  Choose another `out`."
    run = open_run(Config(), out=str(tmp_path / "run"), stage="align")
    (run.path / "config.yaml").write_text("a: [")
    with pytest.raises(PrimaError, match="not valid YAML"):
        open_run(Config(), out=str(run.path), stage="align")


def test_a_damaged_record_is_told(tmp_path: Path):
    run = open_run(Config(), out=str(tmp_path), stage="align")
    record = run.path / "run.json"
    for text, said in (
        ("[]", "damaged: it has no key 'stage'"),
        ('{"stage": "align", "seed": 0}', "damaged: it has no key 'inputs'"),
    ):
        record.write_text(text)
        with pytest.raises(PrimaError) as caught:
            read_record(run.path)
        assert str(caught.value) == f"{record}: {said}"
    record.write_text("{")
    with pytest.raises(PrimaError, match="not valid JSON"):
        read_record(run.path)


def test_a_file_that_the_record_names_must_be_there(tmp_path: Path):
    run = open_run(Config(), out=str(tmp_path / "run"), stage="align")
    weights = run.path / "model" / "part" / "w.bin"
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"1")
    finish_run(run, seed=0, inputs={})
    record = read_record(run.path)
    check_outputs(run.path, record)
    weights.unlink()
    with pytest.raises(PrimaError) as caught:
        check_outputs(run.path, record)
    assert str(caught.value) == f"{weights}: this file of the run is missing\n  Copy the run again, or train it again."


def made_run(path: Path) -> RunDir:
    run = open_run(Config(), out=str(path), stage="align")
    for name in ("model/part/w.bin", "model/config.json", "predictions.parquet"):
        (run.path / name).parent.mkdir(parents=True, exist_ok=True)
        (run.path / name).write_text(name)
    finish_run(run, seed=0, inputs={})
    return run


def test_a_file_must_be_the_one_that_the_run_wrote(tmp_path: Path):
    run = made_run(tmp_path / "run")
    weights, predictions = run.path / "model" / "part" / "w.bin", run.path / "predictions.parquet"
    mend = "\n  Copy the run again, or train it again."

    def message(call: Callable[[], None]) -> str:
        with pytest.raises(PrimaError) as caught:
            call()
        return str(caught.value)

    record = read_record(run.path)
    predictions.write_text("predictions.parquer")
    check_outputs(run.path, record, folder="model")
    other = "is not the file that the run wrote (checksum)" + mend
    assert message(lambda: check_outputs(run.path, record)) == f"{predictions}: {other}"
    weights.write_text("model/part/w.bim")
    assert message(lambda: check_outputs(run.path, record, folder="model")) == f"{weights}: {other}"
    # As a parent: the whole run, or one of its parts; a folder that is of no run is believed.
    assert message(lambda: check_parent(str(run.path))) == f"{weights}: {other}"
    assert message(lambda: check_parent(str(weights.parent))) == f"{weights}: {other}"
    weights.write_text("model/part/w.bin")
    check_parent(str(run.path))
    (tmp_path / "encoder").mkdir()
    check_parent(str(tmp_path / "encoder"))
    # Finished: without reading what may be gigabytes, but all there.
    check_finished(run)
    weights.write_text("model")
    mend = "\n  Copy the run again, or delete the folder and run its stage again."
    said = f"{weights}: is not the file that the run wrote (5 bytes, it had 16){mend}"
    assert message(lambda: check_finished(run)) == said
    weights.unlink()
    assert message(lambda: check_finished(run)) == f"{weights}: this file of the run is missing{mend}"
    (run.path / "run.json").write_text("{")
    assert message(lambda: check_finished(run)).startswith(f"{run.path / 'run.json'}: not valid JSON")


@pytest.mark.parametrize(
    ("key", "value"),
    [("outputs", 5), ("outputs", {"a": 1}), ("inputs", []), ("inputs", {"shards": "x"}), ("stage", 1), ("sizes", [])],
)
def test_a_record_that_holds_something_else_is_told(tmp_path: Path, key: str, value: object):
    file = made_run(tmp_path / "run").path / "run.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    with pytest.raises(PrimaError) as caught:
        read_record(tmp_path / "run")
    assert str(caught.value) == (
        f"{file}: damaged: {key!r} does not hold what a run writes there\n  Copy the run again, or train it again."
    )


def test_the_commit_is_this_programs_or_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Installed into an environment that lies inside of another repository, there is no commit to name."""
    assert len(rundir.git_commit() or "") == 40
    package = tmp_path / "site-packages" / "prima_ray" / "stages"
    package.mkdir(parents=True)
    (tmp_path / ".git").mkdir()
    monkeypatch.setattr(rundir, "__file__", str(package / "rundir.py"))
    assert rundir.git_commit() is None


def test_the_mark_of_unvetted_entries_is_inherited(tmp_path: Path):
    def made(name: str, *, inputs: dict[str, str], parents: ParentState | None = None) -> bool:
        run = open_run(Config(), out=str(tmp_path / name), stage="align")
        (run.path / "model" / "part").mkdir(parents=True)
        finish_run(run, seed=0, inputs=inputs, parents=parents)
        found: bool = read_record(run.path)["unvetted"]
        return found

    assert not made("clean", inputs={})
    assert made("first", inputs={}, parents=ParentState(unvetted=True))
    assert made("second", inputs={"align": str(tmp_path / "first")})
    # A text encoder is a folder inside of its run.
    assert made("third", inputs={"text_encoder": str(tmp_path / "second" / "model" / "part")})
    assert not made("fourth", inputs={"align": str(tmp_path / "clean"), "text_encoder": str(tmp_path / "clean/model")})
    # A run of before the mark.
    record = json.loads((tmp_path / "clean" / "run.json").read_text())
    del record["unvetted"]
    (tmp_path / "clean" / "run.json").write_text(json.dumps(record))
    assert not made("fifth", inputs={"align": str(tmp_path / "clean")})


def test_a_corpus_is_identified_by_its_content_and_its_decisions(tmp_path: Path):
    make_corpus(tmp_path / "a")
    make_corpus(tmp_path / "b")
    first = input_hash(str(tmp_path / "a"))
    assert input_hash(str(tmp_path / "b")) == first
    (tmp_path / "b" / "book.html").write_text("is made from the rest")
    assert input_hash(str(tmp_path / "b")) == first
    (tmp_path / "b" / "vetting.jsonl").write_text("a decision")
    assert input_hash(str(tmp_path / "b")) != first


def test_a_parent_that_grew_is_recorded_as_it_was_read(tmp_path: Path):
    make_corpus(tmp_path / "corpus")
    run = open_run(Config(), out=str(tmp_path / "run"), stage="align")
    finish_run(run, seed=0, inputs={"corpus": str(tmp_path / "corpus")}, parents=ParentState(hashes={"corpus": "then"}))
    assert read_record(run.path)["inputs"]["corpus"]["hash"] == "then"
