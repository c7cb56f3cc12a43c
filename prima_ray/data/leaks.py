"""How strongly each attribute, and its being missing, tells the diagnosis; and leaks that were planted or overlooked.

Associations are reported, because a strong risk factor is what one hopes for. What is refused is what no risk factor
does: an attribute that copies a declared leak, recodes the label, or spells the diagnosis.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from prima_ray.base import PrimaError, StrictConfig
from prima_ray.data.attributes import is_missing
from prima_ray.data.description import (
    AttributeConfig,
    CategoricalAttribute,
    ClassConfig,
    DataSetConfig,
    NumericAttribute,
    TextAttribute,
)

Kind = Literal["value", "missing", "block missing"]
_MAX_CODES = 50
"""A recoding has few values; an identifier, which also tells everything, has many."""
_MIN_EXAMS = 10
"""Fewer agree by chance."""
_INFLECTIONS = (("oma", "oma(?:s|ta|tous)?"), ("us", "(?:us|uses|i)"), ("is", "(?:is|es)"), ("y", "(?:y|ies)"))
"""How a word may end that ends so: melanomata, nevi, keratoses. Any other takes an s."""


class LeaksConfig(StrictConfig):
    """When a suspicion stops the ingest, and which are accepted."""

    accept: tuple[str, ...] = ()
    """Attributes that may look like the label: a true test result, say. Declared `leaks` cannot be accepted."""
    recoding_agreement: float = Field(default=0.98, gt=0.5, le=1)
    """Share of exams on which an attribute must agree with a recoding of the label, or of a leak, to be one."""
    text_share: float = Field(default=0.02, gt=0, le=1)
    """Share of exams whose free text may name their own diagnosis."""
    warn_missing: float = Field(default=0.4, gt=0, le=1)
    """Cramer's V of missingness with the label from which a warning is printed."""
    warn_value: float = Field(default=0.65, gt=0, le=1)
    """Cramer's V of a value with the label from which a warning is printed."""


@dataclass(frozen=True)
class Association:
    """How strongly one thing tells the label."""

    what: str
    kind: Kind
    num_exams: int
    """Exams it was computed on: those with the value, or all for missingness."""
    share_missing: float
    cramers_v: float
    """Bias-corrected (Bergsma 2013): 0 tells nothing, 1 everything."""
    balanced_accuracy: float
    """Of guessing, per value, the class that it makes most likely; cross-validated over the folds."""
    chance: float
    """Balanced accuracy of guessing blindly: 1 / number of classes."""


def associations(
    rows: Sequence[Mapping[str, str]], labels: Sequence[str | None], folds: NDArray[np.int32], data_set: DataSetConfig
) -> list[Association]:
    """Every attribute's value and missingness, and every block's, declared or found; strongest first."""
    known = [position for position, label in enumerate(labels) if label is not None]
    truth = np.array([labels[position] for position in known])
    mine = folds[known]
    chance = 1 / max(1, len(set(truth.tolist())))
    found: list[Association] = []
    masks: dict[str, NDArray[np.bool_]] = {}
    for item in data_set.attributes:
        values = [rows[position].get(item.name) for position in known]
        masks[item.name] = np.array([value is None for value in values], dtype=bool)
        codes = _codes(values, numeric=isinstance(item, NumericAttribute))
        if not isinstance(item, TextAttribute):
            found.append(
                _measure(item.name, "value", codes, truth=truth, folds=mine, present=~masks[item.name], chance=chance)
            )
        absent = masks[item.name].astype(int)
        found.append(_measure(item.name, "missing", absent, truth=truth, folds=mine, present=None, chance=chance))
    for name, members in _blocks(masks, data_set).items():
        together = np.logical_and.reduce([masks[member] for member in members])
        codes = together.astype(int)
        found.append(_measure(name, "block missing", codes, truth=truth, folds=mine, present=None, chance=chance))
    return sorted(found, key=lambda item: (-item.cramers_v, item.what, item.kind))


def _blocks(masks: Mapping[str, NDArray[np.bool_]], data_set: DataSetConfig) -> dict[str, tuple[str, ...]]:
    """The declared blocks, and attributes that are missing in exactly the same exams though nobody said so."""
    blocks = {block.name: block.attributes for block in data_set.blocks}
    declared = data_set.block_attributes
    alike: dict[bytes, list[str]] = defaultdict(list)
    for name, mask in masks.items():
        if name not in declared and 0.01 < mask.sum() / max(1, len(mask)) < 0.99:
            alike[mask.tobytes()].append(name)
    for members in alike.values():
        if len(members) > 1:
            blocks[f"undeclared block: {', '.join(members)}"] = tuple(members)
    return blocks


def _codes(values: Sequence[str | None], *, numeric: bool) -> NDArray[np.int64]:
    present = [value for value in values if value is not None]
    if numeric and present:
        edges = np.unique(np.quantile([float(value) for value in present], np.arange(1, 10) / 10))
        return np.array([-1 if value is None else int(np.searchsorted(edges, float(value))) for value in values])
    order = {value: code for code, value in enumerate(sorted(set(present)))}
    return np.array([-1 if value is None else order[value] for value in values], dtype=np.int64)


def _measure(
    what: str,
    kind: Kind,
    codes: NDArray[np.int64],
    *,
    truth: NDArray[Any],
    folds: NDArray[np.int32],
    present: NDArray[np.bool_] | None,
    chance: float,
) -> Association:
    missing = 0.0 if present is None else float(1 - present.mean()) if len(present) else 0.0
    if kind != "value":
        missing = float(codes.mean()) if len(codes) else 0.0
    if present is not None:
        codes, truth, folds = codes[present], truth[present], folds[present]
    return Association(
        what=what,
        kind=kind,
        num_exams=len(codes),
        share_missing=missing,
        cramers_v=cramers_v(codes, truth),
        balanced_accuracy=_guessing(codes, truth, folds, chance),
        chance=chance,
    )


def cramers_v(codes: NDArray[Any], truth: NDArray[Any]) -> float:
    """Bias-corrected Cramer's V of two categorical vectors (Bergsma 2013); 0 where either is constant."""
    if len(codes) < 2:
        return 0.0
    _, rows = np.unique(codes, return_inverse=True)
    _, columns = np.unique(truth, return_inverse=True)
    r, k, n = rows.max() + 1, columns.max() + 1, len(codes)
    if min(r, k) < 2:
        return 0.0
    table = np.zeros((r, k))
    np.add.at(table, (rows, columns), 1)
    expected = table.sum(1, keepdims=True) * table.sum(0, keepdims=True) / n
    phi2 = float(((table - expected) ** 2 / expected).sum() / n)
    corrected = max(0.0, phi2 - (k - 1) * (r - 1) / (n - 1))
    r_, k_ = r - (r - 1) ** 2 / (n - 1), k - (k - 1) ** 2 / (n - 1)
    return float(min(1.0, np.sqrt(corrected / max(min(r_, k_) - 1, 1e-12))))


def _guessing(codes: NDArray[np.int64], truth: NDArray[Any], folds: NDArray[np.int32], chance: float) -> float:
    names, classes = np.unique(truth, return_inverse=True)
    if len(names) < 2 or len(codes) < 2:
        return chance
    guesses = np.zeros(len(codes), dtype=np.int64)
    for fold in np.unique(folds):
        test, train = folds == fold, folds != fold
        if not train.any():
            return chance
        frequency = np.bincount(classes[train], minlength=len(names)).astype(float)
        table: dict[int, NDArray[np.float64]] = {}
        for code in np.unique(codes[train]):
            table[int(code)] = np.bincount(classes[train & (codes == code)], minlength=len(names)).astype(float)
        for position in np.flatnonzero(test):
            counts = table.get(int(codes[position]), frequency)
            guesses[position] = int(np.argmax(counts / np.maximum(frequency, 1)))
    recalls = [float((guesses[classes == index] == index).mean()) for index in range(len(names))]
    return float(np.mean(recalls))


def refuse_planted_leaks(
    rows: Sequence[Mapping[str, str]],
    labels: Sequence[str | None],
    declared: Mapping[str, Sequence[str | None]],
    data_set: DataSetConfig,
    config: LeaksConfig,
) -> None:
    """Stop at an attribute that gives the label away.

    Args:
        declared: the columns that `leaks` names and the table has, a cell an exam.

    Raises:
        PrimaError: naming the attribute, and what it copies.
    """
    for item in data_set.attributes:
        values = [row.get(item.name) for row in rows]
        for leak, raw in declared.items():
            cells = [None if is_missing(cell, data_set.missing) else str(cell).strip().lower() for cell in raw]
            if _same_up_to_recoding(values, cells, config.recoding_agreement):
                raise PrimaError(
                    f"attribute {item.name!r} says the same as the column {leak!r}, which `leaks` says gives the label "
                    "away",
                    mend="Remove it from data_set.attributes.",
                )
        if item.name in config.accept:
            continue
        mend = "Remove it from data_set.attributes; if it may be known at prediction time, add it to leaks.accept."
        if _is_free_text(item) and (share := _share_naming(values, labels, data_set)) > config.text_share:
            raise PrimaError(
                f"attribute {item.name!r}: the text names the exam's own diagnosis in {share:.1%} of the exams",
                mend=mend,
            )
        if _copies_label(values, labels, config.recoding_agreement):
            raise PrimaError(f"attribute {item.name!r} is a recoded copy of the diagnosis", mend=mend)


def _same_up_to_recoding(first: Sequence[str | None], second: Sequence[str | None], agreement: float) -> bool:
    pairs = [(a, b) for a, b in zip(first, second, strict=True) if a is not None and b is not None]
    if len(pairs) >= _MIN_EXAMS and len({a for a, _ in pairs}) > _MAX_CODES:
        # Too many values to be a recoding, but a date or a number may be copied as it is.
        return sum(_plain(a) == _plain(b) for a, b in pairs) / len(pairs) >= agreement
    return _maps(pairs, agreement) and _maps([(b, a) for a, b in pairs], agreement)


def _plain(text: str) -> str:
    try:
        return f"{float(text):g}"
    except ValueError:
        return text.strip().lower()


def _copies_label(values: Sequence[str | None], labels: Sequence[str | None], agreement: float) -> bool:
    """True where the values say the diagnosis, or the diagnosis fixes the value (as it fixes "malignant: yes")."""
    pairs = [(a, b) for a, b in zip(values, labels, strict=True) if a is not None and b is not None]
    return _maps(pairs, agreement) or _maps([(b, a) for a, b in pairs], agreement)


def _maps(pairs: Sequence[tuple[str, str]], agreement: float) -> bool:
    """True where the first of a pair tells the second, better than always naming the most common one would.

    A pair is judged by the others with the same first: a value that occurs once tells nothing, so that an age in
    years is no recoding in a small data set.
    """
    if len(pairs) < _MIN_EXAMS:
        return False
    by_value: dict[str, Counter[str]] = defaultdict(Counter)
    for first, second in pairs:
        by_value[first][second] += 1
    if not 2 <= len(by_value) <= _MAX_CODES:
        return False
    right = 0
    for counts in by_value.values():
        most, next_most = sorted((0, *counts.values()), reverse=True)[:2]
        right += most if most > max(1, next_most) else 0
    blind = Counter(second for _, second in pairs).most_common(1)[0][1] / len(pairs)
    return right / len(pairs) >= agreement and blind < agreement - 0.02


def _is_free_text(item: AttributeConfig) -> bool:
    return isinstance(item, TextAttribute) or (isinstance(item, CategoricalAttribute) and not item.values)


def _share_naming(values: Sequence[str | None], labels: Sequence[str | None], data_set: DataSetConfig) -> float:
    """Share of the labelled exams with a text whose text names their own diagnosis."""
    patterns = {item.name: _naming(item) for item in data_set.classes}
    texts = [
        (text, label) for text, label in zip(values, labels, strict=True) if text is not None and label is not None
    ]
    return sum(bool(patterns[label].search(_folded(text))) for text, label in texts) / len(texts) if texts else 0.0


def _naming(item: ClassConfig) -> re.Pattern[str]:
    """Finds a class's name, phrase or synonyms in a folded text: "mel" in "case_mel_7", not in "caramel"."""
    spellings = filter(str.strip, map(_folded, (item.name, item.phrase, *item.synonyms)))
    return re.compile("|".join(map(_spelling, spellings)))


def _spelling(text: str) -> str:
    """The pattern of one spelling: words may be inflected, and joined by anything but letters, or by nothing."""
    # Letters end where a digit or underscore begins; of T1, the 1 must not go on as 10.
    before, after = (r"[^\W\d_]" if mark.isalpha() else r"[^\W_]" for mark in (text[0], text[-1]))
    words = [word for word in re.split(r"[\s_-]+(?=[^\W_])", text) if word]
    return rf"(?<!{before})" + r"[\W_]*".join(map(_inflected, words)) + rf"(?!{after})"


def _inflected(word: str) -> str:
    # Short words are abbreviations, which have no Latin plurals.
    for ending, pattern in _INFLECTIONS if len(word) > 4 else ():
        if word.endswith(ending):
            return re.escape(word.removesuffix(ending)) + pattern
    return re.escape(word) + "s?"


def _folded(text: str) -> str:
    """The text without case, accents, wide forms, and the characters that do not show: a zero-width space, say."""
    return "".join(
        mark
        for mark in unicodedata.normalize("NFKD", text).casefold()
        if mark.isspace() or unicodedata.category(mark) not in ("Mn", "Cf", "Cc")
    ).strip()


def naming_texts(
    rows: Sequence[Mapping[str, str]], labels: Sequence[str | None], data_set: DataSetConfig
) -> dict[str, float]:
    """Free-text attributes that name some exam's own diagnosis -> the share of labelled texts that do."""
    shares = {
        item.name: _share_naming([row.get(item.name) for row in rows], labels, data_set)
        for item in data_set.attributes
        if _is_free_text(item)
    }
    return {name: share for name, share in shares.items() if share}


def report(found: Sequence[Association], naming: Mapping[str, float]) -> dict[str, Any]:
    """What leaks.json holds: every association, and the texts that name the diagnosis."""
    return {"associations": [asdict(item) for item in found], "texts_naming_the_diagnosis": dict(naming)}


def warnings(
    found: Sequence[Association], naming: Mapping[str, float], data_set: DataSetConfig, config: LeaksConfig
) -> list[str]:
    """What a user should read: values that tell the label, and missingness, a block's once for all its attributes."""
    values = [
        f"{item.what}: its value tells the diagnosis (Cramer's V {item.cramers_v:.2f}, balanced accuracy "
        f"{item.balanced_accuracy:.2f} against {item.chance:.2f} by chance)"
        for item in found
        if item.kind == "value" and item.cramers_v >= config.warn_value and item.what not in config.accept
    ]
    strong = [item for item in found if item.kind != "value" and item.cramers_v >= config.warn_missing]
    told = {item.what for item in strong if item.kind == "block missing"}
    covered = {name for block in data_set.blocks if block.name in told for name in block.attributes}
    texts = [
        f"{name}: the text names the exam's own diagnosis in {share:.1%} of the exams" for name, share in naming.items()
    ]
    return [*texts, *values] + [
        f"{'block ' if item.kind == 'block missing' else ''}{item.what}: being missing tells the diagnosis "
        f"(Cramer's V {item.cramers_v:.2f}, balanced accuracy {item.balanced_accuracy:.2f} against {item.chance:.2f} "
        f"by chance; missing in {item.share_missing:.0%})"
        for item in strong
        if item.kind == "block missing" or item.what not in covered
    ]
