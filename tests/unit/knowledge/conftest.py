"""A tiny random encoder saved as a hub holds it, and documents to index."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from prima_ray.knowledge.documents import Document, make_document
from prima_ray.knowledge.embedding import Embedder, EncoderConfig
from prima_ray.knowledge.index import IndexConfig
from prima_ray.knowledge.splitting import ChunkConfig
from tests.unit.models.conftest import BERT, VOCABULARY, add_tokenizer

TOPICS = ("sun", "moles", "age", "arsenic", "family", "smoking", "scars", "light skin")


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """A folder of an encoder with random weights, by seed; do not write into it."""
    import transformers

    made: dict[int, Path] = {}

    def get(seed: int = 0) -> Path:
        if seed not in made:
            folder = tmp_path_factory.mktemp(f"encoder{seed}")
            torch.manual_seed(seed)
            config = transformers.BertConfig(**BERT, vocab_size=VOCABULARY, pad_token_id=0)
            transformers.BertModel(config).save_pretrained(folder)
            made[seed] = add_tokenizer(folder)
        return made[seed]

    return get


@pytest.fixture
def config(encoder_folder: Callable[[int], Path]) -> IndexConfig:
    return IndexConfig(
        encoder=EncoderConfig(path=str(encoder_folder(0)), pooling="mean", max_tokens=64),
        chunks=ChunkConfig(max_tokens=32, overlap_tokens=0),
    )


class CountingEmbedder(Embedder):
    """Remembers what it was given."""

    def embed(self, texts):
        self.texts = [*getattr(self, "texts", []), *texts]
        return super().embed(texts)


@pytest.fixture
def embedder(config: IndexConfig) -> CountingEmbedder:
    found = CountingEmbedder.load(config.encoder, device="cpu", batch_size=4)
    assert isinstance(found, CountingEmbedder)
    return found


def note(number: int, text: str | None = None, **keys: object) -> Document:
    """Document `d<number>` of two sections; sources alternate, years go up from 2010."""
    topic = TOPICS[number % len(TOPICS)]
    values = {
        "doc_id": f"d{number}",
        "title": f"On {topic}",
        "source": ("pdq", "medquad")[number % 2],
        "url": f"https://example.org/{number}",
        "date": f"{2010 + number}-05",
        "licence": "CC BY 4.0",
        "sections": [
            (("Risk",), text or f"Much {topic} may raise the risk of melanoma. Number {number} was seen."),
            (("Risk", "Care"), f"See a doctor about {topic}."),
        ],
        **keys,
    }
    return make_document(**values)  # type: ignore[arg-type]
