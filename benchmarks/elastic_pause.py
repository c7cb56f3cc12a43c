"""How long training pauses when workers come and go: Ray Train at its defaults, and as we set it up.

Two `prima elastic` experiments of one schedule, one with `plain_ray: true`. No pairs: an experiment takes minutes, and
each event happens once in either; the phases of a pause tell what the machine's other work does to it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _harness import CONFIGS, WORK, circumstances, find_shards, parse, parser

from prima_ray.base import write_json

SCHEDULE: list[dict[str, Any]] = [
    {"at_step": 5, "event": "add_node"},
    {"at_step": 37, "event": "kill_worker"},
    {"at_step": 58, "event": "remove_node"},
]
"""What a cluster does to a run, once each; the kill comes seven steps after a checkpoint."""

# Smooth, so that the curves can be compared (docs/exactness.md).
TOWER = {
    "name": "vit_tiny_patch16_224",
    "image_size": 32,
    "options": {"patch_size": 4, "embed_dim": 128, "depth": 3, "num_heads": 4},
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run both experiments and write the result file."""
    arguments = parse(parser(__doc__), argv)
    shards, described = find_shards(arguments.shards)
    found = {}
    for name, plain in (("plain", True), ("ours", False)):
        metrics = _experiment(WORK / "elastic" / name, shards, plain=plain, quick=arguments.quick)
        found[name] = {
            key: metrics[key]
            for key in ("events", "pauses", "steps_replayed", "goodput", "largest_loss_difference", "exams_lost")
        }
        print(name, json.dumps(metrics["events"]))
    if not arguments.quick:
        result = {
            "benchmark": "elastic_pause",
            **circumstances("elastic_pause", argv),
            "data": described,
            "schedule": SCHEDULE,
            "results": found,
        }
        write_json(arguments.out / "elastic_pause.json", result)
    return 0


def _experiment(out: Path, shards: str, *, plain: bool, quick: bool) -> dict[str, Any]:
    events = SCHEDULE[:1] if quick else SCHEDULE
    changes = {
        "inputs.shards": shards,
        "inputs.corpus": None,
        "inputs.text_encoder": None,
        "priors.unvetted": False,
        "epochs": 13,
        "max_steps": events[-1]["at_step"] + 20,
        "global_batch": 32,
        "views.image_size": 32,
        "image_tower": TOWER,
        "checkpoint_every_steps": 10,
    }
    settings = {
        "out": str(out),
        "plain_ray": plain,
        "changes": changes,
        "num_workers": [1, 2],
        "start_nodes": 1,
        "schedule": {"kind": "listed", "events": events},
    }
    overrides = [item for key, value in settings.items() for item in ("--set", f"{key}={json.dumps(value)}")]
    config = CONFIGS / "phantoms" / "elastic.yaml"
    subprocess.run([sys.executable, "-m", "prima_ray.cli", "elastic", str(config), *overrides], check=True)
    metrics: dict[str, Any] = json.loads((out / "metrics.json").read_text())
    return metrics


if __name__ == "__main__":
    sys.exit(main())
