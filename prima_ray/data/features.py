"""Features of frozen towers: computed once, stored beside the shards row by row, streamed instead of pixels or text.

A feature folder is keyed by a hash of everything that its values depend on (`feature_key`) and holds one copy of the
values a variant: ``v0/part-00000.parquet`` has the rows and row groups of the shard file of that name. Epoch e reads
variant ``e % variants``, so augmentation of frozen features costs disk, not time. `features.json`, written last, is
the commit. To store another tensor, let the writer's `encode` return it under a field name of `ImageTextBatch` and
list the name in `_RAGGED`.

Values are raw little-endian numbers: a row of ``text_seq`` is its (tokens, width) matrix without padding.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from torch import Tensor

from prima_ray.base import PrimaError, StrictConfig, hash_json
from prima_ray.data.plan import verify_files
from prima_ray.data.reader import StoredColumns
from prima_ray.data.schema import Manifest, ShardFile, join, open_filesystem

FEATURES_VERSION = 1
FEATURES_MANIFEST = "features.json"

Dtype = Literal["float32", "float16", "bfloat16", "bool"]
_RAGGED = {
    "image_cls": True,
    "image_seq": True,
    "text_cls": False,
    "text_seq": True,
    "token_mask": True,
    "attributes": False,
    "photo_logits": False,
}
"""Known tensors, and whether their first axis after the exam (views, tokens) differs from exam to exam."""
_ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "bool": 1}


class FeatureSpec(StrictConfig):
    """One stored tensor: a field of `ImageTextBatch`."""

    name: str
    dtype: Dtype
    shape: tuple[int, ...]
    """Of one exam; of a ragged tensor without its first axis."""

    @property
    def ragged(self) -> bool:
        return _RAGGED[self.name]

    @property
    def item_bytes(self) -> int:
        """Bytes of one exam, of one step along the first axis where it is ragged."""
        return _ITEM_BYTES[self.dtype] * int(np.prod(self.shape, dtype=np.int64))


class FeatureManifest(StrictConfig):
    """`features.json`: what a finished feature folder holds."""

    version: int
    key: dict[str, Any]
    """Everything the values depend on; the folder's name is its hash."""
    variants: int
    specs: tuple[FeatureSpec, ...]
    files: tuple[ShardFile, ...]
    """Of all variants, variant by variant, in the order of the shards' files."""


def feature_key(shards: Manifest, **parts: object) -> dict[str, Any]:
    """Everything that features depend on: the shards' content and ``parts`` (tower weights, views, text, seed...)."""
    return {"version": FEATURES_VERSION, "shards": shards.content_hash, **parts}


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 (hex) of named tensors: of a tower's `state_dict`, whatever device it is on."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def feature_folder(root: str, key: Mapping[str, Any]) -> str:
    """The folder of features with this key below ``root``."""
    return join(root, hash_json(key)[:20])


@dataclass(frozen=True)
class FeatureSet:
    """A finished feature folder."""

    path: str
    manifest: FeatureManifest

    @classmethod
    def open(cls, path: str, *, shards: Manifest | None = None, sha256: bool = False) -> Self:
        """Open a finished feature folder.

        Args:
            shards: the manifest of the shards that it will be read beside.

        Raises:
            PrimaError: not finished, damaged, of another version or of other shards.
        """
        filesystem, root = open_filesystem(path)
        try:
            with filesystem.open_input_stream(join(root, FEATURES_MANIFEST)) as stream:
                manifest = FeatureManifest.model_validate(json.loads(stream.read().decode()))
        except (FileNotFoundError, NotADirectoryError):
            raise PrimaError(
                f"no finished features here ({FEATURES_MANIFEST} is missing)",
                where=path,
                mend="Run the stage that computes them again; it continues where it stopped.",
            ) from None
        except (ValidationError, json.JSONDecodeError, UnicodeDecodeError):
            raise PrimaError(
                "damaged features manifest", where=join(path, FEATURES_MANIFEST), mend="Delete the folder."
            ) from None
        if manifest.version != FEATURES_VERSION:
            raise PrimaError(
                f"features of version {manifest.version}, this program reads version {FEATURES_VERSION}",
                where=path,
                mend="Delete the folder; the features are computed again.",
            )
        if shards is not None and manifest.key.get("shards") != shards.content_hash:
            raise PrimaError(
                "these features were computed from other shards",
                where=path,
                mend="Delete the folder; the features are computed again.",
            )
        verify_files(filesystem, root, manifest.files, where=path, sha256=sha256)
        return cls(path=path, manifest=manifest)

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(spec.name for spec in self.manifest.specs)

    @property
    def stored(self) -> StoredColumns:
        """What a reader needs to know."""
        return StoredColumns(path=self.path, columns=self.columns, variants=self.manifest.variants)


# ------------------------------------------------------------------------------------------------- encoding


def encode_column(values: list[Tensor | None], spec: FeatureSpec) -> pa.Array:
    """One tensor an exam (None: no features) -> a column of raw bytes."""
    return pa.array([None if value is None else _to_bytes(value, spec.dtype) for value in values], type=pa.binary())


def _to_bytes(value: Tensor, dtype: Dtype) -> bytes:
    value = value.detach().cpu().contiguous()
    if dtype == "bool":
        raw: NDArray[Any] = value.to(torch.bool).numpy().astype("u1")
    elif dtype == "bfloat16":
        # numpy knows no bfloat16; its bits travel as integers.
        raw = value.to(torch.bfloat16).view(torch.int16).numpy().astype("<i2")
    else:
        raw = value.to(getattr(torch, dtype)).numpy()
        raw = raw.astype(raw.dtype.newbyteorder("<"))
    return raw.tobytes()


def _from_bytes(data: pa.Buffer, spec: FeatureSpec) -> NDArray[Any]:
    """Float32 (or bool) values of one exam, in the spec's shape behind the ragged axis."""
    if spec.dtype == "bool":
        flat: NDArray[Any] = np.frombuffer(data, dtype="u1") != 0
    elif spec.dtype == "bfloat16":
        flat = (np.frombuffer(data, dtype="<u2").astype(np.uint32) << 16).view(np.float32)
    else:
        flat = np.frombuffer(data, dtype="<f4" if spec.dtype == "float32" else "<f2").astype(np.float32)
    return flat.reshape((-1, *spec.shape) if spec.ragged else spec.shape)


def decode_columns(table: pa.Table, specs: tuple[FeatureSpec, ...], *, padding: NDArray[np.bool_]) -> dict[str, Tensor]:
    """Stored columns -> padded batch tensors, and the masks that belong to them.

    Args:
        table: N rows with one binary column a spec.
        padding: (N,) rows that are no exams; they become zeros with one open slot in each mask, so that a mean or a
            softmax over the slots stays finite. Their weight is zero.

    Raises:
        PrimaError: an exam has no stored features.
    """
    tensors: dict[str, Tensor] = {}
    lengths: dict[str, NDArray[np.int64]] = {}
    for spec in specs:
        scalars = [scalar for chunk in table[spec.name].chunks for scalar in chunk]
        rows = [scalar.as_buffer() for scalar in scalars]
        for position, row in enumerate(rows):
            if row is None and not padding[position]:
                raise PrimaError(
                    f"no stored {spec.name} for the exam {table['exam_id'][position].as_py()}",
                    mend="The features were computed for other folds; compute them for these rows.",
                )
        arrays = [None if row is None else _from_bytes(row, spec) for row in rows]
        dtype = np.bool_ if spec.dtype == "bool" else np.float32
        shape = spec.shape
        if spec.ragged:
            length = np.array([0 if array is None else len(array) for array in arrays], dtype=np.int64)
            lengths[spec.name] = length
            shape = (max(1, int(length.max(initial=1))), *shape)
        padded: NDArray[Any] = np.zeros((len(arrays), *shape), dtype=dtype)
        for position, array in enumerate(arrays):
            if array is not None:
                padded[(position, slice(len(array))) if spec.ragged else position] = array
        tensors[spec.name] = torch.from_numpy(padded)
    for name, mask in (("image_cls", "image_mask"), ("image_seq", "image_mask"), ("text_seq", "attention_mask")):
        if name in lengths:
            slots = torch.arange(tensors[name].shape[1])
            tensors[mask] = slots < torch.from_numpy(np.maximum(lengths[name], 1))[:, None]
    return tensors


def specs_of(
    encoded: Mapping[str, Tensor], dtype: Literal["float32", "float16", "bfloat16"]
) -> tuple[FeatureSpec, ...]:
    """The specs of a batch of encoded tensors, each (N, ...).

    Raises:
        ValueError: a name is no feature field of `ImageTextBatch`.
    """
    specs = []
    for name, value in sorted(encoded.items()):
        if name not in _RAGGED:
            raise ValueError(f"{name!r} is no feature; known: {', '.join(_RAGGED)}")
        shape = tuple(value.shape[2:] if _RAGGED[name] else value.shape[1:])
        specs.append(FeatureSpec(name=name, dtype="bool" if value.dtype == torch.bool else dtype, shape=shape))
    return tuple(specs)
