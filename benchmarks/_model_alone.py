"""A model that answers batches and does nothing else: what batching can give at most. Processes of their own.

python benchmarks/_model_alone.py RUN BODY.json --torch-threads 1 --batch 16 --seconds 5
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import subprocess
import sys
import time
from pathlib import Path


def exams_per_second(
    run: str, body: Path, *, processes: int, torch_threads: int, batch: int, seconds: float
) -> dict[str, float]:
    """Of so many processes together, all of which have loaded and answered before the first begins to count."""
    command = [
        sys.executable, __file__, run, str(body), "--torch-threads", str(torch_threads), "--batch", str(batch),
        "--seconds", str(seconds),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        for _ in range(processes)
    ]
    for process in started:
        if process.stdout is None or process.stdout.readline() != "ready\n":
            raise SystemExit("a model does not load")
    for process in started:
        if process.stdin is not None:
            process.stdin.write("go\n")
            process.stdin.flush()
    return {"exams/s": sum(float(process.communicate()[0]) for process in started)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run")
    parser.add_argument("body", type=Path)
    parser.add_argument("--torch-threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=5.0)
    given = parser.parse_args()
    import torch

    from prima_ray.inference.predictor import Exam
    from prima_ray.serving.engine import Question
    from prima_ray.serving.model import Model

    torch.set_num_threads(given.torch_threads)
    asked = json.loads(given.body.read_text())
    exam = Exam(tuple(map(base64.b64decode, asked["images"])), asked["attributes"])
    model, questions = Model(given.run), [Question(exam)] * given.batch
    for _ in range(5):
        model.answer(questions)
    print("ready", flush=True)
    sys.stdin.readline()
    count, began = 0, time.perf_counter()
    while time.perf_counter() - began < given.seconds:
        model.answer(questions)
        count += given.batch
    print(count / (time.perf_counter() - began))


if __name__ == "__main__":
    main()
