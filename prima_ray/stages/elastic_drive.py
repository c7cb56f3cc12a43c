"""Drives one training through a schedule: an ordinary `prima <stage>` process, on nodes that come and go under it."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from prima_ray.base import PrimaError
from prima_ray.data.fetched import CHECKPOINTS
from prima_ray.stages.elastic_schedule import EventConfig
from prima_ray.training.checkpoint import latest_step
from prima_ray.training.elastic_cluster import LocalNodes
from prima_ray.training.leaving import PLAIN

_log = logging.getLogger(__name__)
_POLL_S = 0.05


class Drive:
    """One training and what happens to it.

    Args:
        run: the training's run directory, `steps.jsonl` and `starts.jsonl` in it are how it is followed.
        log: where its output goes.
        patience_s: how long it may take to start, to recover from an event, or to take a step.
        plain: Ray Train without our settings.
    """

    def __init__(
        self, nodes: LocalNodes, stage: str, config: Path, *, run: Path, log: Path, patience_s: float, plain: bool
    ) -> None:
        self._nodes, self._run, self._log_path, self._patience_s = nodes, run, log, patience_s
        self._command = [sys.executable, "-m", "prima_ray.cli", stage, str(config)]
        # A job's own variables would bind the training to the cluster of the job.
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_JOB")}
        self._environment = {**inherited, "RAY_ADDRESS": nodes.address, **({PLAIN: "1"} if plain else {})}
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Drive:
        self._submit()
        return self

    def __exit__(self, *error: object) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def follow(self, events: Sequence[EventConfig]) -> list[dict[str, Any]]:
        """Let every event happen when it is due, and the training end; returns what happened.

        Raises:
            PrimaError: the training failed, did not recover, or ended before an event was due.
        """
        self._until(lambda: bool(self._steps()), "its first step")
        happened = []
        for item in events:
            self._until(lambda item=item: self._is_due(item), f"step {item.at_step}")  # type: ignore[misc]
            if self._ended():
                raise PrimaError(
                    f"the training ended before {item.event} at step {item.at_step}",
                    where=self._run,
                    mend="Steps go on while an event takes its time: train longer (`changes.max_steps`).",
                )
            num_starts = len(self._starts())
            record = {"event": item.event, "at_step": item.at_step, "step": self._step(), "time": time.time()}
            _log.info("elastic: step %d: %s", record["step"], item.event.replace("_", " "))
            self._do(item)
            self._until(lambda num_starts=num_starts: self._recovered(num_starts), f"recovery from {item.event}")  # type: ignore[misc]
            happened.append({**record, "start": num_starts})
        self._until(lambda: False, "the end")
        return happened

    def _is_due(self, item: EventConfig) -> bool:
        step = self._step()
        saved = latest_step(self._run / CHECKPOINTS) or 0
        return step >= item.at_step and step - saved >= item.after_checkpoint

    def _do(self, item: EventConfig) -> None:
        if item.event == "add_node":
            self._nodes.add()
        elif item.event == "remove_node":
            self._nodes.remove(self._newest_in_use())
        elif item.event == "kill_worker":
            os.kill(int(self._workers()[-1].split(":")[1]), signal.SIGKILL)
        elif item.event == "drain_node":
            self._drain(item.deadline_s)
        elif item.event == "kill_driver" and self._process is not None:
            self._process.kill()
            self._process.wait()
            self._submit()

    def _drain(self, deadline_s: float) -> None:
        """Give notice, and take the node away when it is over, as a cloud would."""
        number, gone_at = self._newest_in_use(), time.monotonic() + deadline_s
        self._nodes.drain(number, deadline_s=deadline_s)
        while time.monotonic() < gone_at and not self._ended():
            time.sleep(_POLL_S)
        self._nodes.remove(number)

    def _newest_in_use(self) -> int:
        found = [self._nodes.number_of(worker.split(":")[0]) for worker in self._workers()]
        return max(number for number in found if number is not None)

    def _workers(self) -> list[str]:
        workers: list[str] = self._starts()[-1]["workers"]
        return workers

    def _recovered(self, num_starts: int) -> bool:
        starts, steps = self._starts(), self._steps()
        return len(starts) > num_starts and bool(steps) and bool(steps[-1]["time"] > starts[-1]["time"])

    def _step(self) -> int:
        steps = self._steps()
        return int(steps[-1]["step"]) if steps else 0

    def _steps(self) -> list[dict[str, Any]]:
        return read_lines(self._run / "steps.jsonl")

    def _starts(self) -> list[dict[str, Any]]:
        return read_lines(self._run / "starts.jsonl")

    def _submit(self) -> None:
        with self._log_path.open("ab") as log:
            self._process = subprocess.Popen(  # noqa: S603 - our own command line
                self._command, stdout=log, stderr=log, env=self._environment
            )

    def _ended(self) -> bool:
        return self._process is not None and self._process.poll() is not None

    def _until(self, condition: Callable[[], bool], what: str) -> None:
        """Wait for the condition or the training's good end.

        Raises:
            PrimaError: it failed, or took no step for too long.
        """
        step, since = self._step(), time.monotonic()
        while not condition():
            if self._ended() and self._process is not None:
                if self._process.returncode == 0:
                    return
                raise PrimaError(
                    f"the training failed ({self._last_words()})",
                    where=self._log_path,
                    mend="Its log says more.",
                )
            if self._step() != step:
                step, since = self._step(), time.monotonic()
            if time.monotonic() - since > self._patience_s:
                raise PrimaError(
                    f"the training took no step for {self._patience_s:g} s, waiting for {what}",
                    where=self._log_path,
                    mend="Raise patience_s on a busy machine.",
                )
            time.sleep(_POLL_S)

    def _last_words(self) -> str:
        lines = [line for line in self._log_path.read_text(errors="replace").splitlines() if line.startswith("prima: ")]
        return lines[-1].removeprefix("prima: ") if lines else f"exit code {self._process and self._process.returncode}"


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a .jsonl file that may be growing, or not be there yet."""
    if not path.exists():
        return []
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            break  # half a line, being written
    return found
