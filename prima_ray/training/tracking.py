"""Where a run's figures go: steps.jsonl, TensorBoard event files, and MLflow where asked for. Rank 0 only."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from prima_ray.base import PrimaError
from prima_ray.training.config import TrackingConfig


class Tracker:
    """Writes step and validation figures of one run; a context manager."""

    def __init__(self, run: Path, config: TrackingConfig, *, params: Mapping[str, Any], resume_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._steps_path = run / "steps.jsonl"
        self.num_replayed = _truncate(self._steps_path, resume_step)
        self._steps = self._steps_path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(run / "tensorboard"), purge_step=resume_step + 1)
        self._mlflow = _MlflowRun(run, config, params) if config.mlflow_uri else None

    def step(self, record: Mapping[str, Any]) -> None:
        """One optimizer step; ``record`` holds at least `step` and `loss`."""
        self._steps.write(json.dumps(record) + "\n")
        self._steps.flush()
        numbers = {key: value for key, value in record.items() if isinstance(value, float)}
        self._write("train", numbers, int(record["step"]))

    def validation(self, metrics: Mapping[str, float], step: int) -> None:
        """The figures of one validation."""
        self._write("val", metrics, step)
        self._board.flush()

    def _write(self, prefix: str, numbers: Mapping[str, float], step: int) -> None:
        for name, value in numbers.items():
            self._board.add_scalar(f"{prefix}/{name}", value, step)
        if self._mlflow:
            self._mlflow.log({f"{prefix}/{name}": value for name, value in numbers.items()}, step)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._steps.close()
        self._board.close()
        if self._mlflow:
            self._mlflow.close(failed=error is not None)


def _truncate(path: Path, resume_step: int) -> int:
    """Drop the lines of steps that the resumed run takes again; returns how many there were."""
    if not path.exists():
        return 0
    kept, dropped = [], 0
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            step = json.loads(line)["step"]
        except (json.JSONDecodeError, KeyError):
            # A kill in the middle of a write leaves half a line at the end.
            dropped += 1
            continue
        if step <= resume_step:
            kept.append(line)
        else:
            dropped += 1
    path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    return dropped


class _MlflowRun:
    """One MLflow run; its id is kept beside the run so that a resumed one goes on in it."""

    def __init__(self, run: Path, config: TrackingConfig, params: Mapping[str, Any]) -> None:
        try:
            from mlflow import MlflowClient
        except ImportError:
            raise PrimaError(
                "tracking.mlflow_uri is set, but MLflow is not installed", mend="Install prima-ray[mlflow]."
            ) from None
        self._client = MlflowClient(tracking_uri=config.mlflow_uri)
        id_file = run / "mlflow_run_id"
        if id_file.exists():
            self._id = id_file.read_text().strip()
            self._client.update_run(self._id, status="RUNNING")
            return
        experiment = self._client.get_experiment_by_name(config.mlflow_experiment)
        experiment_id = (
            experiment.experiment_id if experiment else self._client.create_experiment(config.mlflow_experiment)
        )
        self._id = self._client.create_run(experiment_id, run_name=run.name).info.run_id
        id_file.write_text(self._id)
        for key, value in params.items():
            self._client.log_param(self._id, key, value)

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        for name, value in numbers.items():
            self._client.log_metric(self._id, name, value, step=step)

    def close(self, *, failed: bool) -> None:
        self._client.set_terminated(self._id, status="FAILED" if failed else "FINISHED")
