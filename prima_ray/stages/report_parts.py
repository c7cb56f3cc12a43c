"""Parts of an evaluation's page that need a run beside its figures: examples of answers, and the model card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from prima_ray.data.description import DataSetConfig
from prima_ray.evaluation.metrics import HEADLINE
from prima_ray.evaluation.plots import strip_of
from prima_ray.evaluation.report import Grid, Section, percent
from prima_ray.inference.bundle import read_bundle_config
from prima_ray.stages.explanations import ATTENTION, Example
from prima_ray.stages.scoring import ScoredSet
from prima_ray.stages.tested_run import TestedRun

_TITLES = {"right": "right", "wrong": "wrong, and sure of it", "abstained": "it abstains"}
_MOST = 6
_MOST_SOURCES = 3


def example_section(example: Example, data_set: DataSetConfig) -> Section:
    """One exam, whole: what was seen, what was answered, and why."""
    answer, phrases = example.answer, {item.name: item.phrase for item in data_set.classes}
    ranked = sorted(answer.probabilities.items(), key=lambda item: -item[1])
    facts = {
        "truth": f"{example.truth}, {phrases[example.truth]}",
        "answer": f"{answer.prediction}, {phrases[answer.prediction]}, {answer.confidence:.0%}",
        "probabilities": ", ".join(f"{name} {percent(value)}" for name, value in ranked),
        f"set at {answer.coverage:.0%}": ", ".join(answer.prediction_set),
    }
    if answer.reasons:
        facts["abstains"] = "; ".join(reason.text for reason in answer.reasons)
    facts["read"] = answer.text or "photos alone"
    grids, found = [], answer.explanation
    if found is not None and found.contributions is not None:
        told = [
            (item.attribute.replace("_", " "), item.value, f"{item.log_odds:+.2f}", f"{100 * item.probability:+.1f}")
            for item in found.contributions.items[:_MOST]
        ]
        caption = f"What each attribute did for {answer.prediction}, the largest first: left out by itself"
        grids.append(Grid(["attribute", "value", "log-odds", "points"], told, caption=caption))
    if found is not None:
        for number, item in enumerate(found.evidence[:_MOST], start=1):
            titles = list(dict.fromkeys(source.title for source in item.sources))
            told_of = "; ".join(titles[:_MOST_SOURCES]) + ("; ..." if len(titles) > _MOST_SOURCES else "")
            unvetted = "" if item.vetted else " Nobody has vetted this."
            facts[f"literature {number}"] = f"{item.summary} ({told_of}).{unvetted}"
        facts["notes"] = "; ".join(found.notes)
    return Section(
        title=f"Example, {_TITLES[example.kind]}: {example.truth}",
        note="An exam of the test fold. Literature is on the same facts; the model did not look it up.",
        facts={name: text for name, text in facts.items() if text},
        grids=grids,
        pictures={"From the left: " + ", ".join(example.pictures) + ".": strip_of(list(example.pictures.values()))},
    )


def model_card(run: TestedRun, scored: Sequence[ScoredSet], metrics: Mapping[str, Any]) -> Section:
    """What a stranger should know before using the model (Mitchell et al. 2019, "Model Cards for Model Reporting")."""
    data_set, manifest, whole = run.index.manifest.data_set, run.index.manifest, scored[0]
    figures = [
        f"{title} {percent(item.value)} ({percent(item.low)}-{percent(item.high)})"
        for title, item in zip(HEADLINE.values(), whole.table.rows[run.model].values(), strict=True)
    ]
    tested = f"{whole.table.num_exams} exams of {whole.table.num_patients} patients"
    external, reads = metrics["external"], read_bundle_config(run.path / "model").read_attributes
    facts = {
        "model": f"{run.model}, made by `prima {run.record['stage']}`, finished {run.record['finished_at']}",
        "intended use": f"Research on telling apart {', '.join(item.phrase for item in data_set.classes)}.",
        "not for": "Decisions about a patient's care; diagnoses that are not among these; photos, devices and people "
        "unlike those below. It is no medical device, and nobody has approved it as one.",
        "learned from": f"{len(run.roles.train)} exams of {data_set.title or data_set.name}, content hash "
        f"{manifest.content_hash[:16]}, licence {data_set.license or 'not stated'}"
        if not external
        else f"{data_set.title or data_set.name}, licence {data_set.license or 'not stated'}",
        "tested on": f"{tested} of {external['title']}, another data set"
        if external
        else f"{tested}, none of whom it has seen"
        if not run.shared_patients
        else f"{tested}, of some of whom it has seen other exams",
        "reads": f"photos, and {', '.join(reads)}" if reads else "photos alone",
        "figures": f"{', '.join(figures)}, in %, on all of them",
        "limits": " ".join(_limits(run, metrics, reads)) or "None beyond the warnings above was found.",
    }
    return Section(title="Model card", facts=facts)


def _limits(run: TestedRun, metrics: Mapping[str, Any], reads: Sequence[str]) -> list[str]:
    found = []
    if run.index.manifest.data_set.block_attributes & set(reads):
        found.append(
            "Attributes that go missing together may tell the diagnosis in this data: the table with them masked says "
            "what is left where they do not."
        )
    if any(item["figures"] is None for item in metrics["subgroups"]):
        found.append("Groups of too few exams were not judged, see Subgroups.")
    worse = [
        f"{item['attribute'].replace('_', ' ')}: {item['value']}"
        for item in metrics["subgroups"]
        if item["verdicts"] and item["verdicts"]["accuracy"] == "worse"
    ]
    if worse:
        found.append(f"Less accurate than for the rest: {', '.join(worse)}.")
    if metrics["robustness"]:
        hurt = [
            item["title"]
            for item in metrics["robustness"]["conditions"]
            if item["verdicts"] and item["verdicts"]["accuracy"] == "worse"
        ]
        found += [f"Less accurate with: {', '.join(hurt)}."] if hurt else []
    if metrics["explanations"]:
        shown = metrics["explanations"]["photos"]["methods"].get(ATTENTION)
        if shown and shown["verdict"] == "worse":
            found.append("Its attention maps name what the answer does not rest on.")
        elif shown and shown["verdict"] != "better":
            found.append(
                f"On {shown['num_exams']} exams its attention maps were not shown to name what the answer rests on."
            )
    if run.unvetted:
        found.append("It used entries of a corpus that nobody has vetted.")
    return found
