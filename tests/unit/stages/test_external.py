from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from sklearn import metrics as sk

from prima_ray.base import PrimaError, read_json
from prima_ray.cli import main
from prima_ray.data.plan import ExamIndex
from prima_ray.inference.predictor import Exam, Predictor
from prima_ray.stages.evaluate import EvaluateConfig, run_evaluate
from prima_ray.stages.external import open_external
from prima_ray.stages.row_sets import shard_tables
from tests.conftest import TOY, write_toy_shards

MAPPING: dict[str, Any] = {
    "attributes": {
        "age": {"source": "months", "scale": 0.5},
        "region": {"source": "region", "values": {"FACE": "ARM"}},
        "itch": "itch",
    },
    "classes": {"BCC": "SEK", "NEV": "NEV"},
}
# What was an age is called months here.
ATTRIBUTES = [
    {**item, "name": "months", "maximum": 999} if item["name"] == "age" else item for item in TOY["attributes"]
]


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Other pictures, and another name for the age."""
    folder = tmp_path_factory.mktemp("other") / "shards"
    return write_toy_shards(folder, num_exams=24, seed=5, name="other", title="Other", **renamed())


def renamed() -> dict[str, Any]:
    return {"attributes": ATTRIBUTES, "blocks": [], "rename": {"age": "months"}}


def written(folder: Path, mapping: dict[str, Any]) -> str:
    (folder / "mapping.yaml").write_text(yaml.safe_dump(mapping))
    return str(folder / "mapping.yaml")


def message(run: Path, shards: str, mapping: str) -> str:
    with pytest.raises(PrimaError) as caught:
        open_external(str(run), shards, mapping)
    return str(caught.value)


def test_another_data_set_is_read_as_the_runs_own(
    tiny_fuse: Path, other: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run, mapping = shutil.copytree(tiny_fuse, tmp_path / "run"), written(tmp_path, MAPPING)
    target = run_evaluate(str(run), shards=other, mapping=mapping, config=EvaluateConfig(num_resamples=10))
    assert target == run / "evaluation-other"
    found, html = read_json(target / "metrics.json"), (target / "report.html").read_text()
    index = ExamIndex.read(other)
    rows = np.flatnonzero(np.isin(index.labels, [0, 1]))
    told = found["external"]
    assert (told["data_set"], told["num_exams"], told["num_unlabelled"]) == ("other", len(rows), 3)
    assert told["unmapped_classes"] == {"SEK": int((index.labels == 2).sum())}
    assert told["absent_classes"] == ["BCC"]
    # What the mapping says, by hand, one exam at a time.
    exams = []
    for row in (item for table in shard_tables(index, rows) for item in table.to_pylist()):
        known = dict(row["attributes"])
        age = {"age": float(known["months"]) / 2} if "months" in known else {}
        region = {"region": "ARM"} if known["region"] == "FACE" else {}
        photos = tuple(photo["bytes"] for photo in row["images"])
        exams.append(Exam(photos, {"itch": known["itch"], **age, **region}, row["exam_id"]))
    predicted = Predictor.load(run).predict(exams).argmax(axis=1)
    truth = np.where(index.labels[rows] == 0, 2, 1)
    model = found["sets"]["all"]["models"]["PRIMA (photos and attributes)"]
    assert model["accuracy"]["value"] == pytest.approx(sk.accuracy_score(truth, predicted))
    assert next(iter(found["baselines"])) in found["sets"]["all"]["models"]
    left_out = f"Left out, {told['unmapped_classes']['SEK']} exams of classes that are not mapped: SEK"
    for text in ("External validation on Other", left_out, "The other data set has no exam of BCC"):
        assert text in html


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"classes": {"MEL": "BCC"}}, "classes: other has no class 'MEL'\n  Known: BCC, NEV, SEK."),
        ({"classes": {"BCC": "MEL"}}, "classes: toy has no class 'MEL'\n  Known: BCC, NEV, SEK."),
        ({"attributes": {"agee": "months"}}, "attributes: toy has no attribute 'agee'\n  Did you mean 'age'?"),
        ({"attributes": {"age": "month"}}, "attributes: other has no attribute 'month'\n  Did you mean 'months'?"),
        (
            {"attributes": {"region": {"source": "region", "values": {"FACE": "LEG"}}}},
            "attributes.region.values: region: 'LEG' is none of FACE, ARM",
        ),
        (
            {"attributes": {"itch": {"source": "itch", "scale": 2}}},
            "attributes.itch: scale and offset are for numbers\n  Leave them out.",
        ),
        (
            {"attributes": {"region": "itch"}},
            "attributes.region: it can have none of the 24 values of 'itch'\n"
            "  Give `values`, or `scale` and `offset` of another unit.",
        ),
    ],
)
def test_a_mapping_that_does_not_fit_is_told(
    tiny_fuse: Path, other: str, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    mapping = written(tmp_path, {**MAPPING, **changes})
    assert message(tiny_fuse, other, mapping) == f"{mapping}: {said}"


def test_the_runs_own_exams_are_refused(
    tiny_fuse: Path, labelled_shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mapping = written(tmp_path, {"classes": {"BCC": "BCC", "NEV": "NEV"}})
    assert message(tiny_fuse, labelled_shards, mapping).startswith(
        f"{labelled_shards}: these are the shards that the run was trained on\n"
    )
    # The same patients, and the same photos under another name.
    same = write_toy_shards(tmp_path / "same", num_exams=23, seed=7)
    assert message(tiny_fuse, same, mapping).startswith(
        f"{tiny_fuse}: a leak: 9 patients (p001, p002, p003, ...) among "
    )
    copied = write_toy_shards(tmp_path / "copied", num_exams=23, name="copied")
    assert f"{tiny_fuse}: a leak: " in message(tiny_fuse, copied, mapping)
    assert " photos (" in message(tiny_fuse, copied, mapping)
    assert main(["evaluate", str(tiny_fuse), "--mapping", mapping]) == 2
    assert capsys.readouterr().err.splitlines()[-2:] == [
        "prima: --mapping says how another data set is read",
        "  Name its shards: --shards FOLDER.",
    ]
