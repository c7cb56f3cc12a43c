"""A second look at what was found: a cross-encoder reads query and passage together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field

from prima_ray.base import InputPath, PrimaError, StrictConfig
from prima_ray.knowledge.index import Filter
from prima_ray.knowledge.retrieval import Hit
from prima_ray.knowledge.splitting import context_of
from prima_ray.models.tokenizer import TextTokenizer, first_line, resolve_text_model

if TYPE_CHECKING:
    from prima_ray.knowledge.retrievers import FilteredRetriever


class RerankConfig(StrictConfig):
    """A cross-encoder of transformers: a sequence classifier with one output, or two of which the second is `fits`."""

    name: str | None = None
    """A hub name such as `cross-encoder/ms-marco-MiniLM-L6-v2`, or a local folder."""
    path: InputPath | None = None
    """A local folder instead of `name`."""
    depth: int = Field(default=50, ge=1)
    """Hits that it reads."""
    max_tokens: int = Field(default=512, ge=16)
    batch_size: int = Field(default=16, ge=1)

    def load(self, *, device: str = "cpu") -> CrossEncoder:
        """The cross-encoder.

        Raises:
            PrimaError: none is named, it is not to be had, or it is no cross-encoder.
        """
        source = self.path or self.name
        if source is None:
            raise PrimaError(
                "rerank: no cross-encoder is named", mend="Name one in rerank.name, or its folder in rerank.path."
            )
        return CrossEncoder(source, self, device=device)


class CrossEncoder:
    """(query, passage) -> how well they fit; comparable within one query only."""

    def __init__(self, source: str, config: RerankConfig, *, device: str) -> None:
        from transformers import AutoModelForSequenceClassification

        self._config = config
        self._device = torch.device(device)
        self._tokenizer = TextTokenizer(source, max_tokens=config.max_tokens)
        mend = "Name a local folder in rerank.path, or bring the model with `prima fetch`."
        try:
            model, report = AutoModelForSequenceClassification.from_pretrained(
                resolve_text_model(source), use_safetensors=True, output_loading_info=True, dtype=torch.float32
            )
        except PrimaError:
            raise
        except Exception as error:  # safetensors, huggingface_hub and torch have each their own
            raise PrimaError(f"no cross-encoder to be had ({first_line(error)})", where=source, mend=mend) from None
        if report["missing_keys"]:
            raise PrimaError(
                f"is no cross-encoder: it has no weights for {sorted(report['missing_keys'])[0]}",
                where=source,
                mend="Name a model that was trained to rank passages.",
            )
        if model.config.num_labels > 2:
            raise PrimaError(f"has {model.config.num_labels} outputs, a cross-encoder has one or two", where=source)
        self._model = model.eval().requires_grad_(False).to(self._device)

    @torch.inference_mode()
    def score(self, query: str, passages: Sequence[str]) -> list[float]:
        """A score a passage; of a pair that is too long the longer text is cut off."""
        found: list[float] = []
        for start in range(0, len(passages), self._config.batch_size):
            batch = list(passages[start : start + self._config.batch_size])
            encoded = self._tokenizer.loaded(
                [query] * len(batch),
                batch,
                padding=True,
                truncation="longest_first",
                max_length=self._config.max_tokens,
                return_tensors="pt",
            ).to(self._device)
            logits: Any = self._model(**encoded).logits.float()
            found += (logits[:, -1] if logits.shape[1] == 1 else logits[:, 1] - logits[:, 0]).tolist()
        return found


@dataclass(frozen=True)
class Reranked:
    """The best hits of another retriever, in the cross-encoder's order; what it has not read is not found."""

    retriever: FilteredRetriever
    cross_encoder: CrossEncoder
    depth: int

    def search(
        self, query: str, *, k: int, sources: tuple[str, ...] | None = None, where: Filter | None = None
    ) -> list[Hit]:
        """See the protocol. At least ``k`` hits are read."""
        hits = self.retriever.search(query, k=max(k, self.depth), sources=sources, where=where or Filter())
        passages = [f"{context_of(hit.chunk.title, hit.chunk.heading)}\n{hit.chunk.text}" for hit in hits]
        scored = [
            Hit(hit.chunk, score) for hit, score in zip(hits, self.cross_encoder.score(query, passages), strict=True)
        ]
        return sorted(scored, key=lambda hit: (-hit.score, hit.chunk.chunk_id))[:k]
