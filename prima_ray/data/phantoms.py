"""Phantoms: a generated data set whose truth is known, so that claims about fusion can be tested against exact bounds.

Every exam has two hidden coins. One shows in the picture (`veiled`: a blue-grey veil over the lesion), the other in the
attributes (`restless`: it grew, itches, bleeds ...), and the class needs both, so neither modality alone can do better
than about half. `bayes_accuracy` computes how much better, from the same tables that the generator draws from.

To add an attribute, describe it in `_ATTRIBUTES` and draw it in `_draw_patient` or `_draw_exam`; if it tells the hidden
coin, its table goes into `_SIGNS` instead, which both the generator and the bound read.
"""

from __future__ import annotations

import csv
import io
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field

from prima_ray.base import StrictConfig, hash_key, write_atomic
from prima_ray.data.phantom_pictures import Look, render

Vector = NDArray[np.float64]

CLASSES = ("PQ", "PR", "VQ", "VR")
"""Class 2 * veiled + restless: plain or veiled, quiet or restless."""
TABLE = "metadata.csv"
IMAGES = "images"
LEAK = "biopsied"
"""A column that follows from the class, as in real tables: declared a leak, never an attribute."""


class PhantomConfig(StrictConfig):
    """How many phantoms, and how noisy."""

    num_patients: int = Field(default=480, ge=1)
    """A patient has one to three exams (1.6 on average), an exam one or two photos (1.35)."""
    seed: int = 0
    image_side: int = Field(default=96, ge=16, le=1024)
    jpeg_quality: int = Field(default=90, ge=50, le=100)
    label_noise: float = Field(default=0.04, ge=0, le=0.75)
    """The share of exams whose class is one of the three others, whatever picture and attributes say."""
    missing_rate: float = Field(default=0.08, ge=0, lt=1)
    """Every attribute of every exam is missing with this probability, independently of everything."""
    block_missing_rate: float = Field(default=0.2, ge=0, lt=1)
    """The history of a patient is missing as a whole with this probability, independently of everything."""


@dataclass(frozen=True, slots=True)
class PhantomRecord:
    """One exam with its truth."""

    patient_id: str
    lesion_id: str
    """Counts within the patient: alone it collides, as on PAD-UFES-20."""
    label: str
    veiled: bool
    """The visible coin, which the picture shows."""
    restless: bool
    """The hidden coin, which the attributes tell, not quite surely."""
    attributes: Mapping[str, str]
    """As in the table: missing values are empty or `UNK`."""
    photos: Mapping[str, bytes]
    """Image id (the file's stem) -> JPEG."""


@dataclass(frozen=True, slots=True)
class BayesAccuracy:
    """The best accuracies that any classifier can have on phantoms, as shares of 1."""

    image: float
    attributes: float
    both: float
    image_shuffled: float
    """Of the best classifier on both, when the pictures are dealt out anew: what is left is the attributes."""
    attributes_shuffled: float


def _month_pmf(median: float, spread: float) -> Vector:
    """A log-normal number of months, rounded to 1-240."""
    log_months = np.log(np.arange(1, 241, dtype=np.float64))
    weight = np.exp(-0.5 * ((log_months - np.log(median)) / spread) ** 2) / np.arange(1, 241)
    return np.asarray(weight / weight.sum(), np.float64)


# Attributes that tell the hidden coin: name -> (values, P(value | quiet), P(value | restless)).
_SIGNS: dict[str, tuple[tuple[str, ...], Vector, Vector]] = {
    "grew": (("True", "False"), np.array([0.07, 0.93]), np.array([0.93, 0.07])),
    "itch": (("True", "False"), np.array([0.10, 0.90]), np.array([0.90, 0.10])),
    "bleed": (("True", "False"), np.array([0.05, 0.95]), np.array([0.85, 0.15])),
    "surface": (
        ("SMOOTH", "ROUGH", "SCALY", "CRUSTED"),
        np.array([0.60, 0.28, 0.08, 0.04]),
        np.array([0.04, 0.12, 0.34, 0.50]),
    ),
    "months": (tuple(str(month) for month in range(1, 241)), _month_pmf(60, 0.7), _month_pmf(9, 0.7)),
}
# Attributes that tell nothing about the class. Some show in the picture, so that images and texts can be aligned.
_REGIONS = ("FACE", "SCALP", "NECK", "CHEST", "BACK", "ARM", "HAND", "LEG")
_MEAN_HAIRS = {"FACE": 0.3, "SCALP": 14, "NECK": 1, "CHEST": 8, "BACK": 2, "ARM": 7, "HAND": 2, "LEG": 9}
_SKIN_TYPE_SHARES = np.array([0.18, 0.26, 0.22, 0.15, 0.11, 0.08])
_HISTORY = ("family_history", "smoke", "sunburns")


def _boolean(name: str, phrase: str, phrase_false: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "kind": "boolean", "phrase": phrase, "phrase_false": phrase_false, **more}


_ATTRIBUTES: tuple[dict[str, Any], ...] = (
    {"name": "age", "kind": "numeric", "phrase": "aged {value}", "unit": "years", "minimum": 0, "maximum": 120},
    {
        "name": "sex",
        "kind": "categorical",
        "phrase": "{value}",
        "values": {"FEMALE": "woman", "MALE": "man"},
        "relevant": False,
    },
    {
        "name": "skin_type",
        "kind": "ordinal",
        "phrase": "{value} skin",
        "values": {
            "1": "very light",
            "2": "light",
            "3": "medium",
            "4": "olive",
            "5": "brown",
            "6": "dark brown",
        },
    },
    {
        "name": "region",
        "kind": "categorical",
        "phrase": "on the {value}",
        "values": {region: region.lower() for region in _REGIONS},
    },
    {
        "name": "diameter",
        "column": "diameter_mm",
        "kind": "numeric",
        "phrase": "{value} across",
        "unit": "mm",
        "minimum": 0,
        "maximum": 100,
        "decimals": 1,
    },
    _boolean("grew", "it has grown", "it has not grown", disease_related=True),
    _boolean("itch", "it itches", "it does not itch", disease_related=True),
    _boolean("bleed", "it bleeds", "it does not bleed", disease_related=True),
    {
        "name": "surface",
        "kind": "categorical",
        "phrase": "its surface is {value}",
        "values": {name: name.lower() for name in _SIGNS["surface"][0]},
        "disease_related": True,
    },
    {
        "name": "months",
        "kind": "numeric",
        "phrase": "noticed {value} ago",
        "unit": "months",
        "minimum": 0,
        "maximum": 1200,
        "disease_related": True,
    },
    _boolean("family_history", "skin cancer in the family", "no skin cancer in the family"),
    _boolean("smoke", "smokes", "does not smoke", relevant=False),
    _boolean("sunburns", "had sunburns as a child", "had no sunburns as a child", relevant=False),
)


def data_set_description() -> dict[str, Any]:
    """The `data_set` section of the phantoms' ingest config: plain values, ready for YAML."""
    phrases = ("plain quiet phantom", "plain restless phantom", "veiled quiet phantom", "veiled restless phantom")
    return {
        "name": "phantoms",
        "title": "Phantoms: rendered skin lesions with a known truth",
        "license": "Apache-2.0",
        "subject": "a skin lesion",
        "classes": [{"name": name, "phrase": phrase} for name, phrase in zip(CLASSES, phrases, strict=True)],
        "attributes": [dict(item) for item in _ATTRIBUTES],
        "leaks": [LEAK],
        "blocks": [{"name": "history", "attributes": list(_HISTORY)}],
    }


def ingest_config(
    folder: str | os.PathLike[str], *, out: str = "runs/phantoms/shards", seed: int = 0
) -> dict[str, Any]:
    """The ingest config of a folder that `write_phantoms` has written: what `prima ingest` reads, as a dict."""
    return {
        "out": out,
        "seed": seed,
        "source": {
            "table": f"{os.fspath(folder)}/{TABLE}",
            "images": f"{os.fspath(folder)}/{IMAGES}",
            "columns": {
                "patient": "patient_id",
                "exam": ["patient_id", "lesion_id"],
                "image": "image_id",
                "label": "diagnosis",
            },
        },
        "data_set": data_set_description(),
    }


def generate(config: PhantomConfig) -> Iterator[PhantomRecord]:
    """Draw the phantoms, exam by exam.

    A record depends on (seed, patient, exam) alone: more patients add records and change none.
    """
    for number in range(config.num_patients):
        patient_rng = _rng(config, "patient", number)
        patient, history_missing = _draw_patient(patient_rng), patient_rng.random() < config.block_missing_rate
        num_exams = 1 + int(patient_rng.choice(3, p=[0.55, 0.30, 0.15]))
        for lesion in range(1, num_exams + 1):
            yield _draw_exam(config, number, lesion, patient, history_missing=history_missing)


def _rng(config: PhantomConfig, *key: object) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(hash_key("phantoms", config.seed, *key)))


def _draw_patient(rng: np.random.Generator) -> dict[str, str]:
    return {
        "age": str(int(np.clip(rng.normal(58, 16), 18, 95))),
        "sex": ("FEMALE", "MALE")[rng.integers(2)],
        "skin_type": str(1 + rng.choice(6, p=_SKIN_TYPE_SHARES)),
        **{name: str(bool(rng.random() < share)) for name, share in zip(_HISTORY, (0.3, 0.25, 0.4), strict=True)},
    }


def _draw_exam(
    config: PhantomConfig, number: int, lesion: int, patient: Mapping[str, str], *, history_missing: bool
) -> PhantomRecord:
    rng = _rng(config, "exam", number, lesion)
    veiled, restless = bool(rng.integers(2)), bool(rng.integers(2))
    label = 2 * veiled + restless
    another = (label + int(rng.integers(1, 4))) % 4  # drawn in any case: the noise must not shift what follows
    if rng.random() < config.label_noise:
        label = another
    diameter_mm = round(float(rng.uniform(3, 18)), 1)
    attributes = {
        **patient,
        "region": _REGIONS[rng.integers(len(_REGIONS))],
        "diameter": f"{diameter_mm:.1f}",
        **{name: values[rng.choice(len(values), p=given[restless])] for name, (values, *given) in _SIGNS.items()},
    }
    hairs = int(rng.poisson(_MEAN_HAIRS[attributes["region"]]))
    look = Look(veiled=veiled, skin_type=int(patient["skin_type"]), diameter_mm=diameter_mm, num_hairs=hairs)
    num_photos = 1 + int(rng.random() < 0.35)
    missing = {name for name in attributes if rng.random() < config.missing_rate}
    missing |= set(_HISTORY) if history_missing else set()
    spelling = ("", "UNK")[rng.integers(2)]
    patient_id = f"PH-{number:04d}"
    return PhantomRecord(
        patient_id=patient_id,
        lesion_id=str(lesion),
        label=CLASSES[label],
        veiled=veiled,
        restless=restless,
        attributes={
            item["name"]: spelling if (name := item["name"]) in missing else attributes[name] for item in _ATTRIBUTES
        },
        photos={
            f"{patient_id}-{lesion}-{photo}": _photograph(config, look, number, lesion, photo)
            for photo in range(1, num_photos + 1)
        },
    )


def _photograph(config: PhantomConfig, look: Look, number: int, lesion: int, photo: int) -> bytes:
    picture = render(
        look,
        side=config.image_side,
        lesion=_rng(config, "lesion", number, lesion),
        photo=_rng(config, "photo", number, lesion, photo),
    )
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=config.jpeg_quality)
    return stream.getvalue()


def write_phantoms(folder: str | os.PathLike[str], config: PhantomConfig, *, progress: bool = False) -> None:
    """Write a raw data set as a hospital might hand it over: `metadata.csv`, a row per photo, and `images/*.jpg`.

    The table is written last, so a folder that has it is complete; the same config gives the same bytes.

    Args:
        folder: made if it is not there.
        config: what to write.
        progress: show a bar on stderr.
    """
    from tqdm import tqdm

    images = Path(folder) / IMAGES
    images.mkdir(parents=True, exist_ok=True)
    columns = [item.get("column", item["name"]) for item in _ATTRIBUTES]
    table = io.StringIO(newline="")
    rows = csv.writer(table, lineterminator="\n")
    rows.writerow(["patient_id", "lesion_id", "image_id", "diagnosis", *columns, LEAK])
    with tqdm(desc="phantoms", unit=" exams", disable=not progress, file=sys.stderr) as bar:
        for record in generate(config):
            for image_id, jpeg in record.photos.items():
                (images / f"{image_id}.jpg").write_bytes(jpeg)
                key = [record.patient_id, record.lesion_id, image_id, record.label]
                rows.writerow([*key, *record.attributes.values(), str(record.label != "PQ")])
            bar.update()
    write_atomic(Path(folder) / TABLE, table.getvalue())


def sample_sheet(*, columns: int = 8, side: int = 128, seed: int = 0) -> Image.Image:
    """A picture of some phantoms for people to look at: two rows of plain ones above two rows of veiled ones."""
    sheet = Image.new("RGB", (columns * side, 4 * side))
    num_placed = {False: 0, True: 0}
    for record in generate(PhantomConfig(num_patients=30 * columns, seed=seed, image_side=side)):
        place = num_placed[record.veiled]
        if place < 2 * columns:
            photo = Image.open(io.BytesIO(next(iter(record.photos.values()))))
            sheet.paste(photo, (place % columns * side, (2 * record.veiled + place // columns) * side))
            num_placed[record.veiled] += 1
        if min(num_placed.values()) == 2 * columns:
            break
    return sheet


def bayes_accuracy(config: PhantomConfig | None = None) -> BayesAccuracy:
    """The exact best accuracies, computed from the distribution that `generate` draws from.

    Per exam, the class y depends on two independent fair coins v (veiled) and u (restless):
    P(y | v, u) = 1 - e if y = 2v + u, else e / 3, with e the label noise.

    - A picture is drawn from v, from traits that are independent of (v, u, y) (skin type, diameter, hair) and from
      noise of its own; two photos of an exam share v. Hence the pictures are independent of y given v and those traits,
      and by the data-processing inequality no function of the pictures predicts y better than v itself does. The veil
      is drawn boldly, so v can be read off a picture and the bound is reached: image = sum over v of max over y of
      P(y, v).
    - The signs a = (grew, itch, bleed, surface, months) are independent given u, and each is missing independently of
      all else; the other attributes are independent of (v, u, y). P(a | u) is therefore a product of small tables, and
      every one of its 32,535 cells is summed: attributes = sum over a of max over y of P(y, a).
    - Picture and attributes share only traits that are independent of (v, u, y), so both = sum over v, a of max over y
      of P(y, v, a).
    - Dealing the pictures out anew replaces v by an independent fair coin v'. The best classifier f on both then scores
      sum over v', a of P(v') P(y = f(v', a), a); the same for the attributes. Both coins being fair, this equals the
      other modality's bound.

    Returns:
        accuracies over exams, for an infinite test set.
    """
    config = config or PhantomConfig()
    p_class = np.full((2, 2, 4), config.label_noise / 3)  # [v, u, y]
    for v in range(2):
        for u in range(2):
            p_class[v, u, 2 * v + u] = 1 - config.label_noise
    p_signs = np.stack([_sign_probabilities(u, config.missing_rate) for u in range(2)])  # [u, a]
    joint = 0.25 * np.einsum("vuy,ua->vay", p_class, p_signs)
    p_v, p_a = joint.sum(axis=(1, 2)), joint.sum(axis=(0, 2))
    chosen = joint.argmax(axis=2)  # f(v, a)
    p_class_given_signs, p_class_given_sign_of_picture = joint.sum(axis=0), joint.sum(axis=1)
    columns = np.arange(len(p_a))
    return BayesAccuracy(
        image=float(p_class_given_sign_of_picture.max(axis=1).sum()),
        attributes=float(p_class_given_signs.max(axis=1).sum()),
        both=float(joint.max(axis=2).sum()),
        image_shuffled=float(sum(p_v[v] * p_class_given_signs[columns, chosen[v]].sum() for v in range(2))),
        attributes_shuffled=float(sum(p_class_given_sign_of_picture[v][chosen[v]] @ p_a for v in range(2))),
    )


def _sign_probabilities(restless: int, missing_rate: float) -> Vector:
    """P(a | u) of every combination of signs, "missing" being one value more of each; flat, sums to 1."""
    tables = [np.append((1 - missing_rate) * given[restless], missing_rate) for _, *given in _SIGNS.values()]
    return reduce(lambda left, right: np.multiply.outer(left, right).ravel(), tables)
