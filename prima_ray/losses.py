"""The four alignment losses of PRIMA (arXiv 2602.23297): pure functions of tensors, their configs, their sum.

Inputs are un-normalised projections of N exams; only sim(a, b) = cos(a, b) / temperature normalises. Half precision
is computed in float32, float64 stays float64. All losses share two keywords:

``weights`` (N,): 0 marks a padding exam. It leaves rows and columns: the value is the one without it.
``gather``: a callable (n, ...) -> (n of every rank, ...), differentiable (`training.gather.Gather`). The arguments are
then this rank's exams, equally many on every rank, and the candidates those of all ranks; the mean over the ranks of
the results is the loss of the global batch. No tensor is (global x global), and tokens are never gathered.

Patches and tokens meet within an exam only. So the sum of all losses comes in two halves: `condense_outputs` makes of
any few exams' outputs what the losses need of each, without sequences; `align_losses` is over all exams' of those.

Shapes that do not fit, and temperatures that are not positive, raise ValueError.

To add a loss: the function, its config with a `compute`, one line in `AlignLossConfig`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Literal, Self

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own habit
from pydantic import Field, model_validator
from torch import Tensor

from prima_ray.base import StrictConfig

GatherFunction = Callable[[Tensor], Tensor]
Temperature = float | Tensor


# ------------------------------------------------------------------------------------------------ shared pieces


def _precise(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _unit(x: Tensor) -> Tensor:
    return F.normalize(_precise(x), dim=-1, eps=1e-12)


def _check_shapes(**arguments: tuple[Tensor | None, str]) -> None:
    """Compare shapes with their letters, ``image_cls=(tensor, "V N D")``: one letter is one size."""
    sizes: dict[str, tuple[int, str]] = {}
    for name, (tensor, letters) in arguments.items():
        if tensor is None:
            continue
        shape, expected = tuple(tensor.shape), tuple(letters.split())
        if len(shape) != len(expected) or 0 in shape:
            raise ValueError(f"{name}: expected the shape ({', '.join(expected)}), got {shape}")
        for letter, size in zip(expected, shape, strict=True):
            known, owner = sizes.setdefault(letter, (size, name))
            if known != size:
                raise ValueError(f"{name}: {letter} is {size} in {shape}, but {known} in {owner}")


def _check_temperature(temperature: Temperature) -> Temperature:
    if isinstance(temperature, Tensor):
        if temperature.numel() != 1:
            raise ValueError(f"temperature: expected one number, got the shape {tuple(temperature.shape)}")
        return temperature.reshape(())
    if not temperature > 0:
        raise ValueError(f"temperature: expected a number above 0, got {temperature}")
    return temperature


class _Exams:
    """This rank's exams as rows, those of all ranks as columns; padding is in neither."""

    def __init__(self, like: Tensor, count: int, weights: Tensor | None, gather: GatherFunction | None) -> None:
        ones = torch.ones(count, device=like.device, dtype=_precise(like).dtype)
        weights = ones if weights is None else weights.to(ones)
        self.gather = gather
        self.real = weights > 0
        self.real_columns = self.all(weights) > 0
        if len(self.real_columns) % count:
            raise ValueError(f"gather: {len(self.real_columns)} rows of {count}; every rank needs equally many exams")
        self.world_size = len(self.real_columns) // count
        first = 0
        if gather is not None:
            rank = getattr(gather, "rank", None)
            first = count * (torch.distributed.get_rank() if rank is None else int(rank))
        self.positions = first + torch.arange(count, device=like.device)
        """(N,) the column that each row is."""

    @property
    def num_real(self) -> Tensor:
        """() exams of the global batch; 1 where all are padding, so that it can divide."""
        return self.real_columns.sum().clamp(min=1)

    def all(self, x: Tensor) -> Tensor:
        """(N, ...) -> (N of all ranks, ...)."""
        return x if self.gather is None else self.gather(x)

    def mean(self, values: Tensor) -> Tensor:
        """(..., N) -> (): mean over the exams of the global batch and the leading dimensions, this rank's share."""
        share = torch.where(self.real, values, torch.zeros_like(values)).sum(dim=-1).mean()
        return share * self.world_size / self.num_real

    def mask(self, logits: Tensor) -> Tensor:
        """(..., N of all ranks): padding becomes too low to count."""
        return _exclude(logits, ~self.real_columns)

    def cross_entropy(self, logits: Tensor) -> Tensor:
        """(..., N, columns) -> (..., N): -log softmax at each row's own column."""
        own = logits.gather(-1, self.positions.expand(logits.shape[:-1])[..., None])[..., 0]
        return logits.logsumexp(dim=-1) - own

    def both_ways(self, image: Tensor, text: Tensor, temperature: Temperature) -> tuple[Tensor, Tensor]:
        """Unit vectors (V, N, D) and (N, D) -> sims of these images to all texts, of these texts to all images."""
        all_images = self.all(image.transpose(0, 1)).transpose(0, 1)
        to_text = image @ self.all(text).T / temperature
        to_image = text @ all_images.transpose(1, 2) / temperature
        return self.mask(to_text), self.mask(to_image)


def _exclude(logits: Tensor, excluded: Tensor) -> Tensor:
    # A finite floor: where everything is excluded, -inf would make NaN of values and gradients. A quarter of the
    # range, since the difference of two such values must still be finite.
    return logits.masked_fill(excluded, torch.finfo(logits.dtype).min / 4)


# --------------------------------------------------------------------------------------------------- the losses


def image_consistency_loss(
    view_a: Tensor,
    view_b: Tensor,
    *,
    temperature: Temperature,
    symmetric: bool = True,
    gather: GatherFunction | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """L_img: each view 1 finds view 2 of its exam among 2N - 1 candidates, view 2 of all and view 1 of the others.

    Args:
        view_a: (N, D) global image embeddings of view 1.
        view_b: (N, D) of view 2.
        symmetric: mean over the anchors of both views (NT-Xent, arXiv 2002.05709); False: view 1 only, as printed.

    Returns:
        () the loss.
    """
    _check_shapes(view_a=(view_a, "N D"), view_b=(view_b, "N D"), weights=(weights, "N"))
    temperature = _check_temperature(temperature)
    exams = _Exams(view_a, len(view_a), weights, gather)
    views = torch.stack([_unit(view_a), _unit(view_b)], dim=1)
    candidates = exams.all(views)
    itself = F.one_hot(exams.positions, len(candidates)).bool()

    def one_side(anchor: int, positive: int) -> Tensor:
        across = exams.mask(views[:, anchor] @ candidates[:, positive].T / temperature)
        within = exams.mask(views[:, anchor] @ candidates[:, anchor].T / temperature)
        return exams.mean(exams.cross_entropy(torch.cat([across, _exclude(within, itself)], dim=1)))

    return (one_side(0, 1) + one_side(1, 0)) / 2 if symmetric else one_side(0, 1)


def global_semantic_loss(
    image_cls: Tensor,
    text_cls: Tensor,
    *,
    temperature: Temperature,
    gather: GatherFunction | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """L_glo: symmetric InfoNCE between images and texts, mean over the two directions and the views.

    Args:
        image_cls: (V, N, D).
        text_cls: (N, D).

    Returns:
        () the loss.
    """
    _check_shapes(image_cls=(image_cls, "V N D"), text_cls=(text_cls, "N D"), weights=(weights, "N"))
    exams = _Exams(text_cls, len(text_cls), weights, gather)
    return exams.mean(_info_nce(exams, _unit(image_cls), _unit(text_cls), _check_temperature(temperature)))


def _info_nce(exams: _Exams, image: Tensor, text: Tensor, temperature: Temperature) -> Tensor:
    """Unit vectors (V, N, D) and (N, D) -> (V, N), the mean of both directions."""
    to_text, to_image = exams.both_ways(image, text, temperature)
    return (exams.cross_entropy(to_text) + exams.cross_entropy(to_image)) / 2


def local_semantic_loss(
    image_seq: Tensor,
    text_seq: Tensor,
    text_mask: Tensor,
    *,
    temperature: Temperature,
    attention: bool = True,
    as_printed: bool = False,
    gather: GatherFunction | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """L_loc: each token finds its context, an attention-weighted mean of the patches, and each context its token.

    The negatives are the other real tokens of the same exam. Mean over an exam's real tokens, then over exams, views
    and directions; an exam with fewer than two real tokens counts with the value zero.

    Args:
        image_seq: (V, N, K, D) patches.
        text_seq: (N, L, D) tokens.
        text_mask: (N, L) true on real tokens.
        attention: False is the ablation `loc_dir`: the mean patch against the mean real token, symmetric InfoNCE over
            the exams of the batch. An exam without real tokens then counts zero and is nobody's candidate.
        as_printed: both directions share the denominator over contexts, so that the second adds nothing.

    Returns:
        () the loss.
    """
    _check_shapes(
        image_seq=(image_seq, "V N K D"), text_seq=(text_seq, "N L D"), text_mask=(text_mask, "N L"),
        weights=(weights, "N"),
    )  # fmt: skip
    temperature = _check_temperature(temperature)
    exams = _Exams(text_seq, len(text_seq), weights, gather)
    if attention:
        return exams.mean(_token_contrast(image_seq, text_seq, text_mask, temperature, as_printed=as_printed))
    return _mean_contrast(exams, *_mean_features(image_seq, text_seq, text_mask), temperature)


def _mean_features(image_seq: Tensor, text_seq: Tensor, text_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean patches (V, N, D), mean real tokens (N, D), and (N,) whether there is a real token."""
    tokens, mask = _precise(text_seq), text_mask.bool()
    mean_token = (tokens * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True).clamp(min=1)
    return _precise(image_seq).mean(dim=2), mean_token, mask.any(dim=1)


def _mean_contrast(
    exams: _Exams, mean_patch: Tensor, mean_token: Tensor, described: Tensor, temperature: Temperature
) -> Tensor:
    with_text = _Exams(mean_token, len(mean_token), described.to(mean_token) * exams.real, exams.gather)
    values = _info_nce(with_text, _unit(mean_patch), _unit(mean_token), temperature)
    return exams.mean(torch.where(described, values, torch.zeros_like(values)))


def _token_contrast(
    image_seq: Tensor, text_seq: Tensor, text_mask: Tensor, temperature: Temperature, *, as_printed: bool
) -> Tensor:
    """Patches (V, N, K, D), tokens (N, L, D), mask (N, L) -> (V, N), from each exam alone."""
    patches, tokens, mask = _precise(image_seq), _precise(text_seq), text_mask.bool()
    # The attention sees un-normalised projections: between unit vectors it would be almost flat.
    scores = torch.einsum("nld,vnkd->vnlk", tokens, patches) / tokens.shape[-1] ** 0.5
    contexts = _unit(torch.einsum("vnlk,vnkd->vnld", scores.softmax(dim=-1), patches))
    logits = torch.einsum("nld,vnmd->vnlm", _unit(tokens), contexts) / temperature
    own = logits.diagonal(dim1=-2, dim2=-1)
    to_context = _exclude(logits, ~mask[:, None, :]).logsumexp(dim=-1) - own
    to_token = to_context if as_printed else _exclude(logits, ~mask[:, :, None]).logsumexp(dim=-2) - own
    real = torch.where(mask, (to_context + to_token) / 2, torch.zeros_like(own)).sum(dim=-1)
    count = mask.sum(dim=-1)
    return torch.where(count >= 2, real / count.clamp(min=1), torch.zeros_like(real))


def metadata_similarity(
    attributes: Tensor, *, temperature: Temperature, gather: GatherFunction | None = None
) -> Tensor:
    """G_ij = <y_i, y_j> / tau_label, before any softmax.

    Args:
        attributes: (N, A) the weighted one-hot vectors y (`data.attribute_vectors.SoftTargetEncoder`); for the ablation
            `sup_con` they hold the class alone.
        temperature: tau_label.

    Returns:
        (N, N); with ``gather`` (N, N of all ranks), this rank's rows of a symmetric matrix.
    """
    _check_shapes(attributes=(attributes, "N A"))
    y = _precise(attributes)
    return y @ (y if gather is None else gather(y)).T / _check_temperature(temperature)


def soft_semantic_loss(
    image_cls: Tensor,
    text_cls: Tensor,
    similarity: Tensor,
    *,
    temperature: Temperature,
    as_printed: bool = False,
    gather: GatherFunction | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """L_soft: cross-entropy of the image-text softmax against targets from the metadata, in both directions.

    The target of image i over texts is softmax_j(G_ij), that of text j over images softmax_i(G_ij). An exam with
    G_ii = 0, whose y is all zero, has itself as its target. Mean over exams, directions and views.

    Args:
        image_cls: (V, N, D).
        text_cls: (N, D).
        similarity: (N, N), G of `metadata_similarity`; with ``gather`` (N, N of all ranks), rows of a symmetric G.
        as_printed: s_ij = softmax_j(G_ij) weights the pair (image i, text j) in both directions, and the result is
            divided by N once more (the printed factor is 1 / (4 N^2) for two views).

    Returns:
        () the loss.
    """
    _check_shapes(
        image_cls=(image_cls, "V N D"), text_cls=(text_cls, "N D"), similarity=(similarity, "N M"),
        weights=(weights, "N"),
    )  # fmt: skip
    exams = _Exams(text_cls, len(text_cls), weights, gather)
    if similarity.shape[1] != len(exams.real_columns):
        raise ValueError(
            f"similarity: expected a column for each of the {len(exams.real_columns)} exams of the global batch, "
            f"got the shape {tuple(similarity.shape)}"
        )
    image_target, text_target = _soft_targets(_precise(similarity), exams, as_printed=as_printed)
    to_text, to_image = exams.both_ways(_unit(image_cls), _unit(text_cls), _check_temperature(temperature))
    entropy = image_target * to_text.log_softmax(dim=-1) + text_target * to_image.log_softmax(dim=-1)
    loss = exams.mean(-entropy.sum(dim=-1) / 2)
    return loss / exams.num_real if as_printed else loss


def _soft_targets(similarity: Tensor, exams: _Exams, *, as_printed: bool) -> tuple[Tensor, Tensor]:
    """Targets of this rank's images over all texts and of this rank's texts over all images, (N, columns) each."""
    itself = F.one_hot(exams.positions, similarity.shape[1]).to(similarity.dtype)
    no_attributes = similarity.gather(1, exams.positions[:, None]) == 0
    rows = exams.mask(similarity)
    image_target = torch.where(no_attributes, itself, rows.softmax(dim=1))
    # Row j: G_ij over the images i. Only one process has whole columns; with a gather G is symmetric.
    columns = similarity.T if exams.gather is None else similarity
    if not as_printed:
        return image_target, torch.where(no_attributes, itself, exams.mask(columns).softmax(dim=1))
    # At most 0 between real exams; clamped, since padding rows must not overflow: 0 * inf would enter the gradients.
    printed = exams.mask((columns - exams.all(rows.logsumexp(dim=1))).clamp(max=0)).exp()
    return image_target, torch.where(exams.all(no_attributes.to(itself)).T > 0, itself, printed)


# ------------------------------------------------------------------------------------------ configs and the sum

FixedTemperature = Annotated[float, Field(gt=0)] | None
"""A number, or `null` for the learnable temperature of the model, which all losses with `null` share."""


@dataclass(frozen=True)
class AlignEmbeddings:
    """What the losses of one batch are computed from; shapes as in the functions."""

    image_cls: Tensor
    text_cls: Tensor
    local: Mapping[str, Tensor]
    """What `LocalSemanticConfig.condense` made, exams first."""
    learnable_temperature: Tensor
    attributes: Tensor | None
    label_temperature: float
    weights: Tensor | None
    gather: GatherFunction | None

    def temperature(self, fixed: float | None) -> Temperature:
        return self.learnable_temperature if fixed is None else fixed


class ImageConsistencyConfig(StrictConfig):
    """L_img."""

    weight: float = Field(default=0.2, ge=0)
    temperature: FixedTemperature = 0.1
    symmetric: bool = True
    """False: anchors of view 1 only, as printed."""

    def compute(self, batch: AlignEmbeddings) -> Tensor:
        if len(batch.image_cls) != 2:
            raise ValueError(f"image consistency compares two views of an exam, got {len(batch.image_cls)}")
        return image_consistency_loss(
            *batch.image_cls,
            temperature=batch.temperature(self.temperature),
            symmetric=self.symmetric,
            gather=batch.gather,
            weights=batch.weights,
        )


class GlobalSemanticConfig(StrictConfig):
    """L_glo."""

    weight: float = Field(default=0.3, ge=0)
    temperature: FixedTemperature = None

    def compute(self, batch: AlignEmbeddings) -> Tensor:
        return global_semantic_loss(
            batch.image_cls,
            batch.text_cls,
            temperature=batch.temperature(self.temperature),
            gather=batch.gather,
            weights=batch.weights,
        )


class LocalSemanticConfig(StrictConfig):
    """L_loc."""

    weight: float = Field(default=0.2, ge=0)
    temperature: FixedTemperature = 0.1
    variant: Literal["attention", "loc_dir"] = "attention"
    """`loc_dir`: the mean patch against the mean token, over the exams of the batch."""
    as_printed: bool = False
    """Both directions over contexts: the second then equals the first."""

    @model_validator(mode="after")
    def _printed_attention(self) -> Self:
        if self.as_printed and self.variant != "attention":
            raise ValueError("as_printed belongs to `variant: attention`; loc_dir has no printed form")
        return self

    def condense(self, image_seq: Tensor, text_seq: Tensor, text_mask: Tensor, learned: Tensor) -> dict[str, Tensor]:
        """Sequences (V, N, K, D) and (N, L, D) -> what the loss needs of each exam, exams first.

        `token_contrast` (N, V), each exam's loss by itself; for `loc_dir`, which spans the batch, `mean_patch`
        (N, V, D), `mean_token` (N, D) and `described` (N,).
        """
        _check_shapes(
            image_seq=(image_seq, "V N K D"), text_seq=(text_seq, "N L D"), text_mask=(text_mask, "N L")
        )  # fmt: skip
        if self.variant == "attention":
            temperature = _check_temperature(learned if self.temperature is None else self.temperature)
            values = _token_contrast(image_seq, text_seq, text_mask, temperature, as_printed=self.as_printed)
            return {"token_contrast": values.transpose(0, 1)}
        patch, token, described = _mean_features(image_seq, text_seq, text_mask)
        return {"mean_patch": patch.transpose(0, 1), "mean_token": token, "described": described}

    def compute(self, batch: AlignEmbeddings) -> Tensor:
        exams = _Exams(batch.text_cls, len(batch.text_cls), batch.weights, batch.gather)
        if self.variant == "attention":
            return exams.mean(batch.local["token_contrast"].transpose(0, 1))
        local = batch.local
        temperature = _check_temperature(batch.temperature(self.temperature))
        return _mean_contrast(
            exams, local["mean_patch"].transpose(0, 1), local["mean_token"], local["described"], temperature
        )


class SoftSemanticConfig(StrictConfig):
    """L_soft. What y holds, `sup_con` included, and tau_label are keys of `soft_targets`."""

    weight: float = Field(default=0.3, ge=0)
    temperature: FixedTemperature = None
    as_printed: bool = False
    """The printed factor 1 / (4 N^2), and the printed weight of the text-to-image term."""

    def compute(self, batch: AlignEmbeddings) -> Tensor:
        if batch.attributes is None:
            raise ValueError("the soft semantic loss needs the attribute vectors of the batch")
        return soft_semantic_loss(
            batch.image_cls,
            batch.text_cls,
            metadata_similarity(batch.attributes, temperature=batch.label_temperature, gather=batch.gather),
            temperature=batch.temperature(self.temperature),
            as_printed=self.as_printed,
            gather=batch.gather,
            weights=batch.weights,
        )


class AlignLossConfig(StrictConfig):
    """A section a loss; one of weight 0 is not computed."""

    image_consistency: ImageConsistencyConfig = ImageConsistencyConfig()
    global_semantic: GlobalSemanticConfig = GlobalSemanticConfig()
    local_semantic: LocalSemanticConfig = LocalSemanticConfig()
    soft_semantic: SoftSemanticConfig = SoftSemanticConfig()

    @model_validator(mode="after")
    def _something_to_train(self) -> Self:
        if not any(section.weight for _, section in self):
            raise ValueError("every loss has the weight 0: there is nothing to train")
        return self


def condense_outputs(
    config: AlignLossConfig, outputs: Mapping[str, Tensor], *, token_mask: Tensor | None
) -> dict[str, Tensor]:
    """Some exams' outputs without their sequences: what `align_losses` needs of each, and no more.

    Sequences are by far the largest outputs, and no exam's meet another's. Condensed a micro-batch at a time, they
    need not be kept for the global batch.

    Args:
        outputs: of the dual encoder, exams first: image_cls (N, V, D), image_seq (N, V, K, D), text_cls (N, D),
            text_seq (N, L, D), temperature (1,).
        token_mask: (N, L) true on real tokens; None only where the local loss has the weight 0.

    Returns:
        image_cls, text_cls and temperature as they are, and what `LocalSemanticConfig.condense` makes.

    Raises:
        ValueError: shapes that do not fit, or no mask where one is needed.
    """
    kept = {name: outputs[name] for name in ("image_cls", "text_cls", "temperature")}
    if not config.local_semantic.weight:
        return kept
    if token_mask is None:
        raise ValueError("the local semantic loss needs the mask of real tokens")
    patches, tokens = outputs["image_seq"].transpose(0, 1), outputs["text_seq"]
    return {**kept, **config.local_semantic.condense(patches, tokens, token_mask, outputs["temperature"])}


def align_losses(
    config: AlignLossConfig,
    outputs: Mapping[str, Tensor],
    *,
    attributes: Tensor | None,
    label_temperature: float,
    weights: Tensor | None = None,
    gather: GatherFunction | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum, and its parts before weighting, such as ``soft_semantic_loss``.

    Args:
        outputs: of `condense_outputs`.
        attributes: (N, A) the vectors y; None only where the soft loss has the weight 0.
        label_temperature: tau_label.
        weights: (N,) 0 on padding exams.

    Raises:
        ValueError: shapes that do not fit, or something missing that a loss needs.
    """
    batch = AlignEmbeddings(
        image_cls=outputs["image_cls"].transpose(0, 1),
        text_cls=outputs["text_cls"],
        local=outputs,
        learnable_temperature=outputs["temperature"],
        attributes=attributes,
        label_temperature=label_temperature,
        weights=weights,
        gather=gather,
    )
    sections = {name: section for name, section in config if section.weight}
    parts = {f"{name}_loss": section.compute(batch) for name, section in sections.items()}
    weighted = [section.weight * parts[f"{name}_loss"] for name, section in sections.items()]
    return torch.stack(weighted).sum(), parts
