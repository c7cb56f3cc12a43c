"""The studies that ship: every recipe's config is right, and what both tables need is trained once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from prima_ray.config import load_config
from prima_ray.data.plan import ExamIndex
from prima_ray.studies.cells import Cell, plan_study
from prima_ray.studies.config import LateFusionVariant, StudyConfig

CONFIGS = Path(__file__).parents[3] / "jobs" / "configs"


def planned(name: str, shards: str) -> tuple[StudyConfig, dict[str, Cell]]:
    study = load_config(StudyConfig, CONFIGS / f"{name}.yaml", [f"inputs.shards={shards}", "folds=[0]"])
    return study, plan_study(study, ExamIndex.read(shards))[0]


@pytest.mark.parametrize(
    ("name", "runs"),
    [("pad_ufes_20/table1", 5), ("pad_ufes_20/table3", 28), ("pad_ufes_20/search", 18), ("phantoms/study", 5)],
)
def test_it_can_be_planned(name: str, runs: int, labelled_shards: str) -> None:
    study, cells = planned(name, labelled_shards)
    assert len(cells) == runs
    # Whoever has something to choose has as much as the others.
    assert len({len(item.candidates) for item in study.variants.values() if len(item.candidates) > 1}) <= 1
    assert all(len(item.candidates) for item in study.variants.values() if isinstance(item, LateFusionVariant))


def test_both_tables_share_primas_runs(labelled_shards: str) -> None:
    (_, first), (_, third) = (planned(name, labelled_shards) for name in ("pad_ufes_20/table1", "pad_ufes_20/table3"))
    assert {cell.recipe for key, cell in first.items() if key in third} == {"align", "finetune", "fuse"}
    # The same folder too: whoever is first trains it.
    assert all(cell.folder == third[key].folder for key, cell in first.items() if key in third)


def test_what_is_read_is_known_by_its_content_wherever_it_lies(
    labelled_shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers of runs that read the corpus are of use on another machine, whose literature lies elsewhere."""

    def keys(where: str, text: str) -> dict[str, str]:
        for name in ("pdq_cancer_risk/sections.jsonl", "medquad/medquad_skin.jsonl"):
            file = tmp_path / where / "data" / "literature" / name
            file.parent.mkdir(parents=True)
            file.write_text(text)
        monkeypatch.setenv("PRIMA_SHARED", str(tmp_path / where))
        return {cell.recipe: key for key, cell in planned("pad_ufes_20/table3", labelled_shards)[1].items()}

    here, there, other = keys("here", "{}"), keys("there", "{}"), keys("other", "[]")
    assert here == there
    changed = {name for name, key in other.items() if key != here[name]}
    assert changed == {"corpus", "refine", "align_corpus", "finetune_corpus", "fuse_corpus"}


def test_literature_is_known_by_the_files_that_a_source_reads(labelled_shards: str, tmp_path: Path) -> None:
    """Of a pattern and a folder too; on a store by its address, for it may be much to read."""

    def key(path: str | Path) -> str:
        sources = json.dumps([{"kind": "text", "path": str(path), "source": "notes"}])
        recipe = {"stage": "corpus", "config": str(CONFIGS / "pad_ufes_20" / "corpus.yaml")}
        recipe["change"] = {"literature.sources": json.loads(sources), "literature.allow": ["notes"]}
        study = load_config(
            StudyConfig,
            CONFIGS / "pad_ufes_20" / "table3.yaml",
            [f"inputs.shards={labelled_shards}", "folds=[0]", f"recipes.corpus={json.dumps(recipe)}"],
        )
        cells, _ = plan_study(study, ExamIndex.read(labelled_shards))
        return next(key for key, cell in cells.items() if cell.recipe == "corpus")

    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_text("said")
        (tmp_path / folder / "b.md").write_text("said too")
    assert key(tmp_path / "one") == key(tmp_path / "two")
    assert key(tmp_path / "one" / "*.txt") == key(tmp_path / "two" / "*.txt") != key(tmp_path / "one")
    (tmp_path / "three").mkdir()
    (tmp_path / "three" / "a.txt").write_text("said otherwise")
    assert key(tmp_path / "three" / "*.txt") != key(tmp_path / "one" / "*.txt")
    (tmp_path / "three" / "a.txt").write_text("said")
    (tmp_path / "three" / "b.md").write_text("said too")
    (tmp_path / "three" / "picture.png").write_text("is not read")
    (tmp_path / "four").mkdir()
    assert len({key("s3://bucket/a"), key("s3://bucket/b"), key("s3://bucket/*.txt"), key(tmp_path / "four")}) == 4
