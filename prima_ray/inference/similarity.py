"""What an aligned model says of exams: how near each one's photo is to the text of every other."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize

from prima_ray.base import PrimaError
from prima_ray.data.collate import Collator
from prima_ray.data.fetched import local_copy
from prima_ray.data.reader import RowReader, Rows
from prima_ray.data.schema import Manifest
from prima_ray.inference.bundle import load_bundle
from prima_ray.models.dual_encoder import FeatureEncoder, ProjectionHeads
from prima_ray.models.image_tower import ImageTower
from prima_ray.models.text_tower import TextTower

_BATCH = 16


def image_text_cosines(run: str | Path, shards: str, manifest: Manifest, rows: Rows) -> Tensor:
    """Cosines (N, N) in float64: first photo of exam i, unaugmented, against the text of exam j.

    Args:
        run: a run directory of align.
        rows: (N,) row numbers in ``shards``.

    Raises:
        PrimaError: no such run, damaged, or of another stage.
    """
    folder = local_copy(run) / "model"
    bundle = load_bundle(folder)
    image, text = bundle.components.get("image_tower"), bundle.components.get("text_tower")
    heads = bundle.components.get("heads")
    if not (isinstance(image, ImageTower) and isinstance(text, TextTower) and isinstance(heads, ProjectionHeads)):
        raise PrimaError("no model of align", where=folder, mend="Name the run directory of `prima align`.")
    encoder = FeatureEncoder(image, text, heads).eval()
    collate = Collator(
        data_set=bundle.config.data_set,
        seed=0,
        train=False,
        views=bundle.config.views,
        text=bundle.config.text,
        tokenizer=text.config.tokenizer(),
    )
    reader = RowReader(shards, manifest, columns=collate.columns)
    images, texts = [], []
    with torch.inference_mode():
        for start in range(0, len(rows), _BATCH):
            seen = encoder(collate(reader.read(rows[start : start + _BATCH], 0)))
            images.append(seen["image_cls"][:, 0].double())
            texts.append(seen["text_cls"].double())
    return normalize(torch.cat(images), dim=-1) @ normalize(torch.cat(texts), dim=-1).T
