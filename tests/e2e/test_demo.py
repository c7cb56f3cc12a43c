"""What the README's first command does, end to end, against the phantoms' computed bounds."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from prima_ray.data.phantoms import bayes_accuracy

PRIMA = str(Path(sys.executable).with_name("prima"))


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    root = tmp_path_factory.mktemp("demo")
    done = subprocess.run(
        [PRIMA, "demo", "--out", "runs/demo"], cwd=root, capture_output=True, text=True, timeout=1500, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return root / "runs" / "demo", done


@pytest.fixture(scope="module")
def outcomes(demo: tuple[Path, Any]) -> dict[str, dict[str, float]]:
    found = json.loads((demo[0] / "demo.json").read_text())["outcomes"]
    return {item["name"]: item for item in found}


@pytest.mark.timeout(1600)
def test_the_demo_ends_with_its_run(demo: tuple[Path, subprocess.CompletedProcess[str]]):
    root, done = demo
    assert done.stdout == "run: runs/demo/fuse\n"
    steps = [json.loads(line) for line in (root / "align" / "steps.jsonl").read_text().splitlines()]
    assert {step["world_size"] for step in steps} == {2}
    starts = [json.loads(line) for line in (root / "align" / "starts.jsonl").read_text().splitlines()]
    assert [start["engine"]["kind"] for start in starts] == ["deepspeed"]
    for name in ("config.yaml", "metrics.json", "run.json", "predictions.parquet", "model/config.json"):
        assert (root / "fuse" / name).exists(), name


def test_what_the_literature_says_reaches_the_diagnosis_and_is_marked_as_unvetted(demo: tuple[Path, Any]):
    root = demo[0]
    priors = json.loads((root / "align" / "priors.json").read_text())
    by_literature = {item["attribute"] for item in priors["attributes"] if item["relevant_by"] == "literature"}
    assert by_literature == {"family_history", "smoke", "sunburns"}
    refined = json.loads((root / "refine" / "metrics.json").read_text())
    assert refined["held_out"]["after"]["loss"] < refined["held_out"]["before"]["loss"]
    inputs = json.loads((root / "align" / "run.json").read_text())["inputs"]
    assert set(inputs) == {"shards", "corpus", "text_encoder"}
    marks = {name: json.loads((root / name / "run.json").read_text())["unvetted"] for name in ("corpus", "fuse")}
    assert marks == {"corpus": False, "fuse": True}
    assert "Unvetted: this run" in (root / "fuse" / "evaluation" / "report.html").read_text()


def test_what_the_demo_says_to_ask_can_be_asked(demo: tuple[Path, subprocess.CompletedProcess[str]]):
    root, done = demo
    said = next(line for line in done.stderr.splitlines() if "ask it: " in line).split("ask it: ")[1]
    command = shlex.split(said)
    assert Path(shutil.which(command[0]) or root.parents[1] / command[0]).resolve() == Path(PRIMA).resolve()
    asked = subprocess.run(
        [PRIMA, *command[1:]], cwd=root.parents[1], capture_output=True, text=True, timeout=300, check=False
    )
    assert asked.stdout.startswith("prediction: "), asked.stderr[-2000:]
    assert "warning" not in asked.stdout


def test_a_finished_demo_is_told_again_at_once(demo: tuple[Path, subprocess.CompletedProcess[str]]):
    root, done = demo
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    command = [PRIMA, "demo", "--out", "runs/demo"]
    again = subprocess.run(command, cwd=root.parents[1], capture_output=True, text=True, timeout=120, check=False)
    assert again.stdout == done.stdout
    told = [line for line in done.stderr.splitlines() if line.startswith("demo: ")]
    assert again.stderr.splitlines()[1:] == told[-len(again.stderr.splitlines()) + 1 :]
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before


def test_the_report_says_first_what_was_reached_and_what_can_be(demo: tuple[Path, Any]):
    page = (demo[0] / "fuse" / "evaluation" / "report.html").read_text()
    found = {item["name"]: item for item in json.loads((demo[0] / "demo.json").read_text())["outcomes"]}
    both = found["photos and attributes"]
    said = f"photos and attributes {both['accuracy']:.1%} (best possible {both['bound']:.1%})"
    assert said in page.split("<h2>")[0]


def test_the_bounds_are_what_the_project_promises():
    bounds = bayes_accuracy()
    assert max(bounds.image, bounds.attributes) <= 0.65
    assert bounds.both >= 0.90


def test_fusion_beats_the_better_single_bound_by_three_standard_errors(outcomes: dict[str, dict[str, float]]):
    both, bounds = outcomes["photos and attributes"], bayes_accuracy()
    error = (both["accuracy"] * (1 - both["accuracy"]) / both["num_exams"]) ** 0.5
    assert both["accuracy"] - 3 * error > max(bounds.image, bounds.attributes)
    assert both["accuracy"] < bounds.both + 3 * error


@pytest.mark.parametrize("shuffled", ["photos shuffled", "attributes shuffled"])
def test_shuffling_a_modality_falls_to_the_bound_of_the_other(outcomes: dict[str, dict[str, float]], shuffled: str):
    found, bounds = outcomes[shuffled], bayes_accuracy()
    other = bounds.attributes if shuffled.startswith("photos") else bounds.image
    assert abs(found["accuracy"] - other) < 3 * (other * (1 - other) / found["num_exams"]) ** 0.5


def test_photos_alone_do_not_pass_their_bound(outcomes: dict[str, dict[str, float]]):
    found, bound = outcomes["photos alone"], bayes_accuracy().image
    assert abs(found["accuracy"] - bound) < 3 * (bound * (1 - bound) / found["num_exams"]) ** 0.5


def test_fuse_computes_the_features_of_the_exams_it_needs_and_no_others(demo: tuple[Path, Any]):
    root = demo[0]
    held_out = set(pq.read_table(root / "fuse" / "predictions.parquet")["exam_id"].to_pylist())
    exams = [
        exam
        for path in sorted((root / "shards").glob("part-*.parquet"))
        for exam in pq.read_table(path, columns=["exam_id"])["exam_id"].to_pylist()
    ]
    found = []
    for manifest in (root / "features").glob("*/features.json"):
        if "image_seq" not in (specs := {spec["name"] for spec in json.loads(manifest.read_text())["specs"]}):
            continue
        assert "text_seq" in specs
        for variant in sorted(manifest.parent.glob("v*")):
            column = [
                value
                for path in sorted(variant.glob("part-*.parquet"))
                for value in pq.read_table(path, columns=["image_seq"])["image_seq"].to_pylist()
            ]
            found.append({exam for exam, value in zip(exams, column, strict=True) if value is not None})
    # Two variants under augmentation for training, one without for validation and test.
    assert sorted(found, key=len) == [held_out, set(exams) - held_out, set(exams) - held_out]


def test_one_exam_is_answered_as_the_run_answered_it(demo: tuple[Path, Any], tmp_path: Path):
    root = demo[0]
    predicted = pq.read_table(root / "fuse" / "predictions.parquet").to_pylist()[0]
    shards = [pq.read_table(path).to_pylist() for path in sorted((root / "shards").glob("part-*.parquet"))]
    exam = next(row for rows in shards for row in rows if row["exam_id"] == predicted["exam_id"])
    command = [PRIMA, "predict", str(root / "fuse"), "--json", "--metadata", json.dumps(dict(exam["attributes"]))]
    for number, image in enumerate(exam["images"]):
        photo = tmp_path / f"{number}.jpg"
        photo.write_bytes(image["bytes"])
        command += ["--image", str(photo)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    answer = json.loads(done.stdout)
    assert answer["prediction"] == predicted["prediction"]
    for name, value in answer["probabilities"].items():
        assert abs(value - predicted[f"prob_{name}"]) < 1e-5
