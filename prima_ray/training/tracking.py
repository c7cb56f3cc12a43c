"""Where a run's figures go: steps.jsonl, TensorBoard event files, and MLflow where asked for. Rank 0 only."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from prima_ray.base import PrimaError, write_atomic
from prima_ray.training.config import TrackingConfig

REPLAYED = "replayed.jsonl"
"""Steps that were lost with their workers and taken again, as they were written the first time."""
_MLFLOW_PARAM_CHARS = 500
_MLFLOW_PARAMS_A_CALL = 100
_MLFLOW_METRICS_A_CALL = 1000
"""What every MLflow server takes."""
_MLFLOW_EVERY_S = 10.0
_BOARD_EVERY_S = 2.0


class Tracker:
    """Writes step and validation figures of one run; a context manager."""

    def __init__(self, run: Path, config: TrackingConfig, *, params: Mapping[str, Any], resume_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._steps_path = run / "steps.jsonl"
        self.num_replayed = _truncate(self._steps_path, resume_step)
        self._steps = self._steps_path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(run / "tensorboard"), purge_step=resume_step + 1)
        self._waiting: list[tuple[str, float, int, float]] = []
        self._written = time.monotonic()
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

    def flush(self) -> None:
        """Bring out what waits: with a checkpoint, so that a resumed run lacks nothing of before."""
        self._write_board()
        self._board.flush()
        if self._mlflow:
            self._mlflow.flush()

    def _write(self, prefix: str, numbers: Mapping[str, float], step: int) -> None:
        now = time.time()
        self._waiting += [(f"{prefix}/{name}", value, step, now) for name, value in numbers.items()]
        # Every figure wakes TensorBoard's thread, which then competes with the step for the interpreter.
        if time.monotonic() - self._written > _BOARD_EVERY_S:
            self._write_board()
        if self._mlflow:
            self._mlflow.log({f"{prefix}/{name}": value for name, value in numbers.items()}, step)

    def _write_board(self) -> None:
        for tag, value, step, moment in self._waiting:
            self._board.add_scalar(tag, value, step, walltime=moment)
        self._waiting, self._written = [], time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._steps.close()
        self._write_board()
        self._board.close()
        if self._mlflow:
            self._mlflow.close(failed=error is not None)


def _truncate(path: Path, resume_step: int) -> int:
    """Move the lines of steps that the resumed run takes again to `replayed.jsonl`; returns how many there were."""
    if not path.exists():
        return 0
    kept, replayed, dropped = [], [], 0
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            wanted = json.loads(line)["step"] <= resume_step
        except (json.JSONDecodeError, KeyError, TypeError):
            # A kill in the middle of a write leaves half a line at the end.
            dropped += 1
            continue
        if wanted:
            kept.append(line)
        else:
            replayed.append(line)
            dropped += 1
    if replayed:
        with (path.parent / REPLAYED).open("a", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in replayed)
    if dropped:
        write_atomic(path, "".join(f"{line}\n" for line in kept))
    return dropped


def absolute_uri(uri: str) -> str:
    """An MLflow store's address that means the same in a worker, which has a working directory of its own."""
    scheme, found, path = uri.partition("://")
    if not found:
        return uri if uri.startswith(("databricks", "file:")) else str(Path(uri).resolve())
    if scheme == "sqlite" and path.startswith("/") and not path.startswith("//"):
        return f"sqlite:///{Path(path[1:]).resolve()}"
    return uri


class _MlflowRun:
    """One MLflow run; its id is kept beside the run so that a resumed one goes on in it."""

    def __init__(self, run: Path, config: TrackingConfig, params: Mapping[str, Any]) -> None:
        try:
            from mlflow import MlflowClient
            from mlflow.exceptions import MlflowException
        except ImportError:
            raise PrimaError(
                "tracking.mlflow_uri is set, but MLflow is not installed", mend="Install prima-ray[mlflow]."
            ) from None
        if "://" not in str(config.mlflow_uri):
            # MLflow steers people to databases; who names a folder wants a folder.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        # MLflow asks a server that is not there for minutes on end.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
        try:
            self._client = MlflowClient(tracking_uri=config.mlflow_uri)
            self._id = self._open(run, config, params)
        except MlflowException as error:
            raise PrimaError(
                f"MLflow does not take the run ({str(error).splitlines()[0]})",
                where=config.mlflow_uri,
                mend="Check tracking.mlflow_uri, or set it to null.",
            ) from None
        self._waiting: list[Any] = []
        self._sent = time.monotonic()

    def _open(self, run: Path, config: TrackingConfig, params: Mapping[str, Any]) -> str:
        from mlflow.entities import Param

        id_file = run / "mlflow_run_id"
        if id_file.exists():
            known = id_file.read_text().strip()
            self._client.update_run(known, status="RUNNING")
            return known
        experiment = self._client.get_experiment_by_name(config.mlflow_experiment)
        experiment_id = (
            experiment.experiment_id if experiment else self._client.create_experiment(config.mlflow_experiment)
        )
        created: str = self._client.create_run(experiment_id, run_name=run.name).info.run_id
        flat = [Param(key, str(value)[:_MLFLOW_PARAM_CHARS]) for key, value in _flatten(params)]
        for start in range(0, len(flat), _MLFLOW_PARAMS_A_CALL):
            self._client.log_batch(created, params=flat[start : start + _MLFLOW_PARAMS_A_CALL])
        write_atomic(id_file, created)
        return created

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        moment = time.time_ns() // 1_000_000
        self._waiting += [Metric(name, value, moment, step) for name, value in numbers.items()]
        # A call may cross a network, so not one a figure.
        if len(self._waiting) >= _MLFLOW_METRICS_A_CALL or time.monotonic() - self._sent > _MLFLOW_EVERY_S:
            self.flush()

    def flush(self) -> None:
        for start in range(0, len(self._waiting), _MLFLOW_METRICS_A_CALL):
            self._client.log_batch(self._id, metrics=self._waiting[start : start + _MLFLOW_METRICS_A_CALL])
        self._waiting, self._sent = [], time.monotonic()

    def close(self, *, failed: bool) -> None:
        self.flush()
        self._client.set_terminated(self._id, status="FAILED" if failed else "FINISHED")


def _flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _flatten(item, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value
