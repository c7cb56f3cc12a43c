from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from prima_ray.data.near_duplicates import NearDuplicatesConfig, find_near_duplicates, perceptual_hash
from tests.unit.raw_data_set import picture


def distance(one: Image.Image, other: Image.Image) -> int:
    return (perceptual_hash(one) ^ perceptual_hash(other)).bit_count()


def test_a_photo_looks_like_its_smaller_and_brighter_self_and_like_no_other():
    photo = picture(1, 300, 220)
    assert distance(photo, photo.resize((150, 110))) <= 3
    assert distance(photo, Image.fromarray((np.asarray(photo) * 0.9).astype(np.uint8))) <= 3
    assert distance(photo, picture(2, 300, 220)) > 10
    assert perceptual_hash(Image.new("RGB", (1, 1))) == perceptual_hash(Image.new("RGB", (90, 90)))


def test_pairs_of_different_patients_are_listed_with_their_distance():
    config = NearDuplicatesConfig()
    hashes = [0b0, 0b11, 0b0, 1 << 63, (1 << 64) - 1]
    assert find_near_duplicates(list("abcde"), ["p", "q", "p", "r", "s"], hashes, config) == [
        {"images": ["a", "b"], "patients": ["p", "q"], "distance": 2},
        {"images": ["a", "d"], "patients": ["p", "r"], "distance": 1},
        {"images": ["b", "c"], "patients": ["q", "p"], "distance": 2},
        {"images": ["b", "d"], "patients": ["q", "r"], "distance": 3},
        {"images": ["c", "d"], "patients": ["p", "r"], "distance": 1},
    ]
    assert find_near_duplicates([], [], [], config) == []


def test_the_search_ends_at_the_most_pairs_that_are_wanted():
    blank = [0] * 2000
    names = [str(number) for number in range(2000)]
    assert len(find_near_duplicates(names, names, blank, NearDuplicatesConfig(max_pairs=50))) == 50


@settings(deadline=None, max_examples=50)
@given(
    seeds=st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=4),
    flips=st.lists(st.tuples(st.integers(0, 3), st.sets(st.integers(0, 63), max_size=8)), max_size=20),
    max_distance=st.integers(0, 7),
)
def test_every_pair_is_found(seeds: list[int], flips: list[tuple[int, set[int]]], max_distance: int):
    hashes = list(seeds)
    for seed, bits in flips:
        value = seeds[seed % len(seeds)]
        for bit in bits:
            value ^= 1 << bit
        hashes.append(value)
    names = [f"{number:02}" for number in range(len(hashes))]
    patients = [str(number // 2) for number in range(len(hashes))]
    found = find_near_duplicates(names, patients, hashes, NearDuplicatesConfig(max_distance=max_distance))
    expected = [
        (names[one], names[other])
        for one, other in itertools.combinations(range(len(hashes)), 2)
        if patients[one] != patients[other] and (hashes[one] ^ hashes[other]).bit_count() <= max_distance
    ]
    assert [tuple(pair["images"]) for pair in found] == expected
