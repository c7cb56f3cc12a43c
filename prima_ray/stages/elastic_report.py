"""The report of an elastic experiment: what its two runs left, compared, as figures and as a page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from prima_ray.base import write_atomic, write_json
from prima_ray.evaluation import elastic as measure
from prima_ray.evaluation.elastic_plots import loss_plot, pause_plot, timeline_plot
from prima_ray.evaluation.report import render_page
from prima_ray.stages.elastic_answers import ANSWERS
from prima_ray.stages.elastic_drive import read_lines
from prima_ray.stages.rundir import versions
from prima_ray.training.tracking import REPLAYED

REPORT = "report.html"


def write_report(
    out: Path,
    *,
    stage: str,
    happened: Sequence[Mapping[str, Any]],
    answer_difference: float,
    tolerance: float,
    global_batch: int,
    facts: Mapping[str, str],
) -> dict[str, Any]:
    """Write `events.jsonl`, `metrics.json` and `report.html` into ``out``; returns the metrics.

    Args:
        answer_difference: of what the two models say, see `elastic_answers`.
    """
    steps, fixed = read_lines(out / "elastic" / "steps.jsonl"), read_lines(out / "fixed" / "steps.jsonl")
    replayed, starts = read_lines(out / "elastic" / REPLAYED), read_lines(out / "elastic" / "starts.jsonl")
    pauses = measure.find_pauses(steps, replayed, starts)
    coverage = measure.find_coverage(steps, fixed)
    metrics = {
        "stage": "elastic",
        "num_steps": len(steps),
        "largest_loss_difference": measure.largest_difference(steps, fixed),
        "loss_tolerance": tolerance,
        "same_batches": measure.same_batches(steps, fixed),
        "exams_lost": sum(row.lost for row in coverage),
        "exams_doubled": sum(row.doubled for row in coverage),
        "steps_replayed": sum(start["replayed_steps"] for start in starts),
        "goodput": measure.goodput(steps, replayed, pauses),
        "largest_answer_difference": answer_difference,
        "answer": ANSWERS[stage],
        "pauses": [asdict(pause) for pause in pauses],
        "engine": starts[0]["engine"],
        "world_sizes": [start["engine"]["world_size"] for start in starts],
    }
    rows = _event_rows(happened, pauses)
    write_atomic(out / "events.jsonl", "".join(json.dumps(item) + "\n" for item in happened))
    write_json(out / "metrics.json", {**metrics, "events": rows})
    names = {event["start"]: event["event"].replace("_", " ") for event in happened}
    pictures = {
        "Workers, speed and loss over time. Pauses are grey, steps lost with their workers red.": timeline_plot(
            steps, replayed, pauses, happened, global_batch=global_batch
        ),
        "The loss of both runs, and how far they are apart; the line is the tolerance.": loss_plot(
            steps, fixed, measure.relative_differences(steps, fixed), tolerance=tolerance
        ),
    }
    if pauses:
        labels = [names.get(pause.start, "again") for pause in pauses]
        pictures["What the seconds of each pause went to."] = pause_plot(pauses, labels)
    page = render_page(
        "elastic.html.j2",
        pictures,
        title=f"Elastic {stage}",
        subtitle=f"{len(steps)} steps, {len(happened)} events",
        verdict=_verdict(metrics),
        events=rows,
        coverage=coverage,
        facts={**facts, **{name: versions()[name] for name in ("prima_ray", "ray", "torch") if name in versions()}},
        commands=[f"prima elastic {out / 'config.yaml'} --set out=ANOTHER"],
    )
    write_atomic(out / REPORT, page)
    return metrics


def _verdict(metrics: Mapping[str, Any]) -> list[str]:
    difference, tolerance = metrics["largest_loss_difference"], metrics["loss_tolerance"]
    word = "the same training" if difference <= tolerance else "NOT the same training"
    return [
        f"{word[0].upper()}{word[1:]}: the loss curves differ by at most {difference:.1e} (tolerance {tolerance:.0e}).",
        f"Exams lost: {metrics['exams_lost']}; doubled: {metrics['exams_doubled']}; steps replayed: "
        f"{metrics['steps_replayed']} of {metrics['num_steps']}; goodput {100 * metrics['goodput']:.0f} %.",
        f"{metrics['answer']} of the two trained models differ by at most {metrics['largest_answer_difference']:.1e}.",
    ]


def _event_rows(happened: Sequence[Mapping[str, Any]], pauses: Sequence[measure.Pause]) -> list[dict[str, Any]]:
    """An event a row; a start that no event led to, such as a second one after a loss, a row of its own."""
    by_start = {event["start"]: event for event in happened}
    rows = []
    for pause in pauses:
        event = by_start.get(pause.start)
        rows.append(
            {
                "event": event["event"].replace("_", " ") if event else "another start",
                "at_step": event["step"] if event else "",
                "workers": pause.world_size,
                "from_step": pause.from_step,
                "replayed": pause.replayed,
                "pause": round(pause.seconds, 1),
            }
        )
    return rows
