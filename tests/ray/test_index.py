"""An index made by a pool of Ray Data actors is the one that this process makes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from prima_ray.base import PrimaError
from prima_ray.knowledge.embedding import Embedder, EncoderConfig
from prima_ray.knowledge.embedding_ray import RayActors
from prima_ray.knowledge.index import Filter, Index, IndexConfig
from prima_ray.knowledge.indexing import IndexReport, update_index
from prima_ray.knowledge.splitting import ChunkConfig
from tests.unit.knowledge.conftest import note
from tests.unit.models.conftest import BERT, VOCABULARY, add_tokenizer

pytestmark = pytest.mark.usefixtures("cluster")


def save_encoder(folder: Path) -> Path:
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(**BERT, vocab_size=VOCABULARY, pad_token_id=0)
    transformers.BertModel(config).save_pretrained(folder)
    return add_tokenizer(folder)


def test_actors_make_the_same_index_and_their_mistakes_are_said(tmp_path: Path) -> None:
    encoder = save_encoder(tmp_path / "encoder")
    config = IndexConfig(
        encoder=EncoderConfig(path=str(encoder), pooling="mean", max_tokens=64),
        chunks=ChunkConfig(max_tokens=32, overlap_tokens=0),
    )
    embedder = Embedder.load(config.encoder, device="cpu", batch_size=4)
    told: list[int] = []
    pool = RayActors(num_actors=2)
    for numbers, expected in (
        (range(12), IndexReport(num_added=12, num_embedded=24)),
        (range(14), IndexReport(num_added=2, num_unchanged=12, num_embedded=4)),
    ):
        report = update_index(
            tmp_path / "actors", map(note, numbers), config, embedder, run=pool, progress=told.append, part_letters=200
        )
        assert report == expected
    changed = [note(3, "Another text."), *(note(number) for number in range(14) if number != 3)]
    report = update_index(tmp_path / "actors", changed, config, embedder, run=pool)
    # The other section's vector is kept.
    assert report == IndexReport(num_changed=1, num_unchanged=13, num_embedded=1)
    assert sum(told) == 28
    assert len(told) > 3
    update_index(tmp_path / "here", changed, config, embedder)
    actors, here = Index.open(tmp_path / "actors"), Index.open(tmp_path / "here")
    assert {chunk.chunk_id: chunk for chunk in actors.chunks()} == {chunk.chunk_id: chunk for chunk in here.chunks()}
    vector = embedder.embed(["moles and the sun"])[0]
    one, other = (index.nearest(vector, k=28, where=Filter()) for index in (actors, here))
    assert {chunk.chunk_id: pytest.approx(score, abs=1e-5) for chunk, score in one} == {
        chunk.chunk_id: score for chunk, score in other
    }
    assert not (tmp_path / "actors" / "_staged").exists()

    # The encoder's folder goes away under the actors.
    shutil.rmtree(encoder)
    with pytest.raises(PrimaError) as caught:
        update_index(tmp_path / "actors", [note(20)], config, embedder, run=pool)
    assert str(caught.value) == f"{encoder}: no such model folder"
    assert not (tmp_path / "actors" / "_staged").exists()
