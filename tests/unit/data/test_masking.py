"""What is masked, how often, and that it depends on (seed, epoch, text) alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from prima_ray.data.batch import ImageTextBatch
from prima_ray.data.masking import Masking, MaskingCollator, ReplacementConfig
from prima_ray.data.plan import ExamIndex, plan_epoch, rank_rows
from prima_ray.data.stream import local_batches
from prima_ray.data.text_shards import HELD_OUT, SideText, write_text_shards

MASK, VOCABULARY = 1, 1000
TEXTS = [" ".join(str(100 + number + word) for word in range(3 + 5 * number)) for number in range(11)]


def tokenize(texts: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers are their own tokens, between a 2 and a 3, padded with 0."""
    rows = [[2, *map(int, text.split()), 3] for text in texts]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    return ids, ids > 0, ids > 3


def make(**keys: Any) -> MaskingCollator:
    masking = Masking(
        rate=keys.pop("rate", 0.3),
        replacement=ReplacementConfig(**keys.pop("replacement", {})),
        mask_id=MASK,
        vocabulary=VOCABULARY,
    )
    return MaskingCollator(**{"seed": 0, "train": True, "tokenizer": tokenize, "masking": masking, **keys})


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("texts") / "texts"
    write_text_shards(folder, [SideText(f"t{n}", f"o{n % 3}", text, n % 4 == 0) for n, text in enumerate(TEXTS)])
    return str(folder)


def by_name(batches: Any) -> dict[str, tuple[list[int], list[int]]]:
    """Name -> tokens and labels without the padding."""
    found = {}
    for batch in batches:
        for row, name in enumerate(batch.exam_ids):
            if batch.weights[row]:
                keep = batch.attention_mask[row]
                found[name] = (batch.input_ids[row][keep].tolist(), batch.token_labels[row][keep].tolist())
    return found


def stream(shards: str, collate: MaskingCollator, *, epoch: int = 0, size: int = 4, ranks: int = 1) -> Any:
    plan = plan_epoch(np.arange(len(TEXTS)), global_batch=size, seed=0, epoch=epoch)
    return by_name(
        batch
        for rank in range(ranks)
        for batch in local_batches(shards, [(epoch, rank_rows(plan, rank=rank, world_size=ranks))], collate)
    )


def test_texts_are_shards_like_any_other(shards: str):
    index = ExamIndex.read(shards)
    assert [row["text"] for row in index.attribute_rows()] == TEXTS
    assert index.label_names(np.array([0, 1])) == [HELD_OUT, "train"]
    assert index.patient_fold.tolist() == [int(number % 4 > 0) for number in range(11)]


def test_the_rate_and_the_replacements_are_what_the_config_says():
    masking = Masking(0.3, ReplacementConfig(), mask_id=MASK, vocabulary=VOCABULARY)
    rng = np.random.default_rng(0)
    chosen, masked, kept, other = 0, 0, 0, 0
    for _ in range(4000):
        tokens = rng.integers(100, 200, size=13)
        out, picks = masking(tokens, rng)
        assert picks.sum() in (3, 4)
        assert (out[~picks] == tokens[~picks]).all()
        chosen += int(picks.sum())
        masked += int((out[picks] == MASK).sum())
        kept += int((out[picks] == tokens[picks]).sum())
        other += int(((out[picks] != MASK) & (out[picks] != tokens[picks])).sum())
    assert chosen / (4000 * 13) == pytest.approx(0.3, abs=0.002)
    # A thousandth of the random tokens is the mask, another the token itself.
    assert (masked / chosen, kept / chosen, other / chosen) == pytest.approx((0.8, 0.1, 0.1), abs=0.01)


def test_a_short_text_has_one_masked_token_and_an_empty_one_none():
    masking = Masking(0.05, ReplacementConfig(mask=1, random=0), mask_id=MASK, vocabulary=VOCABULARY)
    out, picks = masking(np.array([7]), np.random.default_rng(0))
    assert (out.tolist(), picks.tolist()) == ([MASK], [True])
    out, picks = masking(np.array([], dtype=np.int64), np.random.default_rng(0))
    assert (len(out), len(picks)) == (0, 0)


def test_the_labels_give_the_text_back_and_special_tokens_are_never_masked(shards: str):
    for name, (tokens, labels) in stream(shards, make(replacement={"mask": 0.5, "random": 0.5})).items():
        restored = [token if label < 0 else label for token, label in zip(tokens, labels, strict=True)]
        assert restored == [2, *map(int, TEXTS[int(name[1:])].split()), 3]
        assert (labels[0], labels[-1]) == (-1, -1)
        assert max(labels) > 0


@pytest.mark.parametrize(("size", "ranks"), [(1, 1), (11, 1), (4, 2), (5, 3)])
def test_masks_do_not_depend_on_batches_or_workers(shards: str, size: int, ranks: int):
    assert stream(shards, make(), size=size, ranks=ranks) == stream(shards, make())


def test_masks_depend_on_seed_epoch_side_and_text(shards: str):
    first = stream(shards, make())
    assert stream(shards, make()) == first
    for other in (make(seed=1), make(train=False)):
        assert stream(shards, other) != first
    assert stream(shards, make(), epoch=1) != first


def test_padding_rows_have_nothing_to_guess(shards: str):
    plan = np.array([[3, -1]])
    batch = next(local_batches(shards, [(0, plan)], make()))
    assert isinstance(batch, ImageTextBatch)
    assert batch.weights.tolist() == [1.0, 0.0]
    assert batch.token_labels is not None
    assert (batch.token_labels[1] == -1).all()


def test_shares_that_are_more_than_all_are_refused():
    with pytest.raises(ValidationError, match="mask 0.8 and random 0.3 are more than all"):
        ReplacementConfig(random=0.3)


def test_a_text_folder_is_written_whole(tmp_path: Path):
    write_text_shards(tmp_path / "texts", [SideText("a", "o", "x", True)])
    assert sorted(item.name for item in (tmp_path / "texts").iterdir()) == [
        *("folds.parquet", "manifest.json", "part-00000.parquet", "quarantine.parquet")
    ]  # fmt: skip
