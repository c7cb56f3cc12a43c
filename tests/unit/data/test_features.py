from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from prima_ray.base import PrimaError, read_json, write_json
from prima_ray.data.batch import ImageTextBatch
from prima_ray.data.collate import Collator
from prima_ray.data.feature_writer import FeatureConfig, compute_features
from prima_ray.data.features import FeatureSet, FeatureSpec, decode_columns, encode_column, hash_tensors
from prima_ray.data.metadata import MetadataTextConfig
from prima_ray.data.plan import plan_steps
from prima_ray.data.schema import read_manifest
from prima_ray.data.stream import local_batches
from prima_ray.data.views import ViewConfig

ROWS = [(0, np.arange(23)[None])]


class WordTokens:
    """Every word an id; the first token is special, the texts are padded to the longest."""

    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
        words = [["[CLS]", *text.split()] for text in texts]
        ids = torch.zeros(len(texts), max(map(len, words)), dtype=torch.int64)
        for row, sentence in enumerate(words):
            for column, word in enumerate(sentence):
                ids[row, column] = 1 + sum(map(ord, word)) % 1000
        attention = ids > 0
        real = attention.clone()
        real[:, 0] = False
        return ids, attention, real


class Tower:
    """Stands for frozen towers: exact arithmetic that depends on every input of one exam alone."""

    def __init__(self) -> None:
        self.exams = 0

    def text(self, batch: ImageTextBatch) -> Mapping[str, Tensor]:
        self.exams += int(batch.weights.sum())
        assert batch.input_ids is not None
        tokens = batch.input_ids[..., None].float() * torch.tensor([1.0, 0.5, 0.25])
        return {"text_cls": tokens[:, 0], "text_seq": tokens}

    def image(self, batch: ImageTextBatch) -> Mapping[str, Tensor]:
        self.exams += int(batch.weights.sum())
        assert batch.images is not None
        patches = batch.images[..., ::12, ::12].flatten(-2).transpose(-1, -2)
        return {"image_cls": patches[..., 0, :], "image_seq": patches}


def text_collator(shards: str, **text: float) -> Collator:
    data_set = read_manifest(shards).data_set
    config = MetadataTextConfig.model_validate(text)
    return Collator(data_set=data_set, seed=5, train=True, text=config, tokenizer=WordTokens())


def image_collator(shards: str, *, train: bool = True, seed: int = 5) -> Collator:
    return Collator(data_set=read_manifest(shards).data_set, seed=seed, train=train, views=ViewConfig(image_size=24))


def streaming(features: FeatureSet, shards: str) -> Collator:
    return Collator(data_set=read_manifest(shards).data_set, seed=5, train=True, features=features.manifest.specs)


def test_streamed_text_features_are_the_direct_ones(toy_shards: str, tmp_path: Path) -> None:
    tower, collate = Tower(), text_collator(toy_shards)
    features = compute_features(
        str(tmp_path), toy_shards, collate, tower.text, tower="t", config=FeatureConfig(batch_size=5)
    )
    (direct,) = local_batches(toy_shards, ROWS, collate)
    (streamed,) = local_batches(toy_shards, ROWS, streaming(features, toy_shards), features=features)
    expected = tower.text(direct)
    assert streamed.input_ids is None
    assert streamed.images is None
    assert torch.equal(streamed.text_cls, expected["text_cls"])  # type: ignore[arg-type]
    assert torch.equal(streamed.attention_mask, direct.attention_mask)  # type: ignore[arg-type]
    assert torch.equal(streamed.token_mask, direct.token_mask)  # type: ignore[arg-type]
    assert torch.equal(streamed.text_seq, expected["text_seq"])  # type: ignore[arg-type]
    assert streamed.exam_ids == direct.exam_ids
    assert torch.equal(streamed.labels, direct.labels)


def test_features_lie_row_by_row_beside_the_shards(toy_shards: str, tmp_path: Path) -> None:
    features = compute_features(
        str(tmp_path), toy_shards, text_collator(toy_shards), Tower().text, tower="t", config=FeatureConfig()
    )
    for file in read_manifest(toy_shards).files:
        source = pq.read_metadata(Path(toy_shards) / file.path)
        stored = pq.read_metadata(Path(features.path) / "v0" / file.path)
        assert [source.row_group(group).num_rows for group in range(source.num_row_groups)] == [
            stored.row_group(group).num_rows for group in range(stored.num_row_groups)
        ]
    assert sorted(path.name for path in Path(features.path).iterdir()) == ["features.json", "v0"]


def test_evaluation_features_keep_every_photo(toy_shards: str, tmp_path: Path) -> None:
    collate = image_collator(toy_shards, train=False)
    features = compute_features(
        str(tmp_path), toy_shards, collate, Tower().image, tower="t", config=FeatureConfig(batch_size=4, variants=3)
    )
    assert features.manifest.variants == 1
    (direct,) = local_batches(toy_shards, ROWS, collate)
    (streamed,) = local_batches(toy_shards, ROWS, streaming(features, toy_shards), features=features)
    assert torch.equal(streamed.image_mask, direct.image_mask)  # type: ignore[arg-type]
    expected = Tower().image(direct)
    mask = direct.image_mask
    assert mask is not None
    assert torch.equal(streamed.image_seq[mask], expected["image_seq"][mask])  # type: ignore[index]
    assert torch.equal(streamed.image_cls[mask], expected["image_cls"][mask])  # type: ignore[index]
    assert not streamed.image_cls[~mask].any()  # type: ignore[index]


def test_an_epoch_reads_its_variant(toy_shards: str, tmp_path: Path) -> None:
    collate = image_collator(toy_shards)
    features = compute_features(
        str(tmp_path), toy_shards, collate, Tower().image, tower="t", config=FeatureConfig(variants=2)
    )
    assert features.manifest.variants == 2
    plan = [(epoch, np.arange(6)[None]) for epoch in range(4)]
    streamed = list(local_batches(toy_shards, plan, streaming(features, toy_shards), features=features))
    direct = list(local_batches(toy_shards, plan[:2], replace(collate, variant=True)))
    for epoch, batch in enumerate(streamed):
        expected = Tower().image(direct[epoch % 2])
        assert torch.equal(batch.image_seq, expected["image_seq"])  # type: ignore[arg-type]
    assert not torch.equal(streamed[0].image_seq, streamed[1].image_seq)  # type: ignore[arg-type]


def test_frozen_text_without_dropout_is_shared_by_training_and_evaluation(toy_shards: str, tmp_path: Path) -> None:
    tower, config = Tower(), FeatureConfig(variants=4)
    collate = text_collator(toy_shards)
    first = compute_features(str(tmp_path), toy_shards, collate, tower.text, tower="t", config=config)
    assert first.manifest.variants == 1
    assert tower.exams == 23
    for other in (collate.for_evaluation(), replace(collate, seed=6)):
        again = compute_features(str(tmp_path), toy_shards, other, tower.text, tower="t", config=config)
        assert again.path == first.path
    assert tower.exams == 23
    dropout = text_collator(toy_shards, attribute_dropout=0.5)
    random = compute_features(str(tmp_path), toy_shards, dropout, tower.text, tower="t", config=config)
    assert random.manifest.variants == 4
    assert tower.exams == 23 * 5


def test_whatever_the_values_depend_on_changes_the_folder(toy_shards: str, tmp_path: Path) -> None:
    def path(collate: Collator, tower: str = "t", **config: object) -> str:
        return compute_features(
            str(tmp_path), toy_shards, collate, Tower().image, tower=tower,
            config=FeatureConfig.model_validate(config)).path  # fmt: skip

    base = image_collator(toy_shards)
    other_views = replace(base, views=ViewConfig(image_size=24, resize="squash"))
    paths = [path(base), path(base, tower="u"), path(base, dtype="float16"), path(base, variants=2), path(other_views),
             path(image_collator(toy_shards, seed=6)), path(base.for_evaluation())]  # fmt: skip
    assert len(set(paths)) == len(paths)


def test_an_interrupted_run_continues_with_the_next_file(toy_shards: str, tmp_path: Path) -> None:
    collate = text_collator(toy_shards)

    class Dies(Tower):
        def text(self, batch: ImageTextBatch) -> Mapping[str, Tensor]:
            if self.exams >= 8:
                raise KeyboardInterrupt
            return super().text(batch)

    with pytest.raises(KeyboardInterrupt):
        compute_features(str(tmp_path), toy_shards, collate, Dies().text, tower="t", config=FeatureConfig(batch_size=4))
    (folder,) = tmp_path.iterdir()
    assert sorted(path.name for path in (folder / "v0").iterdir()) == [
        "part-00000.parquet", "part-00000.parquet.json"]  # fmt: skip
    with pytest.raises(PrimaError) as caught:
        FeatureSet.open(str(folder))
    assert str(caught.value) == (
        f"{folder}: no finished features here (features.json is missing)\n"
        "  Run the stage that computes them again; it continues where it stopped."
    )
    tower = Tower()
    compute_features(str(tmp_path), toy_shards, collate, tower.text, tower="t", config=FeatureConfig(batch_size=4))
    assert tower.exams == 15


def test_several_processes_share_the_files(toy_shards: str, tmp_path: Path) -> None:
    collate, barrier, towers = text_collator(toy_shards), threading.Barrier(2), [Tower(), Tower()]
    found: list[FeatureSet | None] = [None, None]

    def run(rank: int) -> None:
        found[rank] = compute_features(
            str(tmp_path), toy_shards, collate, towers[rank].text, tower="t", config=FeatureConfig(),
            rank=rank, world_size=2, barrier=lambda: barrier.wait(30) and None)  # fmt: skip

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] == found[1] is not None
    assert [tower.exams for tower in towers] == [15, 8]


def test_rows_that_were_not_computed_are_named(toy_shards: str, tmp_path: Path) -> None:
    rows = np.array([0, 1, 2, 9, 22])
    features = compute_features(
        str(tmp_path), toy_shards, text_collator(toy_shards), Tower().text, tower="t", config=FeatureConfig(), rows=rows
    )
    collate = streaming(features, toy_shards)
    (batch,) = local_batches(toy_shards, [(0, np.append(rows, -1)[None])], collate, features=features)
    assert batch.exam_ids == ("e000", "e001", "e002", "e009", "e022", "")
    assert batch.text_cls is not None
    assert not batch.text_cls[-1].any()
    assert batch.attention_mask is not None
    assert batch.attention_mask[-1].sum() == 1
    with pytest.raises(PrimaError) as caught:
        list(local_batches(toy_shards, [(0, np.array([[0, 3]]))], collate, features=features))
    assert str(caught.value) == (
        "no stored text_cls for the exam e003\n"
        "  The features were computed for other folds; compute them for these rows."
    )


def test_batches_do_not_depend_on_the_world_size(toy_shards: str, tmp_path: Path) -> None:
    features = compute_features(
        str(tmp_path),
        toy_shards,
        image_collator(toy_shards),
        Tower().image,
        tower="t",
        config=FeatureConfig(variants=2),
    )
    collate = streaming(features, toy_shards)

    def batches(rank: int, world_size: int) -> list[ImageTextBatch]:
        steps = plan_steps(np.arange(23), global_batch=8, seed=1, total_steps=5, rank=rank, world_size=world_size)
        return list(local_batches(toy_shards, steps, collate, features=features))

    for whole, left, right in zip(batches(0, 1), batches(0, 2), batches(1, 2), strict=True):
        assert torch.equal(whole.image_cls, torch.cat([left.image_cls, right.image_cls]))  # type: ignore[arg-type,list-item]
        assert whole.exam_ids == left.exam_ids + right.exam_ids


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 0.0), ("float16", 1e-3), ("bfloat16", 8e-3)])
def test_values_survive_storage(dtype: str, tolerance: float) -> None:
    values = [torch.randn(3, 4), None, torch.randn(1, 4)]
    spec = FeatureSpec(name="text_seq", dtype=dtype, shape=(4,))  # type: ignore[arg-type]
    column = encode_column(values, spec)
    import pyarrow as pa

    table = pa.table({"exam_id": ["a", None, "b"], "text_seq": column})
    decoded = decode_columns(table, (spec,), padding=np.array([False, True, False]))
    assert decoded["text_seq"].dtype == torch.float32
    assert decoded["text_seq"].shape == (3, 3, 4)
    torch.testing.assert_close(decoded["text_seq"][0], values[0], rtol=tolerance, atol=0.0)
    assert decoded["attention_mask"].tolist() == [[True] * 3, [True, False, False], [True, False, False]]


def test_features_of_other_shards_or_damaged_ones_are_refused(
    toy_shards: str, make_shards: Callable[..., str], tmp_path: Path
) -> None:
    features = compute_features(
        str(tmp_path / "f"), toy_shards, text_collator(toy_shards), Tower().text, tower="t", config=FeatureConfig()
    )
    others = read_manifest(make_shards(num_exams=5))
    with pytest.raises(PrimaError, match="these features were computed from other shards"):
        FeatureSet.open(features.path, shards=others)
    manifest = Path(features.path) / "features.json"
    raw = read_json(manifest)
    write_json(manifest, {**raw, "version": 0})
    with pytest.raises(PrimaError, match="features of version 0, this program reads version 1"):
        FeatureSet.open(features.path)
    write_json(manifest, raw)
    part = Path(features.path) / "v0" / "part-00001.parquet"
    part.write_bytes(part.read_bytes()[:-1])
    with pytest.raises(PrimaError, match=r"part-00001\.parquet: holds \d+ bytes, the manifest says \d+"):
        FeatureSet.open(features.path)


def test_the_hash_of_weights_sees_every_change() -> None:
    weights = {"a": torch.ones(2, 2), "b": torch.tensor(1.0, dtype=torch.bfloat16)}
    assert hash_tensors(weights) == hash_tensors(dict(reversed(weights.items())))
    for changed in ({"a": torch.ones(4)}, {"a": torch.ones(2, 2, dtype=torch.float64)}, {"b": torch.tensor(2.0)}):
        assert hash_tensors({**weights, **changed}) != hash_tensors(weights)


def test_progress_counts_what_is_left_of_this_ranks_share(toy_shards: str, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    collate, tower = text_collator(toy_shards), Tower()
    for _ in range(2):
        compute_features(
            str(tmp_path),
            toy_shards,
            collate,
            tower.text,
            tower="t",
            config=FeatureConfig(batch_size=4),
            progress=lambda count, total: told.append((count, total)),
        )
    # Found finished the second time, and nothing told.
    assert {total for _, total in told} == {23}
    assert sum(count for count, _ in told) == 23
