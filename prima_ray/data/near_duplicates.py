"""Near-duplicate photos across patients, by perceptual hash: they would let a test fold see its training rows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from PIL import Image
from pydantic import Field

from prima_ray.base import StrictConfig

_BITS = 64


class NearDuplicatesConfig(StrictConfig):
    """What counts as a near-duplicate."""

    max_distance: int = Field(default=3, ge=0, le=7)
    """Bits of the 64-bit perceptual hash that may differ. Every pair is found; more bits take longer."""
    max_pairs: int = Field(default=10_000, ge=1)
    """The search ends at so many pairs."""


def perceptual_hash(image: Image.Image) -> int:
    """The 64-bit pHash (DCT of the 32 x 32 grey image against its median; Zauner 2010) as an integer."""
    import imagehash

    bits = imagehash.phash(image).hash.flatten()
    return int(np.packbits(bits).view(">u8")[0])


def find_near_duplicates(
    image_ids: Sequence[str], patient_ids: Sequence[str], hashes: Sequence[int], config: NearDuplicatesConfig
) -> list[dict[str, Any]]:
    """Pairs of photos of different patients whose hashes differ in at most `max_distance` bits.

    The hash is cut into `max_distance` + 1 bands: two hashes that differ in no more bits than that agree in a band
    (pigeonhole), so only photos that share a band are compared. Memory: a few words a photo, whatever its size.
    """
    bands = config.max_distance + 1
    edges = [round(index * _BITS / bands) for index in range(bands + 1)]
    values = np.array(hashes, dtype=np.uint64)
    _, patients = np.unique(np.array(patient_ids, dtype=str), return_inverse=True)
    found: dict[tuple[int, int], int] = {}
    for low, high in pairwise(edges):
        buckets: dict[int, list[int]] = defaultdict(list)
        mask = (1 << (high - low)) - 1
        for position, value in enumerate(hashes):
            buckets[(value >> low) & mask].append(position)
        for bucket in buckets.values():
            members = np.array(bucket)
            for index, first in enumerate(bucket[:-1]):
                others = members[index + 1 :]
                distances = np.bitwise_count(values[others] ^ values[first])
                alike = (distances <= config.max_distance) & (patients[others] != patients[first])
                for second, distance in zip(others[alike].tolist(), distances[alike].tolist(), strict=True):
                    found[first, second] = distance
                    if len(found) >= config.max_pairs:
                        return _listed(found, image_ids, patient_ids)
    return _listed(found, image_ids, patient_ids)


def _listed(
    found: dict[tuple[int, int], int], image_ids: Sequence[str], patient_ids: Sequence[str]
) -> list[dict[str, Any]]:
    return [
        {
            "images": [image_ids[first], image_ids[second]],
            "patients": [patient_ids[first], patient_ids[second]],
            "distance": distance,
        }
        for (first, second), distance in sorted(found.items())
    ]
