"""The four alignment losses of PRIMA (arXiv 2602.23297), pure functions of tensors.

Inputs are un-normalised projections; only `sim` normalises. With ``gather`` the arguments are this rank's rows, the
columns are global, and the mean over ranks of the results is the global value. To add a loss: the function, its
config, one line in `AlignLossConfig` and in `align_losses`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, Self

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own habit
from pydantic import Field, model_validator
from torch import Tensor

from prima_ray.base import StrictConfig

GatherFunction = Callable[[Tensor], Tensor]
Temperature = float | Tensor


def _precise(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _unit(x: Tensor) -> Tensor:
    return F.normalize(_precise(x), dim=-1, eps=1e-12)


class _Rows:
    """Which global columns this rank's rows are, and how rows are averaged."""

    def __init__(self, count: int, weights: Tensor | None, gather: GatherFunction | None, like: Tensor) -> None:
        self.gather = gather
        dtype = _precise(like).dtype
        own = torch.ones(count, device=like.device, dtype=dtype) if weights is None else weights.to(like.device, dtype)
        self.weights = own
        if gather is None:
            self.columns, self.first, self.world_size = own, 0, 1
        else:
            self.columns = gather(own)
            self.world_size = len(self.columns) // max(count, 1)
            rank = getattr(gather, "rank", None)
            self.first = (torch.distributed.get_rank() if rank is None else int(rank)) * count
        self.positions = torch.arange(count, device=like.device) + self.first

    def all(self, x: Tensor) -> Tensor:
        return x if self.gather is None else self.gather(x)

    def mean(self, values: Tensor) -> Tensor:
        """Mean over the exams of the global batch; values (N,) of this rank's."""
        total = self.columns.sum()
        value = torch.where(self.weights > 0, values * self.weights, torch.zeros_like(values)).sum()
        return value * self.world_size / total.clamp(min=1e-30)

    def mask_columns(self, logits: Tensor) -> Tensor:
        """Padding columns take no part."""
        return logits.masked_fill(self.columns == 0, torch.finfo(logits.dtype).min / 4)


def _cross_entropy(logits: Tensor, positions: Tensor) -> Tensor:
    return torch.logsumexp(logits, dim=-1) - logits.gather(-1, positions[:, None])[:, 0]


def image_consistency_loss(
    view_a: Tensor,
    view_b: Tensor,
    *,
    temperature: Temperature,
    symmetric: bool = True,
    gather: GatherFunction | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """L_img. view_a, view_b (N, D) -> (). The positive of anchor i is view 2 of i; 2N - 1 candidates."""
    rows = _Rows(len(view_a), weights, gather, view_a)
    a, b = _unit(view_a), _unit(view_b)
    all_a, all_b = rows.all(a), rows.all(b)

    def one_side(anchor: Tensor, same: Tensor, other: Tensor) -> Tensor:
        across = rows.mask_columns(anchor @ other.T / temperature)
        within = rows.mask_columns(anchor @ same.T / temperature)
        own = F.one_hot(rows.positions, within.shape[1]).bool()
        within = within.masked_fill(own, torch.finfo(within.dtype).min / 4)
        return rows.mean(_cross_entropy(torch.cat([across, within], dim=1), rows.positions))

    loss = one_side(a, all_a, all_b)
    return (loss + one_side(b, all_b, all_a)) / 2 if symmetric else loss


def _info_nce(left: Tensor, right: Tensor, temperature: Temperature, rows: _Rows) -> Tensor:
    """Symmetric InfoNCE between matching rows of unit vectors (N, D)."""
    forward = rows.mask_columns(left @ rows.all(right).T / temperature)
    backward = rows.mask_columns(right @ rows.all(left).T / temperature)
    both = _cross_entropy(forward, rows.positions) + _cross_entropy(backward, rows.positions)
    return rows.mean(both) / 2


def global_semantic_loss(
    image_cls: Tensor,
    text_cls: Tensor,
    *,
    temperature: Temperature,
    gather: GatherFunction | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """L_glo. image_cls (V, N, D), text_cls (N, D) -> (): symmetric InfoNCE, mean over directions and views."""
    rows = _Rows(len(text_cls), weights, gather, text_cls)
    text = _unit(text_cls)
    return torch.stack([_info_nce(_unit(view), text, temperature, rows) for view in image_cls]).mean()


def local_semantic_loss(
    image_seq: Tensor,
    text_seq: Tensor,
    text_mask: Tensor,
    *,
    temperature: Temperature,
    attention: bool = True,
    gather: GatherFunction | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """L_loc. image_seq (V, N, K, D), text_seq (N, L, D), text_mask (N, L) -> ()."""
    rows = _Rows(len(text_seq), weights, gather, text_seq)
    text, mask = _precise(text_seq), text_mask.bool()
    if not attention:
        count = mask.sum(dim=1, keepdim=True).clamp(min=1)
        mean_text = F.normalize((text * mask[..., None]).sum(dim=1) / count, dim=-1, eps=1e-12)
        views = [_info_nce(_unit(_precise(view).mean(dim=1)), mean_text, temperature, rows) for view in image_seq]
        return torch.stack(views).mean()
    values = [rows.mean(_token_contrast(_precise(view), text, mask, temperature)) for view in image_seq]
    return torch.stack(values).mean()


def _token_contrast(patches: Tensor, text: Tensor, mask: Tensor, temperature: Temperature) -> Tensor:
    scores = torch.einsum("nld,nkd->nlk", text, patches) / text.shape[-1] ** 0.5
    context = F.normalize(torch.einsum("nlk,nkd->nld", scores.softmax(dim=-1), patches), dim=-1, eps=1e-12)
    unit = F.normalize(text, dim=-1, eps=1e-12)
    logits = torch.einsum("nld,nmd->nlm", unit, context) / temperature
    lowest = torch.finfo(logits.dtype).min / 4
    own = logits.diagonal(dim1=1, dim2=2)
    to_context = logits.masked_fill(~mask[:, None, :], lowest).logsumexp(dim=2) - own
    to_token = logits.masked_fill(~mask[:, :, None], lowest).logsumexp(dim=1) - own
    count = mask.sum(dim=1)
    per_exam = torch.where(mask, (to_context + to_token) / 2, torch.zeros_like(own)).sum(dim=1) / count.clamp(min=1)
    return torch.where(count >= 2, per_exam, torch.zeros_like(per_exam))


def metadata_similarity(
    attributes: Tensor, *, temperature: Temperature, gather: GatherFunction | None = None
) -> Tensor:
    """G_ij = <y_i, y_j> / tau_label: (N, A) -> (N, N), with ``gather`` (N, N of all ranks)."""
    y = _precise(attributes)
    return y @ (y if gather is None else gather(y)).T / temperature


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
    """L_soft. image_cls (V, N, D), text_cls (N, D), similarity (N, N) -> ()."""
    rows = _Rows(len(text_cls), weights, gather, text_cls)
    text = _unit(text_cls)
    all_text = rows.all(text)
    image_target, text_target = _soft_targets(_precise(similarity), rows, as_printed=as_printed)
    losses = []
    for view in image_cls:
        image = _unit(view)
        to_text = rows.mask_columns(image @ all_text.T / temperature).log_softmax(dim=1)
        to_image = rows.mask_columns(text @ rows.all(image).T / temperature).log_softmax(dim=1)
        losses.append(rows.mean(-(image_target * to_text + text_target * to_image).sum(dim=1)) / 2)
    loss = torch.stack(losses).mean()
    return loss / rows.columns.sum().clamp(min=1) if as_printed else loss


def _soft_targets(similarity: Tensor, rows: _Rows, *, as_printed: bool) -> tuple[Tensor, Tensor]:
    """Targets of this rank's images over all texts, and of this rank's texts over all images, (N, all) each."""
    itself = F.one_hot(rows.positions, similarity.shape[1]).to(similarity.dtype)
    # <y, y> is zero only where y is: such an exam has itself as its target.
    empty = similarity.gather(1, rows.positions[:, None]) == 0
    masked = rows.mask_columns(similarity)
    image_target = torch.where(empty, itself, masked.softmax(dim=1))
    if as_printed:
        # s_ij weights the pair (image i, text j) in both terms: text j reads column j of s.
        if rows.gather is None:
            return image_target, image_target.T
        log_totals = rows.all(masked.logsumexp(dim=1))
        columns = (masked - log_totals[None, :]).exp()
        return image_target, torch.where(rows.all(empty[:, 0])[None, :], itself, columns)
    # softmax_i(G_ij) of text j. With a gather G is symmetric, as `metadata_similarity` makes it: column j is row j.
    source = similarity.T if rows.gather is None else similarity
    return image_target, torch.where(empty, itself, rows.mask_columns(source).softmax(dim=1))


class AlignLossConfig(StrictConfig):
    """Weights and temperatures of the total; a loss of weight 0 is not computed."""

    image_consistency: float = Field(default=0.2, ge=0)
    """Weight of L_img."""
    global_semantic: float = Field(default=0.3, ge=0)
    """Weight of L_glo."""
    local_semantic: float = Field(default=0.2, ge=0)
    """Weight of L_loc."""
    soft_semantic: float = Field(default=0.3, ge=0)
    """Weight of L_soft."""
    image_temperature: float = Field(default=0.1, gt=0)
    local_temperature: float = Field(default=0.1, gt=0)
    image_symmetric: bool = True
    """False: anchors of view 1 only, as printed."""
    local_variant: Literal["attention", "loc_dir"] = "attention"
    """`loc_dir`: the mean patch against the mean token, over the exams of the batch."""
    soft_as_printed: bool = False

    @model_validator(mode="after")
    def _some(self) -> Self:
        if not (self.image_consistency or self.global_semantic or self.local_semantic or self.soft_semantic):
            raise ValueError("every loss has the weight 0: there is nothing to train")
        return self


def align_losses(
    config: AlignLossConfig,
    outputs: Mapping[str, Tensor],
    *,
    token_mask: Tensor,
    attributes: Tensor | None,
    label_temperature: float,
    weights: Tensor | None = None,
    gather: GatherFunction | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted total and its parts, `<name>_loss`, unweighted.

    Args:
        outputs: of the dual encoder, exams first: image_cls (N, V, D), image_seq (N, V, K, D), text_cls (N, D),
            text_seq (N, L, D), temperature (1,).
        token_mask: (N, L) true on real tokens.
        attributes: (N, A) weighted soft-target vectors; needed where the soft loss has a weight.
        weights: (N,) 0 on padding.
    """
    image_cls, text_cls = outputs["image_cls"].transpose(0, 1), outputs["text_cls"]
    learned = outputs["temperature"]
    parts: dict[str, Tensor] = {}
    if config.image_consistency:
        parts["image_loss"] = image_consistency_loss(
            image_cls[0],
            image_cls[1],
            temperature=config.image_temperature,
            symmetric=config.image_symmetric,
            gather=gather,
            weights=weights,
        )
    if config.global_semantic:
        parts["global_loss"] = global_semantic_loss(
            image_cls, text_cls, temperature=learned, gather=gather, weights=weights
        )
    if config.local_semantic:
        parts["local_loss"] = local_semantic_loss(
            outputs["image_seq"].transpose(0, 1),
            outputs["text_seq"],
            token_mask,
            temperature=config.local_temperature,
            attention=config.local_variant == "attention",
            gather=gather,
            weights=weights,
        )
    if config.soft_semantic:
        if attributes is None:
            raise ValueError("the soft loss needs attributes")
        similarity = metadata_similarity(attributes, temperature=label_temperature, gather=gather)
        parts["soft_loss"] = soft_semantic_loss(
            image_cls,
            text_cls,
            similarity,
            temperature=learned,
            as_printed=config.soft_as_printed,
            gather=gather,
            weights=weights,
        )
    factors = {
        "image_loss": config.image_consistency,
        "global_loss": config.global_semantic,
        "local_loss": config.local_semantic,
        "soft_loss": config.soft_semantic,
    }
    total = torch.stack([factors[name] * part.reshape(()) for name, part in parts.items()]).sum()
    return total, parts
