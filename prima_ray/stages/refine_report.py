"""What refining was worth: the encoder as it was beside the refined one, on texts, risk terms and exams."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prima_ray.base import PrimaError, StrictConfig
from prima_ray.config import load_config
from prima_ray.data.batch import ImageTextBatch
from prima_ray.data.fetched import local_copy
from prima_ray.data.metadata import MetadataTextConfig, describe
from prima_ray.data.plan import ExamIndex, plan_epoch
from prima_ray.data.reader import Rows
from prima_ray.data.text_shards import TEXT
from prima_ray.evaluation.baselines import has_blocks, mask_blocks
from prima_ray.evaluation.linear_probe import check_folds, probe, probe_figures
from prima_ray.knowledge.corpus import read_corpus
from prima_ray.knowledge.factors import VocabularyConfig
from prima_ray.knowledge.mentions import Span, Terms
from prima_ray.knowledge.risk_terms import places, risk_terms
from prima_ray.models.masked_lm import MaskedLM
from prima_ray.models.text_tower import TextTower, TextTowerConfig
from prima_ray.models.tokenizer import TextTokenizer
from prima_ray.training.contexts import LocalContext
from prima_ray.training.tasks.refine import RefineTask

MASKS = 4
"""Every held-out text is masked so many times, otherwise than for the early stop."""
_log = logging.getLogger(__name__)


class ProbeConfig(StrictConfig):
    """A logistic regression from the pooled text of an exam to its diagnosis, every fold predicted by the others."""

    split: Literal["patient", "lesion"] = "patient"
    text: MetadataTextConfig = MetadataTextConfig()


@dataclass(frozen=True)
class ReportInputs:
    """What both models are asked."""

    task: RefineTask
    tower: TextTowerConfig
    index: ExamIndex
    """Of the texts."""
    rows: Rows
    """The held-out ones."""
    terms: Terms
    shards: str | None
    probe: ProbeConfig
    context: LocalContext
    batch_size: int


def report(before: MaskedLM, after: MaskedLM, inputs: ReportInputs) -> dict[str, Any]:
    """Figures by what is asked, each `before` and `after`."""
    items = term_items(inputs)
    found: dict[str, dict[str, Any]] = {"held_out": {}, "risk_terms": {}, "probe": {}}
    for moment, model in (("before", before), ("after", after)):
        model.eval().to(inputs.context.device)
        with torch.no_grad():
            found["held_out"][moment] = _held_out(model, inputs)
            found["risk_terms"][moment] = _terms(model, items, inputs)
            found["probe"][moment] = _probe(model, inputs)
        model.cpu()
    return {name: figures for name, figures in found.items() if figures["after"]}


def _held_out(model: MaskedLM, inputs: ReportInputs) -> dict[str, float]:
    plan = plan_epoch(inputs.rows, global_batch=inputs.batch_size, seed=0, epoch=0, shuffle=False)
    # The early stop saw the masks of epoch 0, and chose by them.
    steps = [(draw, plan) for draw in range(1, MASKS + 1)]
    outputs: dict[str, list[Tensor]] = {}
    with closing(inputs.context.batches(inputs.index.shards, steps, inputs.task.stream(train=False))) as batches:
        for batch in batches:
            for name, value in model(batch.to(inputs.context.device)).items():
                outputs.setdefault(name, []).append(value.cpu())
    whole = {name: torch.cat(values) for name, values in outputs.items()}
    return {**inputs.task.metrics(whole), "num_tokens": int(whole["num_masked"].sum())}


@dataclass(frozen=True)
class TermItem:
    """A text in which one risk term is to be guessed, in all its places."""

    text: str
    spans: tuple[Span, ...]


def read_terms(corpus: str, factors: str | None) -> Terms:
    """The risk terms of a corpus and, where it is given, of the YAML that declared its factors.

    Raises:
        PrimaError: one of them is damaged.
    """
    read = read_corpus(local_copy(corpus))
    declared = load_config(VocabularyConfig, factors) if factors else None
    return risk_terms(read.factors, read.diagnoses, declared)


def term_items(inputs: ReportInputs) -> list[TermItem]:
    """Every risk term of every held-out text."""
    texts = [row[TEXT] for row in inputs.index.attribute_rows(inputs.rows)]
    return [TermItem(text, spans) for text in texts for spans in places(text, inputs.terms)]


def _terms(model: MaskedLM, items: Sequence[TermItem], inputs: ReportInputs) -> dict[str, float]:
    losses, right, whole = [], [], []
    for batch in term_batches(items, inputs.task.tokenizer, inputs.batch_size):
        moved = batch.to(inputs.context.device)
        loss, hits = (value.cpu() for value in model.guess(moved))
        if batch.token_labels is None:
            raise AssertionError
        owners = torch.nonzero(batch.token_labels >= 0)[:, 0]
        losses.append(loss)
        right.append(hits)
        whole += [bool(hits[owners == row].all()) for row in sorted(set(owners.tolist()))]
    if not whole:
        return {}
    guessed = torch.cat(right)
    return {
        "loss": float(torch.cat(losses).double().mean()),
        "accuracy": float(guessed.double().mean()),
        "whole_terms": float(np.mean(whole)),
        "num_terms": len(whole),
        "num_tokens": len(guessed),
    }


def term_batches(items: Sequence[TermItem], tokenizer: TextTokenizer, size: int) -> Iterator[ImageTextBatch]:
    """Tokens of the items with every token of the term masked, whole; what the tokenizer cuts off is left out."""
    mask_id = tokenizer.loaded.mask_token_id
    for start in range(0, len(items), size):
        some = items[start : start + size]
        ids, attention, real = tokenizer([item.text for item in some])
        offsets = tokenizer.loaded(
            [item.text for item in some],
            padding=True,
            padding_side="right",
            truncation=True,
            max_length=tokenizer.max_tokens,
            return_offsets_mapping=True,
            return_tensors="pt",
        )["offset_mapping"]
        masked = torch.zeros_like(real)
        for row, item in enumerate(some):
            for first, last in item.spans:
                masked[row] |= real[row] & (offsets[row, :, 0] < last) & (offsets[row, :, 1] > first)
        yield ImageTextBatch(
            exam_ids=tuple(str(start + row) for row in range(len(some))),
            weights=torch.ones(len(some)),
            labels=torch.full((len(some),), -1),
            input_ids=torch.where(masked, mask_id, ids),
            attention_mask=attention,
            token_mask=real,
            token_labels=torch.where(masked, ids, -1),
        )


def check_probe(shards: str, config: ProbeConfig) -> None:
    """See that a probe can be had of these exams, before anything trains.

    Raises:
        PrimaError: no finished shards, or labels and folds that no probe can be trained on.
    """
    index = ExamIndex.read(shards)
    rows = _probe_rows(index, config)
    try:
        check_folds(index.labels[rows], index.folds(config.split)[rows])
    except ValueError as error:
        raise PrimaError(f"no linear probe can be had: {error}", where=shards) from None


def _probe_rows(index: ExamIndex, config: ProbeConfig) -> Rows:
    return np.flatnonzero((index.labels >= 0) & (index.folds(config.split) >= 0))


def _probe(model: MaskedLM, inputs: ReportInputs) -> dict[str, Any]:
    """On all exams, on those with complete metadata, and with the blocks that go missing together masked for all."""
    if inputs.shards is None:
        return {}
    index = ExamIndex.read(inputs.shards)
    rows = _probe_rows(index, inputs.probe)
    folds = index.folds(inputs.probe.split)[rows]
    labels, data_set = index.labels[rows], index.manifest.data_set
    attributes = index.attribute_rows(rows)
    tower = TextTower(inputs.tower, model.encoder, pooling=inputs.tower.resolve_pooling())

    def predict(known: Sequence[Mapping[str, str]]) -> NDArray[np.int64]:
        texts = [describe(row, data_set, inputs.probe.text) for row in known]
        return probe(_embed(tower, texts, inputs), labels, folds)

    predicted = predict(attributes)
    found = {"all": probe_figures(predicted, labels, folds)}
    if data_set.blocks:
        kept = has_blocks(attributes, data_set)
        if kept.any():
            found["complete"] = probe_figures(predicted[kept], labels[kept], folds[kept])
        found["masked"] = probe_figures(predict(mask_blocks(attributes, data_set)), labels, folds)
    return found


def _embed(tower: TextTower, texts: Sequence[str], inputs: ReportInputs) -> NDArray[np.float32]:
    """Pooled features (N, T); an exam's text that others share is read once."""
    unique = sorted(set(texts), key=lambda text: (len(text), text))
    features: dict[str, NDArray[np.float32]] = {}
    for start in range(0, len(unique), inputs.batch_size):
        some = unique[start : start + inputs.batch_size]
        ids, attention, _ = inputs.task.tokenizer(some)
        pooled, _ = tower(ids.to(inputs.context.device), attention.to(inputs.context.device))
        features.update(zip(some, pooled.float().cpu().numpy(), strict=True))
    return np.stack([features[text] for text in texts])


def log_table(figures: Mapping[str, Mapping[str, Any]]) -> None:
    """The report on one screen."""
    lines = [f"{'':44}{'before':>14}{'after':>14}"]
    for title, path, percent in _lines(figures):
        cells = [_cell(_look_up(figures[path[0]][moment], path[1:]), percent) for moment in ("before", "after")]
        lines.append(f"{title:44}{cells[0]:>14}{cells[1]:>14}")
    _log.info("%s", "\n".join(lines))
    held_out = figures["held_out"]
    if held_out["after"]["loss"] >= held_out["before"]["loss"]:
        _log.warning("warning: the held-out loss did not fall: the encoder as it was is no worse than the refined one")


def _lines(figures: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, tuple[str, ...], bool]]:
    yield "held-out loss", ("held_out", "loss"), False
    yield "held-out accuracy", ("held_out", "accuracy"), True
    if "risk_terms" in figures:
        count = figures["risk_terms"]["after"]["num_terms"]
        yield f"risk terms, tokens ({count} terms)", ("risk_terms", "accuracy"), True
        yield "risk terms, whole", ("risk_terms", "whole_terms"), True
    for name in figures.get("probe", {}).get("after", {}):
        yield f"probe, {name} exams: balanced accuracy", ("probe", name, "balanced_accuracy"), True
        yield f"probe, {name} exams: macro F1", ("probe", name, "macro_f1"), True


def _look_up(figures: Any, path: Sequence[str]) -> Any:
    for key in path:
        figures = figures[key]
    return figures


def _cell(value: Any, percent: bool) -> str:
    if isinstance(value, Mapping):
        spread = "" if value["sd"] is None else f" ({100 * value['sd']:.1f})"
        return f"{100 * value['mean']:.1f}{spread}"
    return f"{100 * value:.1f}%" if percent else f"{value:.4f}"
