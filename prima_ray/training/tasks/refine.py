"""Refine: masked-language modelling of texts, of an encoder or of the head that it lacks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from prima_ray.base import PrimaError
from prima_ray.data.batch import ImageTextBatch
from prima_ray.data.masking import Masking, MaskingCollator, ReplacementConfig
from prima_ray.models.lora import LoraConfig
from prima_ray.models.masked_lm import MaskedLM, load_masked_lm
from prima_ray.models.tokenizer import TextTokenizer
from prima_ray.training.contexts import StreamSpec, WorkerContext
from prima_ray.training.task import seeded_init


@dataclass(frozen=True)
class RefineTask:
    """See the module. Texts do not meet in the loss: it is the mean over all masked tokens of the global batch."""

    interacts: ClassVar[bool] = False
    batch_level: ClassVar[tuple[str, ...]] = ()
    metric_names: ClassVar[tuple[str, ...]] = ("loss", "accuracy")

    seed: int
    part: Literal["head", "encoder"]
    """What trains; the other is frozen."""
    source: str
    """A hub name or a folder."""
    tokenizer: TextTokenizer
    trainable: Literal["lora", "full"]
    """Of the encoder."""
    lora: LoraConfig
    mask_rate: float
    replacement: ReplacementConfig

    @property
    def kind(self) -> str:
        return "refine" if self.part == "encoder" else "refine: masked-LM head"

    def prepare(self, context: WorkerContext) -> Self:
        del context
        return self

    def build(self) -> nn.Module:
        with seeded_init(self.seed, "masked-LM head"):
            model, _ = load_masked_lm(self.source, key="text_tower.path")
        with seeded_init(self.seed, "adapters"):
            model.set_trainable(self.part, self.trainable, self.lora)
        return model

    def untrained(self) -> MaskedLM:
        """The model as it is before training, frozen, in eval mode."""
        model, _ = load_masked_lm(self.source, key="text_tower.path")
        return model.eval().requires_grad_(False)

    def stream(self, *, train: bool) -> StreamSpec:
        loaded = self.tokenizer.loaded
        if loaded.mask_token_id is None:
            raise PrimaError(
                "this tokenizer has no mask token",
                where=self.source,
                mend="Name an encoder such as BERT or ModernBERT.",
            )
        masking = Masking(self.mask_rate, self.replacement, mask_id=loaded.mask_token_id, vocabulary=len(loaded))
        return StreamSpec(MaskingCollator(seed=self.seed, train=train, tokenizer=self.tokenizer, masking=masking))

    def batch_weight(self, batch: ImageTextBatch) -> Tensor:
        if batch.token_labels is None:
            raise ValueError("refine needs the labels of masked tokens")
        return (batch.token_labels >= 0).sum().float()

    def condense(self, outputs: Mapping[str, Tensor], batch: ImageTextBatch) -> dict[str, Tensor]:
        del batch
        return dict(outputs)

    def loss(
        self, outputs: Mapping[str, Tensor], batch: ImageTextBatch, *, gather: object, total_weight: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        del batch, gather
        # A batch of padding alone has the weight 0 and the loss 0, not their quotient.
        return outputs["loss_sum"].sum() / total_weight.clamp(min=torch.finfo(torch.float32).tiny), {}

    def observe(self, outputs: Mapping[str, Tensor], batch: ImageTextBatch, *, gather: object) -> dict[str, Tensor]:
        del batch, gather
        return dict(outputs)

    def metrics(self, observed: Mapping[str, Tensor]) -> dict[str, float]:
        sums = {name: float(values.double().sum()) for name, values in observed.items()}
        return {
            "loss": sums["loss_sum"] / max(sums["num_masked"], 1.0),
            "accuracy": sums["num_right"] / max(sums["num_masked"], 1.0),
        }
