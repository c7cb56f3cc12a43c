"""Near-duplicate photos across patients, by perceptual hash: they would let a test fold see its training rows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import combinations, pairwise
from typing import Any

import numpy as np
from PIL import Image

from prima_ray.base import StrictConfig

_BITS = 64


class NearDuplicatesConfig(StrictConfig):
    """What counts as a near-duplicate."""

    max_distance: int = 3
    """Bits of the 64-bit perceptual hash that may differ; pairs up to 3 are found exactly."""
    max_pairs: int = 10_000
    """How many pairs are listed; all are counted up to here."""


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
    found: dict[tuple[int, int], int] = {}
    for low, high in pairwise(edges):
        buckets: dict[int, list[int]] = defaultdict(list)
        mask = (1 << (high - low)) - 1
        for position, value in enumerate(hashes):
            buckets[(value >> low) & mask].append(position)
        for members in buckets.values():
            for first, second in combinations(members, 2):
                if patient_ids[first] == patient_ids[second] or (first, second) in found:
                    continue
                distance = (hashes[first] ^ hashes[second]).bit_count()
                if distance <= config.max_distance:
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
