"""Published answers: a study's figures without its runs, and a study that goes on elsewhere."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prima_ray.base import PrimaError, read_json
from prima_ray.cli import main
from prima_ray.config import dump_config, load_config
from prima_ray.data.plan import ExamIndex
from prima_ray.stages.out_lock import open_alone
from prima_ray.stages.row_sets import read_predictions
from prima_ray.studies.cells import plan_study
from prima_ray.studies.config import StudyConfig
from prima_ray.studies.folds import labelled_roles
from prima_ray.studies.run import run_study, study_so_far
from tests.unit.studies.conftest import write_study

CONFIGS = Path(__file__).parents[3] / "jobs" / "configs"


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory, labelled_shards: str) -> StudyConfig:
    """A finished study with something to choose: do not write into it."""
    candidates = [{"optimizer.lr": 1e-3}, {"optimizer.lr": 1e-4}]
    path = write_study(tmp_path_factory.mktemp("study"), labelled_shards)
    found = load_config(StudyConfig, path, [f"variants.photos.candidates={json.dumps(candidates)}"])
    run_study(found)
    return found


def elsewhere(study: StudyConfig, folder: Path, *answers: Path, **changes: Any) -> StudyConfig:
    """The same study on a machine that has none of its runs."""
    return study.model_copy(update={"out": str(folder / "study"), "answers": tuple(map(str, answers)), **changes})


def ran(folder: Path) -> list[str]:
    """Stages of the runs that were made."""
    return sorted(path.name.rpartition("-")[0] for path in (folder / "cells").glob("*-*") if path.is_dir())


def others(study: StudyConfig, path: Path) -> Path:
    """The file as another training would have it: every answer is another one."""

    def turned(table: pa.Table) -> pa.Table:
        first, *_, last = (name for name in table.column_names if name.startswith("prob_"))
        names = {first: last, last: first}
        swapped = table.rename_columns([names.get(name, name) for name in table.column_names])
        return swapped.select(table.column_names).replace_schema_metadata(table.schema.metadata)

    return changed(study, path, turned)


def answers_of(study: StudyConfig) -> Path:
    return Path(study.out) / "answers.parquet"


def changed(study: StudyConfig, path: Path, change: Callable[[pa.Table], pa.Table]) -> Path:
    """The file of a study's answers, changed."""
    pq.write_table(change(pq.read_table(answers_of(study))), path)
    return path


def test_the_file_holds_what_the_runs_said(study: StudyConfig) -> None:
    index = ExamIndex.read(str(study.inputs.shards))
    cells, asked = plan_study(study, index)
    cell = cells[asked["prima", 0, 1, 0]]
    table = pq.read_table(answers_of(study)).to_pandas()
    rows = labelled_roles(index, split="patient", fold=1).test
    mine = table[(table.run == cell.key) & (table.asked == "test")]
    assert list(mine.exam_id) == list(index.exam_ids[rows])
    expected = read_predictions(cell.folder, index, rows).astype(np.float32)
    assert (mine[[name for name in table.columns if name.startswith("prob_")]].to_numpy() == expected).all()
    photos = table[(table.run == cell.key) & (table.asked == "photos")]
    assert len(photos) == index.num_images[rows].sum()
    told = json.loads(pq.read_schema(answers_of(study)).metadata[b"prima_ray"])["runs"]
    assert set(told) == set(cells)
    assert told[cell.key]["recipe"] == "both"
    assert (told[cell.key]["fold"], told[cell.key]["unvetted"]) == (1, False)
    assert told[cell.key]["seconds"] > 0


def test_figures_come_again_without_training(
    study: StudyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prima_ray.studies.schedule.run_cell", lambda *_: pytest.fail("a published run was trained"))
    again = elsewhere(study, tmp_path, answers_of(study))
    run_study(again)
    assert read_json(Path(again.out) / "metrics.json") == read_json(Path(study.out) / "metrics.json")
    # What was published is published again: nothing is lost by going through another machine.
    assert pq.read_table(answers_of(again)).equals(pq.read_table(answers_of(study)), check_metadata=True)


def test_what_is_not_published_is_trained(study: StudyConfig, tmp_path: Path) -> None:
    """Fold 1 of PRIMA's is missing: that run is made, and what it needs, and nothing else."""
    cells, asked = plan_study(study, ExamIndex.read(str(study.inputs.shards)))
    lost = asked["prima", 0, 1, 0]
    file = changed(study, tmp_path / "some.parquet", lambda table: table.filter(pa.compute.field("run") != lost))
    again = elsewhere(study, tmp_path, file)
    run_study(again)
    assert ran(tmp_path) == ["answers", "finetune", "fuse"]
    assert (tmp_path / "cells" / f"fuse-{lost}").is_dir()
    assert (tmp_path / "cells" / f"finetune-{cells[lost].parents[0]}").is_dir()
    assert read_json(Path(again.out) / "metrics.json")["sets"] == read_json(Path(study.out) / "metrics.json")["sets"]


def test_two_trainings_of_a_run_are_never_mixed(study: StudyConfig, tmp_path: Path) -> None:
    """What is here counts, to its last answer; what is published counts of the others."""
    file = others(study, tmp_path / "others.parquet")
    published = elsewhere(study, tmp_path / "published", file)
    run_study(published)
    mine, theirs = (read_json(Path(each.out) / "metrics.json")["sets"] for each in (study, published))
    assert mine["all"]["headline"]["models"]["prima"] != theirs["all"]["headline"]["models"]["prima"]
    cells = tmp_path / "cells"
    shutil.copytree(Path(study.out).parent / "cells", cells)
    for folder in cells.glob("answers-*"):
        if folder.is_dir():
            shutil.rmtree(folder)
    again = elsewhere(study, tmp_path, file)
    run_study(again)
    assert read_json(Path(again.out) / "metrics.json")["sets"] == mine
    assert "answers" in ran(tmp_path)
    # And what it publishes is its own.
    assert pq.read_table(answers_of(again)).equals(pq.read_table(answers_of(study)))


def test_what_a_file_told_is_not_lost_by_a_part_of_the_study(study: StudyConfig, tmp_path: Path) -> None:
    again = elsewhere(study, tmp_path, answers_of(study))
    run_study(again)
    run_study(again.model_copy(update={"answers": (str(answers_of(again)),), "only": ("metadata",), "folds": (0,)}))
    assert pq.read_table(answers_of(again)).equals(pq.read_table(answers_of(study)), check_metadata=True)
    assert ran(tmp_path) == []


def test_what_was_asked_too_little_is_asked_again(study: StudyConfig, tmp_path: Path) -> None:
    """A search publishes validation folds alone; a study with test folds trains what a search has told of."""
    cells = str(Path(study.out).parent / "cells")
    search = elsewhere(study, tmp_path / "search", scored_on="validation", cells=cells)
    run_study(search)
    assert set(pq.read_table(answers_of(search))["asked"].to_pylist()) == {"val"}
    again = elsewhere(study, tmp_path, answers_of(search))
    run_study(again)
    # The photos' candidates that were not chosen have told enough, but both's parent is trained for it.
    assert ran(tmp_path).count("fuse") == 2
    metrics = read_json(Path(study.out) / "metrics.json")
    assert read_json(Path(again.out) / "metrics.json")["sets"] == metrics["sets"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda table: table.replace_schema_metadata(None), "holds no answers of a study"),
        (lambda table: table.drop_columns([table.column_names[-1]]), "expected run, asked, exam_id, prob_"),
        (
            lambda table: table.set_column(2, "exam_id", pa.array(["?"] * len(table))),
            r"what it tells of .* is of other exams",
        ),
        (
            lambda table: table.set_column(3, table.column_names[3], pa.array([float("nan")] * len(table))),
            "probabilities that are not numbers",
        ),
        (
            lambda table: table.set_column(3, table.column_names[3], pa.array(["much"] * len(table))),
            "probabilities that are not numbers",
        ),
        (lambda table: table.replace_schema_metadata({b"prima_ray": b'{"format": 2, "runs": {}}'}), "is of format 2"),
        (lambda table: table.replace_schema_metadata({b"prima_ray": b'{"format": 1, "runs": {"a": {}}}'}), "holds no"),
    ],
)
def test_a_damaged_file_is_named_before_anything_is_trained(
    study: StudyConfig, tmp_path: Path, change: Callable[[pa.Table], pa.Table], said: str
) -> None:
    file = changed(study, tmp_path / "damaged.parquet", change)
    with pytest.raises(PrimaError, match=said) as error:
        run_study(elsewhere(study, tmp_path, file))
    assert error.value.where == str(file)
    assert ran(tmp_path) == []


def test_a_file_that_is_none(study: StudyConfig, tmp_path: Path) -> None:
    for text, said in ((None, "no such file"), ("no Parquet", "cannot be read as Parquet")):
        file = tmp_path / "answers.parquet"
        if text is not None:
            file.write_text(text)
        with pytest.raises(PrimaError, match=said):
            run_study(elsewhere(study, tmp_path, file))


def test_the_page_so_far(
    study: StudyConfig,
    tmp_path: Path,
    labelled_shards: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`--so-far` trains nothing; paths that are typed are relative to where one stands."""
    path = write_study(tmp_path / "given", labelled_shards)
    assert main(["study", str(path), "--so-far"]) == 2
    assert "no run of prima is finished yet" in capsys.readouterr().err
    recipe = json.dumps({"stage": "ingest", "config": str(CONFIGS / "phantoms" / "ingest.yaml")})
    inputs = ("--set", "inputs={ingest: ingest}", "--set", f"recipes.ingest={recipe}", "--set", f"out={tmp_path / 'x'}")
    assert main(["study", str(path), "--so-far", *inputs]) == 2
    assert "the study's shards are not made yet" in capsys.readouterr().err
    lost = plan_study(study, ExamIndex.read(labelled_shards))[1]["photos", 0, 1, 0]
    changed(study, tmp_path / "some.parquet", lambda table: table.filter(pa.compute.field("run") != lost))
    monkeypatch.chdir(tmp_path)
    assert main(["study", str(path), "--so-far", "--set", "answers=[some.parquet]"]) == 0
    metrics = read_json(tmp_path / "given" / "study" / "metrics.json")
    assert metrics["variants"]["prima"]["missing"] == []
    assert not (tmp_path / "given" / "cells").exists()
    assert main(["study", str(path), "--so-far", "--final", str(tmp_path / "final")]) == 2
    assert "--so-far trains nothing" in capsys.readouterr().err


def test_so_far_stands_on_the_folds_that_most_variants_have_finished(
    study: StudyConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """PRIMA is ahead of the photos by a fold, and one variant has none: neither takes the others' figures away."""
    _, asked = plan_study(study, ExamIndex.read(str(study.inputs.shards)))
    lost = {asked["photos", 0, 1, 0], asked["photos", 1, 1, 0]}
    file = changed(
        study,
        tmp_path / "some.parquet",
        lambda table: table.filter(pa.array([run not in lost for run in table["run"].to_pylist()])),
    )
    again = elsewhere(study, tmp_path, file)
    with open_alone(again, out=again.out, stage="study"):
        # Another process is working in there.
        metrics = read_json(study_so_far(again) / "metrics.json")
    # On fold 0 there are four variants, on both folds two.
    assert metrics["folds"] == [0]
    assert list(metrics["variants"]) == ["prima", "photos", "metadata", "late"]
    assert "Part of the study: there is no answer in fold 1 yet." in (Path(again.out) / "report.html").read_text()
    assert ran(tmp_path) == []
    lost |= {asked["photos", number, 0, 0] for number in (0, 1)}
    file = changed(
        study,
        tmp_path / "fewer.parquet",
        lambda table: table.filter(pa.array([run not in lost for run in table["run"].to_pylist()])),
    )
    found = study_so_far(elsewhere(study, tmp_path / "fewer", file))
    metrics = read_json(found / "metrics.json")
    assert metrics["folds"] == [0, 1]
    assert list(metrics["variants"]) == ["prima", "metadata"]
    assert metrics["waiting"] == ["photos alone", "added up"]
    # Of the photos those that PRIMA begins with; the candidates are not shown.
    assert {recipe: item["runs"] for recipe, item in metrics["runs"].items()} == {"photos": 2, "both": 2}
    assert "photos alone; added up wait for another sitting" in (found / "report.html").read_text()
    assert "--so-far --set" in (found / "report.html").read_text()


def test_a_set_that_nobody_has_been_asked_about_is_left_out(study: StudyConfig, tmp_path: Path) -> None:
    file = changed(
        study,
        tmp_path / "some.parquet",
        lambda table: table.filter(pa.array([name != "masked" for name in table["asked"].to_pylist()])),
    )
    metrics = read_json(study_so_far(elsewhere(study, tmp_path, file)) / "metrics.json")
    assert list(metrics["sets"]) == ["all", "complete", "photos"]


def test_what_was_published_before_and_cannot_be_read_does_not_cost_the_page(
    study: StudyConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    again = elsewhere(study, tmp_path, answers_of(study))
    Path(again.out).mkdir(parents=True)
    (Path(again.out) / "config.yaml").write_text(dump_config(again))
    answers_of(again).write_text("torn")
    run_study(again)
    assert "what was published before is replaced" in caplog.text
    assert pq.read_table(answers_of(again)).equals(pq.read_table(answers_of(study)))
