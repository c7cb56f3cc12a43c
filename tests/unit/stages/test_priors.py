"""A corpus in align and in what builds on it: the choice is recorded, kept, inherited, and marked where unvetted."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from prima_ray.base import PrimaError, StrictConfig, read_json
from prima_ray.data.description import DataSetConfig
from prima_ray.inference.bundle import read_bundle_config
from prima_ray.inference.diagnosis import Diagnoser
from prima_ray.inference.explanation import PLACES, UNVETTED
from prima_ray.inference.predictor import Exam
from prima_ray.knowledge.corpus import Corpus
from prima_ray.knowledge.priors import PriorsConfig
from prima_ray.knowledge.vetting import Verdict, append
from prima_ray.stages import align
from prima_ray.stages.evaluate import EvaluateConfig, run_evaluate
from prima_ray.stages.priors import described_with_priors, parent_state, read_priors
from prima_ray.stages.rundir import finish_run, input_hash, open_run
from tests.conftest import TOY, jpeg, train_tiny
from tests.unit.knowledge.toy_corpus import make_corpus

DATA_SET = DataSetConfig.model_validate(TOY)


class Config(StrictConfig):
    out: str


def corpus_run(folder: Path) -> Corpus:
    """A corpus that is a finished run."""
    run = open_run(Config(out=str(folder)), out=str(folder), stage="corpus")
    corpus = make_corpus(folder)
    finish_run(run, seed=0, inputs={})
    return corpus


def accept(corpus: Corpus, name: str) -> None:
    append(corpus, [Verdict(entry_id=name, entry_hash=corpus.hashes[name], decision="accepted", by="Ana")])


def flags(data_set: DataSetConfig) -> dict[str, tuple[bool, bool]]:
    return {item.name: (item.relevant, item.disease_related) for item in data_set.attributes}


def test_without_a_corpus_nothing_changes(tmp_path: Path):
    assert described_with_priors(DATA_SET, None, PriorsConfig(), run=tmp_path) is DATA_SET
    assert list(tmp_path.iterdir()) == []
    assert parent_state(tmp_path).hashes == {}
    with pytest.raises(ValidationError) as caught:
        align.AlignConfig.model_validate(
            {"out": "x", "inputs": {"shards": "s"}, "image_tower": {"name": "resnet10t"}, "priors": {"unvetted": True}}
        )
    assert caught.value.errors()[0]["msg"] == "Value error, priors: they are of a corpus, give inputs.corpus"


def test_what_is_decided_while_a_run_trains_does_not_change_it(tmp_path: Path):
    corpus, run = corpus_run(tmp_path / "corpus"), tmp_path / "run"
    accept(corpus, "age:NEV")
    before = input_hash(str(corpus.path))
    first = described_with_priors(DATA_SET, str(corpus.path), PriorsConfig(), run=run)
    assert flags(first)["age"] == (True, True)
    accept(corpus, "itch:BCC")
    assert input_hash(str(corpus.path)) != before
    assert described_with_priors(DATA_SET, str(corpus.path), PriorsConfig(), run=run) == first
    assert parent_state(run).hashes == {"corpus": before}
    assert not parent_state(run).unvetted


def test_a_corpus_that_nobody_vetted_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.WARNING, "prima_ray")
    corpus = corpus_run(tmp_path / "corpus")
    described_with_priors(DATA_SET, str(corpus.path), PriorsConfig(), run=tmp_path / "a")
    assert caplog.messages == [f"warning: no usable entry of {corpus.path} speaks of an attribute: is it vetted?"]
    described_with_priors(DATA_SET, str(corpus.path), PriorsConfig(unvetted=True), run=tmp_path / "b")
    assert caplog.messages[1:] == [
        "warning: entries that nobody has vetted are used; this run and its descendants are marked so"
    ]


def test_damaged_priors_are_told(tmp_path: Path):
    for text in ("[]", "{}"):
        (tmp_path / "priors.json").write_text(text)
        with pytest.raises(PrimaError) as caught:
            read_priors(tmp_path)
        assert str(caught.value) == (
            f"{tmp_path}/priors.json: damaged: these are no priors\n  Copy the run again, or train it again."
        )


@pytest.fixture(scope="module")
def trained(labelled_shards: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Align on a corpus with one accepted entry and unvetted ones, and a fuse run on top of it."""
    folder = tmp_path_factory.mktemp("priors")
    corpus = corpus_run(folder / "corpus")
    accept(corpus, "age:NEV")
    raw: dict[str, Any] = {
        "out": str(folder / "align"),
        "inputs": {"shards": labelled_shards, "corpus": str(corpus.path)},
        "priors": {"unvetted": True, "relevant": {"region": False}},
        "image_tower": {
            "name": "vit_tiny_patch16_224",
            "image_size": 32,
            "options": {"patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2},
        },
        "text_tower": {
            "config": {
                "model_type": "bert",
                "hidden_size": 24,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "intermediate_size": 32,
            },
            "max_tokens": 48,
        },
        "projection": {"width": 16},
        "views": {"image_size": 32},
        "global_batch": 8,
        "max_steps": 2,
        "context": {"kind": "local", "device": "cpu"},
        "engine": {"kind": "torch"},
        "features": {"variants": 1},
    }
    found = {"corpus": corpus.path, "align": align.run(align.AlignConfig.model_validate(raw))}
    found["fuse"] = train_tiny(
        "fuse",
        labelled_shards,
        folder / "fuse",
        inputs={"shards": labelled_shards, "align": str(found["align"])},
        image_tower=None,
        text_tower=None,
        max_steps=2,
    )
    return found


def test_the_resolved_choice_is_in_the_run(trained: dict[str, Path]):
    found = read_json(trained["align"] / "priors.json")
    assert found["text_attributes"] == ["itch", "age"]
    assert found["soft_targets"] == {"region": 1.0, "itch": 3.0, "age": 3.0}
    assert [(item["attribute"], item["relevant_by"], item["disease_related_by"]) for item in found["attributes"]] == [
        ("region", "config", "description"),
        ("itch", "visible", "literature"),
        ("age", "literature", "literature"),
    ]
    wanted = {"region": (False, False), "itch": (True, True), "age": (True, True)}
    # Who builds on the run reads what it was aligned on.
    for name in ("align", "fuse"):
        assert flags(read_bundle_config(trained[name] / "model").data_set) == wanted


def test_the_corpus_is_a_parent_with_its_decisions(trained: dict[str, Path]):
    record = read_json(trained["align"] / "run.json")
    assert record["inputs"]["corpus"] == {"path": str(trained["corpus"]), "hash": input_hash(str(trained["corpus"]))}


def test_every_descendant_of_unvetted_entries_is_marked(trained: dict[str, Path]):
    assert [read_json(trained[name] / "run.json")["unvetted"] for name in ("corpus", "align", "fuse")] == [
        False, True, True,
    ]  # fmt: skip
    out = run_evaluate(str(trained["fuse"]), config=EvaluateConfig(num_resamples=2))
    assert read_json(out / "metrics.json")["unvetted"] is True
    assert (
        "Unvetted: this run, or one that it builds on, used entries of a risk corpus that nobody has vetted."
        in (out / "report.html").read_text()
    )


def photo(seed: int = 0) -> bytes:
    return jpeg(np.random.default_rng(seed), 50, 40)


def test_the_run_explains_itself_with_nothing_else_at_hand(trained: dict[str, Path], tmp_path: Path):
    """Align's heads and the corpus's entries are in the model folder, although fusion reads the backbones' features."""
    record = read_json(trained["fuse"] / "run.json")
    assert record["inputs"]["corpus"]["path"] == str(trained["corpus"])
    shutil.copytree(trained["fuse"] / "model", tmp_path / "model")
    diagnoser = Diagnoser.load(tmp_path)
    exam = Exam((photo(), photo(1)), {"itch": True, "age": 61, "region": "FACE"})
    found = diagnoser.diagnose_one(exam, explain=True)
    assert found.explanation is not None
    maps = found.explanation.maps
    assert [(item.photo, item.attribute) for item in maps] == [
        (number, name) for number in (1, 2) for name in (None, "itch", "age")
    ]
    for item in maps:
        assert item.grid.shape == (4, 4)
        assert item.grid.sum() == pytest.approx(1)
    assert found.explanation.contributions is not None
    assert {item.attribute for item in found.explanation.contributions.items} == {"itch", "age"}
    on = {item.diagnosis: (item.attribute, item.vetted) for item in found.explanation.evidence}
    known = {"BCC": ("itch", False), "NEV": ("age", True)}
    assert on == {name: known[name] for name in found.prediction_set if name in known}
    assert found.explanation.notes == ((PLACES, UNVETTED) if "BCC" in on else (PLACES,))
    # The same answer without being asked why.
    assert diagnoser.diagnose_one(exam).probabilities == pytest.approx(dict(found.probabilities), abs=1e-6)
    json.dumps(found.as_dict())


@pytest.mark.parametrize("part", ["image_tower", "heads"])
def test_with_random_weights_the_overlay_is_another(part: str, trained: dict[str, Path], tmp_path: Path):
    """A picture that stays the same whatever the weights would explain nothing (Adebayo et al. 2018)."""
    shutil.copytree(trained["fuse"] / "model", tmp_path / "model")
    exam = Exam((photo(),), {"itch": True, "age": 61})

    def overlay() -> tuple[NDArray[np.float64], bytes]:
        explanation = Diagnoser.load(tmp_path).diagnose_one(exam, explain=True).explanation
        assert explanation is not None
        assert explanation.maps[0].png is not None
        return explanation.maps[0].grid, explanation.maps[0].png

    before, again = overlay(), overlay()
    assert before[1] == again[1]
    weights = tmp_path / "model" / part / "model.safetensors"
    generator = torch.Generator().manual_seed(1)
    state = {name: torch.randn(value.shape, generator=generator) for name, value in load_file(weights).items()}
    save_file(state, weights)
    after = overlay()
    assert after[1] != before[1]
    assert np.abs(after[0] - before[0]).max() > 0.01


def test_a_corpus_must_be_finished(tmp_path: Path, labelled_shards: str, trained: dict[str, Path]):
    make_corpus(tmp_path / "corpus")
    config = align.AlignConfig.model_validate(
        {"out": str(tmp_path / "x"), "inputs": {"shards": labelled_shards, "corpus": str(tmp_path / "corpus")},
         "image_tower": {"name": "resnet10t", "image_size": 32}, "views": {"image_size": 32}}
    )  # fmt: skip
    with pytest.raises(PrimaError, match="is no run directory"):
        align.run(config)
    wrong = config.model_copy(update={"inputs": align.AlignInputs(shards="s", corpus=str(trained["align"]))})
    with pytest.raises(PrimaError) as caught:
        align.run(wrong)
    assert str(caught.value) == f"{trained['align']}: this is a run of align, expected one of corpus"
