from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from prima_ray.base import PrimaError, hash_key
from prima_ray.data.attribute_vectors import SoftTargetConfig, SoftTargetEncoder
from prima_ray.data.batch import ImageTextBatch
from prima_ray.data.collate import Collator
from prima_ray.data.metadata import MetadataTextConfig
from prima_ray.data.plan import ExamIndex, plan_epoch, plan_steps, rank_rows
from prima_ray.data.reader import PlannedRead, RowReader
from prima_ray.data.schema import SHARD_SCHEMA, read_manifest
from prima_ray.data.stream import local_batches
from prima_ray.data.views import ViewConfig


class WordTokens:
    """Every word an id, six tokens a text: the first is special."""

    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
        ids = torch.zeros(len(texts), 8, dtype=torch.int64)
        for row, text in enumerate(texts):
            for column, word in enumerate(["[CLS]", *text.split()][:8]):
                ids[row, column] = 1 + sum(map(ord, word)) % 1000
        attention = ids > 0
        real = attention.clone()
        real[:, 0] = False
        return ids, attention, real


@pytest.fixture(scope="module")
def collate(toy_shards: str) -> Collator:
    index = ExamIndex.read(toy_shards)
    data_set = index.manifest.data_set
    config = SoftTargetConfig(include_label=True)
    return Collator(
        data_set=data_set,
        seed=5,
        train=True,
        views=ViewConfig(image_size=24),
        text=MetadataTextConfig(attribute_dropout=0.3),
        tokenizer=WordTokens(),
        soft_targets=SoftTargetEncoder.fit(index.attribute_rows(), data_set, config),
    )


def stream(shards: str, collate: Collator, *, rank: int = 0, world_size: int = 1, batch: int = 6, start: int = 0,
           total: int = 8, **options: int) -> list[ImageTextBatch]:  # fmt: skip
    steps = plan_steps(np.arange(23), global_batch=batch, seed=5, total_steps=total, start_step=start,
                       rank=rank, world_size=world_size)  # fmt: skip
    return list(local_batches(shards, steps, collate, **options))


def assert_equal(left: ImageTextBatch, right: ImageTextBatch) -> None:
    for field in fields(ImageTextBatch):
        one, other = getattr(left, field.name), getattr(right, field.name)
        if isinstance(one, Tensor):
            assert torch.equal(one, other), field.name
        else:
            assert one == other, field.name


def join(batches: Sequence[ImageTextBatch]) -> ImageTextBatch:
    parts = {
        field.name: torch.cat([getattr(batch, field.name) for batch in batches])
        for field in fields(ImageTextBatch)
        if isinstance(getattr(batches[0], field.name), Tensor)
    }
    return ImageTextBatch(exam_ids=tuple(name for batch in batches for name in batch.exam_ids), **parts)


def test_a_batch_has_what_was_asked_for(toy_shards: str, collate: Collator) -> None:
    batch = stream(toy_shards, collate)[0]
    assert batch.images is not None
    assert batch.images.shape == (6, 2, 3, 24, 24)
    assert batch.images.dtype == torch.float32
    assert batch.image_mask is not None
    assert batch.image_mask.all()
    assert batch.attributes is not None
    assert batch.attributes.shape == (6, collate.soft_targets.width)  # type: ignore[union-attr]
    assert batch.weights.tolist() == [1.0] * 6
    assert batch.labels.dtype == torch.int64
    index = ExamIndex.read(toy_shards)
    expected = {name: int(label) for name, label in zip(index.exam_ids, index.labels, strict=True)}
    assert batch.labels.tolist() == [expected[name] for name in batch.exam_ids]


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_the_ranks_batches_together_are_the_one_rank_batch(toy_shards: str, collate: Collator, world_size: int) -> None:
    whole = stream(toy_shards, collate, batch=12)
    ranks = [stream(toy_shards, collate, rank=rank, world_size=world_size, batch=12) for rank in range(world_size)]
    assert {len(batches) for batches in ranks} == {len(whole)} == {8}
    for step, batch in enumerate(whole):
        assert_equal(join([batches[step] for batches in ranks]), batch)


def test_a_batch_that_does_not_divide_is_padded_on_the_last_rank(toy_shards: str, collate: Collator) -> None:
    whole = stream(toy_shards, collate, batch=8)[0]
    ranks = [stream(toy_shards, collate, rank=rank, world_size=3, batch=8)[0] for rank in range(3)]
    together = join(ranks)
    assert together.weights.tolist() == [1.0] * 8 + [0.0]
    assert together.exam_ids == (*whole.exam_ids, "")
    assert torch.equal(together.images[:8], whole.images)  # type: ignore[index,arg-type]


def test_padding_rows_are_harmless(toy_shards: str, collate: Collator) -> None:
    last = stream(toy_shards, collate, total=4)[-1]
    assert last.weights.tolist() == [1.0] * 5 + [0.0]
    assert last.exam_ids[-1] == ""
    assert last.labels[-1] == -1
    assert last.images is not None
    assert not last.images[-1].any()
    assert last.image_mask is not None
    assert last.image_mask[-1].tolist() == [True, True] or last.image_mask[-1, 0]
    assert last.attention_mask is not None
    assert last.token_mask is not None
    assert last.attention_mask[-1].any()
    assert not last.token_mask[-1].any()
    assert last.attributes is not None
    assert not last.attributes[-1].any()


def test_threads_and_cache_change_nothing(toy_shards: str, collate: Collator) -> None:
    plain = stream(toy_shards, collate, prefetch=0)
    for options in ({"prefetch": 3, "num_threads": 3}, {"cache_bytes": 1}, {"prefetch": 1, "num_threads": 1}):
        for one, other in zip(stream(toy_shards, collate, **options), plain, strict=True):
            assert_equal(one, other)


def test_resuming_at_a_step_gives_the_tail(toy_shards: str, collate: Collator) -> None:
    whole = stream(toy_shards, collate)
    for one, other in zip(stream(toy_shards, collate, start=5), whole[5:], strict=True):
        assert_equal(one, other)


def test_views_and_text_change_from_epoch_to_epoch(toy_shards: str, collate: Collator) -> None:
    rows = np.arange(6)[None]
    first, again, second = local_batches(toy_shards, [(0, rows), (0, rows), (1, rows)], collate)
    assert_equal(first, again)
    assert not torch.equal(first.images, second.images)  # type: ignore[arg-type]
    assert not torch.equal(first.input_ids, second.input_ids)  # type: ignore[arg-type]


def test_mask_keys_are_of_seed_epoch_and_exam(toy_shards: str, collate: Collator) -> None:
    plan = [(epoch, np.array([[3, 5, 4], [5, 9, -1]])) for epoch in (0, 1)]
    first, second, third, _ = local_batches(toy_shards, plan, collate)
    assert first.mask_keys is not None
    assert second.mask_keys is not None
    assert third.mask_keys is not None
    expected = hash_key(collate.seed, 0, "e005", "masks")
    assert int(first.mask_keys[1]) % 2**64 == expected
    assert first.mask_keys[1] == second.mask_keys[0]
    assert len({*first.mask_keys.tolist(), *third.mask_keys.tolist()}) == 6
    assert next(local_batches(toy_shards, plan, collate.for_evaluation())).mask_keys is None
    assert [piece.mask_keys.tolist() for piece in first.split(2) if piece.mask_keys is not None] == [
        first.mask_keys[:2].tolist(),
        first.mask_keys[2:].tolist(),
    ]


def test_augmentation_does_not_depend_on_the_place_in_the_batch(toy_shards: str, collate: Collator) -> None:
    forward, backward = local_batches(toy_shards, [(0, np.arange(6)[None]), (0, np.arange(6)[None, ::-1])], collate)
    assert torch.equal(forward.images, backward.images.flip(0))  # type: ignore[arg-type,union-attr]


def test_an_exam_with_two_photos_shows_both_and_one_photo_twice_otherwise(toy_shards: str, collate: Collator) -> None:
    plain = {"crop_area": (1.0, 1.0), "crop_ratio": (1.0, 1.0), "horizontal_flip": 0.0, "vertical_flip": 0.0,
             "quarter_turns": False, "rotation": 0.0, "color": 0.0, "blur": 0.0}  # fmt: skip
    views = ViewConfig.model_validate({"image_size": 24, "augment": plain})
    only_images = Collator(data_set=collate.data_set, seed=5, train=True, views=views)
    (batch,) = local_batches(toy_shards, [(0, np.arange(2)[None])], only_images)
    assert batch.images is not None
    two, one = batch.images
    # The square crop of a photo still moves along its longer side, by a few pixels.
    assert (two[0] - two[1]).abs().mean() > 0.5
    assert (one[0] - one[1]).abs().mean() < 0.2


def test_evaluation_shows_every_photo_without_augmentation(toy_shards: str, collate: Collator) -> None:
    evaluate = collate.for_evaluation()
    plan = plan_epoch(np.arange(23), global_batch=5, seed=0, epoch=0, shuffle=False)
    batches = list(local_batches(toy_shards, [(0, plan)], evaluate))
    other_epoch = list(local_batches(toy_shards, [(9, plan)], evaluate))
    for one, other in zip(batches, other_epoch, strict=True):
        assert_equal(one, other)
    counts = ExamIndex.read(toy_shards).num_images
    first = batches[0]
    assert first.image_mask is not None
    assert first.images is not None
    assert first.image_mask.sum(dim=1).tolist() == counts[:5].tolist()
    assert not first.images[~first.image_mask].any()
    assert batches[-1].image_mask is not None
    assert batches[-1].image_mask[-1].tolist()[0] is True
    limited = Collator(data_set=collate.data_set, seed=0, train=False, views=ViewConfig(image_size=24, max_photos=1))
    (few,) = local_batches(toy_shards, [(0, plan[:1])], limited)
    assert few.images is not None
    assert few.images.shape[1] == 1
    assert torch.equal(few.images[:, 0], first.images[:, 0])


def test_labels_reach_the_soft_targets_of_training_rows_only(toy_shards: str, collate: Collator) -> None:
    rows = [(0, np.arange(6)[None])]
    (training,) = local_batches(toy_shards, rows, collate)
    (evaluation,) = local_batches(toy_shards, rows, collate.for_evaluation())
    assert training.attributes is not None
    assert evaluation.attributes is not None
    assert training.attributes[:, -3:].argmax(dim=1).tolist() == training.labels.tolist()
    assert not evaluation.attributes[:, -3:].any()


def test_a_stage_without_pixels_does_not_read_the_photos(toy_shards: str, collate: Collator) -> None:
    text_only = Collator(
        data_set=collate.data_set, seed=5, train=False, text=MetadataTextConfig(), tokenizer=WordTokens()
    )
    assert text_only.columns == ("exam_id", "label", "attributes")
    reader = RowReader(toy_shards, read_manifest(toy_shards), columns=text_only.columns)
    assert reader.read(np.array([0, 9]), 0).column_names == ["exam_id", "label", "attributes", "epoch", "padding"]
    (batch,) = local_batches(toy_shards, [(0, np.arange(3)[None])], text_only)
    assert batch.images is None
    assert batch.input_ids is not None


def test_the_reader_gives_rows_in_the_order_asked_for(toy_shards: str) -> None:
    reader = RowReader(toy_shards, read_manifest(toy_shards), columns=["exam_id"])
    rows = np.array([22, 0, -1, 8, 0])
    table = reader.read(rows, np.array([1, 2, 3, 4, 5]))
    assert table["exam_id"].to_pylist() == ["e022", "e000", None, "e008", "e000"]
    assert table["epoch"].to_pylist() == [1, 2, 3, 4, 5]
    assert table["padding"].to_pylist() == [False, False, True, False, False]
    assert reader.read(np.array([-1, -1]), 0)["exam_id"].to_pylist() == [None, None]


def test_a_collator_survives_pickling(toy_shards: str, collate: Collator) -> None:
    again = pickle.loads(pickle.dumps(collate))  # noqa: S301
    rows = [(3, np.arange(6)[None])]
    (one,), (other,) = local_batches(toy_shards, rows, collate), local_batches(toy_shards, rows, again)
    assert_equal(one, other)


def test_a_collator_needs_no_plan_columns(toy_shards: str, collate: Collator) -> None:
    table = pq.read_table(Path(toy_shards) / "part-00000.parquet")
    (streamed,) = local_batches(toy_shards, [(0, np.arange(8)[None])], collate.for_evaluation())
    assert_equal(collate.for_evaluation()(table), streamed)


def test_stopping_early_leaves_no_thread_behind(toy_shards: str, collate: Collator) -> None:
    import threading

    batches = local_batches(
        toy_shards, plan_steps(np.arange(23), global_batch=6, seed=5, total_steps=1000), collate, num_threads=2
    )
    assert isinstance(batches, Iterator)
    next(batches)
    batches.close()  # type: ignore[attr-defined]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prima-collate")]


def damage(shards: str, row: int, data: bytes) -> None:
    path = Path(shards) / "part-00000.parquet"
    rows = pq.read_table(path).to_pylist()
    rows[row]["images"][0]["bytes"] = data
    pq.write_table(pa.Table.from_pylist(rows, schema=SHARD_SCHEMA), path, row_group_size=3)


@pytest.mark.parametrize("train", [True, False])
def test_a_corrupt_photo_names_its_exam_and_itself(
    make_shards: Callable[..., str], collate: Collator, train: bool
) -> None:
    shards = make_shards()
    damage(shards, 3, b"not a photo")
    chosen = collate if train else collate.for_evaluation()
    with pytest.raises(PrimaError) as caught:
        list(local_batches(shards, [(epoch, np.arange(6)[None]) for epoch in range(6)], chosen))
    assert caught.value.what.startswith("exam e003: the photo i003_0 cannot be decoded (")
    assert caught.value.mend == "The shards are damaged: ingest the data set again."


def test_a_file_that_is_no_parquet_is_named(make_shards: Callable[..., str], collate: Collator) -> None:
    shards = make_shards()
    part = Path(shards) / "part-00001.parquet"
    part.write_bytes(b"x" * 200)
    with pytest.raises(PrimaError) as caught:
        list(local_batches(shards, [(0, np.arange(23)[None])], collate))
    assert caught.value.where == str(part)
    assert caught.value.what.startswith("cannot be read as Parquet (")


def test_a_planned_read_refuses_shards_that_were_replaced(toy_shards: str) -> None:
    rows = np.array([0, 1])
    read = PlannedRead(toy_shards, read_manifest(toy_shards).content_hash, ("exam_id",), None, rows, rows)
    assert read()[0]["exam_id"].to_pylist() == ["e000", "e001"]
    stale = PlannedRead(toy_shards, "another", ("exam_id",), None, rows, rows)
    with pytest.raises(PrimaError, match="the shards were replaced while they were being read"):
        stale()


def test_rank_slices_of_the_local_path_read_every_row_once(toy_shards: str, collate: Collator) -> None:
    plan = plan_epoch(np.arange(23), global_batch=7, seed=1, epoch=0)
    seen = [
        name
        for rank in range(3)
        for batch in local_batches(toy_shards, [(0, rank_rows(plan, rank=rank, world_size=3))], collate)
        for name in batch.exam_ids
        if name
    ]
    assert sorted(seen) == [f"e{number:03}" for number in range(23)]


def test_all_photos_of_an_exam_are_views_in_training_too(toy_shards: str, collate: Collator):
    every = replace(collate, views=ViewConfig(image_size=24, num_views="all", max_photos=8))
    trained, evaluated = stream(toy_shards, every, total=4), stream(toy_shards, every.for_evaluation(), total=4)
    for left, right in zip(trained, evaluated, strict=True):
        assert left.exam_ids == right.exam_ids
        assert left.image_mask is not None
        assert right.image_mask is not None
        assert torch.equal(left.image_mask, right.image_mask)
        assert not left.images[~left.image_mask].any()
    assert {int(count) for batch in trained for count in batch.image_mask.sum(dim=1)} == {1, 2}


def test_all_photos_stop_at_the_most_that_are_read():
    assert [ViewConfig(num_views="all", max_photos=3).count_views(count) for count in (1, 3, 9)] == [1, 3, 3]
    assert ViewConfig(num_views=2).count_views(1) == 2
