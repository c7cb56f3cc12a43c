"""A model of transformers in this process: a tiny random Qwen-3, whose words are garbage."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from prima_ray.base import PrimaError
from prima_ray.config import validate_config
from prima_ray.knowledge.chat_model import ChatModel, RefusedError
from prima_ray.knowledge.entries import Failure
from prima_ray.knowledge.llm_transformers import TransformersConfig
from prima_ray.knowledge.llm_writer import LlmWriter, LlmWriterConfig
from tests.unit.knowledge.writing import Shelf, chunk, vocabulary
from tests.unit.models.conftest import BERT, QWEN3, VOCABULARY, add_tokenizer

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }} [SEP] {% endfor %}"
    "{% if add_generation_prompt %}[assistant]{{ note }}{% endif %}"
)
ASKED = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Is dust [SEP] grey?"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen-3 with a chat template; do not write into it."""
    path = tmp_path_factory.mktemp("qwen3")
    torch.manual_seed(0)
    config = transformers.Qwen3Config(**QWEN3, vocab_size=VOCABULARY, pad_token_id=0, eos_token_id=102)
    transformers.Qwen3ForCausalLM(config).save_pretrained(path)
    add_tokenizer(path)
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return path


def load(path: Path, **keys: Any) -> ChatModel:
    raw = {"kind": "transformers", "path": str(path), "device": "cpu", "max_tokens": 16, **keys}
    return validate_config(TransformersConfig, raw, where="corpus.yaml").load()


def test_it_answers_counts_and_repeats_itself(folder: Path) -> None:
    model = load(folder, template_options={"note": " now"})
    first, second = (model.chat(ASKED, schema={}) for _ in range(2))
    assert first == second
    assert first.text
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    # The text's own [SEP] is no mark, those of the template are.
    filled = "[system] Be brief. [SEP] [user] Is dust [\u200bSEP] grey? [SEP] [assistant] now"
    assert first.prompt_tokens == len(tokenizer(filled, add_special_tokens=False)["input_ids"])
    assert tokenizer(filled, add_special_tokens=False)["input_ids"].count(102) == 2
    assert (first.completion_tokens, first.finish_reason) == (16, "length")
    assert model.cost(1, 1) is None


def test_without_a_template_and_with_one_that_knows_no_system(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "chat_template.jinja").write_text(
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TEMPLATE
    )
    merged = load(tmp_path).chat(ASKED, schema={})
    tokens = load(tmp_path).count_tokens
    assert merged.prompt_tokens == tokens("[user] Be brief.\n\nIs dust [\u200bSEP] grey? [SEP] [assistant]")
    (tmp_path / "chat_template.jinja").unlink()
    bare = load(tmp_path).chat(ASKED, schema={})
    assert bare.prompt_tokens == tokens("System:\nBe brief.\n\nUser:\nIs dust [\u200bSEP] grey?\n\nAssistant:\n")


def test_the_identity_is_of_the_weights_not_of_the_place(folder: Path, tmp_path: Path) -> None:
    moved = tmp_path / folder.name
    shutil.copytree(folder, moved)
    assert load(folder).identity == load(moved).identity
    assert load(folder, max_tokens=32).identity != load(folder).identity
    model = transformers.Qwen3ForCausalLM.from_pretrained(moved)
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    model.save_pretrained(moved)
    assert load(folder).identity != load(moved).identity


def test_garbage_is_retried_and_then_recorded(folder: Path, tmp_path: Path) -> None:
    raw = {
        "kind": "llm",
        "llm": {"kind": "transformers", "path": str(folder), "device": "cpu", "max_tokens": 16},
        "max_attempts": 2,
    }
    config = validate_config(LlmWriterConfig, raw, where="corpus.yaml")
    shelf = Shelf(chunk("Dust raises the risk of asthma."))
    pairs = [("dust", "ASTHMA"), ("tea", "CROUP")]
    writer = LlmWriter.load(config, vocabulary(), shelf, cache=tmp_path)
    written = list(writer.write(pairs))
    assert {(item.factor, item.diagnosis) for item in written} == set(pairs)
    for item in written:
        assert isinstance(item, Failure)
        assert (item.reason, item.attempts) == ("malformed", 2)
        assert "it was cut off after 16 tokens; write less. it is" in item.detail
        assert item.answer
    assert (writer.usage.calls, writer.usage.completion_tokens) == (4, 64)
    # Answers that came to nothing are not kept: it is asked again, and says the same.
    again = LlmWriter.load(config, vocabulary(), shelf, cache=tmp_path)
    assert sorted(again.write(pairs), key=repr) == sorted(written, key=repr)
    assert (again.usage.calls, list(tmp_path.rglob("*.json"))) == (4, [])


def test_a_prompt_that_is_too_long_is_refused(folder: Path) -> None:
    model = load(folder, context_window=256)
    with pytest.raises(RefusedError, match="tokens and an answer do not fit into the context window of 256"):
        model.chat([{"role": "user", "content": "dust " * 300}], schema={})


def test_mistakes(folder: Path, tmp_path: Path) -> None:
    def refusal(path: Path | None, **keys: Any) -> PrimaError:
        with pytest.raises(PrimaError) as caught:
            load(path, **keys) if path else TransformersConfig().load()
        return caught.value

    assert refusal(None).what == "llm: no model is named"
    assert "no such model folder" in str(refusal(tmp_path / "nowhere"))
    assert "context_window 300000 does not do" in str(refusal(folder, context_window=300_000))
    assert "context_window 256 does not do" in str(refusal(folder, context_window=256, max_tokens=200))
    bert = tmp_path / "bert"
    transformers.BertModel(transformers.BertConfig(**BERT, vocab_size=VOCABULARY)).save_pretrained(bert)
    add_tokenizer(bert)
    assert "is no language model: it has no weights for" in str(refusal(bert))
    torn = tmp_path / "torn"
    shutil.copytree(folder, torn)
    (torn / "model.safetensors").write_bytes(b"no weights")
    assert "no language model to be had" in str(refusal(torn))


def test_a_model_by_name_is_told_by_its_commit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real: Callable[..., Any] = transformers.AutoModelForCausalLM.from_pretrained

    def from_hub(*arguments: Any, **keys: Any) -> Any:
        model, report = real(*arguments, **keys)
        model.config._commit_hash = "abc"
        return model, report

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", from_hub)
    identity = load(folder).identity
    assert (identity["weights"], identity["tokenizer"]) == ("abc", "abc")
