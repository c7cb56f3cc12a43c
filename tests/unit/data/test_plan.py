from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from prima_ray.base import PrimaError
from prima_ray.data import plan
from prima_ray.data.plan import ExamIndex, plan_epoch, plan_steps, rank_rows, split_roles, verify_shards
from prima_ray.data.reader import RowReader
from prima_ray.data.schema import read_manifest

ROWS = np.arange(100, 203)


@pytest.fixture
def index(toy_shards: str) -> ExamIndex:
    return ExamIndex.read(toy_shards, sha256=True)


def test_the_index_knows_every_exam_without_its_photos(index: ExamIndex) -> None:
    assert len(index) == 23
    assert index.exam_ids[:3].tolist() == ["e000", "e001", "e002"]
    assert index.patient_ids[:3].tolist() == ["p000", "p000", "p001"]
    assert index.labels[:8].tolist() == [0, 1, 2, 0, 1, 2, -1, 1]
    assert index.label_names(np.array([0, 6])) == ["BCC", None]
    assert index.num_images[:4].tolist() == [2, 1, 1, 2]
    assert index.file.tolist() == [0] * 8 + [1] * 8 + [2] * 7
    assert index.row_in_file[[0, 7, 8, 22]].tolist() == [0, 7, 0, 6]
    assert index.attribute_rows(np.array([1, 0])) == [
        {"region": "ARM", "itch": "false", "age": "21"},
        {"region": "FACE", "itch": "true"},
    ]
    assert len(index.attribute_rows()) == 23


def test_roles_are_the_test_fold_the_next_and_the_rest(index: ExamIndex) -> None:
    roles = split_roles(index, fold=2, val_fold=None, split="patient")
    assert (index.patient_fold[roles.test] == 2).all()
    assert (index.patient_fold[roles.val] == 0).all()
    assert (index.patient_fold[roles.train] == 1).all()
    assert sorted(np.concatenate([roles.train, roles.val, roles.test])) == list(range(23))
    assert not set(index.patient_ids[roles.train]) & set(index.patient_ids[roles.test])
    lesion = split_roles(index, fold=0, val_fold=2, split="lesion")
    assert (index.lesion_fold[lesion.val] == 2).all()


def test_no_fold_trains_on_everything_unless_validation_is_named(index: ExamIndex) -> None:
    roles = split_roles(index, fold=None, val_fold=None, split="patient")
    assert (len(roles.train), len(roles.val), len(roles.test)) == (23, 0, 0)
    roles = split_roles(index, fold=None, val_fold=1, split="patient")
    assert len(roles.test) == 0
    assert (index.patient_fold[roles.val] == 1).all()
    assert len(roles.train) + len(roles.val) == 23


def test_impossible_folds_are_mistakes(index: ExamIndex) -> None:
    with pytest.raises(PrimaError) as caught:
        split_roles(index, fold=3, val_fold=None, split="patient")
    assert str(caught.value) == f"{index.shards}: fold: there is no fold 3\n  Folds are 0 to 2."
    with pytest.raises(PrimaError) as caught:
        split_roles(index, fold=1, val_fold=1, split="patient")
    assert caught.value.what == "val_fold: 1 is the test fold as well"


def test_an_epoch_shows_every_row_once_and_pads_the_ragged_end() -> None:
    plan = plan_epoch(ROWS, global_batch=10, seed=3, epoch=0)
    assert plan.shape == (11, 10)
    assert sorted(plan[plan >= 0]) == ROWS.tolist()
    assert (plan[:10] >= 0).all()
    assert (plan[10] >= 0).tolist() == [True] * 3 + [False] * 7


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    plan = plan_epoch(ROWS, global_batch=10, seed=3, epoch=0)
    assert np.array_equal(plan, plan_epoch(ROWS[::-1], global_batch=10, seed=3, epoch=0))
    assert not np.array_equal(plan, plan_epoch(ROWS, global_batch=10, seed=3, epoch=1))
    assert not np.array_equal(plan, plan_epoch(ROWS, global_batch=10, seed=4, epoch=0))
    # Batches are random; the order inside one is the storage order.
    assert (np.diff(plan[:10], axis=1) > 0).all()
    assert np.diff(plan[:10].mean(axis=1)).min() < 0


def test_without_shuffling_the_order_is_the_given_one() -> None:
    plan = plan_epoch(ROWS[::-1], global_batch=50, seed=0, epoch=0, shuffle=False)
    assert plan[plan >= 0].tolist() == ROWS[::-1].tolist()


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
def test_ranks_cut_every_global_batch_into_contiguous_slices(world_size: int) -> None:
    plan = plan_epoch(ROWS, global_batch=10, seed=3, epoch=0)
    slices = [rank_rows(plan, rank=rank, world_size=world_size) for rank in range(world_size)]
    local = -(-10 // world_size)
    assert all(piece.shape == (11, local) for piece in slices)
    together = np.concatenate(slices, axis=1)
    assert np.array_equal(together[:, :10], plan)
    assert (together[:, 10:] == -1).all()


def test_a_window_reads_few_files_a_batch_and_still_shows_every_row_once() -> None:
    rows = np.arange(1000)
    files = rows // 50
    plan = plan_epoch(rows, global_batch=20, seed=1, epoch=0, window_rows=100, files=files)
    assert sorted(plan.ravel()) == rows.tolist()
    assert max(len(np.unique(files[batch])) for batch in plan) <= 3
    assert len({files[batch[0]] for batch in plan}) > 5
    again = plan_epoch(rows, global_batch=20, seed=1, epoch=0, window_rows=100, files=files)
    assert np.array_equal(plan, again)
    other = plan_epoch(rows, global_batch=20, seed=1, epoch=1, window_rows=100, files=files)
    assert not np.array_equal(plan, other)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_windowed_batches_are_the_same_for_any_worker_count(world_size: int) -> None:
    rows, keys = np.arange(1003), {"global_batch": 20, "seed": 1, "window_rows": 100, "files": np.arange(1003) // 50}
    plan = plan_epoch(rows, epoch=1, **keys)  # type: ignore[arg-type]
    parts = [
        [part for _, part in plan_steps(rows, total_steps=102, rank=rank, world_size=world_size, **keys)][1]  # type: ignore[arg-type]
        for rank in range(world_size)
    ]
    together = np.sort(np.concatenate(parts, axis=1), axis=1)
    assert np.array_equal(together[:, -20:], np.sort(plan, axis=1))
    assert (together[:, :-20] == -1).all()


def test_windows_bound_what_a_reader_keeps(make_shards: Callable[..., str]) -> None:
    """120 exams in 15 files: a cache of some files serves windows, each group read once; a whole shuffle reads anew."""
    shards = make_shards(num_exams=120, rows_per_file=8, rows_per_group=8)
    index = ExamIndex.read(shards)

    def read_all(window_rows: int | None) -> tuple[int, int]:
        plan = plan_epoch(np.arange(120), global_batch=8, seed=1, epoch=0, window_rows=window_rows, files=index.file)
        reader = RowReader(shards, index.manifest, columns=["exam_id", "images"], cache_bytes=cache)
        groups, most = 0, 0
        for rows in plan:
            before = set(reader._groups)
            seen = reader.read(rows, 0)
            assert seen["exam_id"].to_pylist() == index.exam_ids[rows].tolist()
            groups += len(set(reader._groups) - before)
            most = max(most, reader._cached_bytes)
        return groups, most

    one_file = sum(file.bytes for file in index.manifest.files) // 15
    cache = 4 * one_file
    windowed, kept = read_all(16)
    assert windowed == 15, "each file once"
    assert kept <= cache
    whole, kept = read_all(None)
    assert whole > 2 * windowed
    assert kept <= cache


def test_resuming_at_a_step_gives_the_tail_of_the_plan() -> None:
    def flat(start: int) -> list[tuple[int, list[int]]]:
        steps = plan_steps(ROWS, global_batch=10, seed=3, total_steps=30, start_step=start, rank=1, world_size=3)
        return [(epoch, row.tolist()) for epoch, rows in steps for row in rows]

    whole = flat(0)
    assert [epoch for epoch, _ in whole] == [0] * 11 + [1] * 11 + [2] * 8
    for start in (0, 5, 11, 15, 29, 30):
        assert flat(start) == whole[start:]


def test_nothing_to_train_on_is_a_mistake() -> None:
    with pytest.raises(PrimaError, match="there are no exams to train on"):
        next(plan_steps(np.empty(0, dtype=np.int64), global_batch=4, seed=0, total_steps=1))


def test_a_file_of_the_wrong_size_is_named(make_shards: Callable[..., str]) -> None:
    shards = make_shards()
    part = Path(shards) / "part-00001.parquet"
    size = part.stat().st_size
    part.write_bytes(part.read_bytes()[:-10])
    with pytest.raises(PrimaError) as caught:
        ExamIndex.read(shards)
    assert str(caught.value) == (
        f"{part}: holds {size - 10} bytes, the manifest says {size}\n"
        "  Restore the file from a copy, or write the folder again."
    )
    part.unlink()
    with pytest.raises(PrimaError) as caught:
        ExamIndex.read(shards)
    assert str(caught.value).startswith(f"{part}: this file of the manifest is missing")


def test_a_wrong_checksum_is_found(make_shards: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    shards = make_shards()
    part = Path(shards) / "part-00002.parquet"
    data = bytearray(part.read_bytes())
    data[100] ^= 1
    part.write_bytes(data)
    manifest = read_manifest(shards)
    verify_shards(shards, manifest, sha256=False)
    with monkeypatch.context() as patch:
        # Of a larger folder than is hashed unasked.
        patch.setattr(plan, "HASHED_BYTES", 10)
        verify_shards(shards, manifest)
        with pytest.raises(PrimaError):
            verify_shards(shards, manifest, sha256=True)
    with pytest.raises(PrimaError) as caught:
        ExamIndex.read(shards)
    assert caught.value.where == str(part)
    assert caught.value.what.startswith("wrong checksum: sha256 ")
    assert manifest.files[2].sha256[:12] in caught.value.what


def test_a_changed_fold_is_found_whatever_the_size_of_the_folder(
    make_shards: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = make_shards()
    monkeypatch.setattr(plan, "HASHED_BYTES", 10)
    folds = Path(shards) / "folds.parquet"
    data = bytearray(folds.read_bytes())
    data[40] ^= 1
    folds.write_bytes(data)
    with pytest.raises(PrimaError, match="wrong checksum") as caught:
        ExamIndex.read(shards)
    assert caught.value.where == str(folds)


def test_a_class_that_the_manifest_does_not_know_is_said(make_shards: Callable[..., str]) -> None:
    shards = make_shards()
    path = Path(shards) / "manifest.json"
    path.write_text(path.read_text().replace('"name": "NEV"', '"name": "NAE"'))
    with pytest.raises(PrimaError, match="the class 'NEV', which the manifest does not know"):
        ExamIndex.read(shards)


def test_a_manifest_that_counts_wrongly_is_found(make_shards: Callable[..., str]) -> None:
    shards = make_shards()
    path = Path(shards) / "manifest.json"
    raw = json.loads(path.read_text())
    raw["files"][0]["rows"] = 9
    path.write_text(json.dumps(raw))
    with pytest.raises(PrimaError, match="holds 8 exams, the manifest says 9"):
        ExamIndex.read(shards)
