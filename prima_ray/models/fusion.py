"""Fusion models: image and text features -> logits of the closed set of diagnoses.

`qwen3` is the method's (a language model reads a prompt and the features as tokens), `mlp` the simple rival. To add
one: a module with `forward(batch) -> {"logits"}`, its config with a `kind`, one line in `FusionConfig`.
"""

from __future__ import annotations

import string
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from prima_ray.base import InputPath, PrimaError, StrictConfig
from prima_ray.data.batch import ImageTextBatch
from prima_ray.models.classifier import mean_over_views
from prima_ray.models.lora import LoraConfig, Trainable, set_trainable
from prima_ray.models.pretrained import check_architecture, from_architecture, load_pretrained, refuse_attention_dropout
from prima_ray.models.tokenizer import OFFLINE_TEXT_MODEL, TextTokenizer

_SPECIALS = {"img_start": "start of the image", "txt_start": "start of the patient data"}


class FusionInputs(StrictConfig):
    """What the features and the closed set look like."""

    image_width: int
    text_width: int
    attribute_width: int = 0
    """Of the attributes as a vector; 0 where there is none."""
    grid: tuple[int, int]
    """Height and width of the image tokens."""
    class_phrases: tuple[str, ...]
    subject: str


class Qwen3FusionConfig(StrictConfig):
    """Qwen-3 with LoRA, or a small random one."""

    kind: Literal["qwen3"] = "qwen3"
    name: str | None = None
    """A hub name (`Qwen/Qwen3-1.7B`)."""
    path: InputPath | None = None
    """A local folder instead."""
    config: dict[str, Any] | None = None
    """Fields of transformers' Qwen3Config for random weights; `vocab_size` is the tokenizer's where absent."""
    tokenizer: str | None = None
    """Another model's tokenizer; needed where the weights are random. Default: the offline text model's."""
    trainable: Trainable = "lora"
    lora: LoraConfig = LoraConfig(rank=16)
    image_stride: int = Field(default=2, ge=1)
    """Down-sampling of the image tokens, each way."""
    text_stride: int = Field(default=2, ge=1)
    """Down-sampling of the text tokens."""
    local_tokens: bool = True
    """False: global tokens alone."""
    shortcut: bool = False
    """Linear layers from the global features, and the attributes' vector, to the logits beside the language model."""
    attention: Literal["sdpa", "eager"] = "sdpa"
    gradient_checkpointing: bool = False

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if sum(item is not None for item in (self.name, self.path, self.config)) != 1:
            raise ValueError("give one of name, path and config")
        if self.config is not None and self.trainable == "lora":
            raise ValueError("LoRA over random weights adapts noise: set trainable to full, or name a model")
        if self.config is not None and self.config.get("model_type", "qwen3") != "qwen3":
            raise ValueError(f"config.model_type is {self.config['model_type']}, expected qwen3")
        refuse_attention_dropout(self.config or {})
        return self

    def check_architecture(self) -> None:
        """Look for mistakes in `config` before anything is built from it.

        Raises:
            PrimaError: a field that is not of Qwen3Config, or a value that it cannot have.
        """
        if self.config is not None:
            check_architecture({**self.config, "model_type": "qwen3"}, key="fusion.config")

    def build(self, inputs: FusionInputs) -> Qwen3Fusion:
        """The model on the CPU. On the meta device (`with torch.device("meta")`) no weights are read.

        Raises:
            PrimaError: the model is neither in the folder nor to be had by name, or is no Qwen-3.
        """
        return Qwen3Fusion(self, inputs)


class MlpFusionConfig(StrictConfig):
    """Mean global image feature and metadata, concatenated, through an MLP."""

    kind: Literal["mlp"] = "mlp"
    hidden: int = Field(default=512, gt=0)
    reads: Literal["text", "attributes"] = "text"
    """The global text feature, or the attributes' vector."""

    def build(self, inputs: FusionInputs) -> MlpFusion:
        """The model on the CPU."""
        return MlpFusion(self, inputs)


FusionConfig = Annotated[Qwen3FusionConfig | MlpFusionConfig, Field(discriminator="kind")]


class MlpFusion(nn.Module):
    """See `MlpFusionConfig`."""

    def __init__(self, config: MlpFusionConfig, inputs: FusionInputs) -> None:
        super().__init__()
        self.config, self.inputs = config, inputs
        metadata = inputs.text_width if config.reads == "text" else inputs.attribute_width
        self.image_norm = nn.LayerNorm(inputs.image_width)
        self.text_norm = nn.LayerNorm(metadata) if config.reads == "text" else nn.Identity()
        self.layers = nn.Sequential(
            nn.Linear(inputs.image_width + metadata, config.hidden),
            nn.GELU(),
            nn.Linear(config.hidden, len(inputs.class_phrases)),
        )

    def forward(self, batch: ImageTextBatch) -> dict[str, Tensor]:
        """Cached features of N exams -> logits (N, C)."""
        features = _features(batch)
        image = mean_over_views(self.image_norm(features[0]), batch.image_mask)
        metadata = features[2] if self.config.reads == "text" else _attributes(batch)
        return {"logits": self.layers(torch.cat([image, self.text_norm(metadata)], dim=-1))}


class Qwen3Fusion(nn.Module):
    """Prompt, <img_start>, global and local image tokens, <txt_start>, global and local text tokens, answer cue. Where
    attributes are given as a vector too, a token of it stands behind the global text token.

    Slots that an exam lacks (photos, text tokens) go behind its end and are masked, so neither an exam's logits nor
    the places that its random masks are keyed by depend on its neighbours in the batch.
    """

    def __init__(self, config: Qwen3FusionConfig, inputs: FusionInputs) -> None:
        super().__init__()
        self.config, self.inputs = config, inputs
        tokenizer = fusion_tokenizer(config)
        self.backbone, output_layer = _build_backbone(config, tokenizer)
        set_trainable(self.backbone, config.trainable, config.lora)
        if config.gradient_checkpointing:
            self.backbone.gradient_checkpointing_enable()
        width = int(self.backbone.config.hidden_size)
        self.image_global = _mlp(inputs.image_width, width)
        self.text_global = _mlp(inputs.text_width, width)
        self.attributes = _plain_mlp(inputs.attribute_width, width) if inputs.attribute_width else None
        self.shortcut = Shortcut(inputs) if config.shortcut else None
        if config.local_tokens:
            self.image_local = ImageProjector(inputs.image_width, width, stride=config.image_stride, grid=inputs.grid)
            self.text_local = TextProjector(inputs.text_width, width, stride=config.text_stride)
        prompt, cue, letters = prompt_tokens(inputs, tokenizer)
        self.prompt_ids: Tensor
        self.cue_ids: Tensor
        self.class_ids: Tensor
        for name, ids in (("prompt_ids", prompt), ("cue_ids", cue), ("class_ids", letters)):
            self.register_buffer(name, torch.tensor(ids, dtype=torch.int64), persistent=False)
        rows = self.backbone.get_input_embeddings().weight
        with torch.no_grad():
            described = [
                rows[tokenizer.loaded(text, add_special_tokens=False)["input_ids"]].mean(dim=0)
                for text in _SPECIALS.values()
            ]
        self.specials = nn.Parameter(torch.stack(described).float())
        # Classes past the alphabet, and models whose output rows are not their input rows, have rows of their own.
        own = len(inputs.class_phrases) - len(letters)
        self.extra_classes = nn.Parameter(torch.randn(own, width) * 0.02) if own else None
        self.output_rows: nn.Parameter | None = None
        if output_layer is not None:
            self.output_rows = nn.Parameter(
                output_layer.weight.detach()[list(letters)].clone(), requires_grad=config.trainable == "full"
            )

    def forward(self, batch: ImageTextBatch) -> dict[str, Tensor]:
        """Cached features of N exams -> logits (N, C) over the class tokens at the last position."""
        image_cls, image_seq, text_cls, text_seq = _features(batch)
        count = len(batch)
        views = _mask(batch.image_mask, image_cls)
        tokens = _mask(batch.attention_mask, text_seq)
        always = torch.ones(count, 1, dtype=torch.bool, device=image_cls.device)
        parts: list[tuple[Tensor, Tensor]] = [(self.specials[0].expand(count, 1, -1), always)]
        parts.append((self.image_global(image_cls), views))
        if self.config.local_tokens:
            local = self.image_local(image_seq)
            parts.append((local.flatten(1, 2), views.repeat_interleave(local.shape[2], dim=1)))
        parts.append((self.specials[1].expand(count, 1, -1), always))
        parts.append((self.text_global(text_cls)[:, None], always))
        if self.attributes is not None:
            parts.append((self.attributes(_attributes(batch))[:, None], always))
        if self.config.local_tokens:
            parts.append(self.text_local(text_seq, tokens))
        parts.append(self._words(self.cue_ids, always))
        dtype = self.specials.dtype
        embeddings = torch.cat([part.to(dtype) for part, _ in parts], dim=1)
        mask = torch.cat([part for _, part in parts], dim=1)
        embeddings, mask = _pack(embeddings, mask)
        sequence = self._after_prompt(embeddings, mask)
        hidden = sequence[torch.arange(count, device=mask.device), mask.sum(dim=1) - 1]
        with torch.autocast(hidden.device.type, enabled=False):
            logits = hidden.float() @ self._class_rows().float().T
            return {"logits": logits if self.shortcut is None else logits + self.shortcut(batch)}

    def _after_prompt(self, embeddings: Tensor, mask: Tensor) -> Tensor:
        """(N, S, D) and its mask -> hidden states (N, S, D) of what follows the prompt.

        The prompt is the same for every exam, and nothing is before it: it is read once, and its keys and values serve
        all. Not for one exam alone, nor where each has a dropout of its own, nor where activations are not kept.
        """
        count, prompt = len(embeddings), self._words(self.prompt_ids, mask[:1, :1])[0].to(embeddings.dtype)
        seen = mask.new_ones(count, prompt.shape[1])
        whole = torch.cat([seen, mask], dim=1).long()
        dropped = self.config.trainable == "lora" and self.config.lora.dropout > 0
        if count == 1 or (self.training and (dropped or self.config.gradient_checkpointing)):
            joined = torch.cat([prompt.expand(count, -1, -1), embeddings], dim=1)
            found: Tensor = self.backbone(inputs_embeds=joined, attention_mask=whole, use_cache=False).last_hidden_state
            return found[:, prompt.shape[1] :]
        past = self.backbone(inputs_embeds=prompt, use_cache=True).past_key_values
        past.batch_repeat_interleave(count)
        after: Tensor = self.backbone(
            inputs_embeds=embeddings, attention_mask=whole, past_key_values=past, use_cache=True
        ).last_hidden_state
        return after

    def _words(self, ids: Tensor, always: Tensor) -> tuple[Tensor, Tensor]:
        embedded: Tensor = self.backbone.get_input_embeddings()(ids)
        return embedded.expand(len(always), -1, -1), always.expand(-1, len(ids))

    def _class_rows(self) -> Tensor:
        # Only the rows of the class tokens: the whole vocabulary would be 152k logits an exam.
        rows = self.backbone.get_input_embeddings()(self.class_ids) if self.output_rows is None else self.output_rows
        return rows if self.extra_classes is None else torch.cat([rows, self.extra_classes.to(rows.dtype)])


class Shortcut(nn.Module):
    """Global features -> logits (N, C), linear and from zero: what each modality says by itself."""

    def __init__(self, inputs: FusionInputs) -> None:
        super().__init__()
        metadata, classes = inputs.attribute_width or inputs.text_width, len(inputs.class_phrases)
        self.reads_vector = inputs.attribute_width > 0
        self.image_norm = nn.LayerNorm(inputs.image_width)
        self.image, self.metadata = nn.Linear(inputs.image_width, classes), nn.Linear(metadata, classes)
        for layer in (self.image, self.metadata):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, batch: ImageTextBatch) -> Tensor:
        """See the class."""
        image_cls, _, text_cls, _ = _features(batch)
        image = mean_over_views(self.image(self.image_norm(image_cls.float())), batch.image_mask)
        metadata: Tensor = self.metadata(_attributes(batch) if self.reads_vector else text_cls.float())
        return image + metadata


class ImageProjector(nn.Module):
    """2-D convolution block: (N, V, K, C) -> (N, V, K', D), down-sampled by the stride each way."""

    def __init__(self, in_width: int, width: int, *, stride: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.grid = grid
        self.norm = nn.LayerNorm(in_width)
        self.reduce = nn.Conv2d(in_width, width, kernel_size=3, stride=stride, padding=1)
        self.mix = nn.Conv2d(width, width, kernel_size=1)

    def forward(self, tokens: Tensor) -> Tensor:
        """See the class."""
        maps = self.norm(tokens).flatten(0, 1).transpose(1, 2).unflatten(2, self.grid)
        mixed: Tensor = self.mix(nn.functional.gelu(self.reduce(maps)))
        return mixed.flatten(2).transpose(1, 2).reshape(*tokens.shape[:2], -1, mixed.shape[1])


class TextProjector(nn.Module):
    """1-D convolution block: (N, L, T) and its mask -> (N, L', D) and its mask, down-sampled by the stride."""

    def __init__(self, in_width: int, width: int, *, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.norm = nn.LayerNorm(in_width)
        self.reduce = nn.Conv1d(in_width, width, kernel_size=3, stride=stride, padding=1)
        self.mix = nn.Conv1d(width, width, kernel_size=1)

    def forward(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """See the class."""
        # Padding is zeroed before the kernel reaches over it: the same as the convolution's own padding.
        clean = self.norm(tokens) * mask[..., None].to(tokens.dtype)
        mixed: Tensor = self.mix(nn.functional.gelu(self.reduce(clean.transpose(1, 2)))).transpose(1, 2)
        return mixed, mask[:, :: self.stride]


def _features(batch: ImageTextBatch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    parts = (batch.image_cls, batch.image_seq, batch.text_cls, batch.text_seq)
    if any(part is None for part in parts):
        raise ValueError("a fusion model reads features: image_cls, image_seq, text_cls and text_seq")
    return parts  # type: ignore[return-value]


def _attributes(batch: ImageTextBatch) -> Tensor:
    if batch.attributes is None:
        raise ValueError("this fusion model reads the attributes as a vector too")
    return batch.attributes


def _pack(embeddings: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """(N, S, D) and its mask (N, S), with what is masked behind what is not."""
    order = mask.to(torch.int8).argsort(dim=1, descending=True, stable=True)
    return embeddings.gather(1, order[..., None].expand_as(embeddings)), mask.gather(1, order)


def _mask(mask: Tensor | None, like: Tensor) -> Tensor:
    return torch.ones(like.shape[:2], dtype=torch.bool, device=like.device) if mask is None else mask


def _mlp(in_width: int, width: int) -> nn.Module:
    return nn.Sequential(nn.LayerNorm(in_width), nn.Linear(in_width, width), nn.GELU(), nn.Linear(width, width))


def _plain_mlp(in_width: int, width: int) -> nn.Module:
    """Without a norm before it: of a one-hot vector it would change what is said by how much is known."""
    return nn.Sequential(nn.Linear(in_width, width), nn.GELU(), nn.Linear(width, width))


def fusion_tokenizer(config: Qwen3FusionConfig) -> TextTokenizer:
    """The tokenizer of the model, or of the one that `tokenizer` names."""
    return TextTokenizer(config.tokenizer or config.path or config.name or OFFLINE_TEXT_MODEL, max_tokens=4096)


def prompt_tokens(inputs: FusionInputs, tokenizer: TextTokenizer) -> tuple[list[int], list[int], list[int]]:
    """Token ids of the prompt, of the answer cue, and of the classes' letters (at most 26).

    Raises:
        PrimaError: a letter is not one token of its own in this vocabulary.
    """
    letters = string.ascii_uppercase[: len(inputs.class_phrases)]
    names = [*letters, *(f"class {number + 1}" for number in range(len(letters), len(inputs.class_phrases)))]
    options = "; ".join(f"{name}: {phrase}" for name, phrase in zip(names, inputs.class_phrases, strict=True))
    prompt = f"Images and data of a patient with {inputs.subject}. Which diagnosis is it? {options}."

    def ids(text: str) -> list[int]:
        found: list[int] = tokenizer.loaded(text, add_special_tokens=False)["input_ids"]
        return found

    # With the space before them: so they stand in the prompt, and so one would follow the cue.
    singles = [ids(f" {letter}") for letter in letters]
    if any(len(single) != 1 for single in singles) or len({single[0] for single in singles}) < len(singles):
        raise PrimaError("the letters A, B, C ... are not single tokens of this tokenizer", where=tokenizer.name)
    return ids(prompt), ids("The diagnosis is"), [single[0] for single in singles]


def _build_backbone(config: Qwen3FusionConfig, tokenizer: TextTokenizer) -> tuple[Any, Any]:
    """The model without its output layer, and that layer where it is not the embeddings again (Qwen3-8B's is not)."""
    if config.config is not None:
        fields = {"tie_word_embeddings": True, **config.config, "model_type": "qwen3"}
        return from_architecture(fields, tokenizer.loaded, attention=config.attention), None
    return load_pretrained(
        config.path or config.name or "", key="fusion.path", model_type="qwen3", attention=config.attention
    )
