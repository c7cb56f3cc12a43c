"""Which runs a study needs, and which of them are one and the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from prima_ray.base import PrimaError, write_json
from prima_ray.data.plan import ExamIndex
from prima_ray.data.schema import FOLDS, MANIFEST, read_manifest
from prima_ray.studies.cells import plan_study
from prima_ray.studies.config import StudyConfig
from tests.conftest import describe_file

Make = Callable[..., StudyConfig]


def planned(study: StudyConfig) -> tuple[Any, Any]:
    return plan_study(study, ExamIndex.read(str(study.inputs.shards)))


def test_what_two_variants_need_is_one_run(make_study: Make) -> None:
    cells, asked = planned(make_study())
    assert [(cell.recipe, cell.fold) for cell in cells.values()] == [
        ("photos", 0), ("both", 0), ("photos", 1), ("both", 1),
    ]  # fmt: skip
    assert asked["photos", 0, 1, 0] in cells[asked["prima", 0, 1, 0]].parents
    both = cells[asked["prima", 0, 1, 0]].config
    assert (both.fold, both.inputs.finetune) == (1, str(cells[asked["photos", 0, 1, 0]].folder))


def test_the_key_says_what_and_not_where_or_how_fast(make_study: Make) -> None:
    first, _ = planned(make_study())
    recipes = yaml.safe_load(yaml.safe_dump({name: item.model_dump() for name, item in make_study().recipes.items()}))
    recipes["photos"]["change"] |= {"micro_batch": 4, "log_exam_ids": True, "feature_cache": "elsewhere"}
    again, _ = planned(make_study(recipes=recipes, cells="other/cells", num_resamples=7))
    assert list(first) == list(again)
    recipes["photos"]["change"] |= {"optimizer.lr": 0.5}
    others, _ = planned(make_study(recipes=recipes))
    # What comes of another parent is another run too.
    assert not set(first) & set(others)


def test_seeds_folds_and_candidates_are_runs_of_their_own(make_study: Make) -> None:
    raw = make_study().model_dump(mode="json")
    variants, recipes = raw["variants"], raw["recipes"]
    variants["prima"]["candidates"] = [{}, {"optimizer.lr": 0.1}]
    recipes["photos"]["vary"] = False
    cells, asked = planned(make_study(variants=variants, recipes=recipes, seeds=[0, 1]))
    # photos, once a fold; both, twice a fold and seed.
    assert [cell.recipe for cell in cells.values()].count("photos") == 2
    assert [cell.recipe for cell in cells.values()].count("both") == 8
    assert asked["photos", 0, 0, 1] == asked["photos", 0, 0, 0]
    assert len(set(asked.values())) == len(cells)


def test_the_content_of_what_lies_outside_counts(make_study: Make, make_shards: Callable[..., str]) -> None:
    first, _ = planned(make_study())
    moved, _ = planned(make_study(inputs={"shards": make_shards(num_exams=40, num_folds=4)}))
    assert list(moved) == list(first)


def test_a_run_that_is_none_of_the_studys_is_refused(make_study: Make, tiny_finetune: Path) -> None:
    recipes = make_study().model_dump(mode="json")["recipes"]
    recipes["both"] |= {"parents": {}, "change": {"inputs.finetune": str(tiny_finetune)}}
    with pytest.raises(PrimaError, match=r"recipes.both: inputs.finetune names a run that is none of this study's"):
        planned(make_study(recipes=recipes))


def test_a_planted_leak_is_caught(make_study: Make, make_shards: Callable[..., str]) -> None:
    shards = make_shards(num_exams=40, num_folds=4)
    path = Path(shards) / FOLDS
    table = pq.read_table(path)
    # Two exams of one patient, in two folds.
    folds = table["patient"].to_pylist()
    folds[1] = (folds[0] + 1) % 4
    table = table.set_column(1, "patient", pa.array(folds, table.schema.field("patient").type))
    pq.write_table(table, path)
    # Its checksum alone would tell.
    manifest = read_manifest(shards)
    side = tuple(
        describe_file(Path(shards), FOLDS, table.num_rows) if item.path == FOLDS else item
        for item in manifest.side_files
    )
    write_json(Path(shards) / MANIFEST, manifest.model_copy(update={"side_files": side}).model_dump(mode="json"))
    study = make_study(inputs={"shards": shards}, folds=[0, 1, 2, 3])
    index = ExamIndex.read(shards)
    with pytest.raises(PrimaError, match=r"a leak: 1 patient \(p000\) among those that it is scored on"):
        plan_study(study, index)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"folds": [0, 9]}, "there is no fold 9"),
        ({"folds": [1, 1]}, "one is named twice"),
    ],
)
def test_folds_that_cannot_be(make_study: Make, change: dict[str, Any], said: str) -> None:
    with pytest.raises(PrimaError, match=said):
        planned(make_study(**change))


def test_a_mistake_in_a_recipe_names_it(make_study: Make) -> None:
    recipes = make_study().model_dump(mode="json")["recipes"]
    recipes["photos"]["change"] = {"optimizer.rate": 1}
    with pytest.raises(PrimaError, match=r"recipes.photos: unknown key 'optimizer.rate'"):
        planned(make_study(recipes=recipes))
