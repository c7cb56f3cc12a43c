"""Where the words look: the attention of L_loc, from the text's tokens to the picture's patches, as maps and as a
picture.

For the tokens l and patches k of one photo, in align's shared space and un-normalised as in the loss (method, stage 2):
a_lk = softmax_k(q_l . p_k / sqrt(D)). The map of an attribute is the mean over the tokens of its clause. It shows what
alignment learned to look at for these words, not why a class was predicted: for that see `contributions`.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from prima_ray.data.description import DataSetConfig
from prima_ray.data.metadata import MetadataTextConfig, clause_spans
from prima_ray.models.tokenizer import TextTokenizer

Grid = NDArray[np.float64]
_MIN_SIDE = 256
_FULL = 3.0
"""Times the even share at which a patch has the strongest colour, unless the map has a higher peak."""
_COLOURS = np.array(
    [(0.0, 0, 0, 4), (0.35, 87, 16, 110), (0.65, 203, 65, 73), (0.85, 249, 142, 9), (1.0, 252, 255, 164)]
)
"""Position, red, green, blue of a few points of matplotlib's `inferno` (CC0)."""


@dataclass(frozen=True)
class AttentionMap:
    """Where one photo is looked at."""

    photo: int
    """From 1."""
    attribute: str | None
    """None: all attributes together."""
    grid: Grid
    """(rows, columns), sums to 1."""
    png: bytes | None = None
    """The view that the model read, the map over it; of all attributes together."""

    @property
    def spread(self) -> float:
        """exp(entropy) over the number of patches: 1 looks everywhere alike, 1 / K at one patch of K."""
        share = self.grid.ravel()
        known = share[share > 0]
        return float(np.exp(-(known * np.log(known)).sum()) / len(share))


@torch.inference_mode()
def token_attention(text_seq: Tensor, image_seq: Tensor) -> Tensor:
    """Projected tokens (L, D) and patches (V, K, D) -> (V, L, K), a distribution over the patches of each photo."""
    scores = torch.einsum("ld,vkd->vlk", text_seq.float(), image_seq.float()) / text_seq.shape[-1] ** 0.5
    shares: Tensor = scores.softmax(dim=-1)
    return shares


def clause_tokens(
    attributes: Mapping[str, str],
    data_set: DataSetConfig,
    config: MetadataTextConfig,
    text: str,
    tokenizer: TextTokenizer,
) -> dict[str, list[int]]:
    """The positions of the tokens that speak of each attribute, in the order of the text; without those that were cut
    off.

    Args:
        attributes: canonical values.
        text: as `describe` gives it.
    """
    spans = clause_spans(attributes, data_set, config)
    encoded = tokenizer.bare.encode(text)
    # The last place of a text that is too long is the closing special token's.
    last = tokenizer.max_tokens - 1 if len(encoded.ids) > tokenizer.max_tokens else len(encoded.ids)
    places = [
        (place, start, end)
        for place, ((start, end), special) in enumerate(zip(encoded.offsets, encoded.special_tokens_mask, strict=True))
        if place < last and not special and end > start
    ]
    found = {
        name: [place for place, start, end in places if start < stop and end > begin]
        for name, (begin, stop) in spans.items()
    }
    return {name: tokens for name, tokens in found.items() if tokens}


def attention_maps(
    attention: Tensor, tokens: Mapping[str, Sequence[int]], grid: tuple[int, int], views: NDArray[np.floating]
) -> list[AttentionMap]:
    """The maps of one exam: by photo, all attributes together with a picture, then each attribute.

    Args:
        attention: (V, L, K) of `token_attention`.
        tokens: attribute -> its tokens, not empty.
        grid: rows and columns of the K patches.
        views: (V, S, S, 3) in 0-1: what the model read.
    """
    found = []
    for photo, share in enumerate(attention.double().cpu().numpy()):
        each = {name: share[list(places)].mean(axis=0).reshape(grid) for name, places in tokens.items()}
        together: Grid = np.mean(list(each.values()), axis=0)
        found.append(AttentionMap(photo + 1, None, together, overlay(views[photo], together)))
        found += [AttentionMap(photo + 1, name, one) for name, one in each.items()]
    return found


def overlay(view: NDArray[np.floating], grid: Grid) -> bytes:
    """A PNG of the view in grey, with the map over it in colour.

    The brighter, the more is looked at a place: black is nothing, the brightest is three times the even share or the
    map's peak, whichever is more. So a map that looks everywhere alike is as dull as it should be.

    Args:
        view: (S, S, 3) in 0-1.
        grid: (rows, columns), sums to 1.
    """
    side = max(_MIN_SIDE, view.shape[0])
    shape = (side, side)
    picture = Image.fromarray((np.clip(view, 0, 1) * 255).astype(np.uint8)).resize(shape, Image.Resampling.BICUBIC)
    grey = np.asarray(picture.convert("L"), np.float64)[..., None]
    heat = grid * grid.size
    heat = heat / max(_FULL, float(heat.max()))
    smooth = np.asarray(Image.fromarray(heat.astype(np.float32)).resize(shape, Image.Resampling.BICUBIC), np.float64)
    smooth = np.clip(smooth, 0, 1)
    colour = np.stack([np.interp(smooth, _COLOURS[:, 0], _COLOURS[:, channel]) for channel in (1, 2, 3)], axis=-1)
    mixed = 0.5 * grey + 0.6 * colour
    stream = io.BytesIO()
    Image.fromarray(np.clip(mixed, 0, 255).astype(np.uint8)).save(stream, "PNG", optimize=True)
    return stream.getvalue()
