"""Masked language models: any encoder that transformers has one for, computed at the masked tokens alone.

A checkpoint may hold the encoder without the head that guesses tokens (sentence encoders do); its head is then random
and has to be trained before it says anything.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own habit
from torch import Tensor, nn

from prima_ray.base import PrimaError, write_json
from prima_ray.data.batch import ImageTextBatch
from prima_ray.models.lora import LoraConfig, merge_lora, set_trainable
from prima_ray.models.pretrained import read_architecture, read_weights, refuse_missing
from prima_ray.models.tokenizer import TextTokenizer, resolve_text_model


class MaskedLM(nn.Module):
    """A model of transformers taken apart: the encoder sees whole texts, the head only the hidden states it is asked.

    The head is the model itself with its encoder replaced, so every architecture keeps its own. Where the output layer
    is tied to the input embeddings it stays so.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self._prefix: str = model.base_model_prefix
        self.encoder: nn.Module = model.base_model
        setattr(model, self._prefix, _Passed())
        self.head = model

    def set_trainable(
        self, part: Literal["head", "encoder"], trainable: Literal["lora", "full"], lora: LoraConfig
    ) -> None:
        """Free one part and freeze the other. What is tied to the encoder belongs to it."""
        self.requires_grad_(False)
        if part == "encoder":
            set_trainable(self.encoder, trainable, lora)
            return
        theirs = {id(parameter) for parameter in self.encoder.parameters()}
        for parameter in self.head.parameters():
            parameter.requires_grad_(id(parameter) not in theirs)

    def check_tokens(self, tokenizer: TextTokenizer) -> None:
        """See that the model can read whatever the tokenizer gives it.

        Raises:
            PrimaError: texts may be longer than its positions, or tokens have ids that it does not know.
        """
        config = self.head.config
        longest = getattr(config, "max_position_embeddings", None)
        if longest is not None and longest < tokenizer.max_tokens:
            raise PrimaError(f"text_tower.max_tokens is {tokenizer.max_tokens}, the model reads {longest}")
        if len(tokenizer.loaded) > config.vocab_size:
            raise PrimaError(
                f"the tokenizer has {len(tokenizer.loaded)} tokens, the model knows {config.vocab_size}",
                where=tokenizer.name,
                mend="Put the model's own tokenizer into its folder.",
            )

    def guess(self, batch: ImageTextBatch) -> tuple[Tensor, Tensor]:
        """The (M,) cross-entropies of the batch's masked tokens, row by row, and (M,) whether the best guess is right.

        Raises:
            ValueError: the batch has no masked tokens' labels.
        """
        if batch.input_ids is None or batch.attention_mask is None or batch.token_labels is None:
            raise ValueError("a masked language model needs tokens and the labels of those that are masked")
        hidden: Tensor = self.encoder(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask.long()
        ).last_hidden_state
        masked = batch.token_labels >= 0
        logits: Tensor = self.head(inputs_embeds=hidden[masked][None]).logits[0]
        labels = batch.token_labels[masked]
        return F.cross_entropy(logits.float(), labels, reduction="none"), logits.argmax(dim=-1) == labels

    def forward(self, batch: ImageTextBatch) -> dict[str, Tensor]:
        """(N,) float32 each: a text's summed cross-entropy, how many tokens were guessed right, and how many in all."""
        losses, right = self.guess(batch)
        if batch.token_labels is None:
            raise AssertionError
        rows = torch.nonzero(batch.token_labels >= 0)[:, 0]
        nothing = losses.new_zeros(len(batch))
        return {
            "loss_sum": nothing.index_add(0, rows, losses),
            "num_right": nothing.index_add(0, rows, right.float()),
            "num_masked": (batch.token_labels >= 0).sum(dim=1).float(),
        }

    def save(self, folder: Path, *, source: str, tokenizer: TextTokenizer, pooling: Literal["cls", "mean"]) -> None:
        """Write a folder of transformers in fp32, tokenizer included; LoRA adapters are folded in, in place.

        `AutoModel` reads the encoder from it, `AutoModelForMaskedLM` the head as well.

        Args:
            source: where the model came from, whose dropout rates the config keeps.
        """
        merge_lora(self.encoder)
        # Written aside: a folder that is there is whole.
        aside = folder.with_name(f".{folder.name}.part")
        shutil.rmtree(aside, ignore_errors=True)
        whole = self.head
        passed = getattr(whole, self._prefix)
        rates = {name: value for name, value in vars(_published(source)).items() if "dropout" in name}
        ours = {name: getattr(whole.config, name) for name in rates}
        setattr(whole, self._prefix, self.encoder)
        vars(whole.config).update(rates)
        try:
            whole.save_pretrained(aside)
        finally:
            setattr(whole, self._prefix, passed)
            vars(whole.config).update(ours)
        tokenizer.save(aside)
        # How sentence-transformers and `TextTowerConfig.pooling: auto` know.
        modes = {f"pooling_mode_{mode}_token{'s' * (mode == 'mean')}": mode == pooling for mode in ("cls", "mean")}
        write_json(aside / "1_Pooling" / "config.json", {"word_embedding_dimension": whole.config.hidden_size, **modes})
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)


class _Passed(nn.Module):
    """Stands where the encoder was: the hidden states come as `inputs_embeds`."""

    def forward(self, input_ids: Tensor | None = None, *, inputs_embeds: Tensor, **options: object) -> Any:
        from transformers.modeling_outputs import BaseModelOutput

        del input_ids, options
        return BaseModelOutput(last_hidden_state=inputs_embeds)


def load_masked_lm(source: str, *, key: str) -> tuple[MaskedLM, bool]:
    """A masked language model on the CPU in fp32 without dropout, and whether its head was in the checkpoint.

    A head that was not is random, from torch's global generator. On the meta device no weights are read.

    Args:
        source: a hub name, a local folder, or the offline text model.
        key: the config key of the local folder, for the mend.

    Raises:
        PrimaError: nothing there, damaged, or an architecture without a masked language model.
    """
    from transformers import MODEL_FOR_MASKED_LM_MAPPING, AutoModelForMaskedLM

    architecture = read_architecture(source, key=key)
    if type(architecture) not in MODEL_FOR_MASKED_LM_MAPPING:
        raise PrimaError(
            f"transformers has no masked language model of type {architecture.model_type}",
            where=source,
            mend="Name an encoder such as BERT or ModernBERT.",
        )
    model, missing = read_weights(AutoModelForMaskedLM, source, architecture, key=key)
    prefix = f"{model.base_model_prefix}."
    refuse_missing([name for name in missing if name.startswith(prefix)], source)
    return MaskedLM(model), not missing


def _published(source: str) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(resolve_text_model(source))
