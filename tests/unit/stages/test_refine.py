"""Refine as a stage: what it reads, writes, marks and refuses."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from prima_ray.base import PrimaError, read_json
from prima_ray.data.text_shards import SideText, write_text_shards
from prima_ray.knowledge.corpus import Corpus
from prima_ray.knowledge.vetting import Verdict, append
from prima_ray.models.masked_lm import load_masked_lm
from prima_ray.models.text_tower import TextTowerConfig
from prima_ray.models.tokenizer import OFFLINE_TEXT_MODEL, TextTokenizer
from prima_ray.stages import align, refine
from prima_ray.stages import training as training_module
from prima_ray.stages.align import _encoder_folder
from prima_ray.stages.refine import RefineConfig
from prima_ray.stages.rundir import input_hash, is_unvetted
from prima_ray.training.tracking import Tracker
from tests.unit.knowledge.toy_corpus import FACTORS, OLD, OTHER, SUN, entry, make_corpus
from tests.unit.models.conftest import BERT, VOCABULARY, add_tokenizer
from tests.unit.stages.test_priors import Config, accept
from tests.unit.training.toys import curve, read_lines

NAMES = ("sunburn:BCC", "itch:BCC", "age:NEV")


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def tiny_encoder(folder: Path, *, head: bool) -> Path:
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(**BERT, vocab_size=VOCABULARY)
    (transformers.BertForMaskedLM if head else transformers.BertModel)(config).save_pretrained(folder)
    return add_tokenizer(folder)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a masked-LM head."""
    return tiny_encoder(tmp_path_factory.mktemp("encoder"), head=True)


def corpus_run(folder: Path, *, accepted: tuple[str, ...] = (), **keys: Any) -> Corpus:
    from prima_ray.stages.rundir import finish_run, open_run

    run = open_run(Config(out=str(folder)), out=str(folder), stage="corpus")
    corpus = make_corpus(folder, **keys)
    finish_run(run, seed=0, inputs={})
    for name in accepted:
        accept(corpus, name)
    return corpus


def config_of(out: Path, corpus: Corpus, source: Path, **keys: Any) -> RefineConfig:
    inputs = {"corpus": str(corpus.path), **keys.pop("inputs", {})}
    raw = {
        "out": str(out),
        "inputs": inputs,
        "text_tower": {"path": str(source), "max_tokens": 24},
        "lora": {"rank": 2},
        "head": {"epochs": 2, "lr": 0.01},
        "epochs": 2,
        "global_batch": 4,
        "optimizer": {"lr": 0.01},
        "context": {"kind": "local", "device": "cpu"},
        **keys,
    }
    return RefineConfig.model_validate(raw)


@pytest.fixture(scope="module")
def refined(tmp_path_factory: pytest.TempPathFactory, encoder: Path, labelled_shards: str) -> Path:
    """On three accepted entries, with exams for the probe."""
    folder = tmp_path_factory.mktemp("refined")
    corpus = corpus_run(folder / "corpus", accepted=NAMES)
    # The seed that holds out the entry with risk terms.
    return refine.run(config_of(folder / "run", corpus, encoder, inputs={"shards": labelled_shards}, seed=1))


def test_the_run_holds_an_encoder_and_what_it_was_worth(refined: Path, labelled_shards: str, encoder: Path):
    metrics = read_json(refined / "metrics.json")
    assert (metrics["stage"], metrics["head"]) == ("refine", "published")
    assert 0.001 < metrics["trained_share"] < 0.01
    for moment in ("before", "after"):
        assert metrics["held_out"][moment].keys() == {"loss", "accuracy", "num_tokens"}
        assert metrics["risk_terms"][moment].keys() == {*("loss", "accuracy", "whole_terms", "num_terms", "num_tokens")}
        probe = metrics["probe"][moment]
        assert probe.keys() == {"all", "complete", "masked"}
        assert len(probe["all"]["balanced_accuracy"]["folds"]) == 4
        assert probe["complete"]["num_exams"] < probe["all"]["num_exams"] == probe["masked"]["num_exams"]
    assert metrics["held_out"]["after"] != metrics["held_out"]["before"]
    record = read_json(refined / "run.json")
    assert record["unvetted"] is False
    corpus = str(refined.parent / "corpus")
    assert record["inputs"]["corpus"] == {"path": corpus, "hash": input_hash(corpus)}
    assert record["inputs"].keys() == {"corpus", "shards", "text_encoder"}
    assert "model/model.safetensors" in record["outputs"]
    split = read_json(refined / "split.json")
    assert sorted([*split["train"], *split["held_out"]]) == sorted(NAMES)
    assert len(split["held_out"]) == 1
    assert {path.name for path in (refined / "model").iterdir()} >= {
        *("config.json", "model.safetensors", "tokenizer.json", "1_Pooling")
    }


def test_the_report_can_be_computed_again_from_the_run(refined: Path, encoder: Path):
    tower = TextTowerConfig(name=str(refined / "model"), max_tokens=24).build()
    before = TextTowerConfig(path=str(encoder), max_tokens=24).build()
    name = "encoder.layer.0.attention.self.query.weight"
    assert not torch.equal(tower.model.state_dict()[name], before.model.state_dict()[name])
    # What LoRA does not touch is as it was.
    name = "embeddings.word_embeddings.weight"
    assert torch.equal(tower.model.state_dict()[name], before.model.state_dict()[name])
    assert load_masked_lm(str(refined / "model"), key="k")[1]


def test_a_finished_run_is_returned_and_another_config_is_refused(
    refined: Path, encoder: Path, labelled_shards: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(refine, "report", None)
    corpus = Corpus(refined.parent / "corpus", (), {}, (), {}, {})
    same: dict[str, Any] = {"inputs": {"shards": labelled_shards}, "seed": 1}
    assert refine.run(config_of(refined, corpus, encoder, **same, micro_batch=1)) == refined
    with pytest.raises(PrimaError, match=r"another config; it differs in mask_rate"):
        refine.run(config_of(refined, corpus, encoder, **same, mask_rate=0.5))


def test_an_encoder_without_a_head_gets_one_first(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, "prima_ray")
    source = tiny_encoder(tmp_path / "encoder", head=False)
    corpus = corpus_run(tmp_path / "corpus", accepted=NAMES)
    out = refine.run(config_of(tmp_path / "run", corpus, source, epochs=1))
    assert f"refine: {source} has no masked-LM head; one is trained, the encoder is frozen meanwhile" in caplog.messages
    assert read_json(out / "metrics.json")["head"] == "trained"
    assert len(curve(out / "head")) == 2 * len(curve(out))
    headed, has_head = load_masked_lm(str(out / "masked_lm"), key="k")
    assert has_head
    plain = TextTowerConfig(path=str(source)).build().model.state_dict()
    for name, value in headed.encoder.state_dict().items():
        assert torch.equal(value, plain[name]), name
    # The refined encoder comes with the very head that was trained for the plain one.
    after, _ = load_masked_lm(str(out / "model"), key="k")
    name = "cls.predictions.transform.dense.weight"
    assert torch.equal(after.head.state_dict()[name], headed.head.state_dict()[name])


def test_a_run_that_was_broken_off_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = tiny_encoder(tmp_path / "encoder", head=False)
    corpus = corpus_run(tmp_path / "corpus", accepted=("sunburn:BCC", "age:NEV"))
    config = config_of(tmp_path / "run", corpus, source)
    launch, calls = training_module.launch, []

    def broken(job: Any) -> None:
        calls.append(job.task.part)
        if len(calls) == 2:
            raise KeyboardInterrupt
        launch(job)

    monkeypatch.setattr(training_module, "launch", broken)
    with pytest.raises(KeyboardInterrupt):
        refine.run(config)
    before = input_hash(str(corpus.path))
    # What is decided meanwhile does not change the run.
    accept(corpus, "itch:BCC")
    out = refine.run(config)
    assert calls == ["head", "encoder", "encoder"]
    assert read_json(out / "run.json")["inputs"]["corpus"]["hash"] == before != input_hash(str(corpus.path))
    split = read_json(out / "split.json")
    assert sorted([*split["train"], *split["held_out"]]) == ["age:NEV", "sunburn:BCC"]


@pytest.fixture(scope="module")
def unvetted(tmp_path_factory: pytest.TempPathFactory, encoder: Path) -> Path:
    folder = tmp_path_factory.mktemp("unvetted")
    corpus = corpus_run(folder / "corpus", accepted=("age:NEV",))
    return refine.run(config_of(folder / "run", corpus, encoder, unvetted=True, max_steps=1))


def test_unvetted_entries_mark_the_run_and_who_builds_on_it(unvetted: Path, labelled_shards: str, tmp_path: Path):
    assert read_json(unvetted / "run.json")["unvetted"] is True
    assert is_unvetted(str(unvetted / "model"))
    raw: dict[str, Any] = {
        "inputs": {"shards": labelled_shards},
        "image_tower": {
            "name": "vit_tiny_patch16_224",
            "image_size": 32,
            "options": {"patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2},
        },
        "text_tower": {"name": str(unvetted / "model"), "max_tokens": 24},
        "projection": {"width": 16},
        "views": {"image_size": 32},
        "global_batch": 8,
        "max_steps": 1,
        "context": {"kind": "local", "device": "cpu"},
        "features": {"variants": 1},
    }
    # The folder by its name, and the run by its role.
    runs = [
        align.run(align.AlignConfig.model_validate({"out": str(tmp_path / "name"), **raw})),
        align.run(
            align.AlignConfig.model_validate(
                {
                    **raw,
                    "out": str(tmp_path / "role"),
                    "inputs": {"shards": labelled_shards, "text_encoder": str(unvetted)},
                    "text_tower": {"max_tokens": 24},
                }
            )
        ),
    ]
    for run in runs:
        record = read_json(run / "run.json")
        assert record["unvetted"] is True
        assert "text_encoder" in record["inputs"]
        spec = read_json(run / "model" / "text_tower" / "config.json")["spec"]["config"]
        assert spec["config"]["hidden_size"] == 32
    weights = [run / "model" / "text_tower" / "model.safetensors" for run in runs]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def killed_at(monkeypatch: pytest.MonkeyPatch, config: RefineConfig, step: int) -> None:
    """Run until a step of the encoder, and end there without a word, as a SIGKILL would."""
    original = Tracker.step

    def fatal(self: Tracker, record: Mapping[str, Any]) -> None:
        if record["step"] == step:
            raise Killed
        original(self, record)

    with monkeypatch.context() as patch:
        patch.setattr(Tracker, "step", fatal)
        with pytest.raises(Killed):
            refine.run(config)


class Killed(BaseException):
    """Nothing catches it."""


def test_a_killed_run_gives_the_same_encoder(tmp_path: Path, encoder: Path, monkeypatch: pytest.MonkeyPatch):
    corpus = corpus_run(tmp_path / "corpus", accepted=NAMES)
    keys: dict[str, Any] = {"epochs": 4, "global_batch": 2, "checkpoint_every_steps": 1}
    whole = refine.run(config_of(tmp_path / "whole", corpus, encoder, **keys))
    broken = config_of(tmp_path / "broken", corpus, encoder, **keys)
    killed_at(monkeypatch, broken, 4)
    assert len(curve(Path(broken.out))) == 3
    again = refine.run(broken)
    assert curve(again) == curve(whole)
    weights = [run / "model" / "model.safetensors" for run in (again, whole)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    figures = [read_json(run / "metrics.json") for run in (again, whole)]
    assert figures[0] == figures[1]


@pytest.mark.parametrize("key", ["path", "config"])
def test_align_takes_one_encoder(refined: Path, labelled_shards: str, key: str):
    tower = {"path": str(refined / "model")} if key == "path" else {"config": {"model_type": "bert"}}
    with pytest.raises(ValidationError) as caught:
        align.AlignConfig.model_validate(
            {
                "out": "x",
                "inputs": {"shards": labelled_shards, "text_encoder": str(refined)},
                "image_tower": {"name": "resnet10t"},
                "text_tower": tower,
            }
        )
    message = f"inputs.text_encoder and text_tower.{key} both say which encoder: give one of them"
    assert caught.value.errors()[0]["msg"] == f"Value error, {message}"


def test_align_reads_with_the_tokenizer_of_the_refined_encoder(tmp_path: Path, labelled_shards: str):
    """One that cuts words otherwise, in two folders of equal weights: features that are stored are told apart."""
    source = tiny_encoder(tmp_path / "encoder", head=True)
    corpus = corpus_run(tmp_path / "corpus", accepted=NAMES)
    first = refine.run(config_of(tmp_path / "first", corpus, source, max_steps=1))
    second = tmp_path / "second"
    shutil.copytree(first / "model", second)
    raw = json.loads((second / "tokenizer.json").read_text())
    raw["normalizer"]["lowercase"] = False
    (second / "tokenizer.json").write_text(json.dumps(raw))
    (second / "tokenizer_config.json").write_text(
        (second / "tokenizer_config.json").read_text().replace('"do_lower_case": true', '"do_lower_case": false')
    )
    found = [TextTokenizer(str(folder), max_tokens=24) for folder in (first / "model", source, second)]
    assert found[0](["A Mole"])[0].tolist() != found[2](["A Mole"])[0].tolist()
    assert found[0](["A Mole"])[0].tolist() == found[1](["A Mole"])[0].tolist()
    assert found[0].digest != found[2].digest
    assert found[0].digest != TextTokenizer(str(first / "model"), max_tokens=25).digest


def test_which_folder_a_text_encoder_is(refined: Path, tmp_path: Path, encoder: Path):
    assert _encoder_folder(str(refined)) == str(refined / "model")
    assert _encoder_folder(str(encoder)) == str(encoder)
    (tmp_path / "config.yaml").write_text("out: x\n")
    with pytest.raises(PrimaError, match="this is not finished"):
        _encoder_folder(str(tmp_path))
    with pytest.raises(PrimaError, match="this is a run of corpus, expected one of refine"):
        _encoder_folder(str(refined.parent / "corpus"))


def test_the_masks_that_choose_are_not_those_that_are_reported(refined: Path):
    metrics = read_json(refined / "metrics.json")
    assert metrics["val"]["loss"] != metrics["held_out"]["after"]["loss"]
    assert metrics["best_step"] <= len(read_lines(refined / "steps.jsonl"))


def test_the_offline_model_is_no_folder_even_where_one_is_called_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / OFFLINE_TEXT_MODEL).mkdir()
    monkeypatch.chdir(tmp_path)
    assert TextTowerConfig().folder is None


# ---------------------------------------------------------------------------------------------------- refusing


def error_of(config: RefineConfig) -> str:
    with pytest.raises(PrimaError) as caught:
        refine.run(config)
    assert not Path(config.out).exists()
    return str(caught.value)


def test_a_corpus_that_nobody_vetted_is_refused_and_says_what_to_do(tmp_path: Path, encoder: Path):
    corpus = corpus_run(tmp_path / "corpus")
    mend = f"Run `prima vet {corpus.path}`, or set `unvetted: true` for an experiment: the run is then marked."
    assert error_of(config_of(tmp_path / "run", corpus, encoder)) == (
        f"{corpus.path}: no entries with evidence of this corpus are accepted, two are needed; "
        f"3 wait for a decision\n  {mend}"
    )
    # An accepted entry that says nothing is none to read.
    accept(corpus, "sunburn:NEV")
    accept(corpus, "itch:BCC")
    assert error_of(config_of(tmp_path / "run", corpus, encoder)) == (
        f"{corpus.path}: 1 entry with evidence of this corpus is accepted, two are needed; "
        f"2 wait for a decision\n  {mend}"
    )


def test_a_corpus_without_evidence_is_refused(tmp_path: Path, encoder: Path):
    corpus = corpus_run(tmp_path / "corpus", entries=(entry("sunburn", "NEV", "no_evidence"),))
    assert error_of(config_of(tmp_path / "run", corpus, encoder, unvetted=True)) == (
        f"{corpus.path}: no entries with evidence can be used, two are needed: one trains, one is held out\n"
        "  Make the corpus anew from more literature."
    )


def test_a_corpus_whose_entries_were_all_rejected_says_so(tmp_path: Path, encoder: Path):
    corpus = corpus_run(tmp_path / "corpus")
    verdicts = [
        Verdict(entry_id=name, entry_hash=corpus.hashes[name], decision="rejected", by="Ana")
        for name in (*NAMES, "sunburn:NEV")
    ]
    append(corpus, verdicts)
    # An entry without evidence is none that could have been read.
    assert error_of(config_of(tmp_path / "run", corpus, encoder, unvetted=True)) == (
        f"{corpus.path}: no entries with evidence can be used, two are needed: one trains, one is held out; "
        "3 were rejected\n  Make the corpus anew from more literature, or look at what was rejected again: "
        f"`prima vet {corpus.path}`."
    )


def test_an_empty_corpus_is_refused(tmp_path: Path, encoder: Path):
    corpus = corpus_run(tmp_path / "corpus", entries=())
    assert "no entries with evidence can be used" in error_of(config_of(tmp_path / "run", corpus, encoder))


def test_a_model_that_cannot_guess_or_read_its_tokens_is_refused(tmp_path: Path, encoder: Path):
    import transformers

    corpus = corpus_run(tmp_path / "corpus", accepted=NAMES)
    folder = tmp_path / "qwen3"
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    transformers.Qwen3Model(transformers.Qwen3Config(**sizes, vocab_size=VOCABULARY)).save_pretrained(folder)
    add_tokenizer(folder)
    assert f"{folder}: transformers has no masked language model of type qwen3" in error_of(
        config_of(tmp_path / "run", corpus, folder)
    )
    assert error_of(config_of(tmp_path / "run", corpus, encoder, text_tower={"path": encoder, "max_tokens": 600})) == (
        "text_tower.max_tokens is 600, the model reads 512"
    )
    small = tmp_path / "small"
    transformers.BertForMaskedLM(transformers.BertConfig(**BERT, vocab_size=100)).save_pretrained(small)
    add_tokenizer(small)
    assert error_of(config_of(tmp_path / "run", corpus, small)) == (
        f"{small}: the tokenizer has {VOCABULARY} tokens, the model knows 100\n"
        "  Put the model's own tokenizer into its folder."
    )


def test_a_mistake_before_the_head_trains_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = tiny_encoder(tmp_path / "encoder", head=False)
    corpus = corpus_run(tmp_path / "corpus", accepted=NAMES)

    def wrong(job: Any) -> None:
        (job.run / "mistake.json").write_text("{}")
        raise PrimaError("no such engine here")

    monkeypatch.setattr(training_module, "launch", wrong)
    assert error_of(config_of(tmp_path / "run", corpus, source)) == "no such engine here"


def test_entries_that_have_all_their_texts_in_common_cannot_be_split(tmp_path: Path, encoder: Path):
    entries = [
        entry(name, "BCC", "raises", (SUN, "raise the risk"), summary="Says doc1.") for name in ("sunburn", "age")
    ]
    corpus = corpus_run(tmp_path / "corpus", entries=entries)
    assert error_of(config_of(tmp_path / "run", corpus, encoder, unvetted=True)) == (
        f"{corpus.path}: no text is held out: the entries have all of theirs in common\n"
        "  Set `texts` to read more of an entry, or choose another `seed` or `held_out`."
    )


def test_a_corpus_must_be_finished_and_whole(tmp_path: Path, encoder: Path):
    corpus = make_corpus(tmp_path / "corpus")
    assert "is no run directory" in error_of(config_of(tmp_path / "run", corpus, encoder))
    whole = corpus_run(tmp_path / "whole", accepted=NAMES)
    (whole.path / "corpus.jsonl").write_text("")
    assert "corpus.jsonl: damaged: this is not the file that was written (checksum)" in error_of(
        config_of(tmp_path / "run", whole, encoder)
    )
    (whole.path / "corpus.json").unlink()
    assert error_of(config_of(tmp_path / "run", whole, encoder)) == (
        f"{whole.path}: no complete corpus here (corpus.json is missing)\n  Run `prima corpus` to make or complete it."
    )


def test_what_would_fail_at_the_end_fails_at_the_beginning(tmp_path: Path, encoder: Path):
    corpus = corpus_run(tmp_path / "corpus", accepted=NAMES)
    missing = str(tmp_path / "none")
    assert "manifest.json is missing" in error_of(
        config_of(tmp_path / "run", corpus, encoder, inputs={"shards": missing})
    )
    assert "none.yaml" in error_of(config_of(tmp_path / "run", corpus, encoder, factors=f"{missing}.yaml"))
    texts = [SideText(f"t{number}", "o", "A text.", held_out=bool(number)) for number in range(2)]
    write_text_shards(tmp_path / "two", texts)
    # Each of its two folds is all of a class.
    assert error_of(config_of(tmp_path / "run", corpus, encoder, inputs={"shards": str(tmp_path / "two")})) == (
        f"{tmp_path / 'two'}: no linear probe can be had: outside of fold 0 there is only one class"
    )


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"text_tower": {"config": {"model_type": "bert"}}},
            "text_tower.config: random weights have nothing to refine, name a model",
        ),
        (
            {"text_tower": {"trainable": "full"}},
            "text_tower.trainable: what refine trains is said by `trainable` and `lora`",
        ),
        ({"selection": {"metric": "bleu", "mode": "max"}}, "selection.metric: refine reports loss, accuracy"),
        ({"num_workers": 2}, "num_workers is 2, but the local context has one worker: set context.kind to ray, or "
         "num_workers to 1"),
    ],
)  # fmt: skip
def test_configs_that_cannot_work(keys: dict[str, Any], message: str):
    with pytest.raises(ValidationError) as caught:
        RefineConfig.model_validate({"out": "x", "inputs": {"corpus": "c"}, **keys})
    assert caught.value.errors()[0]["msg"] == f"Value error, {message}"


def test_an_edited_entry_is_read_as_edited(tmp_path: Path, encoder: Path):
    corpus = corpus_run(tmp_path / "corpus", accepted=("age:NEV",))
    edited = entry("itch", "BCC", "lowers", (OTHER, "Itching was reported"), summary="An edited summary.")
    append(
        corpus,
        [
            Verdict(
                entry_id="itch:BCC", entry_hash=corpus.hashes["itch:BCC"], decision="edited", by="Ana", edited=edited
            )
        ],
    )
    out = refine.run(config_of(tmp_path / "run", corpus, encoder, max_steps=1))
    from prima_ray.data.plan import ExamIndex

    texts = [row["text"] for row in ExamIndex.read(str(out / "texts")).attribute_rows()]
    assert "An edited summary." in texts
    assert "itch and BCC." not in texts
    assert OLD.text in texts
    assert read_json(out / "run.json")["unvetted"] is False
    assert len(FACTORS) == 3
